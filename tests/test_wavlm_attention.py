# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""WavLM through torch's fused attention against WavLM as transformers runs it."""

import copy

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

from spear_hf.mvq.wavlm_attention import fuse_wavlm_attention


def tiny_wavlm(**settings):
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(16, 20),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_buckets=32,
        max_bucket_distance=64,
        **settings,
    )
    model = WavLMModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_attn_embed" in name or "gru_rel_pos" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(stable, masked):
    model = tiny_wavlm(do_stable_layer_norm=stable, feat_extract_norm="layer")
    fused = copy.deepcopy(model)
    fuse_wavlm_attention(fused)
    waveforms = torch.randn(3, 16000)
    lengths = torch.tensor([16000, 9000, 4000])
    mask = (torch.arange(16000) < lengths[:, None]).long() if masked else None
    expected = model(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
    found = fused(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
    frames = model._get_feat_extract_output_lengths(lengths) if masked else [len(expected[0][0])] * 3
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected):
        for row, count in enumerate(frames):  # of padding, either says what it likes
            torch.testing.assert_close(one[row, :count], other[row, :count], atol=1e-5, rtol=0)
    plain = tiny_wavlm(do_stable_layer_norm=stable, feat_extract_norm="layer")
    for module in plain.modules():
        if hasattr(module, "gru_rel_pos_const"):
            module.gru_rel_pos_const.fill_(0.0)
    without = plain(waveforms, attention_mask=mask).last_hidden_state
    assert not torch.allclose(without[0], expected[-1][0], atol=1e-3), "the gate is seen by this test"
