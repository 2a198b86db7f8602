# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What Balancer and Whiten cost a training step on a GPU, counted without a GPU: launches, bytes, floating-point work.

    python examples/count_regularizer_kernels.py --output model_cards/benchmarks/regularizer_kernels.csv

The step is pre-training in bfloat16 autocast of `--batch` utterances of 10 s by compiled layers. What their graphs do
is not counted here (examples/count_gpu_kernels.py does), but what happens outside of them: every place is called once,
on tensors without memory that have the shapes, types and order of what the model computes there, and every operation
and every kernel in Triton is a launch that reads its arguments and writes its results once. `launches` and the rest
are means of a step: each place by the share of steps in which it acts. Whiten's places all count as beyond their
limits, as nearly all were in experiments/pretraining.md. `milliseconds` is what the sum takes if nothing overlaps, at
the rates that the options give: a calculation for comparing, no measurement.
"""

import argparse
import collections
import contextlib
import csv
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from count_gpu_kernels import Kernels, autocast_as_on_cuda, moved, pretraining, run, step_inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

import spear_hf.modeling_spear as modeling
from spear_hf.pretraining.regularizers import install_regularizers
from spear_hf.pretraining.regularizers_config import RegularizersConfig
from spear_hf.pretraining.regularizers_graph import GraphDraws, GraphRegularizers
from spear_hf.pretraining.regularizers_schedules import WHITEN_PROBABILITIES


PRODUCTS = ("mm", "addmm")


@dataclass
class Row:
    """The places of a kind. `batches`: adjusted ones, of the schedules; `acting`: places that act in a step."""

    batches: float
    regularizer: str
    kind: str
    dtype: str
    places: int = 0
    acting: float = 0.0
    launches: float = 0.0
    gigabytes: float = 0.0
    teraflop_float32: float = 0.0
    teraflop_bfloat16: float = 0.0
    milliseconds: float = 0.0


@dataclass
class Place:
    """An operation of a Balancer, a Whiten or both, in the order in which it asks whether they act."""

    regularizers: tuple[str, ...]
    kind: str
    act: Callable[..., Any]
    features: torch.Tensor


class Work(Kernels):
    """Counts the work of matrix products as well."""

    IGNORED = (*Kernels.IGNORED, "promote_types", "is_autocast_enabled", "get_autocast_dtype")

    def __init__(self) -> None:
        super().__init__()
        self.flops = collections.Counter[torch.dtype]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            left, right = args[PRODUCTS.index(name) :][:2]
            self.flops[left.dtype] += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result

    def launch(self, kernel: Any, *args: Any, **options: Any) -> None:
        """In place of a kernel's own launch."""
        self.kernels += 1
        self.bytes += sum(moved(tensor) for tensor in args if isinstance(tensor, torch.Tensor))


