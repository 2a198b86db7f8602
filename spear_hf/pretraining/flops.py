# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Floating-point operations of an encoder, counted from its configuration, and the peak they are compared with (MFU).

Counted are the multiplications and additions (two for each product) of matrix products and convolutions; activations,
norms and softmaxes, which are bound by memory, are not. The backward pass takes twice the forward pass. Model FLOPs
utilisation (MFU) is what the audio needs, padding and recomputation left out, over what the devices could do:

    mfu = 3 * sum(forward_flops(config, frames of each utterance)) / (seconds * ranks * peak_flops(device))
"""

import functools
import time
from collections.abc import Iterable

import torch

from ..configuration_spear import SpearConfig
from ..data.collation import encoder_frames


# Forward pass, gradient by the inputs, gradient by the weights.
FLOPS_OF_A_STEP = 3

# Dense bfloat16 peak in FLOP/s, from the vendors' data sheets, by a part of the name that torch gives the device. The
# first part that fits counts.
PEAK_BF16 = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def forward_flops(config: SpearConfig, frames: int, with_heads: bool = True) -> int:
    """Of one utterance of so many filter-bank frames (100 Hz); `with_heads`: of pre-training, on every frame."""
    length = (frames - 7) // 2  # frames at 50 Hz
    total = _stem_flops(config, frames)
    for layers, factor, kernel in zip(
        config.num_layers_per_stack, config.downsampling_factors, config.conv_kernel_sizes
    ):
        total += layers * _layer_flops(config, -(-length // factor), kernel)
    if with_heads:
        classes = sum(target["num_codebooks"] * target["codebook_size"] for target in _targets(config))
        total += 2 * encoder_frames(frames, config) * config.hidden_size * classes
    return total


class FlopCounter:
    """Of a step: `FLOPS_OF_A_STEP` times the forward passes of utterances; each length is counted once."""

    def __init__(self, config: SpearConfig) -> None:
        self.config = config
        self._forward: dict[int, int] = {}

    def __call__(self, frames: Iterable[int]) -> int:
        """For utterances of so many filter-bank frames."""
        total = 0
        for length in frames:
            if length not in self._forward:
                self._forward[length] = forward_flops(self.config, length)
            total += self._forward[length]
        return FLOPS_OF_A_STEP * total


def _targets(config: SpearConfig) -> list[dict]:
    return list((config.pretraining_targets or {}).values())


def _stem_flops(config: SpearConfig, frames: int) -> int:
    first, second, third = config.stem_channels
    bins = config.num_mel_bins
    length1, length2 = frames - 2, (frames - 5) // 2 + 1
    length = length2 - 2
    bins2 = (bins - 3) // 2 + 1
    bins3 = (bins2 - 3) // 2 + 1
    convolutions = (
        9 * first * length1 * bins
        + 9 * first * second * length2 * bins2
        + 9 * second * third * length * bins3
        + (49 * third + 2 * third * 3 * third) * length * bins3  # ConvNeXt: depthwise, two pointwise
    )
    return 2 * (convolutions + third * bins3 * config.hidden_size * length)


def _layer_flops(config: SpearConfig, length: int, kernel: int) -> int:
    """Of one layer on `length` frames of its stack; the position scores are computed for 2 * length offsets."""
    size, heads = config.hidden_size, config.num_attention_heads
    query, value, pos = config.query_head_dim, config.value_head_dim, config.pos_head_dim
    inner = size * 3 // 4  # of the nonlinear attention
    projections = (
        size * heads * (2 * query + pos)  # queries, keys, positions
        + 2 * 2 * size * heads * value  # two self-attentions: values, output
        + 4 * size * inner  # nonlinear attention: three inputs, output
        + 2 * 3 * size * size  # two convolution modules: values and gates, output
        + 2 * size * kernel  # their depthwise convolutions
        + 2 * size * (config.intermediate_size * (3 + 4 + 5) // 4)  # three feed-forward modules
    )
    positions = 2 * length * config.pos_dim * heads * pos
    scores = length * length * heads * (query + 2 * pos)
    weighted = length * length * (2 * heads * value + inner)
    return 2 * (projections * length + positions + scores + weighted)


def peak_flops(device: torch.device, bf16: bool) -> float:
    """FLOP/s that `device` can do: of its data sheet in bfloat16 if it is known, else measured on a matrix product."""
    if bf16 and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_BF16.items():
            if part in name:
                return peak
    return measured_flops(str(device), torch.bfloat16 if bf16 else torch.float32)


@functools.cache
def measured_flops(device: str, dtype: torch.dtype, size: int | None = None, repeats: int = 3) -> float:
    """FLOP/s of the best of a few square matrix products, on the CPU with the threads torch has now (0.1 s)."""
    size = size or (1024 if device.startswith("cpu") else 8192)
    left = torch.ones(size, size, device=device, dtype=dtype)
    best = 0.0
    for attempt in range(repeats + 1):
        start = time.perf_counter()
        product = left @ left
        float(product[0, 0])  # waits for the device
        if attempt:  # the first one warms up
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best
