# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs the kernels of regularizers_triton.py through Triton's interpreter, and prints errors as JSON, by case.

    TRITON_INTERPRET=1 python -m tests.regularizer_kernels_on_cpu

A process of its own, as the variable counts when Triton is imported.
"""

import json

import torch

from spear_hf.pretraining import regularizers_balancer, regularizers_kernels, regularizers_triton, regularizers_whiten
from spear_hf.pretraining.regularizers_balancer import balance_gradient_, balancing_line
from spear_hf.pretraining.regularizers_schedules import BALANCER_GRADIENT_SCALE
from spear_hf.pretraining.regularizers_whiten import WhitenState, whiten_gradient_

from .test_regularizers_gradients import (
    BALANCED_CASES,
    channels_of_every_kind,
    coloured,
    largest_push_of_flat_channels,
    slow_whitened_gradient,
)
from .wavlm_kernels_on_cpu import scalars_of_recent_numpy


def with_kernels(works: bool) -> None:
    kernels = regularizers_triton if works else None
    for module in (regularizers_balancer, regularizers_whiten):
        module.kernels_for = lambda x: kernels


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def sums_error(frames: int, width: int) -> float:
    x = torch.randn(frames, width + 5).half()[:, 2 : 2 + width] + 1.0
    expected = torch.stack([x.double().sum(dim=0), x.double().square().sum(dim=0)])
    return relative(regularizers_triton.column_sums(x), expected)


def line_error(case: int, dim: int) -> float:
    """Features with channels last in memory, or not, and all or a part of them."""
    x = channels_of_every_kind(torch.Generator().manual_seed(0)).view(4, 60, 12)
    x = x if dim == 2 else x.mT.contiguous()
    lines = []
    for works in (False, True):
        with_kernels(works)
        lines.append([balancing_line(x, BALANCED_CASES[case], dim, part) for part in (None, (3, 7))])
    for line in lines[1]:
        assert line.shape == (2, 12)
    assert not lines[1][1][:, :3].any()
    assert not lines[1][1][:, 10:].any()
    # Of a dead channel and of constant ones the slope is that of rounding errors.
    return max(relative(found[:, :9], expected[:, :9]) for found, expected in zip(lines[1], lines[0]))


def balance_error(dtype: torch.dtype, part: tuple[int, int] | None) -> float:
    """Of the change, in place, of a gradient whose rows are parts of longer ones; in bfloat16, which the interpreter
    cuts off, of the changed gradient."""
    generator = torch.Generator().manual_seed(0)
    x = channels_of_every_kind(generator).view(4, 60, 12).to(dtype)
    whole = torch.randn(4, 60, 20, generator=generator).to(dtype)
    found = []
    for works in (False, True):
        with_kernels(works)
        grad = whole.clone()
        balance_gradient_(grad[..., 3:15], x, BALANCED_CASES[0], 2, part)
        found.append((grad - whole if dtype == torch.float32 else grad).float())
    start, length = part or (0, 12)
    outside = [place for place in range(20) if not start <= place - 3 < start + length]
    assert torch.equal(grad[..., outside], whole[..., outside])
    return relative(found[1][..., 3:12], found[0][..., 3:12])  # without constant channels, as above


def inner_balance_error() -> float:
    """With channels in the middle, in memory too."""
    x = channels_of_every_kind(torch.Generator().manual_seed(0)).view(2, 10, 12, 12).transpose(2, 3).contiguous()
    whole, found = torch.randn(2, 10, 12, 12), []
    for works in (False, True):
        with_kernels(works)
        grad = whole.clone()
        balance_gradient_(grad, x, BALANCED_CASES[0], 2, None)
        found.append((grad - whole)[:, :, :9])
    return relative(found[1], found[0])


def whiten_error(dtype: torch.dtype, groups: int, channels: int, dim: int) -> float:
    """Of the change, against float64, for features far from centred; with the votes of both kinds of place."""
    generator = torch.Generator().manual_seed(3)
    x = coloured(generator, frames=2000, channels=channels).to(dtype) * 3.0
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    expected = slow_whitened_gradient(x.double(), grad.double(), 1.0, 0.5, groups)
    state = WhitenState()
    places = [state.add(name) for name in ("beyond", "within")]
    changed, kept = (grad.view(4, 500, -1).clone() for _ in range(2))
    features = x.view(4, 500, -1)
    if dim == 1:
        features, changed, kept = (tensor.mT.contiguous() for tensor in (features, changed, kept))
    for place, found, limit in zip(places, (changed, kept), (1.0, 1e3)):
        whiten_gradient_(found, features, limit, 0.5, state, place, groups, dim, None, in_bfloat16=True)
    if dim == 1:
        changed, kept = changed.mT, kept.mT
    assert torch.equal(kept.reshape(2000, -1), grad)
    assert state.collect(torch.device("cpu")).tolist() == [2.0, 1.0]
    found = changed.reshape(2000, -1).double()
    return float((found - expected).norm() / (expected - grad.double()).norm())


def is_flat_gradient_finite() -> bool:
    """Of features that do not vary, as of digital silence, where sums of products fall short: tensor cores cut off."""
    products = regularizers_whiten._products
    regularizers_whiten._products = lambda x: products(x) * (1 - 1e-5)
    features, grad = torch.randn(24).bfloat16().expand(2000, 24).clone(), torch.randn(2000, 24).bfloat16()
    state = WhitenState()
    whiten_gradient_(grad, features, 5.0, 0.5, state, state.add("place"), 1, -1, None)
    regularizers_whiten._products = products
    return bool(grad.isfinite().all())


def main() -> None:
    torch.manual_seed(0)
    scalars_of_recent_numpy()
    tried_out = regularizers_kernels._kernels(torch.device("cpu"))
    assert tried_out is regularizers_triton, "what is tried out there can be launched"
    regularizers_whiten._products = lambda x: x.float().T @ x.float()
    regularizers_triton.FRAMES = 128
    exact = {f"sums {case}": sums_error(*case) for case in ((1, 3), (128, 64), (300, 70), (129, 128))}
    for case in range(len(BALANCED_CASES)):
        exact |= {f"line {case} {dim}": line_error(case, dim) for dim in (1, 2)}
    exact["balance in the middle"] = inner_balance_error()
    rounded = {}
    for part in (None, (2, 5)):
        exact[f"balance {part}"] = balance_error(torch.float32, part)
        rounded[f"balance {part}"] = balance_error(torch.bfloat16, part)
    with_kernels(True)
    assert largest_push_of_flat_channels() < 2 * BALANCER_GRADIENT_SCALE
    assert is_flat_gradient_finite()
    for dtype in (torch.bfloat16, torch.float32):
        for case in ((1, 24, 2), (2, 24, 2), (2, 24, 1), (4, 36, 2)):
            rounded[f"whiten {dtype} {case}"] = whiten_error(dtype, *case)
    print(json.dumps({"exact": exact, "rounded": rounded}))


if __name__ == "__main__":
    main()
