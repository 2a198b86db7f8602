# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What the training-only regularisers cost: time and memory of a training step on CPU, each switched off by name.

    python examples/benchmark_regularizers.py             # some minutes; model_cards/benchmarks/regularizers.csv
    python examples/benchmark_regularizers.py --profile   # only says which operations they add

A step is the forward and backward pass of 2 utterances of 10 seconds, of `tiny` and of base. `all` and `without NAME`
are at the start of the schedules, where everything acts most often, `all, late` after 20,000 adjusted batches, with
half of Whiten's places beyond their limit. The variants take turns; `cpu_seconds` is the mean of the repeats in
seconds of this process's CPU time, which other work on the machine disturbs least. `saved_mib` is what autograd keeps
for the backward pass, without parameters, in the mean of the repeats.
"""

import argparse
import csv
import dataclasses
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import spear_hf
from spear_hf import SpearConfig, SpearForPreTraining
from spear_hf.pretraining.config import load_config
from spear_hf.pretraining.regularizers import Regularizers, install_regularizers
from spear_hf.pretraining.regularizers_config import RegularizersConfig
from spear_hf.pretraining.setup import model_config


OUTPUT = Path(__file__).resolve().parent.parent / "model_cards" / "benchmarks" / "regularizers.csv"
NAMES = [field.name for field in dataclasses.fields(RegularizersConfig) if field.name != "enabled"]
LATE = 20_000.0  # adjusted batches
BATCH, FRAMES = 2, 1000


def architecture(size: str) -> SpearConfig:
    """`tiny` as shipped, or a published size, with the paper's speech targets."""
    config = model_config(load_config("tiny").model) if size == "tiny" else getattr(SpearConfig, size)()
    config.pretraining_targets = {"speech": {"num_codebooks": 16, "codebook_size": 256, "weight": 1.0}}
    return config


def make_inputs(model: SpearForPreTraining) -> dict[str, torch.Tensor]:
    """Random features and labels: the time does not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    frames = int(model._get_feat_extract_output_lengths(FRAMES))
    return {
        "input_features": torch.randn(BATCH, FRAMES, 128, generator=generator),
        "attention_mask": torch.ones(BATCH, FRAMES, dtype=torch.long),
        "mask_time_indices": torch.rand(BATCH, FRAMES, generator=generator) < 0.4,
        "speech_labels": torch.randint(256, (BATCH, frames, 16), generator=generator),
    }


def variants() -> dict[str, tuple[RegularizersConfig, float]]:
    """Configurations by name, and the adjusted batches they are timed at."""
    found = {"off": (RegularizersConfig(), 0.0)}
    found["all"] = (RegularizersConfig(enabled=True), 0.0)
    found["all, late"] = (RegularizersConfig(enabled=True), LATE)
    for name in NAMES:
        found[f"without {name}"] = (RegularizersConfig(enabled=True, **{name: False}), 0.0)
    return found


def timed_step(
    model: SpearForPreTraining, inputs: dict[str, torch.Tensor], config: RegularizersConfig, batches: float, seed: int
) -> tuple[float, float]:
    """Seconds of CPU time, and MiB that autograd keeps, of one step."""
    regularizers = install_regularizers(model, config)
    late(regularizers, batches)
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(seed)
    model.zero_grad()
    start = time.process_time()
    regularizers.set_step(batches)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    regularizers.count_votes(regularizers.collect_votes().tolist())
    seconds = time.process_time() - start
    regularizers.remove()
    return seconds, sum(kept.values()) / 2**20


def late(regularizers: Regularizers, batches: float) -> None:
    """Half of Whiten's places within their limit, as none is before it is measured."""
    state = regularizers.whiten_state
    if batches:
        state.exceeded = [place % 2 == 0 for place in range(len(state.names))]


def benchmark(size: str, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    """One row per variant of these names; all variants if there are none."""
    chosen = {name: variant for name, variant in variants().items() if not names or name in ("off", *names)}
    torch.manual_seed(0)
    model = SpearForPreTraining(architecture(size)).train()
    inputs = make_inputs(model)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    timed_step(model, inputs, RegularizersConfig(), 0.0, 0)  # the first step allocates
    for repeat in range(repeats):
        for name, (config, batches) in chosen.items():
            measured[name].append(timed_step(model, inputs, config, batches, repeat))
    means = {name: [statistics.mean(column) for column in zip(*steps)] for name, steps in measured.items()}
    return [
        {
            "model": size,
            "variant": name,
            "adjusted_batches": round(chosen[name][1]),
            "cpu_seconds": round(seconds, 4),
            "over_off": round(seconds / means["off"][0], 3),
            "saved_mib": round(kept, 1),
            "saved_over_off": round(kept / means["off"][1], 3),
            "repeats": repeats,
        }
        for name, (seconds, kept) in means.items()
    ]


def setting() -> dict[str, Any]:
    """Where and how it was measured."""
    return {
        "batch": f"{BATCH} x 10 s",
        "machine": f"{platform.machine()} CPU, {platform.system()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spear_hf": spear_hf.__version__,
        "command": "python " + " ".join(["examples/benchmark_regularizers.py", *sys.argv[1:]]),
    }


def print_profile(size: str) -> None:
    """The costliest operations of a step, without and with all regularisers."""
    torch.manual_seed(0)
    model = SpearForPreTraining(architecture(size)).train()
    inputs = make_inputs(model)
    for config in (RegularizersConfig(), RegularizersConfig(enabled=True)):
        timed_step(model, inputs, config, 0.0, 0)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            timed_step(model, inputs, config, 0.0, 0)
        print(f"{size}, enabled={config.enabled}")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--sizes", nargs="*", default=["tiny", "base"])
    parser.add_argument("--repeats", type=int, nargs="*", default=[12, 4], help="of every variant, per size")
    parser.add_argument("--variants", nargs="*", default=[], help="besides `off`; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="only profile the first size")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.profile:
        print_profile(arguments.sizes[0])
        return
    rows = []
    for size, repeats in zip(arguments.sizes, arguments.repeats):
        for row in benchmark(size, repeats, arguments.variants):
            print(*(f"{name}={value}" for name, value in row.items()), sep="  ", flush=True)
            rows.append(row | setting())
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
