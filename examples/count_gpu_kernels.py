# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels of a training step on a GPU, and the bytes they move, counted without a GPU.

    python examples/count_gpu_kernels.py --output model_cards/benchmarks/training_kernels.csv

The step is pre-training of 10 s utterances in bfloat16 autocast, forwards and backwards, without the optimiser. As it
is, every operation is a kernel that reads its inputs and writes its outputs. Compiled (`compile_layers`), kernels are
those that torch's inductor schedules for Triton: it plans the code of the stem and of every kind of layer for a GPU,
and nothing of it is run (on a GPU it then makes one of several small ones, a third less in all). `seconds_of_audio` is
what a second of a GPU would hear if it did nothing but move these bytes at `--bandwidth` (of an H200: 4.8 TB/s by its
data sheet, of which simple kernels reach four fifths), and `--flops` of products in bfloat16: a bound for comparing,
no measurement.

It looks into inductor, whose insides change: for the torch version of constraints.txt.
"""

import argparse
import collections
import copy
import csv
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
from torch import nn
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from spear_hf import SpearConfig, SpearForPreTraining
from spear_hf.modeling_spear import (
    SpearBypass,
    SpearDownsample,
    SpearDownsampledStack,
    SpearLayer,
    SpearStem,
    compile_options,
)
from spear_hf.pretraining.flops import FLOPS_OF_A_STEP, forward_flops


FRAMES = 998  # 10 s of filter bank
CODEBOOKS, CODEBOOK_SIZE = 16, 256
WIDE_ON_CUDA = ("softplus", "softmax.int", "log_softmax.int", "nll_loss")
"""What autocast computes in float32 on CUDA devices, but not on CPUs, where this is traced."""


@dataclass
class Row:
    """What one part of a step does. `times`: how often the part occurs; kernels and gigabytes are of all of these."""

    part: str
    mode: str
    times: int
    kernels: int
    gigabytes: float


def autocast_as_on_cuda(library: torch.library.Library) -> None:
    without_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def widened(operation: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return operation(x.float(), *args, **kwargs)

    for name in WIDE_ON_CUDA:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, functools.partial(widened, operation), "AutocastCPU")


def moved(tensor: torch.Tensor) -> int:
    """Bytes of the memory that a tensor shows."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride]
    return functools.reduce(int.__mul__, sizes, tensor.element_size())


class Kernels(TorchDispatchMode):
    """Counts operations that are not views, and the bytes of their arguments and results."""

    IGNORED = ("empty", "new_empty", "empty_like", "detach", "lift_fresh", "_reshape_alias")

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if function.namespace == "aten" and not function.is_view and not name.startswith(self.IGNORED):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.kernels += 1
            self.bytes += sum(moved(tensor) for tensor in tensors)
        return result


