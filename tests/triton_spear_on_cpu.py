# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs the kernels of triton_spear.py through Triton's interpreter, and prints errors as JSON, by case.

    TRITON_INTERPRET=1 python -m tests.triton_spear_on_cpu

A process of its own, as the variable counts when Triton is imported.
"""

import json

import torch

from spear_hf import triton_spear
from spear_hf.compiled_spear import depthwise_weight_gradient, kernels, scores_by_offset

from .wavlm_kernels_on_cpu import scalars_of_recent_numpy


def score_error(length: int) -> float:
    scores = torch.randn(2, 3, length, length)
    return float((triton_spear.scores_by_offset(scores) - scores_by_offset(scores)).abs().max())


def convolution_error(batch: int, frames: int, channels: int, taps: int) -> float:
    """Relative to the largest entry."""
    grad, x = torch.randn(2, batch, frames, channels).half()
    expected = depthwise_weight_gradient(grad.mT, x.mT, taps)
    found = triton_spear.depthwise_weight_gradient(grad, x, taps)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    torch.manual_seed(0)
    scalars_of_recent_numpy()
    assert kernels(torch.device("cpu")) is triton_spear, "what is tried out there can be launched"
    triton_spear.COLUMNS = 16
    triton_spear.FRAMES = 8
    errors = {f"scores {length}": score_error(length) for length in (1, 2, 7, 8, 9, 20)}
    for case in ((1, 1, 64, 3), (2, 8, 64, 5), (3, 9, 70, 7), (1, 30, 20, 31), (2, 3, 130, 15)):
        errors[f"convolution {case}"] = convolution_error(*case)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
