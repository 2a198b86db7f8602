# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs the kernels of wavlm_kernels.py through Triton's interpreter, and prints errors as JSON, by case.

    TRITON_INTERPRET=1 python -m tests.wavlm_kernels_on_cpu

A process of its own, as the variable counts when Triton is imported. float16: the interpreter's products are not right
for bfloat16.
"""

import copy
import json
from types import SimpleNamespace

import torch
import triton.runtime.interpreter as interpreter
from torch.nn import functional as F
from transformers import WavLMConfig, WavLMModel

from spear_hf.mvq import wavlm_attention, wavlm_convolutions, wavlm_kernels


LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)


def scalars_of_recent_numpy() -> None:
    """The interpreter takes int() of arrays of one element, which NumPy no longer gives."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):  # Triton 3.3 has none, and leaves what it sets
        patch(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def attention_error(frames: int, head_dim: int, skewed: bool) -> float:
    """Largest error of valid frames, against the plain way in float32."""
    batch, heads = 3, 2
    query, key, value, hidden = torch.randn(4, batch, frames, heads * head_dim).half()
    lengths = torch.tensor([frames, max(1, frames // 2), 1], dtype=torch.int32)
    farthest = wavlm_kernels.padded(frames) - 1
    table = torch.randn(heads, 2 * farthest + 1).half()
    weight, bias, scale = 0.3 * torch.randn(2, head_dim), torch.randn(2), torch.randn(heads)
    biases = wavlm_kernels.skewed(table) if skewed else table
    found = wavlm_kernels.attention(query, key, value, hidden, biases, weight, bias, scale, lengths)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.float().unflatten(-1, (heads, head_dim)).transpose(1, 2)

    update, reset = (by_head(hidden) @ weight.T + bias).sigmoid().split(1, dim=-1)
    gate = update * (reset * scale[:, None, None] - 1.0) + 2.0
    places = torch.arange(frames)
    scores = gate * table.float()[:, places[None, :] - places[:, None] + farthest]
    scores = scores.masked_fill(places >= lengths[:, None, None, None], -torch.inf)
    expected = F.scaled_dot_product_attention(by_head(query), by_head(key), by_head(value), attn_mask=scores)
    difference = (found - expected.transpose(1, 2).flatten(-2)).abs()
    assert bool(found.isfinite().all())
    return max(float(rows[:length].max()) for rows, length in zip(difference, lengths))


def convolution_error(channels_in: int, channels: int, taps: int, stride: int, frames: int) -> float:
    weight = (torch.randn(channels, channels_in, taps) / (channels_in * taps) ** 0.5).half()
    bias, norm_weight, norm_bias = torch.randn(3, channels)
    x = torch.randn(2, frames, channels_in).half()
    expected = F.conv1d(x.float().transpose(1, 2), weight.float(), bias, stride=stride).transpose(1, 2)
    expected = F.gelu(F.layer_norm(expected, (channels,), norm_weight, norm_bias, 1e-3))
    flat = weight.permute(2, 1, 0).flatten(0, 1).contiguous()
    weights = wavlm_kernels.ConvolutionWeights(flat, bias, norm_weight, norm_bias, 1e-3, taps, stride)
    found = wavlm_kernels.convolution(x[..., 0].contiguous() if channels_in == 1 else x, weights)
    assert found.shape == expected.shape
    return float((found - expected).abs().max())


def position_error(frames: int, taps: int) -> float:
    groups, width = 2, 16
    x, bias = torch.randn(2, frames, groups * width).half(), torch.randn(groups * width)
    weight = (torch.randn(groups * width, width, taps) / (width * taps) ** 0.5).half()
    expected = F.conv1d(x.float().transpose(1, 2), weight.float(), bias, padding=taps // 2, groups=groups)
    expected = F.gelu(expected[..., :frames]).transpose(1, 2)
    by_tap = weight.unflatten(0, (groups, width)).permute(0, 3, 2, 1).contiguous()
    return float((wavlm_kernels.position_convolution(x, by_tap, bias) - expected).abs().max())


def model_errors(masked: bool) -> list[float]:
    """Of every hidden state of a whole model, relative to its level, against transformers in float32."""
    config = WavLMConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(16, 16),
        conv_kernel=(10, 8),
        conv_stride=(16, 20),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        num_buckets=32,
        max_bucket_distance=64,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    model = WavLMModel(config).eval()
    for name, parameter in model.named_parameters():
        if "rel_attn_embed" in name or "gru_rel_pos" in name:
            parameter.normal_()
    fused = copy.deepcopy(model)
    wavlm_attention.fuse_wavlm_attention(fused)
    wavlm_convolutions.fuse_wavlm_convolutions(fused)
    calls = dict.fromkeys(("attention", "convolution", "position_convolution"), 0)

    def counting(name: str):
        def call(*arguments):
            calls[name] += 1
            return getattr(wavlm_kernels, name)(*arguments)

        return call

    kernels = SimpleNamespace(**{**vars(wavlm_kernels), **{name: counting(name) for name in calls}})

    def counted(x: torch.Tensor) -> SimpleNamespace | None:
        return kernels if x.dtype == torch.float16 else None

    wavlm_attention.kernels_for = wavlm_convolutions.kernels_for = counted
    longest = 44800 if masked else 8000  # 139 frames: two blocks of queries
    waveforms = torch.randn(3, longest)
    lengths = torch.tensor([longest, 27000, 4000])
    mask = (torch.arange(longest) < lengths[:, None]).long() if masked else None
    expected = model(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
    in_single = fused(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
    assert not any(calls.values()), "float32 is computed as before"
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(expected[:1], in_single[:1]))
    found = fused.half()(waveforms.half(), attention_mask=mask, output_hidden_states=True).hidden_states
    assert list(calls.values()) == [3, 2, 1]
    frames = model._get_feat_extract_output_lengths(lengths).tolist() if masked else [len(expected[0][0])] * 3
    return [
        max(float((one[row, :n] - other[row, :n]).norm() / one[row, :n].norm()) for row, n in enumerate(frames))
        for one, other in zip(expected, found)
    ]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    scalars_of_recent_numpy()
    errors = {
        f"attention, {frames} frames, head_dim {head_dim}, {'skewed' if skewed else 'plain'} table": attention_error(
            frames, head_dim, skewed
        )
        for frames in LENGTHS
        for head_dim, skewed in ((16, True), (64, frames != 130))
    }
    errors["attention, head_dim 128"] = attention_error(70, 128, True)
    for case in ((1, 64, 10, 5, 777), (64, 64, 3, 2, 131), (128, 32, 2, 2, 150), (16, 16, 8, 20, 300)):
        errors[f"convolution {case}"] = convolution_error(*case)
    for case in ((5, 16), (130, 16), (130, 7)):
        errors[f"position convolution {case}"] = position_error(*case)
    for masked in (False, True):
        for number, error in enumerate(model_errors(masked)):
            errors[f"hidden state {number}{', masked' if masked else ''}"] = error
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
