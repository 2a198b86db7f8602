# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The regularisers inside compiled layers: one graph, whatever a step draws and whatever the schedules say.

A graph holds numbers of the host as constants, and has no branches. So rates, limits and decisions come to it as one
short vector a call (`GraphDraws`), a branch that is left out is multiplied by 0, and what is much and seldom is an
operation that the compiler does not look into: when it runs, it looks at the draws, and mostly does nothing.
`balancing` gives two numbers a channel, zeros for nothing, with which the graph changes a gradient, as it reads that
and the features anyway. `whiten_gradient` does all of Whiten, and of a Balancer of the same features; it stands where
gradients go through memory, next to a linear layer or a convolution.

The draws are those of the latest call of a module, for its backward pass too, so a second forward pass must not come
before the backward pass of the first one. Gradient checkpointing may: it calls layers, and a stack draws for these.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import nn

from ..compiled_spear import widened_type
from ..devices import to_device
from ..modeling_spear import SpearLayer, SpearModel, SpearStack, SpearStem
from .regularizers import Regularizers, Transform, first_argument
from .regularizers_balancer import along, balance_gradient_, balancing_line
from .regularizers_config import RegularizersConfig
from .regularizers_schedules import (
    BYPASS_LIMIT_PROBABILITY,
    BYPASS_MAXIMUM,
    SCORE_PENALTY_PROBABILITY,
    WHITEN_PROBABILITIES,
    WHITENS,
)
from .regularizers_skips import Draws
from .regularizers_whiten import autocasts_to_bfloat16, whiten_gradient_


# Of features: offset and slope of Balancer's push by channel, and None for none.
Balancing = Callable[[torch.Tensor], torch.Tensor | None]
# Of features and their gradient, which it changes, or not, and of whether it may compute in bfloat16.
Whitening = Callable[[torch.Tensor, torch.Tensor, bool], None]


class GraphDraws(Draws):
    """Draws that graphs can read."""

    _known: ClassVar[WeakValueDictionary[int, "GraphDraws"]] = WeakValueDictionary()
    _handles: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self._sources: list[Callable[[], float]] = []
        self._numbers = torch.empty(0)
        self._one = self.new_number(lambda: 1.0)
        self._balancings: list[Balancing] = []
        self._whitenings: list[Whitening] = []
        # A tensor, so that it is no constant of a graph, which many layers share.
        self.handle = torch.tensor(next(self._handles))
        self._known[int(self.handle)] = self

    def new_number(self, source: Callable[[], float]) -> int:
        """A place for a number that is asked for at every draw, for `number`."""
        self._sources.append(source)
        return len(self._sources) - 1

    def new_flag(self, probability: Callable[[], float]) -> int:
        """A place for 1 with this probability, else 0, for `number`."""
        decision = self.new_decision()
        return self.new_number(lambda: float(self.happens(decision, probability())))

    def new_balancing(self, balancing: Balancing) -> int:
        """A place for `balanced`."""
        self._balancings.append(balancing)
        return len(self._balancings) - 1

    def new_whitening(self, whitening: Whitening) -> int:
        """A place for `whitened`."""
        self._whitenings.append(whitening)
        return len(self._whitenings) - 1

    def draw(self, batch: int, device: torch.device) -> None:
        super().draw(batch, device)
        self._numbers = to_device([source() for source in self._sources], torch.float32, device)

    def number(self, place: int) -> torch.Tensor:
        """The number of the latest draw, shape ()."""
        return self._numbers[place]

    def balanced(self, features: torch.Tensor, place: int, dim: int) -> torch.Tensor:
        """`features`, with channels along `dim`, whose gradient will be balanced."""
        return _Balanced.apply(features, self.handle, place, dim % features.ndim)

    def whitened(self, features: torch.Tensor, place: int) -> torch.Tensor:
        """`features`, whose gradient will be whitened."""
        one = self.number(self._one)
        return _Whitened.apply(features, self.handle, place, one, autocasts_to_bfloat16(features))

    @classmethod
    def balancing(cls, handle: int, place: int) -> Balancing:
        return cls._known[handle]._balancings[place]

    @classmethod
    def whitening(cls, handle: int, place: int) -> Whitening:
        return cls._known[handle]._whitenings[place]


