# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The count of operations against torch's own, which watches every matrix product and convolution."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spear_hf import SpearConfig, SpearForPreTraining
from spear_hf.pretraining.flops import PEAK_BF16, forward_flops, measured_flops, peak_flops


SIZES = {
    "base": (SpearConfig.base(), 998),
    "large": (SpearConfig.large(), 131),
    "25 Hz, narrow": (
        SpearConfig(
            hidden_size=96,
            intermediate_size=128,
            stem_channels=[2, 4, 6],
            num_layers_per_stack=[1, 2, 1],
            downsampling_factors=[1, 4, 2],
            conv_kernel_sizes=[31, 15, 7],
            num_mel_bins=80,
            output_downsampling_factor=2,
        ),
        333,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_forward_flops_are_those_that_torch_counts(name):
    config, frames = SIZES[name]
    with torch.device("meta"):
        model = SpearForPreTraining(config).eval()
        features = torch.zeros(1, frames, config.num_mel_bins)
        counter = FlopCounterMode(display=False)
        with counter:
            hidden_states = model.spear(features).last_hidden_state
            encoder = counter.get_total_flops()
            for head in model.prediction_heads.values():
                head(hidden_states)
    assert forward_flops(config, frames, with_heads=False) == encoder
    assert forward_flops(config, frames) == counter.get_total_flops()


def test_the_peak_is_measured_where_no_data_sheet_is_known():
    rate = measured_flops("cpu", torch.float32, size=256)
    assert 1e8 < rate < 1e14
    assert peak_flops(torch.device("cpu"), bf16=False) == measured_flops("cpu", torch.float32)


def test_the_first_name_that_fits_is_the_most_special():
    names = list(PEAK_BF16)
    for place, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:place]), name


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA A10G", 70e12)],
)
def test_a_card_has_not_the_peak_of_one_of_a_like_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), bf16=True) == peak
