# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Balancer: identity forward; backward, channels whose statistics leave their limits are pushed back.

With mean m, standard deviation s and root mean square r of a channel, the loss is
|m/s - clamp(m/s)| + |log(clamp(r) / r)|. Its gradient is, within a channel, linear in the input, so that the means and
mean squares of the channels are all that is needed: the gradient is never built by autograd, and normalised to a root
mean square of 1 without another pass over the input.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from ..compiled_spear import widened_type
from .regularizers_kernels import columns_of, kernels_for, rows_of
from .regularizers_schedules import BALANCER_GRADIENT_SCALE, BALANCER_SMALLEST_DEVIATION, BalancerLimits


def balance(
    x: torch.Tensor, limits: BalancerLimits, dim: int = -1, part: tuple[int, int] | None = None
) -> torch.Tensor:
    """`x`, whose gradient will be changed. Channels lie along `dim`; `part` is the range (start, length) of them."""
    start, length = (0, x.shape[dim]) if part is None else part
    return _Balance.apply(x, limits, dim, start, length)


def balanced_part(
    x: torch.Tensor, grad: torch.Tensor, limits: BalancerLimits, dim: int, part: tuple[int, int] | None
) -> torch.Tensor:
    """What becomes of `grad` in the backward pass of `balance`."""
    if part is None or part[1] == x.shape[dim]:
        return balanced_gradient(x, grad, limits, dim)
    changed = grad.clone()
    place = changed.narrow(dim, *part)
    place.copy_(balanced_gradient(x.narrow(dim, *part), place, limits, dim))
    return changed


def balanced_gradient(x: torch.Tensor, grad: torch.Tensor, limits: BalancerLimits, dim: int = -1) -> torch.Tensor:
    """`grad` + |`grad`| * the push. Computed in float32, returned in the dtype of `grad`."""
    offset, slope = along(dim, x, balancing_line(x, limits, dim))
    push = torch.addcmul(offset, x, slope)
    return push.mul_(grad.abs()).add_(grad).to(grad.dtype)


def balance_gradient_(
    grad: torch.Tensor, x: torch.Tensor, limits: BalancerLimits, dim: int, part: tuple[int, int] | None
) -> None:
    """What the backward pass of `balance` does to `grad`, in place."""
    if part is not None:
        grad, x = grad.narrow(dim, *part), x.narrow(dim, *part)
    kernels, rows = kernels_for(x), rows_of(grad, x, dim)
    if kernels is None or rows is None:
        grad.copy_(balanced_gradient(x, grad, limits, dim))
    else:
        of_grad, of_x = rows
        line = balancing_line(x, limits, dim)
        inner = of_x.shape[1] // x.shape[dim]
        kernels.balance_(of_grad, of_x, line if inner == 1 else line.repeat_interleave(inner, dim=1))


def along(dim: int, x: torch.Tensor, line: torch.Tensor) -> torch.Tensor:
    """(2, channels), with as many axes after it as `x` has after `dim`."""
    return line.view(2, -1, *[1] * (x.ndim - 1 - dim % x.ndim))


def balancing_line(
    x: torch.Tensor, limits: BalancerLimits, dim: int = -1, part: tuple[int, int] | None = None
) -> torch.Tensor:
    """Offset and slope, (2, channels), float32 at least: offset + slope * `x` is 0.04 * the loss's gradient with
    respect to `x`, of root mean square 1 in every channel that has one. Zeros for channels outside of `part`.

    Statistics run over all axes but `dim`, padded frames included, as in the published recipe: batches of bucketed
    lengths have few of them, and since the change is proportional to the incoming gradient, padded frames get none.
    """
    size = x.shape[dim]
    start, length = (0, size) if part is None else part
    x = x.narrow(dim, start, length)
    axes = [axis for axis in range(x.ndim) if axis != dim % x.ndim]
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.balancing_line(_sums(kernels, x, dim, axes), x.numel() // length, limits, start, size)
    # Sums in float32 without a copy of the features in it.
    dtype = widened_type(x)
    mean = x.mean(axes, dtype=dtype)
    rms = torch.linalg.vector_norm(x, dim=axes, dtype=dtype)
    rms = (rms / math.sqrt(x.numel() // length)).clamp(min=1e-10)
    deviation = (rms.square() - mean.square()).clamp(min=1e-20).sqrt().maximum(BALANCER_SMALLEST_DEVIATION * rms)
    ratio = mean / deviation
    # 1 beyond the upper limit, -1 beyond the lower one, in few launches.
    by_mean = (ratio - ratio.clamp(limits.min_mean, limits.max_mean)).sign()
    by_rms = (rms - rms.clamp(limits.min_rms, limits.max_rms)).sign()

    # d(m/s)/dx = (1 - ratio * z) / (n s) and d(log r)/dx = (ratio + z) / (n s (1 + ratio^2)), z = (x - mean) / s:
    # both without their common 1 / (n s), which the normalisation takes away.
    quotient = 1.0 + ratio.square()
    center = by_mean + by_rms * ratio / quotient
    slope = by_rms / quotient - by_mean * ratio  # of z, whose mean is 0 and mean square 1
    scale = BALANCER_GRADIENT_SCALE / torch.hypot(center, slope).clamp(min=1e-20)
    slope = slope / deviation
    line = torch.stack([(center - slope * mean) * scale, slope * scale])
    return F.pad(line, (start, size - start - length)) if length < size else line


def _sums(kernels: Any, x: torch.Tensor, dim: int, axes: list[int]) -> torch.Tensor:
    """Of the values and of their squares, by channel: (2, channels), in float32."""
    columns = columns_of(x, dim)
    if columns is not None:
        return kernels.column_sums(columns)
    norms = torch.linalg.vector_norm(x, dim=axes, dtype=torch.float32)
    return torch.stack([x.sum(axes, dtype=torch.float32), norms.square()])


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limits: BalancerLimits, dim: int, start: int, length: int) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.limits, ctx.part = limits, (dim, start, length)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x,), (grad,), (dim, *part) = ctx.saved_tensors, grads, ctx.part
        return balanced_part(x, grad, ctx.limits, dim, tuple(part)), None, None, None, None
