# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What is recorded of every step, summed exactly over micro-batches and ranks, and the JSON-lines files it goes to."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator

from ..data.audio import SAMPLING_RATE
from ..data.collation import MicroBatch, needs_target
from ..devices import to_device
from ..modeling_spear import SpearForPreTraining, SpearForPreTrainingOutput
from ..mvq.atomic_files import explained


logger = logging.getLogger(__name__)

# Fields of a metrics line that differ between two runs of the same training.
TIMING_FIELDS = ("step_seconds", "audio_seconds_per_second", "data_wait_share", "mfu", "memory_mb")

# Counters that are summed with the model's statistics, in this order.
COUNTERS = ("loss", "samples", "padded_samples", "utterances", "items", "mixed", "noisy", "flops", "stop")


class Sums(NamedTuple):
    """What a step, or a validation, comes to over all micro-batches and ranks; on the CPU, in float64."""

    statistics: torch.Tensor
    """(teachers, domains, 2 [masked, unmasked], 3 [loss, correct, count])."""
    codebooks: torch.Tensor
    """(codebooks of all teachers, 2 [correct, count]), of masked frames."""
    counters: dict[str, float]
    """`COUNTERS` by name."""


class StepSums:
    """Sums over the micro-batches of a step on one rank, in one vector, so that a single reduction makes them global.

    Args:
        codebooks: teacher -> number of codebooks, in the order of the model's heads.
        domains: of the utterances, in the order of the metrics.
        device: where the vector lives.
        target_domains: teacher -> domains of the utterances that predict its tokens; see `needs_target`.
    """

    def __init__(
        self,
        codebooks: Mapping[str, int],
        domains: Sequence[str],
        device: torch.device,
        target_domains: Mapping[str, Sequence[str] | None] | None = None,
    ) -> None:
        self.target_domains = dict(target_domains or {})
        self.codebooks = dict(codebooks)
        self.domains = list(domains)
        self._sizes = [6 * len(self.codebooks) * len(self.domains), 2 * sum(self.codebooks.values()), len(COUNTERS)]
        self.vector = torch.zeros(sum(self._sizes), dtype=exact(device), device=device)
        self._counted = dict.fromkeys(COUNTERS, 0)  # on the host; the loss is in the vector from the beginning

    def add(
        self, batch: MicroBatch, output: SpearForPreTrainingOutput, loss: torch.Tensor | None = None, flops: int = 0
    ) -> None:
        """One forward pass: its output, its loss (already normalised), and the operations that the step takes."""
        assert output.utterance_statistics is not None
        assert output.codebook_statistics is not None
        statistics, codebooks, counters = self.vector.split(self._sizes)
        rows = [[domain == row for row in batch.domains] for domain in self.domains]
        chosen = to_device(rows, self.vector.dtype, self.vector.device)  # (domains, rows)
        by_domain = torch.einsum("dr,trgk->tdgk", chosen, output.utterance_statistics.to(self.vector.dtype))
        statistics += by_domain.flatten()
        codebooks += output.codebook_statistics.flatten()
        if loss is not None:
            counters[0] += loss.detach()
        self._counted["samples"] += batch.num_samples
        self._counted["padded_samples"] += batch.num_padded_samples
        self._counted["utterances"] += len(batch.ids)
        self._counted["items"] += batch.num_items
        self._counted["mixed"] += batch.num_mixed
        self._counted["noisy"] += batch.num_noisy
        self._counted["flops"] += flops

    def request_stop(self) -> None:
        """This rank was told to stop; after the reduction all ranks know."""
        self._counted["stop"] = 1

    def reduce(self, accelerator: Accelerator) -> None:
        """Makes them the sums of all ranks, which all must call; nothing can be added any more."""
        counters = self.vector.split(self._sizes)[2]
        counters += to_device(list(self._counted.values()), self.vector.dtype, self.vector.device)
        self.vector = accelerator.reduce(self.vector, "sum")

    def read(self, *others: torch.Tensor) -> tuple[Sums, list[list[float]]]:
        """The sums, and the elements of `others`, all with a single wait for the device."""
        parts = [self.vector, *(other.detach().flatten().to(self.vector.dtype) for other in others)]
        vector, *read = torch.cat(parts).double().cpu().split([len(part) for part in parts])
        statistics, codebooks, counters = vector.split(self._sizes)
        shape = (len(self.codebooks), len(self.domains), 2, 3)
        sums = Sums(statistics.view(shape), codebooks.view(-1, 2), dict(zip(COUNTERS, counters.tolist())))
        return sums, [other.tolist() for other in read]

    def metrics(self, sums: Sums) -> dict[str, Any]:
        """Losses and accuracies of the teachers: of all utterances, by domain if there are several, by codebook."""
        metrics: dict[str, Any] = dict(teacher_metrics(list(self.codebooks), sums.statistics.sum(dim=1)))
        codebooks = sums.codebooks.split(list(self.codebooks.values()))
        for (name, by_domain), entries in zip(zip(self.codebooks, sums.statistics), codebooks):
            for domain, ((masked_loss, correct, masked), (unmasked_loss, _, unmasked)) in zip(
                self.domains, by_domain.tolist()
            ):
                if len(self.domains) > 1 and needs_target(name, domain, self.target_domains.get(name)):
                    metrics[f"{name}_loss_on_{domain}"] = ratio(masked_loss + unmasked_loss, masked + unmasked)
                    metrics[f"{name}_masked_accuracy_on_{domain}"] = ratio(correct, masked)
            metrics[f"{name}_codebook_accuracy"] = [ratio(correct, count) for correct, count in entries.tolist()]
        return metrics


