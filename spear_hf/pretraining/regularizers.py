# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The training-only regularisers of the published recipe, installed on a model from outside.

    regularizers = install_regularizers(model, RegularizersConfig(enabled=True))
    for every step:
        regularizers.set_step(adjusted_batches(step, batch_seconds), normalizer)   # evaluates the schedules
        ... forward and backward passes of the step ...
        votes = regularizers.collect_votes()                                       # of Whiten's measurements
        regularizers.count_votes(votes.tolist())
    regularizers.remove()

They are hooks, and the `forward` of a few instances: nothing of them is in the modelling file, in the weights or in
the saved configuration, and all of them do nothing in eval mode. Numbers: regularizers_schedules.py.

Randomness: each layer, the stem and each `out_combiner` draws its numbers from torch's generators when it is called
(see `Draws`), so a run that seeds them by step and rank repeats, and gradient checkpointing draws the same again.
Ranks may draw differently. The only state is Whiten's (see `WhitenState`), which is the same on all ranks.

torch.compile: hooks and the replaced methods run eagerly (`torch.compiler.disable`), so a compiled model breaks its
graph around them, but no schedule and no draw is a constant of a graph: nothing is compiled twice because of them.
`in_graph=True` puts them into the graphs, for layers that are compiled one by one: regularizers_graph.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..modeling_spear import (
    SpearAttentionWeights,
    SpearBypass,
    SpearConvolution,
    SpearDownsampledStack,
    SpearFeedForward,
    SpearLayer,
    SpearModel,
    SpearStack,
    SpearStem,
)
from .regularizers_balancer import balance
from .regularizers_config import RegularizersConfig
from .regularizers_schedules import (
    BALANCERS,
    BYPASS_LIMIT_PROBABILITY,
    BYPASS_MAXIMUM,
    BYPASS_MINIMUM,
    POSITION_DROPOUT,
    RATES,
    SCORE_PENALTY,
    SCORE_PENALTY_PROBABILITY,
    STEM_GRADIENT_SCALE,
    WHITEN_PROBABILITIES,
    WHITENS,
    BalancerLimits,
    Schedule,
    layer_skip_schedules,
)
from .regularizers_skips import (
    Draws,
    LimitValue,
    ScaleGradient,
    bypass_with_scale,
    feature_mask,
    penalized_attention_weights,
)
from .regularizers_whiten import WhitenState, whiten


FORMAT_VERSION = 1
FILE_NAME = "regularizers.json"

Transform = Callable[[torch.Tensor], torch.Tensor]


def install_regularizers(model: nn.Module, config: RegularizersConfig, in_graph: bool = False) -> "Regularizers":
    """Installs what `config` asks for on a SPEAR encoder, or on a model that has one as `spear`.

    To be called before the model is wrapped (DDP, compile), and after any copy of it is made. `in_graph` is for
    `SpearModel.compile_layers`; it draws other numbers, of the same distributions.
    """
    if in_graph:
        from .regularizers_graph import GraphRegularizers

        return GraphRegularizers(model, config)
    return Regularizers(model, config)


