# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""ScaledAdam: Adam whose steps are relative to the size of each tensor, and which learns that size as well.

    optimizer = ScaledAdam(model.named_parameters(), lr=0.045)

The optimiser of Zipformer (arXiv 2310.11230), which the paper trains SPEAR with. Of a tensor p with
gradient g and root mean square rms(p), in every step, after g has been clipped (all in float32):

    v     <- beta2 v + (1 - beta2) g²
    delta <- beta1 delta - (1 - beta1) lr max(rms(p), param_min_rms) g / (sqrt(v / (1 - beta2^t)) + eps)
    p     <- p + delta

and before it in every `size_update_period`-th, with s = Σ p·g of the `size_update_period` steps up to this one and
beta = beta2^size_update_period:

    rms(p) is computed anew; it is kept until the next time
    w     <- beta w + (1 - beta) mean(s²)
    r      = -scalar_lr_scale lr sqrt(1 - beta^n) Σ s / (sqrt(w) + eps), at the n-th time
    delta <- delta + (1 - beta1) p · min(r, (param_max_rms - rms(p)) / rms(p)), nothing where rms(p) < param_min_rms

A tensor of one element is a scalar: its factor in place of rms(p) is `scalar_lr_scale`, it has no size to learn, and
it is held within ±`scalar_max` before delta is added.

Clipping is global: the norm over all tensors of g·rms(p) is held below `clipping_scale` times the median of the
`clipping_update_period` latest norms, which is taken anew every so many steps; at first, when it changes fast, after
10, 20 and 40 steps, and then doubled. There is none before. One difference to the published recipe, which stops
correcting v when the correction is below one per cent: here it is always corrected.

Cost: two float32 averages a parameter, as AdamW, and a temporary of some tensors at a time; a step reads the gradients
once more than AdamW's and, for Σ p·g, the weights. The host waits for the device once in `size_update_period` steps,
to read one short vector, and is otherwise ahead of it.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


logger = logging.getLogger(__name__)

# Steps after which the threshold of the norm is first estimated, and what it is multiplied by then.
EARLY_ESTIMATES, EARLY_SLACK = (10, 20, 40), 2.0

# A warning says which tensors are at fault where so large a share of the steps is clipped, at most once in so many
# windows of `clipping_update_period` steps. Normally it is a few per cent.
WARN_SHARE, WARN_WINDOWS = 0.25, 10

# Elements that are worked on at a time. On the CPU, weights, gradient, averages and a temporary of as many should stay
# in the cache; on an accelerator few launches matter, and the temporary should be small beside the model.
CPU_CHUNK, DEVICE_CHUNK = 1 << 17, 1 << 26


class _Chunk(NamedTuple):
    """Parameters of one group that are worked on at a time, with their state."""

    group: dict[str, Any]
    places: range
    parameters: list[Tensor]
    exp_avg_sq: list[Tensor]
    delta: list[Tensor]
    scalars: list[Tensor]


class _HostCopy:
    """A number on its way to the host, which waits for it only when it is read."""

    def __init__(self, number: Tensor) -> None:
        self._copy = number.to("cpu", non_blocking=True)
        self._arrival = torch.cuda.Event() if number.device.type == "cuda" else None
        if self._arrival is not None:
            self._arrival.record(torch.cuda.current_stream(number.device))

    def read(self) -> float:
        if self._arrival is not None:
            self._arrival.synchronize()
        return float(self._copy)


