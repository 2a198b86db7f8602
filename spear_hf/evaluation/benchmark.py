# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Tasks on representations side by side, each pair of them a file of its own, so that a run goes on where it was.

OUTPUT/results/TASK/NAME.json, .npz     results of a pair with the settings they are of; samples of the bootstrap
OUTPUT/results/TASK/NAME.parts          while a pair is not done: a file for each choice of features and head that is
OUTPUT/report.json                      all of it, and paired differences to every other representation
OUTPUT/report.md, *.png                 for people
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import transformers
from tqdm import tqdm

from .. import __version__
from ..devices import pick_device
from ..mvq.atomic_files import write_atomically
from .bootstrap import Estimate, difference
from .embedding_cache import EmbeddingCache
from .problems import MAX_LISTED
from .protocols import VERSION, Result, Settings, run_task
from .representations import (
    LOG_MEL,
    MFCC,
    RANDOM,
    TEACHER,
    Representation,
    check_model,
    load_representation,
    short_name,
)
from .tasks import Task, load_task


FORMAT, FORMAT_VERSION = "spear_hf.evaluation", 1
UNREADABLE = (OSError, ValueError, TypeError, KeyError, BadZipFile, EOFError)  # what a damaged result may raise
DEFAULT_BASELINES = (LOG_MEL, MFCC, RANDOM)


def evaluate(
    models: Sequence[str],
    tasks: Sequence[str],
    output: str | os.PathLike,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    cache: str | os.PathLike | None = None,
    settings: Settings | None = None,
    device: str = "auto",
    dtype: str = "float32",
    batch_seconds: float = 30.0,
    max_seconds: float = 120.0,
) -> dict[str, Any]:
    """Runs what is missing, and writes and returns the report.

    Args:
        models: representations, see representations.py; folders or Hub ids as a rule.
        tasks: see tasks.py.
        output: folder of the results. A result that is there is kept if its settings, its task and the fingerprint of
            its representation are the same.
        baselines: more representations. `random` stands for each model's architecture with random weights.
        cache: folder of the embeddings; default: `cache` in the output.

    Raises:
        ValueError: a wrong argument, two tasks or representations of one name, or a clip that cannot be used.
        OSError: there is no such model.
    """
    settings = settings or Settings()
    place = pick_device(device)
    settings = replace(settings, device=str(place))
    specs = representation_specs(models, baselines)
    loaded = [load_task(spec) for spec in tasks]
    if not specs or not loaded:
        raise ValueError("name at least one model or baseline, and one task")
    _unique([task.name for task in loaded], "tasks", "give one of them another with #name=...")
    for spec in specs.values():
        check_model(spec)  # before the first one has been run for hours
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    store = EmbeddingCache(cache or folder / "cache", batch_seconds, max_seconds, settings.progress)
    entries: dict[str, dict[str, Any]] = {}
    samples: dict[tuple[str, str], np.ndarray] = {}
    with tqdm(total=len(specs) * len(loaded), desc="evaluate", unit="result", disable=not settings.progress) as bar:
        for name, spec in specs.items():
            representation = load_representation(spec, str(place), dtype, settings.seed, name)
            entries[name] = _described(representation, spec)
            for task in loaded:
                record, drawn = _one(task, representation, store, settings, folder)
                entries[name]["tasks"][task.name] = record
                samples[name, task.name] = drawn
                bar.update()
            del representation  # before the next one is loaded
    report = _finite(_report(loaded, entries, samples, list(specs), models, settings, store))
    write_json(folder / "report.json", report)
    return report


def representation_specs(models: Sequence[str], baselines: Sequence[str]) -> dict[str, str]:
    """Name -> spec of all representations, models first; `random` is spelt out for each model."""
    specs: list[str] = list(models)
    for baseline in baselines:
        if baseline == RANDOM:
            kinds = (TEACHER, f"{RANDOM}:")
            trained = [model for model in models if model not in (LOG_MEL, MFCC) and not model.startswith(kinds)]
            specs += [f"{RANDOM}:{model}" for model in trained]
        else:
            specs.append(baseline)
    named: dict[str, str] = {}
    for spec in dict.fromkeys(specs):
        name = short = short_name(spec)
        number = 1
        while name in named:
            number += 1
            name = f"{short} ({number})"
        named[name] = spec
    return named