class Regularizers:
    """Handle of the installed regularisers: evaluates their schedules, keeps their state, removes them."""

    def __init__(self, model: nn.Module, config: RegularizersConfig) -> None:
        self.config = config
        self.rates: dict[str, float] = {}
        """Rates by name at the current step; those of the layers' skips by the layer's name."""
        self.balancers: dict[str, BalancerLimits] = {}
        self.whiten_limits: dict[str, float] = {}
        self.bypass_minimum = 0.0
        self.score_penalty: float | torch.Tensor = SCORE_PENALTY
        self.whiten_state = WhitenState()
        self._layer_skips: dict[str, Schedule] = {}
        self._dropouts: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._feature_mask: torch.Tensor | None = None
        encoder = getattr(model, "spear", model)
        if not isinstance(encoder, SpearModel):
            raise TypeError(f"install_regularizers needs a SPEAR model, not a {type(model).__name__}.")
        self._encoder: SpearModel = encoder
        if config.enabled:
            self._install_encoder(encoder)
        self.set_step(0.0)

    # --------------------------------------------------------------------------------------------------- every step

    def set_step(self, batches: float, normalizer: float | torch.Tensor = 1.0) -> None:
        """Evaluates all schedules at so many adjusted batches (see `adjusted_batches`).

        `normalizer` is what this rank's loss, a sum over target frames, is divided by: the penalty of attention scores
        is an absolute gradient, which must be divided likewise. All else is relative to the incoming gradient.
        """
        if not self._undo:
            return
        self.rates = {name: schedule(batches) for name, schedule in (RATES | self._layer_skips).items()}
        self.balancers = {name: schedule(batches) for name, schedule in BALANCERS.items()}
        self.whiten_limits = {name: row.limit(batches) for name, row in WHITENS.items()}
        self.bypass_minimum = BYPASS_MINIMUM(batches)
        self.score_penalty = SCORE_PENALTY / normalizer
        for dropout in self._dropouts:
            dropout.p = self.rates["dropout"]

    def collect_votes(self) -> torch.Tensor:
        """To be called on every rank after the last backward pass of a step: what Whiten measured, on the device."""
        device = next(self._encoder.parameters()).device
        if not self._undo or not self.whiten_state.names:
            return torch.zeros(0, device=device)
        return self.whiten_state.collect(device)

    def count_votes(self, votes: Sequence[float]) -> None:
        """Settles Whiten's state by what was collected."""
        self.whiten_state.count(votes)

    def state_dict(self) -> dict[str, Any]:
        """Whiten's state after `count_votes`: for each place whether it exceeded its limit when last measured."""
        state = self.whiten_state
        return {"format_version": FORMAT_VERSION, "whiten_exceeded": dict(zip(state.names, state.exceeded))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave. ValueError if it is of another model, configuration or version."""
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"The regularisers' state has format version {state['format_version']}, this spear_hf reads "
                f"{FORMAT_VERSION}: use the spear_hf that wrote it."
            )
        exceeded, names = state["whiten_exceeded"], self.whiten_state.names
        if sorted(exceeded) != sorted(names):
            differing = sorted(set(exceeded) ^ set(names))
            raise ValueError(
                f"The regularisers' state is of another model or configuration: {len(differing)} places of Whiten "
                f"are on one side only, such as {differing[0]}."
            )
        self.whiten_state.exceeded = [bool(exceeded[name]) for name in names]

    def save(self, folder: Path) -> None:
        """Writes the state into a checkpoint's folder."""
        (folder / FILE_NAME).write_text(json.dumps(self.state_dict(), indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Reads the state from a checkpoint's folder; one without it has none where nothing is installed."""
        if self._undo or (folder / FILE_NAME).exists():
            self.load_state_dict(json.loads((folder / FILE_NAME).read_text(encoding="utf-8")))

    def remove(self) -> None:
        """Leaves the model as it was before the installation."""
        while self._undo:
            self._undo.pop()()

    # ------------------------------------------------------------------------------------------------- installation

    def _install_encoder(self, encoder: SpearModel) -> None:
        config = encoder.config
        self._install_position_dropout(encoder)
        self._install_stem(encoder)
        skips = layer_skip_schedules(config.num_layers_per_stack, config.downsampling_factors)
        for place, stack in enumerate(encoder.stacks):
            name = f"stacks.{place}"
            if isinstance(stack, SpearDownsampledStack):
                self._install_bypass(stack.out_combiner, self._draw_before(stack))
                stack, name = stack.stack, f"{name}.stack"
            assert isinstance(stack, SpearStack)
            self._install_feature_mask(stack)
            for index, layer in enumerate(stack.layers):
                assert isinstance(layer, SpearLayer)
                draws = self._layer_draws(stack, layer)
                self._install_layer(layer, f"{name}.layers.{index}", skips[place][index], draws)

    def _install_position_dropout(self, encoder: SpearModel) -> None:
        """The encoder reads the rate from its configuration, which is put back at once: it goes into checkpoints."""
        if not self.config.position_dropout:
            return
        configured: list[float] = []

        def set_rate(module: SpearModel, args: Any) -> None:
            if module.training:
                configured.append(module.config.position_dropout)
                module.config.position_dropout = POSITION_DROPOUT

        def put_back(module: SpearModel, args: Any, output: Any) -> None:
            if configured:
                module.config.position_dropout = configured.pop()

        self._undo.append(encoder.register_forward_pre_hook(set_rate).remove)
        self._undo.append(encoder.register_forward_hook(put_back, always_call=True).remove)

    def _install_stem(self, encoder: SpearModel) -> None:
        stem, config = encoder.stem, encoder.config
        draws = self._stem_draws(encoder)
        scale = self._scale_gradient if self.config.stem_gradient_scale else None
        self._after(stem.conv1, scale, self._balancer("stem_conv1", draws, dim=1))
        self._after(stem.conv2, self._balancer("stem_conv2", draws, dim=1))
        self._after(stem.conv3, self._balancer("stem_conv3", draws, dim=1))
        self._after(stem.convnext.pointwise_conv1, self._balancer("convnext_hidden", draws, dim=1))
        self._after(stem.convnext.pointwise_conv2, self._skip("convnext_skip", draws))
        self._install_convnext_output(stem, draws)
        self._after(stem.out_proj, self._whiten("stem_output", "stem.out_proj", draws))
        self._install_dropout(stem.dropout, draws)
        if self.config.feature_mask:
            places = draws.new_per_sequence(), draws.new_per_sequence()
            unmasked_size = config.unmasked_hidden_size
            assert unmasked_size is not None  # set by SpearConfig

            def draw_mask(like: torch.Tensor) -> torch.Tensor:
                self._feature_mask = feature_mask(draws, places, like, unmasked_size)
                return like

            self._install_mask_draw(encoder, draw_mask)

    def _install_convnext_output(self, stem: SpearStem, draws: Draws) -> None:
        self._after(stem.convnext, *self._balancer_and_whiten("convnext_output", "stem.convnext", draws, dim=1))

    def _install_mask_draw(self, encoder: SpearModel, draw_mask: Transform) -> None:
        self._after(encoder.stem, draw_mask)

    def _install_feature_mask(self, stack: SpearStack) -> None:
        """The stem's draw is handed down to the layers as an argument, so that recomputed layers get the same."""
        if not self.config.feature_mask:
            return

        def hand_down(module: SpearStack, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not module.training or self._feature_mask is None:
                return None
            mask = self._feature_mask.to(args[0].dtype)
            return (args[0] * mask, *args[1:]), kwargs | {"feature_mask": mask}

        self._undo.append(stack.register_forward_pre_hook(torch.compiler.disable(hand_down), with_kwargs=True).remove)

    def _stem_draws(self, encoder: SpearModel) -> Draws:
        return self._draw_before(encoder.stem)

    def _layer_draws(self, stack: SpearStack, layer: SpearLayer) -> Draws:
        # Before the first module inside the layer, which gradient checkpointing calls again: whether it calls the
        # hooks of the layer itself again differs between versions of transformers.
        return self._draw_before(layer.self_attn_weights)

    def _install_layer(self, layer: SpearLayer, name: str, skip: Schedule, draws: Draws) -> None:
        self._install_attention_weights(layer.self_attn_weights, f"{name}.self_attn_weights", draws)

        attention_skip = self._skip("attention_skip", draws)  # one draw for the three modules
        nonlin, nonlin_name = layer.nonlin_attention, f"{name}.nonlin_attention"
        inner = 3 * self._encoder.config.hidden_size // 4
        balance_gate = self._balancer("nonlin_gate", draws, part=(0, inner))
        whiten_value = self._whiten("nonlin_value", f"{nonlin_name}.in_proj", draws, part=(inner, inner))
        # Gates, values, gates of the output. In this order the gradient is balanced before it goes through memory.
        self._after(nonlin.in_proj, whiten_value, balance_gate)
        self._after(
            nonlin,
            self._whiten("nonlin_output", nonlin_name, draws),
            self._balancer("nonlin_output", draws),
            attention_skip,
        )
        for part in ("self_attn1", "self_attn2"):
            whiten_output = self._whiten("self_attention_output", f"{name}.{part}", draws)
            self._after(getattr(layer, part), whiten_output, attention_skip)
        for part in ("conv_module1", "conv_module2"):
            self._install_convolution(getattr(layer, part), f"{name}.{part}", draws)
        for number in (1, 2, 3):
            part = f"feed_forward{number}"
            self._install_feed_forward(getattr(layer, part), f"{name}.{part}", draws, number)

        self._before(layer.norm, self._balancer("layer_before_norm", draws))
        self._install_bypass(layer.bypass_mid, draws)
        self._layer_skips[name] = skip
        self._install_bypass(layer.bypass, draws, name if self.config.layer_skip else None)
        # The bypass is the last of the layer.
        self._after(layer.bypass, *self._balancer_and_whiten("layer_output", name, draws))
        if self.config.feature_mask:
            self._install_layer_mask(layer)

    def _install_layer_mask(self, layer: SpearLayer) -> None:
        def mask(module: SpearLayer, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor | None:
            return output * kwargs["feature_mask"] if "feature_mask" in kwargs else None

        self._undo.append(layer.register_forward_hook(torch.compiler.disable(mask), with_kwargs=True).remove)

    def _install_attention_weights(self, module: SpearAttentionWeights, name: str, draws: Draws) -> None:
        keys = module.num_heads * module.query_head_dim
        self._after(
            module.in_proj,  # queries, keys, queries of the positions
            *self._balancer_and_whiten(
                "attention_keys", f"{name}.in_proj", draws, groups=module.num_heads, part=(keys, keys)
            ),
        )
        if self.config.position_skip:
            self._after(module.linear_pos, self._position_skip(draws))
        if self.config.score_penalty:
            penalty = self._score_penalty(draws)

            def forward(
                module: SpearAttentionWeights,
                hidden_states: torch.Tensor,
                position_table: torch.Tensor,
                key_mask: torch.Tensor | None = None,
            ) -> torch.Tensor:
                now = penalty() if module.training else None
                if now is None:
                    return type(module).forward(module, hidden_states, position_table, key_mask)
                return penalized_attention_weights(module, hidden_states, position_table, key_mask, now)

            self._replace_forward(module, forward)

    def _position_skip(self, draws: Draws) -> Transform:
        decision = draws.new_decision()

        def leave_out(positions: torch.Tensor) -> torch.Tensor:
            return positions * 0.0 if draws.happens(decision, self.rates["position_skip"]) else positions

        return leave_out

    def _score_penalty(self, draws: Draws) -> Callable[[], float | torch.Tensor | None]:
        """What gives the penalty of this call, None for none."""
        decision = draws.new_decision()
        return lambda: self.score_penalty if draws.happens(decision, SCORE_PENALTY_PROBABILITY) else None

    def _install_convolution(self, module: SpearConvolution, name: str, draws: Draws) -> None:
        size = self._encoder.config.hidden_size
        self._after(module.in_proj, self._balancer("convolution_gate", draws, part=(size, size)))  # values, gates
        self._after(
            module.depthwise_conv,  # (batch, channels, frames)
            *self._balancer_and_whiten("convolution_depthwise", f"{name}.depthwise_conv", draws, dim=1),
        )
        self._after(module, self._skip("convolution_skip", draws))

    def _install_feed_forward(self, module: SpearFeedForward, name: str, draws: Draws, number: int) -> None:
        self._after(module.in_proj, self._balancer("feed_forward_hidden", draws))
        self._install_dropout(module.dropout, draws)
        whiten_output = self._whiten("feed_forward_output", name, draws)
        if number == 1:
            self._after(module, whiten_output)
        else:
            balancer = self._balancer(f"feed_forward{number}_output", draws)
            self._after(module, whiten_output, balancer, self._skip("feed_forward_skip", draws))

    def _install_bypass(self, module: SpearBypass, draws: Draws, skip: str | None = None) -> None:
        """Limits, and where `skip` names a rate the skip of a whole layer."""
        limit = self._bypass_limit(draws) if self.config.bypass_limits else None
        skipped = None if skip is None else self._layer_skip(draws, skip)
        if limit is None and skipped is None:
            return

        def forward(module: SpearBypass, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
            scale: torch.Tensor = module.bypass_scale
            if module.training and limit is not None:
                scale = limit(scale)
            if module.training and skipped is not None:
                scale = scale * skipped(hidden_states).to(scale.dtype)
            return bypass_with_scale(module, residual, hidden_states, scale)

        self._replace_forward(module, forward)

    def _bypass_limit(self, draws: Draws) -> Transform:
        decision = draws.new_decision()

        def limit(scale: torch.Tensor) -> torch.Tensor:
            if not draws.happens(decision, BYPASS_LIMIT_PROBABILITY):
                return scale
            return LimitValue.apply(scale, self.bypass_minimum, BYPASS_MAXIMUM)

        return limit

    def _layer_skip(self, draws: Draws, name: str) -> Transform:
        """From features to what is 0 where a sequence goes without the layer, else 1: `(batch, 1, 1)`."""
        place = draws.new_per_sequence()
        return lambda hidden_states: draws.keep(place, self.rates[name], hidden_states)

    def _install_dropout(self, dropout: Any, draws: Draws) -> None:
        """The module's own rate follows the schedule."""
        if not self.config.dropout:
            return
        configured = dropout.p
        self._dropouts.append(dropout)
        self._undo.append(lambda: setattr(dropout, "p", configured))
        # Out of compiled graphs, which would hold the rate as a constant.
        self._replace_forward(dropout, self._dropout_forward(draws))

    def _dropout_forward(self, draws: Draws) -> Callable:
        return lambda module, hidden_states: type(module).forward(module, hidden_states)

    # --------------------------------------------------------------------------- what a place does with its features

    def _balancer(
        self, kind: str, draws: Draws, dim: int = -1, part: tuple[int, int] | None = None
    ) -> Transform | None:
        if not self.config.balancer:
            return None
        decision = draws.new_decision()

        def apply(features: torch.Tensor) -> torch.Tensor:
            limits = self.balancers[kind]
            return balance(features, limits, dim, part) if draws.happens(decision, limits.probability) else features

        return apply

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
        decision, index, scale = draws.new_decision(), self.whiten_state.add(name), WHITENS[kind].gradient_scale

        def apply(features: torch.Tensor) -> torch.Tensor:
            probability = WHITEN_PROBABILITIES[self.whiten_state.exceeded[index]]
            if not draws.happens(decision, probability):
                return features
            return whiten(features, self.whiten_limits[kind], scale, self.whiten_state, index, groups, dim, part)

        return apply

    def _balancer_and_whiten(
        self,
        kind: str,
        name: str,
        draws: Draws,
        groups: int = 1,
        dim: int = -1,
        part: tuple[int, int] | None = None,
    ) -> tuple[Transform | None, ...]:
        """Of a kind that has both, of the same features."""
        return self._balancer(kind, draws, dim, part), self._whiten(kind, name, draws, groups, dim, part)

    def _skip(self, kind: str, draws: Draws) -> Transform | None:
        if not getattr(self.config, kind):
            return None
        place = draws.new_per_sequence()

        def apply(branch: torch.Tensor) -> torch.Tensor:
            rate = self.rates[kind]
            return branch * draws.keep(place, rate, branch) if rate > 0 else branch

        return apply

    @staticmethod
    def _scale_gradient(features: torch.Tensor) -> torch.Tensor:
        return ScaleGradient.apply(features, STEM_GRADIENT_SCALE)

    # --------------------------------------------------------------------------------------------- hooks and forwards

    def _draw_before(self, module: nn.Module) -> Draws:
        """Random numbers that are drawn anew before every call of `module`."""
        draws = self._new_draws()

        @torch.compiler.disable
        def draw(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if module.training:
                features = first_argument(args, kwargs)
                draws.draw(features.shape[0], features.device)

        self._undo.append(module.register_forward_pre_hook(draw, with_kwargs=True).remove)
        return draws

    def _new_draws(self) -> Draws:
        return Draws()

    def _traced(self, function: Callable) -> Callable:
        """A hook or a method as torch.compile is to see it."""
        return torch.compiler.disable(function)

    def _after(self, module: nn.Module, *transforms: Transform | None) -> None:
        """In training the output of `module` goes through these, in this order."""
        active = [transform for transform in transforms if transform is not None]
        if not active:
            return

        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if not module.training:
                return None
            for transform in active:
                output = transform(output)
            return output

        self._undo.append(module.register_forward_hook(self._traced(hook)).remove)

    def _before(self, module: nn.Module, transform: Transform | None) -> None:
        """In training the first argument of `module` goes through this."""
        if transform is None:
            return

        def hook(module: nn.Module, args: tuple) -> tuple | None:
            return (transform(args[0]), *args[1:]) if module.training else None

        self._undo.append(module.register_forward_pre_hook(self._traced(hook)).remove)

    def _replace_forward(self, module: nn.Module, forward: Callable) -> None:
        """Of this instance. A bound method, so that a deep copy of the model computes with its own parameters."""
        module.forward = MethodType(self._traced(forward), module)
        self._undo.append(lambda: delattr(module, "forward"))


def first_argument(args: tuple, kwargs: dict) -> Any:
    """Of a call, whether it was given by name or not."""
    return args[0] if args else next(iter(kwargs.values()))