def exact(device: torch.device) -> torch.dtype:
    """For sums: float32 has 24 bits, too few for the samples of a step. MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def codebooks_of(model: SpearForPreTraining) -> dict[str, int]:
    """Teacher -> number of codebooks, in the order of the model's heads."""
    targets: Mapping[str, dict] = model.config.pretraining_targets or {}
    return {name: targets[name]["num_codebooks"] for name in model.prediction_heads}


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


def numbers(record: Mapping[str, Any], group: str) -> dict[str, float]:
    """What a tracker can draw of a record; the entries of a list are numbered."""
    drawn: dict[str, float] = {}
    for name, value in record.items():
        values = {f"{name}/{place}": item for place, item in enumerate(value)} if isinstance(value, list) else {}
        for full_name, item in (values or {name: value}).items():
            if isinstance(item, int | float) and name != "step":
                drawn[f"{group}/{full_name}"] = item
    return drawn


def summary(record: Mapping[str, Any]) -> str:
    """Loss and masked accuracy of each teacher, in a few words; where nothing is masked, that."""

    def parts() -> Iterator[str]:
        if "loss" in record:
            yield f"loss {record['loss']:.3f}"
        for key in record:
            name = key.removesuffix("_masked_accuracy")
            if name != key and record[key] is not None:
                text = f"{name} masked accuracy {record[key]:.3f}"
                if record.get(f"{name}_unigram_accuracy") is not None:
                    text += f" (unigram {record[f'{name}_unigram_accuracy']:.3f})"
                yield text

    return ", ".join(parts()) or "no frame with a target is masked"


def ratio(numerator: float, denominator: float) -> float | None:
    """Their quotient; None where there is nothing to divide by."""
    return numerator / denominator if denominator else None


def memory_mb(device: torch.device) -> float:
    """Peak of the accelerator's memory, or the process's resident memory on the CPU, in MB of 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return psutil.Process().memory_info().rss / 1e6


class StepClock:
    """Where the time of a step goes: waiting for data, and the whole.

    Args:
        peak: FLOP/s of all ranks together.
    """

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.start = time.perf_counter()
        self.waited = 0.0

    def data_arrived(self) -> None:
        """Call when the step's batches are there."""
        self.waited = time.perf_counter() - self.start

    def lap(self, samples: float, flops: float) -> dict[str, float]:
        """The timing fields of the step that ends now, which heard `samples` of audio; the next one begins."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return {
            "step_seconds": round(seconds, 4),
            "audio_seconds_per_second": round(samples / SAMPLING_RATE / seconds, 2),
            "data_wait_share": round(self.waited / seconds, 4),
            "mfu": round(flops / seconds / self.peak, 5),
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
        kept = [] if keep_until is None else [line for line, row in _records(path) if row["step"] <= keep_until]
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
        with explained(self.path):
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
        # What a failed write left in the buffer cannot be written now either, and its error must be seen.
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a torn last line is left out."""
    return [row for _, row in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines and what they hold; without those that a crash has damaged, of which only a torn last one is expected."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.endswith("}\n") else None
            except ValueError:
                row = None
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield line, row
            elif line.endswith("\n"):
                logger.warning("Line %d of %s is damaged and left out.", number, path)
