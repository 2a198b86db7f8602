# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spear-hf tokenize` says of its work: a line of metrics for every shard, and the totals of a store.

They are kept beside the store, in STORE.metrics/, as they differ from run to run and a store's bytes must not:

    STORE.metrics/job-0-of-1.rank-0.jsonl   a line for every shard that this worker made, appended
    STORE.metrics/summary.json              totals of the store, whoever made it, written when it is complete
"""

import json
import logging
import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spear_hf.mvq.atomic_files import write_atomically
from spear_hf.mvq.store_format import INDEX, METADATA, QUARANTINE, prefix, read_infos, read_metadata, to_json
from spear_hf.mvq.teachers import SAMPLING_RATE


logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
_NAMED = "(?<!\\S)(\\S*/)?\0[:,]?(?!\\S)"  # the name of a file in a message


@dataclass(frozen=True)
class ShardMetrics:
    """How one shard was made. Seconds of waiting, computing and writing overlap from shard to shard."""

    shard: int
    utterances: int  # with tokens
    bad: int
    audio_seconds: float
    frames: int
    decode_wait_seconds: float  # that the teacher was idle for want of audio
    compute_seconds: float  # teacher and quantiser
    write_seconds: float  # in another thread
    real_time_factor: float  # seconds of audio in a second of waiting and computing
    padding_share: float  # of what went through the teacher


class MetricsFile:
    """A file of JSON lines. Where it cannot be written, which is no reason to stop, that is said once."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def append(self, metrics: ShardMetrics) -> None:
        """Adds a line of JSON. A file that cannot be written is given up with a warning."""
        if self.path is None:
            return
        row = {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(metrics).items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            logger.warning("No more metrics: %s cannot be written (%s).", self.path, error)
            self.path = None


@dataclass(frozen=True)
class StoreTotals:
    """What a complete store holds, counted from its index: nothing twice, whatever the number of workers."""

    utterances: int
    hours: float
    frames: int
    bits: float
    bad: int
    bad_by_reason: dict[str, int]


def metrics_folder(store: Path) -> Path:
    """Beside the store, which may be "."."""
    store = Path(os.path.abspath(store)) if store.name in ("", "..") else store
    return store.with_name(store.name + ".metrics")


def store_totals(folder: Path) -> StoreTotals:
    """Of a complete store; of several teachers the frames are those of all."""
    infos = read_infos(read_metadata(folder), folder / METADATA)
    counts = {name: f"{prefix(name)}num_frames" for name in infos}
    index = pq.read_table(folder / INDEX, columns=["num_samples", *counts.values()])
    frames = {name: int(np.sum(index[column].to_numpy())) for name, column in counts.items()}
    quarantine = folder / QUARANTINE
    lines = quarantine.read_text(encoding="utf-8").splitlines() if quarantine.exists() else []
    bad = [json.loads(line) for line in lines]
    return StoreTotals(
        utterances=len(index),
        hours=int(np.sum(index["num_samples"].to_numpy())) / SAMPLING_RATE / 3600,
        frames=sum(frames.values()),
        bits=sum(frames[name] * info.num_codebooks * math.log2(info.codebook_size) for name, info in infos.items()),
        bad=len(bad),
        bad_by_reason=dict(Counter(bad_reason(**item) for item in bad).most_common()),
    )


def bad_reason(id: str, path: str, error: str) -> str:
    """An error without the file's name and with N for numbers, so that errors can be counted."""
    for name in {id, path, Path(path).name} - {""}:
        error = _without(name, error)
    return re.sub(r"-?\d+(\.\d+)?", "N", " ".join(error.split())) or "unknown"


def _without(name: str, error: str) -> str:
    if error.count("\0") or error.find(name) < error.rfind(name):
        return re.sub(_NAMED.replace("\0", re.escape(name)), "", error)
    # One expression for all names: compiling one for each takes half a millisecond, and there may be very many.
    return re.sub(_NAMED, "", error.replace(name, "\0")).replace("\0", name)


def write_summary(folder: Path, values: dict[str, Any]) -> None:
    """Writes the summary of a run, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SUMMARY, (to_json(values, indent=2) + "\n").encode())
