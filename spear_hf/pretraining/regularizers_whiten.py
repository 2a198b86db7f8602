# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Whiten: identity forward; backward, features whose covariance is too far from a multiple of the identity are pushed.

For x (frames, groups, channels of a group), centred, with covariances C_g = x_g' x_g, the metric is the mean over
groups and channels of the row sums of C_g^2 by the square of the mean diagonal: 1 for white features, `channels` where
they all lie on a line. Its gradient is a multiple of x_g (C_g - metric * I), with C scaled to a mean diagonal of 1.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..compiled_spear import widened_type
from .regularizers_kernels import kernels_for


class WhitenState:
    """Which places exceeded their limit when last measured: they are looked at more often.

    A place votes in its backward pass (once per call, also where the forward pass is computed twice for gradient
    checkpointing); the votes of a step are collected at its end, over all ranks. So the state is the same on every
    rank, changes between steps only, and the host reads all votes at once, together with what else it reads.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.exceeded: list[bool] = []
        self._votes = torch.zeros(0)  # 0: not measured in this step, 1: within the limit, 2: beyond it

    def add(self, name: str) -> int:
        """Registers a place, which counts as beyond its limit until it is measured; returns its index."""
        self.names.append(name)
        self.exceeded.append(True)
        self._votes = torch.zeros(len(self.names))
        return len(self.names) - 1

    def vote(self, index: int, exceeded: torch.Tensor) -> None:
        """Called in a backward pass with a bool of shape () on the device of the features."""
        vote = self.votes_on(exceeded.device).select(0, index)
        torch.maximum(vote, 1.0 + exceeded, out=vote)

    def votes_on(self, device: torch.device) -> torch.Tensor:
        """Those of this step so far, (places,), to be changed there: the largest vote of a place counts."""
        if self._votes.device != device:
            self._votes = self._votes.to(device)
        return self._votes

    def collect(self, device: torch.device) -> torch.Tensor:
        """The votes of all ranks since the last time: (places,). A place beyond its limit on any rank is beyond it."""
        votes = self._votes.to(device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        self._votes = torch.zeros_like(votes)
        return votes

    def count(self, votes: Sequence[float]) -> None:
        """Takes the votes that were collected, now on the host, into account."""
        for index, vote in enumerate(votes):
            if vote:
                self.exceeded[index] = vote > 1


def whiten(
    x: torch.Tensor,
    limit: float,
    gradient_scale: float,
    state: WhitenState,
    index: int,
    groups: int = 1,
    dim: int = -1,
    part: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`x`, whose gradient will be changed. Channels lie along `dim`; `part` is the range (start, length) of them."""
    start, length = (0, x.shape[dim]) if part is None else part
    in_bfloat16 = autocasts_to_bfloat16(x)
    return _Whiten.apply(x, limit, gradient_scale, state, index, groups, dim, start, length, in_bfloat16)


def whitening_penalty(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The metric of `(frames, channels)`, shape (), and its gradient up to a positive factor; in float32 at least.

    Statistics run over all frames, padded ones included, as in the published recipe.
    """
    channels = x.shape[1]
    x = x - x.mean(dim=0, dtype=widened_type(x))
    covariance = x.T @ x
    if groups > 1:
        same = torch.eye(groups, device=x.device, dtype=covariance.dtype)[:, None, :, None]
        covariance = (covariance.view(groups, channels // groups, groups, -1) * same).view(channels, channels)
    diagonal = covariance.diagonal()
    covariance /= diagonal.mean().clamp(min=1e-20)
    metric = covariance.square().sum() / channels
    diagonal -= metric  # in place: a view of the covariance
    return metric, x @ covariance


def autocasts_to_bfloat16(x: torch.Tensor) -> bool:
    """Whether layers that are given `x` now compute in bfloat16."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16


def whiten_gradient_(
    grad: torch.Tensor,
    x: torch.Tensor,
    limit: float,
    gradient_scale: float,
    state: WhitenState,
    index: int,
    groups: int,
    dim: int,
    part: tuple[int, int] | None,
    in_bfloat16: bool = False,
) -> None:
    """What the backward pass of `whiten` does to `grad`, in place; it votes.

    `in_bfloat16`: products may be of numbers in it, whatever the features are, as those of the layers around are.
    """
    start, length = (0, x.shape[dim]) if part is None else part
    place = grad.narrow(dim, start, length).movedim(dim, -1)  # (..., channels)
    features = x.narrow(dim, start, length).movedim(dim, -1).flatten(0, -2)
    kernels = _kernels_for(features, in_bfloat16)
    with torch.autocast(device_type=x.device.type, enabled=False):
        if kernels is not None:
            penalty, scale = _scaled_penalty(
                kernels, features, place, limit, gradient_scale, state.votes_on(x.device), index, groups
            )
        else:
            metric, penalty = whitening_penalty(features, groups)
            # No branch on the metric, which would make the host wait for the device.
            exceeded = metric > limit
            norms = torch.linalg.vector_norm(place, dtype=widened_type(place))
            norms = norms / (torch.linalg.vector_norm(penalty, dtype=widened_type(penalty)) + 1e-20)
            scale = torch.where(exceeded, gradient_scale * norms, 0.0)
            state.vote(index, exceeded)
        place.addcmul_(penalty.view(place.shape), scale)


def _kernels_for(x: torch.Tensor, in_bfloat16: bool) -> Any | None:
    """Those for products of bfloat16 with sums in float32, where `x` allows for it: float16 has too small a range."""
    is_half = x.dtype == torch.bfloat16 or (in_bfloat16 and x.dtype == torch.float32)
    return kernels_for(x) if is_half and _has_products(x.device) else None


def _scaled_penalty(
    kernels: Any,
    x: torch.Tensor,
    grad: torch.Tensor,
    limit: float,
    gradient_scale: float,
    votes: torch.Tensor,
    index: int,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the metric of `x`, (frames, channels), up to a factor, in bfloat16; what it is multiplied by."""
    x = x if x.stride(1) == 1 else x.contiguous()
    sums = kernels.column_sums(x)
    if x.dtype == torch.bfloat16:
        metric, matrix, bias = kernels.whitening_matrix(_products(x), sums, len(x), groups)
        penalty = torch.addmm(bias, x, matrix)
    else:  # centred before it is rounded
        x = torch.sub(x, sums[0] / len(x), out=torch.empty_like(x, dtype=torch.bfloat16))
        metric, matrix, _ = kernels.whitening_matrix(_products(x), None, len(x), groups)
        penalty = x @ matrix
    norms = (torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in (grad, penalty))
    return penalty, kernels.whitening_scale(metric, *norms, limit, gradient_scale, votes, index)


def _products(x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x.T, x, out_dtype=torch.float32)


@functools.lru_cache(maxsize=16)
def _has_products(device: torch.device) -> bool:
    """Whether there are these, of bfloat16: from torch 2.8 on, and not of every GPU."""
    try:
        _products(torch.ones(8, 8, dtype=torch.bfloat16, device=device))
    except (TypeError, RuntimeError):
        return False
    return True


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        limit: float,
        gradient_scale: float,
        state: WhitenState,
        index: int,
        groups: int,
        dim: int,
        start: int,
        length: int,
        in_bfloat16: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.place = limit, gradient_scale, state, index, groups, dim, (start, length), in_bfloat16
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        grad = grad.clone()
        whiten_gradient_(grad, x, *ctx.place)
        return grad, *[None] * 9
