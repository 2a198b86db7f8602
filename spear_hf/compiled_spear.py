# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Gradients of compiled layers for which the compiler, or cuDNN, takes several times as long as they need.

Operations of their own, which the compiler does not look into: kernels in Triton on an NVIDIA GPU, torch's functions
elsewhere. What is computed is the same.
"""

import functools
import importlib
import re
import warnings
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight


# Of the operations below: each copy of this file on the Hub has its own, as a second one of a name ends the first.
NAMESPACE = re.sub(r"\W", "_", __name__)


def is_trained_by_compiler() -> bool:
    """Whether torch.compile is at work, on a backward pass too. It takes itself for export."""
    return torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()


@functools.lru_cache(maxsize=16)
def kernels(device: torch.device) -> Any:
    """triton_spear.py of the installed package, which is not among the files of a model on the Hub; None without, and,
    with a warning, where its kernels cannot be launched."""
    try:
        module = importlib.import_module("spear_hf.triton_spear")
    except ImportError:
        return None
    try:
        module.scores_by_offset(torch.zeros(1, 1, device=device))
    except Exception as error:  # no C compiler, a driver that is too old: each in a way of its own
        warnings.warn(f"Compiled layers take the slower way through torch's operations: {error}", stacklevel=2)
        return None
    return module


def in_autocast(x: torch.Tensor) -> torch.Tensor:
    """In the dtype that autocast, if there is one, computes in."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def widened_type(x: torch.Tensor) -> torch.dtype:
    """The type of `x`, or float32 where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def scores_by_key(scores: torch.Tensor) -> torch.Tensor:
    """The view that `relative_scores` is: (..., length, 2 * length) -> (..., length, length)."""
    length = scores.shape[-2]
    rows = scores.flatten(-2)[..., length - 1 : length - 1 + length * (2 * length - 1)]
    return rows.unflatten(-1, (length, 2 * length - 1))[..., :length]


@torch.library.custom_op(f"{NAMESPACE}::scores_by_offset", mutates_args=())
def scores_by_offset(scores: torch.Tensor) -> torch.Tensor:
    """The gradient of `scores_by_key`: (..., length, length) -> (..., length, 2 * length), zeros elsewhere."""
    if scores.is_cuda and (fast := kernels(scores.device)) is not None:
        return fast.scores_by_offset(scores.contiguous())
    found = scores.new_zeros(*scores.shape[:-1], 2 * scores.shape[-1])
    scores_by_key(found).copy_(scores)
    return found


@scores_by_offset.register_fake
def _(scores: torch.Tensor) -> torch.Tensor:
    return scores.new_empty(*scores.shape[:-1], 2 * scores.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::depthwise_weight_gradient", mutates_args=())
def depthwise_weight_gradient(grad: torch.Tensor, x: torch.Tensor, taps: int) -> torch.Tensor:
    """Of a depthwise convolution that keeps the length: gradient and features (batch, channels, frames), an odd number
    of taps -> (channels, 1, taps), in float32 at least."""
    if x.is_cuda and x.dtype != torch.float64 and (fast := kernels(x.device)) is not None:
        return fast.depthwise_weight_gradient(grad.mT.contiguous(), x.mT.contiguous(), taps)
    grad, x = grad.to(widened_type(x)), x.to(widened_type(x))
    return conv1d_weight(x, (x.shape[1], 1, taps), grad, padding=taps // 2, groups=x.shape[1])


@depthwise_weight_gradient.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, taps: int) -> torch.Tensor:
    return x.new_empty(x.shape[1], 1, taps, dtype=widened_type(x))


class RelativeScores(torch.autograd.Function):
    """`scores_by_key`, of whose gradient the compiler makes five integer divisions a score."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        return scores_by_key(scores)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return scores_by_offset(grads[0])


class DepthwiseConv2d(torch.autograd.Function):
    """Of features (batch, channels, height, width), with odd kernels and as many zeros around as keep the size.

    The gradient of the features is a convolution with the weights turned round, for which cuDNN has faster kernels.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _convolved(x, weight, bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (x, weight), (grad,) = ctx.saved_tensors, grads
        if weight.shape[2] == 1:
            of_weight = depthwise_weight_gradient(grad.squeeze(2), x.squeeze(2), weight.shape[3]).unsqueeze(2)
        else:
            own, sides, ones, zeros = in_layout(weight, x), _sides(weight), [1, 1], [0, 0]
            given = (grad, x, own, None, ones, sides, ones, False, zeros, x.shape[1], [False, True, False])
            of_weight = torch.ops.aten.convolution_backward(*given)[1]
        of_bias = grad.sum((0, 2, 3), dtype=widened_type(grad))
        return _convolved(grad, weight.flip(2, 3)), of_weight.to(weight.dtype), of_bias.to(weight.dtype)


def _convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.conv2d(x, in_layout(weight, x), bias, padding=_sides(weight), groups=x.shape[1])


def _sides(weight: torch.Tensor) -> list[int]:
    """Zeros to either side that keep the size."""
    return [size // 2 for size in weight.shape[2:]]


def in_layout(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`weight` in the dtype of `x`, and for half precision on a GPU with channels last."""
    weight = weight.to(x.dtype)
    return channels_last(weight) if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) else weight


def channels_last(weight: torch.Tensor) -> torch.Tensor:
    """The kernels of a depthwise convolution, `(channels, 1, height, width)`, with strides that say so.

    Without them torch takes the kernels, and then the gradients, to be in its default order: with a single channel a
    tensor is in both.
    """
    return weight.squeeze(1).unsqueeze(-1).movedim(-1, 1)
