# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SPEAR as an upstream of s3prl: frame counts of all lengths, shapes, batches, gradients, and the hub's entry."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import spear_hf
from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
from spear_hf.evaluation.framing import framed
from spear_hf.evaluation.superb import UpstreamExpert

from .test_hear import SIZES, noise


TOLERANCE = 5  # of s3prl's Featurizer: |frames - round(samples / rate)| < 5; test_s3prl.py has the thing itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    SpearModel(SpearConfig(**SIZES, output_downsampling_factor=2)).save_pretrained(folder)
    SpearFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def upstream(folder):
    return UpstreamExpert(str(folder)).eval()


def test_frames_of_every_length_are_those_that_the_toolkit_expects(upstream):
    """All residues of the frame's length and all seconds, by arithmetic that the next test ties to the model."""
    rate = upstream.get_downsample_rates("hidden_states")
    extractor = upstream.feature_extractor
    lengths = {1600 + residue for residue in range(0, 960)} | {second * 16000 + 37 for second in range(1, 35)}
    for samples in sorted({*lengths, 35 * 16000}):
        expected = (samples - 1) // rate + 1  # S3PRLUpstream's
        extended = framed(torch.zeros(samples), expected, 160)
        assert (extractor.num_frames(len(extended)) - 7) // 2 == expected
        assert 0 <= expected - round(samples / rate) <= 1 < TOLERANCE


@pytest.mark.parametrize("samples", [1600, 1601, 1759, 1761, 4000, 16000, 35 * 16000])
@torch.no_grad()
def test_shapes(upstream, samples):
    features = upstream([noise(1, samples)[0]])
    states = features["hidden_states"]
    assert isinstance(states, list)
    assert len(states) == 3
    assert {state.shape for state in states} == {(1, math.ceil(samples / 320), 16)}
    assert abs(states[0].shape[1] - round(samples / upstream.get_downsample_rates("hidden_states"))) < TOLERANCE
    assert torch.equal(features["last_hidden_state"], states[-1])
    assert torch.equal(features["hidden_state_1"], states[1])


@torch.no_grad()
def test_a_batch_of_unlike_lengths(upstream):
    wavs = [noise(1, samples, seed)[0] for seed, samples in enumerate((1600, 16010, 7000))]
    together = upstream(wavs)["hidden_states"]
    assert {state.shape for state in together} == {(3, 51, 16)}
    for row, wav in enumerate(wavs):
        alone = upstream([wav])["hidden_states"]
        frames = alone[0].shape[1]
        for one, other in zip(alone, together):
            assert torch.allclose(one[0], other[row, :frames], atol=1e-5)
            assert not other[row, frames:].any()


def test_gradients_reach_the_encoder(folder):
    upstream = UpstreamExpert(str(folder)).train()
    upstream([noise(1, 3200)[0]])["hidden_states"][-1].sum().backward()
    assert upstream.model.stem.conv1.weight.grad.abs().sum() > 0


def test_hub_entry(folder, upstream):
    entry = Path(spear_hf.__file__).parent / "evaluation" / "superb_hub"
    # As s3prl's runner calls it.
    loaded = torch.hub.load(str(entry), "spear", ckpt=str(folder), model_config=None, refresh=False, source="local")
    wav = noise(1, 4000)[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()([wav])["hidden_states"][1], upstream([wav])["hidden_states"][1])


def test_wrong_arguments(folder, upstream):
    # As torchaudio.load gives it, of which a single frame was made; and what is no tensor.
    for wav in (torch.zeros(1, 16000), np.zeros(16000), [0.0] * 16000):
        with pytest.raises(ValueError, match=r"tensors \(samples,\) are needed"):
            upstream([wav])
    with pytest.raises(ValueError, match="ckpt is not set"):
        UpstreamExpert()
    with pytest.raises(ValueError, match="model_config"):
        UpstreamExpert(str(folder), "config.yaml")
