# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Who or what sounds when: tables of segments, and the labels of encoder frames that follow from them.

A table has a row for each segment, with the columns

    id      of the utterance: its id or path in the manifest, or its path in a folder
    start   seconds from the beginning of the file
    end     seconds, exclusive
    label   what it is

as JSON lines, CSV or TSV. Time that no segment covers is background.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import MANIFEST_SUFFIXES, rows_of_table


COLUMNS = ("id", "start", "end", "label")


@dataclass(frozen=True)
class Segment:
    """`label` from `start` to `end`, in seconds of the file."""

    start: float
    end: float
    label: str


def read_segments(path: str) -> dict[str, list[Segment]]:
    """Utterance id -> its segments, in order. ValueError names the table and the line of what is wrong."""
    source = Path(path)
    if source.suffix.lower() not in MANIFEST_SUFFIXES or not source.is_file():
        raise ValueError(f"segments={path} must be an existing table: .jsonl, .csv or .tsv")
    segments: dict[str, list[Segment]] = defaultdict(list)
    for line, row in rows_of_table(source):
        if missing := [name for name in COLUMNS if row.get(name) in (None, "")]:
            raise ValueError(f"{path}, line {line}: no {', '.join(missing)}; the columns are {', '.join(COLUMNS)}")
        segments[str(row["id"])].append(parse_segment(row, f"{path}, line {line}"))
    return {name: sorted(items, key=lambda item: item.start) for name, items in segments.items()}


def parse_segment(row: dict[str, Any], place: str) -> Segment:
    """The segment of a row; ValueError names the place of what is wrong."""
    try:
        start, end = float(row["start"]), float(row["end"])
    except (TypeError, ValueError):
        raise ValueError(f"{place}: start={row['start']!r} and end={row['end']!r} must be seconds") from None
    if not (0 <= start < end and math.isfinite(end)):
        raise ValueError(f"{place}: start={start} and end={end} must be 0 <= start < end")
    if not isinstance(row["label"], (str, int, float)):
        raise ValueError(f"{place}: label={row['label']!r} must be text or a number; a segment has one")
    return Segment(start, end, str(row["label"]))


@dataclass(frozen=True)
class FrameGrid:
    """Times of the encoder's frames.

    Frame t at 50 Hz sees the frames 2t to 2t + 8 of the filter bank, of which 2t + 4, in the middle, lies around
    20t + 45 ms. A frame at 25 Hz is a mean of two of these.
    """

    downsampling: int = 1
    """`output_downsampling_factor` of the configuration."""

    @property
    def seconds(self) -> float:
        """From one frame to the next."""
        return 0.02 * self.downsampling

    def frames(self, filter_bank_frames: int) -> int:
        """Encoder frames of so many frames of the filter bank at 100 Hz."""
        frames = (filter_bank_frames - 7) // 2
        return -(-frames // self.downsampling)

    def centres(self, frames: int) -> np.ndarray:
        """Seconds (frames,) from the first sample to the centres of the frames."""
        return 0.045 + 0.01 * (self.downsampling - 1) + self.seconds * np.arange(frames)

    def labels(
        self,
        segments: Sequence[Segment],
        frames: int,
        offset: float,
        label2id: dict[str, int],
        background: int | None,
        name: str,
    ) -> np.ndarray:
        """Labels of the frames of audio that begins `offset` seconds into the file: what their centres lie in.

        Args:
            background: id of frames outside all segments; int64 ids (frames,) result. None: multi-label, float32
                multi-hot vectors (frames, labels).
            name: of the utterance, for errors.

        Raises:
            ValueError: a label that is not in `label2id`, or segments of different labels overlap where there can be
                only one.
        """
        centres = offset + self.centres(frames)
        hot = np.zeros((frames, len(label2id)), dtype=np.float32)
        for segment in segments:
            if segment.label not in label2id:
                raise ValueError(
                    f"{name} has a segment {segment.label!r}, which is not among the labels of the training rows: "
                    f"{', '.join(sorted(label2id))}"
                )
            hot[(centres >= segment.start) & (centres < segment.end), label2id[segment.label]] = 1.0
        if background is None:
            return hot
        counts = hot.sum(axis=1)
        if (counts > 1).any():
            time = centres[int(np.argmax(counts > 1))]
            raise ValueError(f"{name} has several labels at {time:.2f} s: overlapping segments need --multi_label")
        return np.where(counts > 0, hot.argmax(axis=1), background)