class Zeros:
    """Tensors of zeros, made several at a time: a launch for each is all that a Balancer costs that does not act."""

    MADE_AT_ONCE = 16
    _left: ClassVar[dict[tuple[int, torch.device, torch.dtype], list[torch.Tensor]]] = {}

    @classmethod
    def take(cls, features: torch.Tensor, size: int) -> torch.Tensor:
        """(2, size), on the device of `features`, float32 at least; the taker's own."""
        kind = size, features.device, widened_type(features)
        left = cls._left.setdefault(kind, [])
        if not left:
            left += [torch.empty(2, size, dtype=kind[2], device=kind[1]) for _ in range(cls.MADE_AT_ONCE)]
            torch._foreach_zero_(left)
        return left.pop()


# A step has hundreds of these, which mostly do nothing: by torch.library.custom_op each would take 20 us, not 5.
_library = torch.library.Library("spear_hf", "FRAGMENT")
_library.define("balancing(Tensor features, Tensor handle, int place, int dim) -> Tensor")
_library.define("whiten_gradient(Tensor(a!) grad, Tensor features, Tensor handle, int place, bool in_bfloat16) -> ()")


# `handle`, on the CPU, is that of the draws.


def balancing(features: torch.Tensor, handle: torch.Tensor, place: int, dim: int) -> torch.Tensor:
    """Offset and slope of Balancer's push on the gradient of `features`, as the draws say: (2, channels)."""
    found = GraphDraws.balancing(int(handle), place)(features)
    return Zeros.take(features, features.shape[dim]) if found is None else found


def fake_balancing(features: torch.Tensor, handle: torch.Tensor, place: int, dim: int) -> torch.Tensor:
    return features.new_empty(2, features.shape[dim], dtype=widened_type(features))


def whiten_gradient(
    grad: torch.Tensor, features: torch.Tensor, handle: torch.Tensor, place: int, in_bfloat16: bool
) -> None:
    """Changes `grad`, that of `features`, as the draws say."""
    GraphDraws.whitening(int(handle), place)(features, grad, in_bfloat16)


for _name, _function, _fake in (
    ("balancing", balancing, fake_balancing),
    ("whiten_gradient", whiten_gradient, lambda *args: None),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spear_hf::{_name}", _fake, lib=_library)


class _Balanced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, handle: torch.Tensor, place: int, dim: int) -> torch.Tensor:
        ctx.save_for_backward(features, handle)
        ctx.place, ctx.dim = place, dim
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (features, handle), (grad,) = ctx.saved_tensors, grads
        offset, slope = along(ctx.dim, features, torch.ops.spear_hf.balancing(features, handle, ctx.place, ctx.dim))
        return (grad + grad.abs() * (offset + slope * features)).to(grad.dtype), None, None, None