class Places:
    """Finds the places of a model whose layers are to be compiled."""

    def __init__(self) -> None:
        self.found: list[Place] = []
        self._installed: dict[tuple[GraphDraws, str, int], tuple[str, tuple[str, ...]]] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Installation and a forward pass are to be in here."""
        installs: dict[str, tuple[str, tuple[str, ...]]] = {
            "_balancer": ("_balancings", ("balancer",)),
            "_whiten": ("_whitenings", ("whiten",)),
            "_balancer_and_whiten": ("_whitenings", ("whiten", "balancer")),
        }
        changed: dict[tuple[Any, str], Callable[..., Any]] = {
            (GraphRegularizers, name): self._named(getattr(GraphRegularizers, name), *installed)
            for name, installed in installs.items()
        }
        changed |= {
            (GraphDraws, "balanced"): lambda draws, x, place, dim: self._called(draws, "_balancings", x, place),
            (GraphDraws, "whitened"): lambda draws, x, place: self._called(draws, "_whitenings", x, place),
            (GraphDraws, "draw"): draw_nothing,
            (modeling, "computes_in_half"): lambda hidden_states: True,
            (modeling, "_swoosh"): functools.partial(swoosh_as_compiled, modeling._swoosh),
        }
        before = {place: getattr(*place) for place in changed}
        try:
            for (owner, name), function in changed.items():
                setattr(owner, name, function)
            yield
        finally:
            for (owner, name), function in before.items():
                setattr(owner, name, function)

    def _named(self, install: Callable[..., Any], places: str, regularizers: tuple[str, ...]) -> Callable[..., Any]:
        @functools.wraps(install)
        def named(*args: Any, **kwargs: Any) -> Any:
            draws = next(arg for arg in args if isinstance(arg, GraphDraws))
            self._installed[draws, places, len(getattr(draws, places))] = args[1], regularizers
            return install(*args, **kwargs)

        return named

    def _called(self, draws: GraphDraws, places: str, features: torch.Tensor, place: int) -> torch.Tensor:
        kind, regularizers = self._installed[draws, places, place]
        self.found.append(Place(regularizers, kind, getattr(draws, places)[place], features))
        return features


def swoosh_as_compiled(swoosh: Callable[..., torch.Tensor], x: torch.Tensor, *numbers: float) -> torch.Tensor:
    return swoosh(x, *numbers).to(x.dtype)


def draw_nothing(draws: GraphDraws, batch: int, device: torch.device) -> None:
    """Numbers that have no value."""
    draws._sequences = torch.empty(draws._per_sequence, batch)
    draws._numbers = torch.empty(len(draws._sources))


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def work_of(place: Place, regularizer: str) -> Work:
    """Of one action of this one alone."""
    features, work, asked = on_gpu(place.features), Work(), iter(place.regularizers)
    happens, of_kernels = GraphDraws.happens, JITFunction.run
    GraphDraws.happens = lambda draws, decision, probability: next(asked) == regularizer
    JITFunction.run = lambda kernel, *args, **options: work.launch(kernel, *args)
    try:
        with work:
            if place.regularizers == ("balancer",):
                place.act(features)
            else:
                place.act(features, on_gpu(place.features), True)
    finally:
        GraphDraws.happens, JITFunction.run = happens, of_kernels
    return work


def rows(size: str, batch: int, all_batches: list[float]) -> list[Row]:
    """By adjusted batches, regulariser, kind and type."""
    places, table = Places(), dict[tuple[float, str, str, str], Row]()
    torch.cuda.device_of = contextlib.nullcontext  # type: ignore[assignment,misc]
    with FakeTensorMode(allow_non_fake_inputs=True), places.watched():
        model = pretraining(size)
        model._target_places = lambda labels: torch.arange(labels.numel() // labels.shape[-1])  # type: ignore
        regularizers = install_regularizers(model, RegularizersConfig(enabled=True), in_graph=True)
        run(model, **step_inputs(model, batch))
        state = regularizers.whiten_state
        state._votes = torch.empty(len(state.names), device="cuda")
        for name in ("balancer", "whiten"):  # the first one tries out, once for all, what can be launched
            work_of(next(place for place in places.found if name in place.regularizers), name)
        counted = [(place, name, work_of(place, name)) for place in places.found for name in place.regularizers]
    for batches in all_batches:
        regularizers.set_step(batches)
        for place, name, work in counted:
            key = batches, name, place.kind, str(place.features.dtype).removeprefix("torch.")
            row = table.setdefault(key, Row(*key))
            share = WHITEN_PROBABILITIES[True]
            if name == "balancer":
                share = regularizers.balancers[place.kind].probability
            row.places += 1
            row.acting += share
            row.launches += share * work.kernels
            row.gigabytes += share * work.bytes / 1e9
            row.teraflop_float32 += share * work.flops[torch.float32] / 1e12
            row.teraflop_bfloat16 += share * work.flops[torch.bfloat16] / 1e12
    return [table[key] for key in sorted(table)]


def totals(table: list[Row]) -> list[Row]:
    """Of all kinds."""
    found: dict[tuple[float, str], Row] = {}
    for row in table:
        result = found.setdefault((row.batches, row.regularizer), Row(row.batches, row.regularizer, "all", ""))
        for field in fields(Row)[4:]:
            setattr(result, field.name, getattr(result, field.name) + getattr(row, field.name))
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--size", default="base", choices=("base", "large", "xlarge"))
    parser.add_argument("--batch", type=int, default=240, help="utterances of 10 s")
    parser.add_argument("--batches", type=float, nargs="+", default=[0.0, 20_000.0], help="adjusted, of schedules")
    parser.add_argument("--bandwidth", type=float, default=4.0, help="TB/s")
    parser.add_argument("--flops", type=float, default=500.0, help="TFLOP/s in bfloat16")
    parser.add_argument("--flops-float32", type=float, default=45.0, help="TFLOP/s in float32")
    parser.add_argument("--launch", type=float, default=3.0, help="microseconds of a launch")
    arguments = parser.parse_args()
    library = torch.library.Library("aten", "IMPL")  # in force as long as it is held
    autocast_as_on_cuda(library)
    table = rows(arguments.size, arguments.batch, arguments.batches)
    for row in table:
        row.milliseconds = (
            1e-3 * arguments.launch * row.launches
            + row.gigabytes / arguments.bandwidth
            + 1e3 * row.teraflop_float32 / arguments.flops_float32
            + 1e3 * row.teraflop_bfloat16 / arguments.flops
        )
    table += totals(table)
    records = [{name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(row).items()} for row in table]
    for record in records:
        print(*(f"{name}={value}" for name, value in record.items()), sep="  ", flush=True)
    if arguments.output:
        command = " ".join(["python", "examples/count_regularizer_kernels.py", *sys.argv[1:]])
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*records[0], "torch", "command"], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**record, "torch": torch.__version__, "command": command} for record in records)


if __name__ == "__main__":
    main()
