# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf benchmark`: what is measured, one table a call."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .plots import plot_speed, save_figure
from .speed import CASES, Timing, benchmark, write_table
from .speed_parts import benchmark_features, benchmark_lengths
from .speed_steps import benchmark_memory, benchmark_training


Measure = Callable[[Sequence[str], str, int], Iterator[Timing]]

MEASURES: dict[str, tuple[Measure, str]] = {  # and their cases, where none are given
    "encoder": (benchmark, CASES),
    "features": (benchmark_features, "32x10"),
    "lengths": (benchmark_lengths, "64x2-30"),
    "training": (benchmark_training, "2x10"),
    "memory": (benchmark_memory, "1x60"),
}


def run_benchmark(
    measure: str, against: str, output: Path | None, cases: str | None, repeats: int, threads: int | None
) -> int:
    """Prints rows as they come; returns the exit code."""
    timings = []
    try:
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r} must be one of {', '.join(MEASURES)}.")
        if output is not None:
            _check_output(output)
        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads={threads} must be 1 or more.")
            torch.set_num_threads(threads)
        compute, usual = MEASURES[measure]
        names = [name.strip() for name in against.split(",") if name.strip()]
        for timing in compute(names, usual if cases is None else cases, repeats):
            timings.append(timing)
            print(_line(timing), flush=True)
        if output is not None:
            write_table(timings, output)
            print(f"Written: {output}")
        if output is not None and measure == "encoder":
            chart = save_figure(plot_speed([asdict(timing) for timing in timings]), output.with_suffix(".png"))
            print(f"Written: {chart}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_output(output: Path) -> None:
    """Before minutes of measuring: ValueError for what is no table's name, or cannot be written."""
    if output.suffix != ".csv" or output.is_dir():
        raise ValueError(f"--output {output}: a table is written, to a name that ends in .csv.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error.strerror}; choose another folder.") from error


def _line(timing: Timing) -> str:
    line = (
        f"{timing.case:>12}  {timing.contender:<12} {timing.seconds:8.3f} s  {timing.times_spear:6.2f} x spear"
        f"  {timing.audio_per_second:7.1f} s of audio per second"
    )
    peak = getattr(timing, "peak_megabytes", None)
    return line if peak is None else f"{line}  {peak:7.0f} MB at most"