class _Whitened(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, handle: torch.Tensor, place: int, one: torch.Tensor, in_bfloat16: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(features, handle, one)
        ctx.place, ctx.in_bfloat16 = place, in_bfloat16
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        features, handle, one = ctx.saved_tensors
        # A copy, which others that got the same gradient need. inductor does without one where it sees that it is one,
        # and reads the changed gradient for what was computed of it before (torch 2.11).
        grad = grads[0] * one.to(grads[0].dtype)
        torch.ops.spear_hf.whiten_gradient(grad, features, handle, ctx.place, ctx.in_bfloat16)
        return grad, None, None, None, None


class TurnOutwardGradient(torch.autograd.Function):
    """What `LimitValue` does, with values that are `below` and `above` the limits as tensors; else the identity."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, below: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(below, above)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (below, above), (grad,) = ctx.saved_tensors, grads
        return torch.where((below & (grad > 0)) | (above & (grad < 0)), -grad, grad), None, None


def time_shared_dropout(hidden_states: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """`SpearTimeSharedDropout` of `(batch, frames, dim)`, at a rate that is a tensor of shape ()."""
    kept = torch.rand_like(hidden_states[:, :1], dtype=torch.float32) >= rate
    return hidden_states * (kept / (1.0 - rate)).to(hidden_states.dtype)


class GraphRegularizers(Regularizers):
    """`Regularizers` of compiled layers."""

    def __init__(self, model: nn.Module, config: RegularizersConfig) -> None:
        self._penalty = torch.empty(())
        # The draws vary with the batch, and hooks of torch's own modules hold them.
        torch._dynamo.config.force_nn_module_property_static_shapes = False
        super().__init__(model, config)

    def set_step(self, batches: float, normalizer: float | torch.Tensor = 1.0) -> None:
        super().set_step(batches, normalizer)
        device = next(self._encoder.parameters()).device
        penalty = self.score_penalty
        if isinstance(penalty, torch.Tensor):
            self._penalty = penalty.to(device, torch.float32)
        else:
            self._penalty = to_device(penalty, torch.float32, device)

    def _new_draws(self) -> GraphDraws:
        return GraphDraws()

    def _traced(self, function: Callable) -> Callable:
        return function

    # Nothing of the host's may be drawn inside what is compiled.

    def _stem_draws(self, encoder: SpearModel) -> Draws:
        return self._draw_before(encoder)

    def _layer_draws(self, stack: SpearStack, layer: SpearLayer) -> Draws:
        return self._draw_before(stack)

    def _install_convnext_output(self, stem: SpearStem, draws: Draws) -> None:
        # As it is projected, (batch, frames, channels * bins): otherwise it would be kept in two orders.
        transforms = self._balancer_and_whiten("convnext_output", "stem.convnext", draws, dim=2)
        channels = stem.convnext.pointwise_conv2.out_channels

        def push(features: torch.Tensor) -> torch.Tensor:
            features = features.unflatten(-1, (channels, -1))
            for transform in transforms:
                features = features if transform is None else transform(features)
            return features.flatten(-2)

        self._before(stem.out_proj, push)

    def _install_mask_draw(self, encoder: SpearModel, draw_mask: Transform) -> None:
        def draw_before(module: SpearModel, args: tuple, kwargs: dict) -> None:
            if module.training:
                features = first_argument(args, kwargs)
                draw_mask(features.new_empty(features.shape[0], 1, module.config.hidden_size))

        self._undo.append(encoder.register_forward_pre_hook(draw_before, with_kwargs=True).remove)

    def _install_layer_mask(self, layer: SpearLayer) -> None:
        # Inside of the layer's graph, which a hook of the layer would not be.
        def mask(hidden_states: torch.Tensor) -> torch.Tensor:
            assert self._feature_mask is not None
            return hidden_states * self._feature_mask.to(hidden_states.dtype)

        self._after(layer.bypass, mask)

    def _position_skip(self, draws: Draws) -> Transform:
        assert isinstance(draws, GraphDraws)
        skipped = draws.new_flag(lambda: self.rates["position_skip"])
        return lambda positions: positions * (1.0 - draws.number(skipped)).to(positions.dtype)

    def _score_penalty(self, draws: Draws) -> Callable[[], torch.Tensor]:
        assert isinstance(draws, GraphDraws)
        penalized = draws.new_flag(lambda: SCORE_PENALTY_PROBABILITY)
        return lambda: self._penalty * draws.number(penalized)

    def _bypass_limit(self, draws: Draws) -> Transform:
        assert isinstance(draws, GraphDraws)
        acts, minimum = draws.new_flag(lambda: BYPASS_LIMIT_PROBABILITY), draws.new_number(lambda: self.bypass_minimum)

        def limit(scale: torch.Tensor) -> torch.Tensor:
            does_act = draws.number(acts) > 0
            # Compared here: torch 2.14 fails on numbers of the host inside of functions with gradients of their own.
            below, above = (scale < draws.number(minimum)) & does_act, (scale > BYPASS_MAXIMUM) & does_act
            return TurnOutwardGradient.apply(scale, below, above)

        return limit

    def _layer_skip(self, draws: Draws, name: str) -> Transform:
        assert isinstance(draws, GraphDraws)
        place, rate = draws.new_per_sequence(), draws.new_number(lambda: self.rates[name])
        return lambda hidden_states: draws.keep(place, draws.number(rate), hidden_states)

    def _dropout_forward(self, draws: Draws) -> Callable:
        assert isinstance(draws, GraphDraws)
        rate = draws.new_number(lambda: self.rates["dropout"])

        def forward(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
            return time_shared_dropout(hidden_states, draws.number(rate)) if module.training else hidden_states

        return forward

    def _skip(self, kind: str, draws: Draws) -> Transform | None:
        if not getattr(self.config, kind):
            return None
        assert isinstance(draws, GraphDraws)
        place, rate = draws.new_per_sequence(), draws.new_number(lambda: self.rates[kind])
        return lambda branch: branch * draws.keep(place, draws.number(rate), branch)

    def _balancer(
        self, kind: str, draws: Draws, dim: int = -1, part: tuple[int, int] | None = None
    ) -> Transform | None:
        if not self.config.balancer:
            return None
        assert isinstance(draws, GraphDraws)
        decision = draws.new_decision()

        def line(features: torch.Tensor) -> torch.Tensor | None:
            limits = self.balancers[kind]
            acts = draws.happens(decision, limits.probability)
            return balancing_line(features, limits, dim, part) if acts else None

        place = draws.new_balancing(line)
        return lambda features: draws.balanced(features, place, dim)

    def _whiten(
        self,
        kind: str,
        name: str,
        draws: Draws,
        groups: int = 1,
        dim: int = -1,
        part: tuple[int, int] | None = None,
    ) -> Transform | None:
        if not self.config.whiten:
            return None
        assert isinstance(draws, GraphDraws)
        place = draws.new_whitening(self._whitening(kind, name, draws, groups, dim, part))
        return lambda features: draws.whitened(features, place)

    def _whitening(
        self, kind: str, name: str, draws: Draws, groups: int, dim: int, part: tuple[int, int] | None
    ) -> Whitening:
        decision, index, scale = draws.new_decision(), self.whiten_state.add(name), WHITENS[kind].gradient_scale

        def whiten(features: torch.Tensor, grad: torch.Tensor, in_bfloat16: bool) -> None:
            state = self.whiten_state
            if draws.happens(decision, WHITEN_PROBABILITIES[state.exceeded[index]]):
                limit = self.whiten_limits[kind]
                whiten_gradient_(grad, features, limit, scale, state, index, groups, dim, part, in_bfloat16)

        return whiten

    def _balancer_and_whiten(
        self,
        kind: str,
        name: str,
        draws: Draws,
        groups: int = 1,
        dim: int = -1,
        part: tuple[int, int] | None = None,
    ) -> tuple[Transform | None, ...]:
        if not self.config.balancer or not self.config.whiten:
            return super()._balancer_and_whiten(kind, name, draws, groups, dim, part)
        assert isinstance(draws, GraphDraws)
        decision, whiten = draws.new_decision(), self._whitening(kind, name, draws, groups, dim, part)

        # Both in one operation: behind it the graph would read and write the gradient once more, in every step.
        def push(features: torch.Tensor, grad: torch.Tensor, in_bfloat16: bool) -> None:
            whiten(features, grad, in_bfloat16)
            limits = self.balancers[kind]
            if draws.happens(decision, limits.probability):
                balance_gradient_(grad, features, limits, dim, part)

        place = draws.new_whitening(push)
        return (lambda features: draws.whitened(features, place),)