class ScaledAdam(torch.optim.Optimizer):
    """See the module. Takes named parameters, or groups of them, as every optimiser of torch; names are for warnings.

    Parameters are float32 (or float64) and whole, not sharded; all on one device. One without a gradient is treated as
    if it were zero, so its momentum goes on. Gradients must be finite, and are clipped in place.

    Args:
        lr: may differ between groups, as may `betas`, `eps`, `scalar_lr_scale`, `param_min_rms`, `param_max_rms` and
            `scalar_max`; the other arguments are of the whole.
        clipping_scale: None turns clipping off.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.045,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        clipping_scale: float | None = 2.0,
        scalar_lr_scale: float = 0.1,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
    ) -> None:
        if size_update_period < 1 or clipping_update_period < 1:
            raise ValueError(
                f"size_update_period={size_update_period} and clipping_update_period={clipping_update_period} must be "
                "at least 1 step."
            )
        self.clipping_scale = clipping_scale
        self.size_update_period = size_update_period
        self.clipping_update_period = clipping_update_period
        self._step = 0
        self._vectors: dict[str, Tensor] = {}  # what is small, of all tensors together; empty before the first step
        self._scales: list[float] = []  # on the host: rms of tensors, `scalar_lr_scale` of scalars
        self._work: list[_Chunk] = []  # the parameters in the order of their updates; empty before the first step
        self._sizes = torch.empty(0)  # elements of each of them
        self._clipping_factor: _HostCopy | None = None
        self._last_warning = -WARN_WINDOWS * clipping_update_period
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "scalar_lr_scale": scalar_lr_scale,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of any optimiser, but only before the first step."""
        if self._step:
            raise ValueError("ScaledAdam has begun: its parameters are fixed. Make a new one for other parameters.")
        super().add_param_group(param_group)

    @property
    def clipping_factor(self) -> float:
        """What the gradients were multiplied by in the last step. Waits until this is known, not for the step."""
        return 1.0 if self._clipping_factor is None else self._clipping_factor.read()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if not self._work:
            check_parameters(parameters)
            self._sizes = parameters[0].new_tensor([parameter.numel() for parameter in parameters])
            if not self._vectors:
                self._start(parameters)
            self._plan(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

        vectors, place = self._vectors, self._step % self.size_update_period
        norms = torch.stack(torch._foreach_norm(gradients)) * vectors["rms"]  # (tensors,)
        vectors["size_grads"][place] = dot_products(parameters, gradients)
        factor = self._clip(norms)
        if factor is not None:
            vectors["size_grads"][place] *= factor
            if factor.device.type != "cpu" or factor < 1:  # the CPU knows it without waiting
                torch._foreach_mul_(gradients, factor)

        size_steps = None
        if place == self.size_update_period - 1:
            self._measure(parameters)
            steps = self._size_steps()
            self._scales, size_steps = torch.stack([vectors["rms"], steps]).tolist()
        elif not self._scales:  # the first step, also after loading
            self._scales = vectors["rms"].tolist()

        for chunk in self._work:
            here = slice(chunk.places.start, chunk.places.stop)
            self._update(chunk, gradients[here], None if size_steps is None else size_steps[here])
        self._step += 1
        return loss

    def _plan(self, parameters: list[Tensor]) -> None:
        """What does not change from step to step."""
        start = 0
        for group in self.param_groups:
            end = start + len(group["params"])
            for places in chunks(parameters, start, end):
                part = parameters[places.start : places.stop]
                states = [self.state[parameter] for parameter in part]
                moments = [state["exp_avg_sq"] for state in states], [state["delta"] for state in states]
                self._work.append(_Chunk(group, places, part, *moments, [p for p in part if p.numel() == 1]))
            start = end

    def _start(self, parameters: list[Tensor]) -> None:
        """Makes the state, before the first step."""
        first = parameters[0]
        for parameter in parameters:
            self.state[parameter] = {"delta": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        zeros = first.new_zeros(len(parameters))
        self._vectors = {
            "rms": zeros.clone(),
            "size_exp_avg_sq": zeros.clone(),
            "size_grads": zeros.repeat(self.size_update_period, 1),  # (period, tensors)
            "norms": first.new_zeros(self.clipping_update_period),
            "threshold": first.new_full((), math.inf),
            "clipped": zeros.new_zeros(()),  # steps of this window
            "clipped_shares": zeros.clone(),  # of each tensor in the squared norms of these steps, summed
        }
        self._measure(parameters)

    def _measure(self, parameters: list[Tensor]) -> None:
        """The root mean square of every tensor, and the scalars' factor in its place, anew."""
        rms = torch.stack(torch._foreach_norm(parameters)) / self._sizes.sqrt()
        parts = rms.split([len(group["params"]) for group in self.param_groups])
        sizes = self._sizes.split([len(part) for part in parts])
        self._vectors["rms"] = torch.cat(
            [
                torch.where(size == 1, group["scalar_lr_scale"], part)
                for group, size, part in zip(self.param_groups, sizes, parts)
            ]
        )

    def _clip(self, norms: Tensor) -> Tensor | None:
        """The factor (a tensor of no dimensions) for the gradients whose norms, relative to their weights', are given.

        None where there is no clipping yet, or none at all.
        """
        step, period, vectors = self._step, self.clipping_update_period, self._vectors
        self._clipping_factor = None
        if self.clipping_scale is None or step == 0:
            return None
        norm = torch.linalg.vector_norm(norms)
        vectors["norms"][step % period] = norm
        early = step in EARLY_ESTIMATES and step < period
        if early or step % period == 0:
            count = min(step, period)  # unfilled places are zero and come first
            median = vectors["norms"].sort().values[-count:][min(2 * (count // 4), count - 1)]
            vectors["threshold"] = median * self.clipping_scale * (EARLY_SLACK if early else 1.0)
        if step % period == 0:
            self._close_window()
        factor = (vectors["threshold"] / (norm + 1e-20)).clamp(max=1.0)
        clipped = factor < 1
        vectors["clipped"] += clipped
        vectors["clipped_shares"] += (norms / (norm + 1e-20)).square() * clipped
        self._clipping_factor = _HostCopy(factor)
        return factor

    def _close_window(self) -> None:
        """Warns if much of the last window was clipped, naming the worst tensors, and begins the next."""
        clipped, shares = int(self._vectors["clipped"]), self._vectors["clipped_shares"]
        wait = WARN_WINDOWS * self.clipping_update_period
        if clipped >= WARN_SHARE * self.clipping_update_period and self._step - self._last_warning >= wait:
            self._last_warning = self._step
            names = [name for group in self.param_groups for name in parameter_names(group)]
            values, places = (shares / clipped).topk(min(3, len(names)))
            worst = [f"{names[place]} ({value:.0%})" for value, place in zip(values.tolist(), places.tolist())]
            logger.warning(
                "Step %d: %d of the last %d gradients were clipped. Largest shares of their squared norms: %s.",
                self._step, clipped, self.clipping_update_period, ", ".join(worst),
            )  # fmt: skip
        self._vectors["clipped"].zero_()
        shares.zero_()

    def _size_steps(self) -> Tensor:
        """By what share of its own every tensor is to be added to its delta: (tensors,), 0 for scalars."""
        vectors, parts, start = self._vectors, [], 0
        for group in self.param_groups:
            here = slice(start, start + len(group["params"]))
            beta = group["betas"][1] ** self.size_update_period
            correction = 1 - beta ** (self._step // self.size_update_period + 1)
            rate = group["scalar_lr_scale"] * group["lr"] * correction**0.5
            grads, average, rms = (
                vectors["size_grads"][:, here],
                vectors["size_exp_avg_sq"][here],
                vectors["rms"][here],
            )
            average.mul_(beta).add_(grads.square().mean(dim=0), alpha=1 - beta)
            steps = -rate * grads.sum(dim=0) / (average.sqrt() + group["eps"])
            steps = torch.where(rms < group["param_min_rms"], 0.0, steps)
            # Of rms 0 the room is infinite, and the step 0.
            steps = torch.minimum(steps, (group["param_max_rms"] - rms) / rms)
            parts.append(torch.where(self._sizes[here] == 1, 0.0, (1 - group["betas"][0]) * steps))
            start = here.stop
        return torch.cat(parts)

    def _update(self, chunk: "_Chunk", g: list[Tensor], size_steps: list[float] | None) -> None:
        """Moves the parameters of `chunk`, whose gradients are `g`."""
        group, p, v, delta = chunk.group, chunk.parameters, chunk.exp_avg_sq, chunk.delta
        beta1, beta2 = group["betas"]
        correction = (1 - beta2 ** (self._step + 1)) ** 0.5

        torch._foreach_mul_(delta, beta1)
        if size_steps is not None:
            torch._foreach_add_(delta, torch._foreach_mul(p, size_steps))
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        # g / (sqrt(v / correction²) + eps) is correction g / (sqrt(v) + correction eps): one pass less.
        divisors = torch._foreach_sqrt(v)
        torch._foreach_add_(divisors, correction * group["eps"])
        rate = -group["lr"] * (1 - beta1) * correction
        scales = [rate * max(self._scales[place], group["param_min_rms"]) for place in chunk.places]
        torch._foreach_addcdiv_(delta, g, divisors, scales)
        if chunk.scalars:
            torch._foreach_clamp_min_(chunk.scalars, -group["scalar_max"])
            torch._foreach_clamp_max_(chunk.scalars, group["scalar_max"])
        torch._foreach_add_(p, delta)

    def state_dict(self) -> dict[str, Any]:
        """As of any optimiser, with one more entry, `scaled_adam`: the step and what is of all tensors together."""
        return {
            **super().state_dict(),
            "scaled_adam": {"step": self._step, "last_warning": self._last_warning, **self._vectors},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """ValueError where it is of another optimiser or of other periods."""
        if "scaled_adam" not in state_dict:
            raise ValueError(
                "This is not the state of ScaledAdam (it has no entry 'scaled_adam'): resume with the optimizer.name "
                "that it was saved with."
            )
        shared = dict(state_dict["scaled_adam"])
        step, last_warning = int(shared.pop("step")), int(shared.pop("last_warning"))
        for name, expected in (("size_grads", self.size_update_period), ("norms", self.clipping_update_period)):
            if shared and len(shared[name]) != expected:
                period = "size_update_period" if name == "size_grads" else "clipping_update_period"
                raise ValueError(f"The state was saved with {period}={len(shared[name])}, not {expected}: restore it.")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "scaled_adam"})
        device = self.param_groups[0]["params"][0].device
        self._vectors = {name: vector.to(device, copy=True) for name, vector in shared.items()}
        self._step, self._last_warning, self._scales, self._work = step, last_warning, [], []


def check_parameters(parameters: list[Tensor]) -> None:
    """ValueError for parameters that this optimiser would not do justice to."""
    first = parameters[0]
    for parameter in parameters:
        if isinstance(parameter, DTensor) or parameter.numel() == 0:
            raise ValueError(
                "ScaledAdam needs whole tensors for their root mean squares, but these are sharded (FSDP). Train with "
                "DDP, or set optimizer.name=adamw."
            )
        if parameter.dtype not in (torch.float32, torch.float64) or parameter.dtype != first.dtype:
            raise ValueError(
                f"ScaledAdam updates float32 weights, but one is {parameter.dtype}: call model.float(), and use "
                "autocast for a forward pass in half precision."
            )
        if parameter.device != first.device:
            raise ValueError(f"ScaledAdam needs all weights on one device, not {first.device} and {parameter.device}.")


def dot_products(parameters: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Σ p·g of every tensor: (tensors,)."""
    if parameters[0].device.type == "cpu":
        return torch.stack([torch.dot(p.reshape(-1), g.reshape(-1)) for p, g in zip(parameters, gradients)])
    # Every dot product is a launch or two: those of one shape go together.
    shapes: dict[torch.Size, list[int]] = {}
    for place, parameter in enumerate(parameters):
        shapes.setdefault(parameter.shape, []).append(place)
    results: dict[int, Tensor] = {}
    for places in shapes.values():
        products = torch.stack(torch._foreach_mul([parameters[i] for i in places], [gradients[i] for i in places]))
        results.update(zip(places, products.reshape(len(places), -1).sum(dim=1).unbind()))
    return torch.stack([results[place] for place in range(len(parameters))])


def chunks(tensors: list[Tensor], start: int, end: int) -> Iterable[range]:
    """Consecutive places from `start` to `end`, of about as many elements as should be worked on at a time."""
    limit = CPU_CHUNK if tensors[0].device.type == "cpu" else DEVICE_CHUNK
    first, elements = start, 0
    for place in range(start, end):
        if place > first and elements + tensors[place].numel() > limit:
            yield range(first, place)
            first, elements = place, 0
        elements += tensors[place].numel()
    if first < end:  # a group may be empty
        yield range(first, end)


def parameter_names(group: dict[str, Any]) -> list[str]:
    """The names that the parameters were given with, or their places and shapes."""
    unnamed = (f"parameter {place} of shape {tuple(p.shape)}" for place, p in enumerate(group["params"]))
    return list(group.get("param_names", unnamed))
