# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The random numbers of the regularisers, and those that leave something out or limit a gradient.

A branch that is skipped is multiplied by 0, so that its parameters keep a gradient: distributed training needs no
`find_unused_parameters`.
"""

from typing import Any

import torch

from ..modeling_spear import SpearAttentionWeights, SpearBypass
from .regularizers_schedules import FEATURE_MASK_PROBABILITY, SCORE_LIMIT


class Draws:
    """The random numbers that one call of a module needs, drawn together at its start from torch's generators.

    Decisions for the whole batch come from the CPU's generator, so that no host waits for a device; those for each
    sequence come from the device's. Where the module is recomputed (gradient checkpointing) both generators are set
    back before, so that the same numbers are drawn. How many are drawn never depends on a schedule.
    """

    def __init__(self) -> None:
        self._decisions = 0
        self._per_sequence = 0
        self._decided: list[float] = []
        self._sequences = torch.empty(0)

    def new_decision(self) -> int:
        """A place for one number per call, for `happens`."""
        self._decisions += 1
        return self._decisions - 1

    def new_per_sequence(self) -> int:
        """A place for one number per sequence of the batch, for `keep`."""
        self._per_sequence += 1
        return self._per_sequence - 1

    def draw(self, batch: int, device: torch.device) -> None:
        """New numbers, uniform in [0, 1)."""
        self._decided = torch.rand(self._decisions).tolist()
        self._sequences = torch.rand(self._per_sequence, batch, device=device)

    def happens(self, decision: int, probability: float) -> bool:
        """True with this probability."""
        return self._decided[decision] < probability

    def keep(self, per_sequence: int, rate: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """0 with probability `rate`, else 1; of shape `(batch, 1, ...)` and dtype as `like`."""
        kept = (self._sequences[per_sequence] >= rate).to(like.dtype)
        return kept.view(-1, *[1] * (like.ndim - 1))


def feature_mask(draws: Draws, places: tuple[int, int], like: torch.Tensor, unmasked_size: int) -> torch.Tensor:
    """`(batch, 1, dim)`: of the channels above the first `unmasked_size`, a sequence goes without all of them with
    p = 0.125, else with a further p = 0.125 without the upper half."""
    size = like.shape[-1]
    lower = draws.keep(places[0], FEATURE_MASK_PROBABILITY, like)  # (batch, 1, 1)
    upper = lower * draws.keep(places[1], FEATURE_MASK_PROBABILITY, like)
    middle = (size - unmasked_size) // 2
    return torch.cat(
        [
            torch.ones_like(lower).expand(-1, -1, unmasked_size),
            lower.expand(-1, -1, middle),
            upper.expand(-1, -1, size - unmasked_size - middle),
        ],
        dim=-1,
    )


class ScaleGradient(torch.autograd.Function):
    """Identity, whose gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.scale, None


class LimitValue(torch.autograd.Function):
    """Identity; the gradient's sign is flipped where a step against it would take a value further out of its range."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, minimum: float, maximum: float) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.range = minimum, maximum
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (value,), (grad,), (minimum, maximum) = ctx.saved_tensors, grads, ctx.range
        outwards = ((value < minimum) & (grad > 0)) | ((value > maximum) & (grad < 0))
        return torch.where(outwards, -grad, grad), None, None


class PenalizeScores(torch.autograd.Function):
    """Identity; `penalty` * sign(score) is added to the gradient of scores beyond +-25.

    `real` `(batch, 1, frames, frames)` is False, or None, where query or key are padding, which is left alone.
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, penalty: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        beyond = (scores > SCORE_LIMIT).to(torch.int8) - (scores < -SCORE_LIMIT).to(torch.int8)
        ctx.save_for_backward(beyond if real is None else beyond * real, penalty)  # a byte a score, not the scores
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (beyond, penalty), (grad,) = ctx.saved_tensors, grads
        return grad + (beyond * penalty).to(grad.dtype), None, None


def penalized_attention_weights(
    module: SpearAttentionWeights,
    hidden_states: torch.Tensor,
    position_table: torch.Tensor,
    key_mask: torch.Tensor | None,
    penalty: float | torch.Tensor,
) -> torch.Tensor:
    """`SpearAttentionWeights.forward`, with the penalty on its scores."""
    real = None if key_mask is None else key_mask[:, None, :, None] & key_mask[:, None, None, :]
    penalty = torch.as_tensor(penalty, dtype=torch.float32, device=hidden_states.device)
    scores = PenalizeScores.apply(module.scores(hidden_states, position_table), penalty, real)
    return module.normalize(scores, key_mask)


def bypass_with_scale(
    module: SpearBypass, residual: torch.Tensor, hidden_states: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """`SpearBypass.forward`, to the bit, with `scale` `(dim,)` or `(batch, 1, dim)` in place of its parameter."""
    return torch.addcmul(residual, hidden_states - residual, scale)