def _unique(names: Sequence[str], what: str, fix: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two {what} are called {', '.join(twice)}: {fix}")


def _described(representation: Representation, spec: str) -> dict[str, Any]:
    return {
        "spec": short_name(spec),  # no paths of this machine
        "fingerprint": representation.fingerprint,
        "weights": representation.weights,
        "layers": representation.num_layers,
        "dim": representation.dim,
        "frame_rate": 1 / representation.frame_seconds if representation.timed else None,
        "tasks": {},
    }


def _one(
    task: Task, representation: Representation, store: EmbeddingCache, settings: Settings, folder: Path
) -> tuple[dict[str, Any], np.ndarray]:
    """The record of a task and a representation, from disk if it is there, and the samples of its headline."""
    path = folder / "results" / file_name(task.name) / f"{file_name(representation.name)}.json"
    key = _key(task, representation, store, settings)
    if (stored := _stored(path, key)) is not None:
        return stored
    parts = _Parts(path.with_suffix(".parts"), key)
    results = run_task(task, representation, store, settings, parts)
    record = {"key": key, "headline": results[0].to_dict(), "results": [result.to_dict() for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_samples(path.with_suffix(".npz"), key, results[0])
    write_json(path, record)  # what is read is complete
    parts.clear()
    return record, results[0].estimate.samples


class _Parts:
    """Results of a pair's choices, of this key."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def _path(self, features: str, head: str) -> Path:
        return self.folder / f"{file_name(features)}-{head}.npz"

    def get(self, features: str, head: str) -> Result | None:
        with suppress(*UNREADABLE), np.load(self._path(features, head), allow_pickle=False) as file:
            if str(file["key"]) == self.key:
                record = json.loads(str(file["record"]))
                value, low, high, units = (record.pop(name) for name in ("value", "low", "high", "units"))
                return Result(
                    **{item.name: record.pop(item.name) for item in fields(Result) if item.name in record},
                    estimate=Estimate(value, low, high, file["samples"], units),
                    details=record,
                )
        return None

    def put(self, result: Result) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = json.dumps(result.to_dict())
        _write_samples(self._path(result.features, result.head), self.key, result, record=np.array(record))

    def clear(self) -> None:
        """Once the pair is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _stored(path: Path, key: str) -> tuple[dict[str, Any], np.ndarray] | None:
    """The record and the samples of an earlier run; None where there is none of this key, or it cannot be read."""
    with suppress(*UNREADABLE):
        record = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
            if record["key"] == str(file["key"]) == key:
                return record, file["samples"]
    return None


def _key(task: Task, representation: Representation, store: EmbeddingCache, settings: Settings) -> str:
    """A hash of all that a result depends on: what the clips hold and are, the representation, the settings."""
    shown = {name: value for name, value in asdict(settings).items() if name not in ("progress", "device")}
    digest = hashlib.sha256()
    for fold in task.folds:
        for part in ("train", "valid", "test"):
            for clip in getattr(fold, part):
                facts = [part, store.checksum(clip), clip.id, clip.labels, clip.transcript, clip.speaker, clip.group]
                digest.update(json.dumps([*facts, clip.language, clip.segments], default=str).encode())
    facts = [FORMAT_VERSION, VERSION, task.name, task.kind, task.labels, task.collar, task.postprocessing, shown]
    digest.update(json.dumps([*facts, representation.fingerprint], default=str).encode())
    return digest.hexdigest()


def _write_samples(path: Path, key: str, result: Result, **more: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), samples=result.estimate.samples, **more)
    write_atomically(path, buffer.getvalue())


def _report(
    tasks: Sequence[Task],
    entries: dict[str, dict[str, Any]],
    samples: dict[tuple[str, str], np.ndarray],
    names: Sequence[str],
    models: Sequence[str],
    settings: Settings,
    store: EmbeddingCache,
) -> dict[str, Any]:
    described = {}
    for task in tasks:
        first = entries[names[0]]["tasks"][task.name]["headline"]
        described[task.name] = {
            "kind": task.kind,
            "source": short_name(task.source),
            "split": task.test_split,
            "hub": task.hub,
            "metric": first["metric"],
            "higher_is_better": first["higher_is_better"],
            "chance": _chance(task),
            "labels": list(task.labels) if len(task.labels) <= MAX_LISTED else len(task.labels),
            "clips": {
                part: len({clip.id for fold in task.folds for clip in getattr(fold, part)})
                for part in ("train", "valid", "test")
            },
            "folds": len(task.folds),
            "bootstrap_units": first["units"],
            "test_clips_in_training": _trained_on(task, store),
            "test_groups_in_training": _groups_trained_on(task),
        }
    report: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {
            "spear_hf": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("progress", "device")},
        "models": list(names)[: len(dict.fromkeys(models))],
        "tasks": described,
        "representations": entries,
    }
    for name in report["models"]:
        for task in tasks:
            record = entries[name]["tasks"][task.name]
            record["minus"] = {
                other: difference(*(_estimate(entries, samples, one, task.name) for one in (name, other)))
                for other in names
                if other != name
            }
    return report


def _trained_on(task: Task, store: EmbeddingCache) -> int:
    """Test clips whose very file is also trained on, or selects settings."""
    count = 0
    for fold in task.folds:
        known = {store.checksum(clip) for clip in (*fold.train, *fold.valid)}
        count += sum(store.checksum(clip) in known for clip in fold.test)
    return count


def _groups_trained_on(task: Task) -> int:
    """Groups of test clips, in a verification speakers, that training or selection hear too."""
    shared: set[str | None] = set()
    for fold in task.folds:
        known, tested = (
            {clip.speaker if task.kind == "verification" else clip.group for clip in clips}
            for clips in ((*fold.train, *fold.valid), fold.test)
        )
        shared |= known & tested
    return len(shared - {None})


def _chance(task: Task) -> float | None:
    """What the main metric is without listening: always the most frequent test label, or guessing; None: unknown."""
    if task.kind == "classification":
        labels = [clip.labels[0] for clip in task.test_clips]
        return max(Counter(labels).values()) / len(labels)
    return 0.5 if task.kind in ("verification", "query") else None


def _estimate(
    entries: dict[str, dict[str, Any]], samples: dict[tuple[str, str], np.ndarray], name: str, task: str
) -> Estimate:
    headline = entries[name]["tasks"][task]["headline"]
    return Estimate(headline["value"], headline["low"], headline["high"], samples[name, task], headline["units"])


def file_name(name: str) -> str:
    """Readable, of a length that file systems take, and unlike for unlike names."""
    safe = re.sub(r"^\.+|[^\w.+-]+", "-", name)[:80]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def write_json(path: Path, content: Any) -> None:
    """In one step; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
