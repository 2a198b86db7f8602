# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics of sound event detection, as sed_eval and HEAR define them (Mesaros et al., Applied Sciences 6(6), 2016).

    EventF1().compute(
        predictions=[[{"label": "dog", "start": 1.0, "end": 2.0}]],  # one list of events for each clip
        references=[[{"label": "dog", "start": 1.1, "end": 1.9}]],
    )  # {"event_f1": 1.0, ...}

Times are in seconds. Counts are summed over clips and labels before they are divided (micro average).

Events: a predicted event is right if a reference event of its label begins within a collar of it, 200 ms, and, where
asked, ends within the collar or a share of the reference's length, one half. Every event is matched once at most, in
the way that gives the most matches.
Segments: time is cut into seconds; a label is active in a second in which any event of it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from ..data.segments import Segment
from .metrics import LocalMetric


ONSET_COLLAR = 0.2  # seconds
OFFSET_SHARE = 0.5  # of the length of the reference event
RESOLUTION = 1.0  # seconds


@dataclass(frozen=True)
class Counts:
    """What is right, what was predicted, and what there is; of segments also the errors, each a number of labels."""

    right: int = 0
    predicted: int = 0
    present: int = 0
    errors: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(one + two for one, two in zip(vars(self).values(), vars(other).values())))


def event_counts(
    predictions: Sequence[Segment],
    references: Sequence[Segment],
    collar: float = ONSET_COLLAR,
    with_offset: bool = False,
    offset_share: float = OFFSET_SHARE,
) -> Counts:
    """Counts of the events of one clip."""
    right = 0
    for label in {event.label for event in predictions}:
        found = [event for event in predictions if event.label == label]
        there = [event for event in references if event.label == label]
        near = np.zeros((len(found), len(there)), dtype=np.int8)
        for row, one in enumerate(found):
            for column, other in enumerate(there):
                reach = max(collar, offset_share * (other.end - other.start))
                near[row, column] = _within(one.start, other.start, collar) and (
                    not with_offset or _within(one.end, other.end, reach)
                )
        if near.any():
            right += int((maximum_bipartite_matching(csr_array(near)) >= 0).sum())
    return Counts(right, len(predictions), len(references))


def _within(one: float, other: float, reach: float) -> bool:
    return abs(one - other) <= reach + 1e-9  # 0.3 - 0.1 is more than 0.2 in floating point


def segment_counts(
    predictions: Sequence[Segment], references: Sequence[Segment], resolution: float = RESOLUTION
) -> Counts:
    """Counts of the labels of one clip's segments."""
    active = [_active(events, resolution) for events in (predictions, references)]
    errors = 0
    for place in {place for cells in active for place, _ in cells}:
        found, there = ({label for other, label in cells if other == place} for cells in active)
        # A wrong label in place of a missing one is a single error, a substitution.
        errors += max(len(found - there), len(there - found))
    return Counts(len(active[0] & active[1]), len(active[0]), len(active[1]), errors)


def _active(events: Sequence[Segment], resolution: float) -> set[tuple[int, str]]:
    cells = set()
    for event in events:
        first, last = math.floor(event.start / resolution + 1e-9), math.ceil(event.end / resolution - 1e-9)
        cells |= {(place, event.label) for place in range(first, max(last, first + 1))}
    return cells


def f1_of(counts: Counts) -> float:
    """F1; 0 where nothing was predicted or nothing is there."""
    total = counts.predicted + counts.present
    return 2 * counts.right / total if total else 0.0


class _EventMetric(LocalMetric):
    prediction = reference = datasets.List(
        {"label": datasets.Value("string"), "start": datasets.Value("float64"), "end": datasets.Value("float64")}
    )


def _scores(name: str, counts: Counts) -> dict[str, float]:
    return {
        f"{name}_f1": f1_of(counts),
        f"{name}_precision": counts.right / counts.predicted if counts.predicted else 0.0,
        f"{name}_recall": counts.right / counts.present if counts.present else 0.0,
    }


class EventF1(_EventMetric):
    """`event_f1`, `event_precision`, `event_recall`.

    `compute` takes `collar` (seconds), `with_offset`, and `offset_share` (of the length, 0.5; of HEAR's music 0.2).
    """

    description = "F1 of sound events with an onset collar, as sed_eval has it."

    def _compute(
        self,
        predictions: Any,
        references: Any,
        collar: float = ONSET_COLLAR,
        with_offset: bool = False,
        offset_share: float = OFFSET_SHARE,
    ) -> dict[str, float]:
        if not (collar >= 0 and offset_share >= 0):
            raise ValueError(f"collar={collar} and offset_share={offset_share} must not be negative")
        clips = zip(_segments(predictions), _segments(references))
        counts = sum((event_counts(*clip, collar, with_offset, offset_share) for clip in clips), Counts())
        return _scores("event", counts)


class SegmentF1(_EventMetric):
    """`segment_f1`, `segment_precision`, `segment_recall` and `segment_er`, errors per active label of a reference.

    `compute` takes `resolution`, the seconds of a segment. The error rate needs a reference event.
    """

    description = "F1 and error rate of segments of sound, as sed_eval has them."

    def _compute(self, predictions: Any, references: Any, resolution: float = RESOLUTION) -> dict[str, float]:
        if not resolution > 0:
            raise ValueError(f"resolution={resolution} must be positive, in seconds")
        clips = zip(_segments(predictions), _segments(references))
        counts = sum((segment_counts(*clip, resolution) for clip in clips), Counts())
        if counts.present == 0:
            raise ValueError(f"there is no event in the {len(references)} references: the error rate is not defined")
        return _scores("segment", counts) | {"segment_er": counts.errors / counts.present}


def _segments(clips: Any) -> list[list[Segment]]:
    return [[_segment(event) for event in clip] for clip in clips]


def _segment(event: dict[str, Any]) -> Segment:
    segment = Segment(event["start"], event["end"], event["label"])
    if segment.label is None or not -math.inf < segment.start <= segment.end < math.inf:
        raise ValueError(f"{event} is no event: it needs a label, and a start before its end, in seconds")
    return segment
