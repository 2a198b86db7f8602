# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What is recorded of every step, summed exactly over micro-batches and ranks, and the JSON-lines files it goes to."""

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from ..data.audio import SAMPLING_RATE
from ..data.collation import MicroBatch


# Fields of a metrics line that differ between two runs of the same training.
TIMING_FIELDS = ("step_seconds", "audio_seconds_per_second", "data_wait_share", "memory_mb")

# Places of the counters that are summed with the model's statistics.
COUNTERS = ("loss", "samples", "padded_samples", "utterances", "items", "mixed", "noisy", "stop")


class StepSums:
    """Sums over the micro-batches of a step on one rank, in one vector, so that a single reduction makes them global.

    Args:
        teachers: names of the model's heads, in its order.
        device: where the vector lives.
    """

    def __init__(self, teachers: Sequence[str], device: torch.device) -> None:
        self.teachers = list(teachers)
        # float32 has 24 bits: too few for the samples of a step. MPS has no float64.
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.vector = torch.zeros(6 * len(self.teachers) + len(COUNTERS), dtype=kind, device=device)

    def add(self, batch: MicroBatch, loss: torch.Tensor, statistics: torch.Tensor) -> None:
        """One forward pass: its loss (already normalised) and the statistics (teachers, 2, 3) of the output."""
        size = statistics.numel()
        self.vector[:size] += statistics.detach().flatten()
        self.vector[size] += loss.detach()
        counters = [batch.num_samples, batch.num_padded_samples, len(batch.ids), batch.num_items]
        counters += [batch.num_mixed, batch.num_noisy]
        self.vector[size + 1 : size + 1 + len(counters)] += torch.tensor(
            counters, dtype=self.vector.dtype, device=self.vector.device
        )

    def request_stop(self) -> None:
        """This rank was told to stop; after the reduction all ranks know."""
        self.vector[-1] += 1

    def read(self) -> tuple[torch.Tensor, dict[str, float]]:
        """Statistics (teachers, 2, 3) on the CPU, and the counters by name. Waits for the device."""
        vector = self.vector.double().cpu()
        size = 6 * len(self.teachers)
        return vector[:size].view(-1, 2, 3), dict(zip(COUNTERS, vector[size:].tolist()))


def teacher_metrics(teachers: Sequence[str], statistics: torch.Tensor) -> dict[str, float | None]:
    """Losses and accuracies per teacher of statistics (teachers, 2 [masked, unmasked], 3 [loss, correct, count]).

    None where there was no such frame. Losses are cross-entropies in nats, means over codebooks and frames.
    """
    metrics: dict[str, float | None] = {}
    for name, sums in zip(teachers, statistics.tolist()):
        (masked_loss, masked_correct, masked), (unmasked_loss, unmasked_correct, unmasked) = sums
        metrics[f"{name}_loss"] = ratio(masked_loss + unmasked_loss, masked + unmasked)
        metrics[f"{name}_masked_loss"] = ratio(masked_loss, masked)
        metrics[f"{name}_unmasked_loss"] = ratio(unmasked_loss, unmasked)
        metrics[f"{name}_masked_accuracy"] = ratio(masked_correct, masked)
        metrics[f"{name}_unmasked_accuracy"] = ratio(unmasked_correct, unmasked)
    return metrics


def ratio(numerator: float, denominator: float) -> float | None:
    """Their quotient; None where there is nothing to divide by."""
    return numerator / denominator if denominator else None


def memory_mb(device: torch.device) -> float:
    """Peak of the accelerator's memory, or the process's resident memory on the CPU, in MB of 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return psutil.Process().memory_info().rss / 1e6


class StepClock:
    """Where the time of a step goes: waiting for data, and the whole."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0

    def data_arrived(self) -> None:
        """Call when the step's batches are there."""
        self.waited = time.perf_counter() - self.start

    def lap(self, samples: float) -> dict[str, float]:
        """The timing fields of the step that ends now; the next one begins."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return {
            "step_seconds": round(seconds, 4),
            "audio_seconds_per_second": round(samples / SAMPLING_RATE / seconds, 2),
            "data_wait_share": round(self.waited / seconds, 4),
        }

    def restart(self) -> None:
        """Leaves out what happened since the last lap (validation, saving)."""
        self.start = time.perf_counter()


class JsonLines:
    """A file of one JSON object per line, appended to; every line is handed to the system at once.

    Args:
        path: of the file.
        keep_until: records of later steps, and a torn last line, are removed first; None removes all.
    """

    def __init__(self, path: Path, keep_until: int | None = None) -> None:
        self.path = path
        kept = [] if keep_until is None else [line for line in _whole_lines(path) if _step(line) <= keep_until]
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One line. Numbers that JSON does not have (NaN, infinities) become null."""
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flushes to the disk, before a checkpoint that goes with it."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a torn last line is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterable[str]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("}\n"):
                yield line


def _step(line: str) -> int:
    return int(json.loads(line)["step"])
