# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""WavLM's kernels: through Triton's interpreter here, and on a GPU against the plain way where there is one."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

from spear_hf.mvq.wavlm_attention import fuse_wavlm_attention, kernels_for
from spear_hf.mvq.wavlm_convolutions import fuse_wavlm_convolutions


pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
ROOT = Path(__file__).resolve().parent.parent


def test_kernels_compute_what_plain_operations_do():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.wavlm_kernels_on_cpu"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    errors = json.loads(result.stdout.splitlines()[-1])
    assert len(errors) > 25
    assert not {case: error for case, error in errors.items() if not error < 3e-3}, "float16 has 11 bits"


def test_elsewhere_nothing_changes():
    assert kernels_for(torch.zeros(1, dtype=torch.bfloat16)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_hidden_states_on_a_gpu(dtype):
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    model = WavLMModel(config).eval().cuda()
    for name, parameter in model.named_parameters():
        if "rel_attn_embed" in name or "gru_rel_pos" in name:
            parameter.normal_()
    fused = copy.deepcopy(model).to(dtype)
    fuse_wavlm_attention(fused)
    fuse_wavlm_convolutions(fused)
    assert kernels_for(torch.zeros(1, dtype=dtype, device="cuda")) is not None
    for longest in (400, 700, 16000, 50001, 200000):
        lengths = torch.tensor([longest, max(400, longest // 2), 400], device="cuda")
        waveforms = torch.randn(3, longest, device="cuda")
        mask = (torch.arange(longest, device="cuda") < lengths[:, None]).long()
        expected = model(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
        found = fused(waveforms.to(dtype), attention_mask=mask, output_hidden_states=True).hidden_states
        plain = model.to(dtype)(waveforms.to(dtype), attention_mask=mask, output_hidden_states=True).hidden_states
        model.float()
        for row, frames in enumerate(model._get_feat_extract_output_lengths(lengths).tolist()):
            for one, other, usual in zip(expected, found, plain):
                error, rounding = ((other, usual)[i][row, :frames].float() - one[row, :frames] for i in range(2))
                assert error.norm() < 1.5 * rounding.norm() + 1e-3 * one[row, :frames].norm(), (longest, row)
