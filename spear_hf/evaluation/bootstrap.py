# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Confidence intervals of any metric, and of differences: a metric is a function of how often each test clip counts.

The draws depend on the seed and the number of units alone, so that two representations are always drawn on the same
clips, and the difference of their samples is that of a paired bootstrap.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.seeding import keyed_generator


RESAMPLES = 1000
LEVEL = 0.95
Score = Callable[[np.ndarray], float]
"""Weights (clips,), whole numbers, 0 for a clip not drawn -> the metric. ValueError where it is not defined."""


@dataclass(frozen=True)
class Estimate:
    """A metric with its percentile interval (95 %), and the samples that this comes from."""

    value: float
    low: float
    high: float
    samples: np.ndarray
    """(resamples,); NaN where the metric is not defined on a resample."""
    units: int
    """What a resample draws so many of: clips, or groups of clips."""

    def to_dict(self) -> dict[str, float]:
        """For JSON, without the samples."""
        return {"value": self.value, "low": self.low, "high": self.high, "units": self.units}


def estimate(score: Score, units: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The metric and its interval; `units` (clips,) are drawn with replacement, with all clips that have them."""
    samples = np.full(resamples, np.nan)
    for place, weights in enumerate(resampled_weights(units, seed, resamples)):
        try:
            samples[place] = score(weights)
        except ValueError:  # no trial of one kind, no clip of any class
            continue
    value = score(np.ones(len(units), dtype=np.int64))
    return Estimate(value, *interval(samples), samples, len(set(units)))


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Percentiles of the samples; NaN if there are hardly any."""
    known = samples[np.isfinite(samples)]
    if len(known) < len(samples) / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def difference(first: Estimate, second: Estimate) -> dict[str, float]:
    """`first` minus `second`, with the interval of a paired bootstrap; both must be of the same test clips."""
    if len(first.samples) != len(second.samples):
        raise ValueError(f"{len(first.samples)} and {len(second.samples)} samples cannot be paired")
    low, high = interval(first.samples - second.samples)
    return {"mean": first.value - second.value, "low": low, "high": high}


def resampled_weights(units: Sequence[Hashable], seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each clip is drawn, (clips,), for one resample after the other."""
    _, place = np.unique(np.asarray([str(unit) for unit in units]), return_inverse=True)
    number = int(place.max()) + 1
    rng = keyed_generator(seed, number, "bootstrap")
    for _ in range(resamples):
        yield np.bincount(rng.integers(number, size=number), minlength=number)[place]


def mean_of(parts: Sequence[tuple[Score, slice]]) -> Score:
    """The mean of several scores, each of a part of the clips: of folds, and of seeds, which share their clips."""

    def score(weights: np.ndarray) -> float:
        return float(np.mean([part(weights[place]) for part, place in parts]))

    return score


def ratio(numerators: Any, denominators: Any) -> Score:
    """The score sum(numerators) / sum(denominators) of numbers by clip: accuracies, error rates of texts."""
    tops, bottoms = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)

    def score(weights: np.ndarray) -> float:
        total = float(bottoms @ weights)
        if total == 0:
            raise ValueError("nothing to divide by")
        return float(tops @ weights) / total

    return score
