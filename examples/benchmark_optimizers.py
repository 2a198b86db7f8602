# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A step of ScaledAdam against torch's AdamW, and a sample of the running average, on the weights of the base model.

    python examples/benchmark_optimizers.py             # a minute; writes model_cards/benchmarks/optimizers.csv
    python examples/benchmark_optimizers.py --profile   # only says where the time of ScaledAdam goes

All work on the same weights and random gradients, by turns, so that what else the machine does hits all alike. The
median over whole periods of ScaledAdam's four steps counts, of which the fourth does more. State is what the optimiser
or the average holds beside weights and gradients.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import spear_hf
from spear_hf import SpearConfig, SpearForPreTraining
from spear_hf.pretraining.averaging import RunningAverage
from spear_hf.pretraining.scaled_adam import ScaledAdam


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "model_cards" / "benchmarks" / "optimizers.csv"
BASELINE = "AdamW foreach"
WANTED_RATIO = 1.5
PERIOD = 4  # of ScaledAdam: the mean of so many steps is one measurement
RATE = 1e-5


def contenders(model: SpearForPreTraining) -> dict[str, torch.optim.Optimizer]:
    """Optimisers of the same weights."""
    parameters = list(model.parameters())
    return {
        BASELINE: torch.optim.AdamW(parameters, lr=RATE, foreach=True),
        "AdamW loop": torch.optim.AdamW(parameters, lr=RATE, foreach=False),
        "AdamW fused": torch.optim.AdamW(parameters, lr=RATE, fused=True),
        "ScaledAdam": ScaledAdam(model.named_parameters(), lr=RATE),
    }


def seconds(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """Of one call, the mean of `times`."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def num_bytes(state: Any) -> int:
    """Of all tensors in nested dicts."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(map(num_bytes, state.values())) if isinstance(state, dict) else 0


def benchmark(model: SpearForPreTraining, repeats: int) -> list[dict[str, Any]]:
    """One row for each optimiser and one for the average."""
    device = next(model.parameters()).device
    optimizers, average = contenders(model), RunningAverage(every=1)
    steps = iter(range(1, 1_000_000))
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        **{name: (optimizer.step, PERIOD) for name, optimizer in optimizers.items()},
        "RunningAverage sample": (lambda: average.update(next(steps), model.state_dict()), 1),
    }
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, (call, times) in calls.items():
            measured[name].append(seconds(call, times, device))
            if repeat == 0:  # warming up: states are made
                measured[name].clear()
    baseline = statistics.median(measured[BASELINE])
    states = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    states["RunningAverage sample"] = average.state_dict()
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    return [
        {
            "what": name,
            "device": device.type,
            "tensors": len(parameters),
            "parameters": count,
            "median_seconds": round(statistics.median(values), 5),
            "least_seconds": round(min(values), 5),
            "ratio_to_adamw_foreach": round(statistics.median(values) / baseline, 3),
            "state_bytes_per_parameter": round(num_bytes(states[name]) / count, 3),
        }
        for name, values in measured.items()
    ]


def profile(model: SpearForPreTraining) -> None:
    """Prints the operations of ScaledAdam by time."""
    optimizer = ScaledAdam(model.named_parameters(), lr=RATE)
    for _ in range(PERIOD):
        optimizer.step()
    with torch.profiler.profile() as profiler:
        for _ in range(PERIOD):
            optimizer.step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))


def setting() -> dict[str, Any]:
    """Where this was measured."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    return {
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spear_hf": spear_hf.__version__,
        "command": "python " + " ".join(["examples/benchmark_optimizers.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=["base", "large", "xlarge"], default="base")
    parser.add_argument("--repeats", type=int, default=7, help=f"of {PERIOD} steps each; the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="only profile ScaledAdam")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = getattr(SpearConfig, arguments.size)(
        pretraining_targets={"speech": {"num_codebooks": 16, "codebook_size": 256, "weight": 1.0}}
    )
    model = SpearForPreTraining(config).to(arguments.device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    if arguments.profile:
        profile(model)
        return
    rows = [row | setting() for row in benchmark(model, arguments.repeats)]
    print(json.dumps(rows, indent=1))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {arguments.output}")
    ratio = next(row["ratio_to_adamw_foreach"] for row in rows if row["what"] == "ScaledAdam")
    if ratio > WANTED_RATIO:
        sys.exit(f"falls short: {ratio} times {BASELINE}, at most {WANTED_RATIO} wanted")


if __name__ == "__main__":
    main()