class NoDevice:
    """A driver of Triton for a Hopper GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Scheduled(Exception):
    """The kernels of a graph are counted, and it is not compiled."""


class Scheduler:
    """A backend of torch.compile that counts what inductor would launch, and runs the graph as it is."""

    def __init__(self) -> None:
        self.kernels, self.bytes = 0, 0
        self.options: dict[str, bool] = {}
        inductor_config.cpu_backend = "triton"
        inductor_config.fx_graph_cache = False
        functorch_config.enable_autograd_cache = False
        driver.set_active(NoDevice())  # type: ignore[arg-type]
        self._inner = compile_fx.compile_fx_inner

        def count(graph: GraphLowering) -> None:
            graph.codegen()
            total, nodes, _ = graph.count_bytes()
            self.kernels += len(nodes)
            self.bytes += total
            raise Scheduled

        GraphLowering.compile_to_module = count  # type: ignore[method-assign,assignment]

    def __call__(self, graph: Any, inputs: Any) -> Any:
        with inductor_config.patch(self.options):
            return compile_fx.compile_fx(graph, inputs, inner_compile=self._count)

    def _count(self, graph: Any, inputs: Any, **settings: Any) -> Any:
        try:
            self._inner(copy.deepcopy(graph), inputs, **settings)
        except Exception as error:
            if "Scheduled" not in repr(error):
                raise
        return make_boxed_func(graph.forward)


def pretraining(size: str) -> SpearForPreTraining:
    target = {"num_codebooks": CODEBOOKS, "codebook_size": CODEBOOK_SIZE, "weight": 1.0}
    return SpearForPreTraining(getattr(SpearConfig, size)(pretraining_targets={"speech": target})).train()


def step_inputs(model: SpearForPreTraining, batch: int) -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.randn(batch, FRAMES, model.config.num_mel_bins),
        "speech_labels": torch.zeros(batch, (FRAMES - 7) // 2, CODEBOOKS, dtype=torch.long),
        "mask_time_indices": torch.ones(batch, FRAMES, dtype=torch.bool),
    }


def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return function(*args, **kwargs)


def eager_step(size: str, batch: int) -> tuple[Row, list[tuple[nn.Module, tuple]]]:
    """The whole step, and what `compile_layers` compiles with what it is given."""
    calls: list[tuple[nn.Module, tuple]] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = pretraining(size)
        model._target_places = lambda labels: torch.arange(labels.shape[0] * labels.shape[1])  # type: ignore
        combiners = [stack.out_combiner for stack in model.modules() if isinstance(stack, SpearDownsampledStack)]
        for module in model.modules():
            if isinstance(module, (SpearStem, SpearLayer, SpearDownsample)) or module in combiners:
                module.register_forward_pre_hook(lambda module, args: calls.append((module, args)))
        counter = Kernels()
        with counter:
            run(model, **step_inputs(model, batch)).loss.backward()
    return Row("step", "eager", 1, counter.kernels, counter.bytes / 1e9), calls


def kinds(calls: list[tuple[nn.Module, tuple]]) -> Iterator[tuple[str, int, nn.Module, tuple]]:
    """Name, number, module and arguments of every kind of part."""
    groups: dict[str, list[tuple[nn.Module, tuple]]] = collections.defaultdict(list)
    for module, args in calls:
        name = {SpearStem: "stem", SpearBypass: "combination of a stack with its input"}.get(type(module), "")
        if isinstance(module, SpearDownsample):
            name = f"downsampling by {module.factor}"
        if isinstance(module, SpearLayer):
            kernel_size = module.conv_module1.depthwise_conv.kernel_size[0]
            name = f"layer, {args[0].shape[1]} frames, kernel {kernel_size}"
        groups[name].append((module, args))
    for name, group in groups.items():
        yield name, len(group), *group[0]


def part_rows(name: str, times: int, module: nn.Module, args: tuple, scheduler: Scheduler) -> Iterator[Row]:
    """A part as it is and compiled."""

    def backward(function: Callable[..., Any], *inputs: Any) -> None:
        output = run(function, *inputs)
        output.backward(torch.empty_like(output))

    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [arg.detach().requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg for arg in args]
        module.zero_grad()  # of the whole step: what is there would be added to
        counter = Kernels()
        with counter:
            backward(module, *given)
    yield Row(name, "eager", times, times * counter.kernels, times * counter.bytes / 1e9)
    torch.compiler.reset()
    scheduler.kernels = scheduler.bytes = 0
    scheduler.options = compile_options(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        backward(torch.compile(module, backend=scheduler, dynamic=True), *given)
    yield Row(name, "compiled", times, times * scheduler.kernels, times * scheduler.bytes / 1e9)


def rows(size: str, batch: int) -> Iterator[Row]:
    step, calls = eager_step(size, batch)
    yield step
    compiled = Row("step", "compiled", 1, step.kernels, step.gigabytes)
    scheduler = Scheduler()
    for name, times, module, args in kinds(calls):
        for row in part_rows(name, times, module, args, scheduler):
            yield row
            sign = 1 if row.mode == "compiled" else -1
            compiled.kernels += sign * row.kernels
            compiled.gigabytes += sign * row.gigabytes
    yield compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--size", default="base", choices=("base", "large", "xlarge"))
    parser.add_argument("--batch", type=int, default=32, help="utterances of 10 s")
    parser.add_argument("--bandwidth", type=float, default=3.8, help="TB/s")
    parser.add_argument("--flops", type=float, default=500.0, help="TFLOP/s")
    arguments = parser.parse_args()
    library = torch.library.Library("aten", "IMPL")  # in force as long as it is held
    autocast_as_on_cuda(library)
    operations = FLOPS_OF_A_STEP * arguments.batch * forward_flops(pretraining(arguments.size).config, FRAMES, True)
    table = []
    for row in rows(arguments.size, arguments.batch):
        print(f"{row.part:38} {row.mode:8} {row.times} x {row.kernels:6} kernels {row.gigabytes:7.2f} GB", flush=True)
        record = asdict(row) | {"gigabytes": round(row.gigabytes, 2)}
        if row.part == "step":
            seconds = row.gigabytes / 1e3 / arguments.bandwidth + operations / 1e12 / arguments.flops
            record["seconds_of_audio"] = round(10 * arguments.batch / seconds)
            print(f"  at most {record['seconds_of_audio']} seconds of audio in a second")
        table.append(record)
    if arguments.output:
        command = " ".join(["python", "examples/count_gpu_kernels.py", *sys.argv[1:]])
        names = [*(field.name for field in fields(Row)), "seconds_of_audio", "torch", "command"]
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({**record, "torch": torch.__version__, "command": command} for record in table)


if __name__ == "__main__":
    main()
