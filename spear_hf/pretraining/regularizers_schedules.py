# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Every number of the training-only regularisers of the published Zipformer recipe, as schedules.

Schedules are piecewise linear in the adjusted batches b = steps * (seconds of audio in a step, over all ranks) / 600,
so that a recipe with larger steps gets through them in fewer. They are evaluated once per step, in plain Python, by
`Regularizers.set_step`; the modules read the results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


REFERENCE_SECONDS = 600.0  # of audio in a step of the recipe that the schedules were written for
LAYER_SKIP_WARMUP = 4000.0  # adjusted batches until all layers are warm
INITIAL_LAYER_SKIP = 0.5
FINAL_LAYER_SKIP = 0.035  # times the root of the stack's downsampling factor

POSITION_DROPOUT = 0.15  # of the entries of the position table
FEATURE_MASK_PROBABILITY = 0.125
BYPASS_LIMIT_PROBABILITY = 0.6  # per call
BYPASS_MAXIMUM = 1.0
STEM_GRADIENT_SCALE = 0.2
SCORE_LIMIT = 25.0
SCORE_PENALTY = 1e-4  # gradient per score, where the loss is the sum over the target frames
SCORE_PENALTY_PROBABILITY = 0.1  # per call
BALANCER_GRADIENT_SCALE = 0.04
# Over the root mean square: below, a variance in float32 is rounding, by which the push would be divided.
BALANCER_SMALLEST_DEVIATION = 1e-3
WHITEN_PROBABILITIES = (0.025, 0.25)  # per call: (below the limit, above the limit when last measured)


def adjusted_batches(steps: int, batch_seconds: float) -> float:
    """`steps` of `batch_seconds` seconds of audio over all ranks, in steps of 600 seconds."""
    return steps * batch_seconds / REFERENCE_SECONDS


class Schedule:
    """A piecewise linear function of the adjusted batches: `Schedule((0, 0.3), (20_000, 0.1))`; constant outside.

    One number is a constant: `Schedule(0.05)`.
    """

    def __init__(self, *points: tuple[float, float] | float) -> None:
        self.points = tuple(point if isinstance(point, tuple) else (0.0, point) for point in points)
        places = [place for place, _ in self.points]
        if not places or any(before >= after for before, after in pairwise(places)):
            raise ValueError(f"A schedule needs points of ascending batches, not {points}.")

    def __call__(self, batches: float) -> float:
        """The value at so many adjusted batches."""
        before, value = self.points[0]
        for after, target in self.points[1:]:
            if batches < after:
                return value + (target - value) * max(batches - before, 0.0) / (after - before)
            before, value = after, target
        return value


def layer_skip_schedules(layers_per_stack: Sequence[int], factors: Sequence[int]) -> list[list[Schedule]]:
    """Rate at which each layer of each stack is skipped. Warm-up is staggered, the first layers are warm first.

    The 4,000 batches are divided into (stacks + 1) slots; the layers of stack i warm up one after the other in slot
    i + 1, each from 0.5 to 0.035 * sqrt(factor).
    """
    slot = LAYER_SKIP_WARMUP / (len(layers_per_stack) + 1)
    schedules = []
    for stack, (layers, factor) in enumerate(zip(layers_per_stack, factors)):
        ends = [slot * (stack + 1) + slot * layer / layers for layer in range(layers + 1)]
        final = FINAL_LAYER_SKIP * math.sqrt(factor)
        schedules.append([Schedule((begin, INITIAL_LAYER_SKIP), (end, final)) for begin, end in pairwise(ends)])
    return schedules


# Rates per sequence, but `position_skip`: per call, for the whole batch.
RATES: dict[str, Schedule] = {
    "dropout": Schedule((0, 0.3), (20_000, 0.1)),
    "position_skip": Schedule((0, 0.5), (4000, 0.0)),
    "attention_skip": Schedule((0, 0.2), (4000, 0.05), (16_000, 0.0)),
    "convolution_skip": Schedule((0, 0.2), (4000, 0.05), (16_000, 0.0)),
    "feed_forward_skip": Schedule((0, 0.1), (4000, 0.01), (50_000, 0.0)),
    "convnext_skip": Schedule((0, 0.2), (20_000, 0.015)),
}
BYPASS_MINIMUM = Schedule((0, 0.9), (20_000, 0.2))


class BalancerLimits(NamedTuple):
    """What a Balancer asks of every channel at one step of the training, and how often."""

    min_mean: float
    """Of mean / standard deviation."""
    max_mean: float
    min_rms: float
    max_rms: float
    probability: float
    """Per call."""


def positive_share_to_mean(share: float) -> float:
    """The published turn of a share of positive values into mean / standard deviation; ±inf (no limit) for 1 and 0.

    It approximates erfinv(2 share - 1), that is, the quantile of a normal distribution divided by the root of 2.
    """
    if not 0 < share < 1:
        return math.copysign(math.inf, share - 0.5)
    return 0.8139535143 * math.atanh(2 * share - 1)


def absolute_to_rms(absolute: float) -> float:
    """Root of the mean square of a centred normal distribution of this mean absolute value."""
    return 1.25331413732 * absolute


@dataclass(frozen=True)
class BalancerSchedule:
    """A row of the recipe's table: share of positive values and mean absolute value, each between two limits."""

    positive: tuple[Schedule, Schedule]
    absolute: tuple[Schedule, Schedule]
    probability: Schedule

    def __call__(self, batches: float) -> BalancerLimits:
        """The limits at so many adjusted batches."""
        return BalancerLimits(
            positive_share_to_mean(self.positive[0](batches)),
            positive_share_to_mean(self.positive[1](batches)),
            absolute_to_rms(self.absolute[0](batches)),
            absolute_to_rms(self.absolute[1](batches)),
            self.probability(batches),
        )


_DEFAULT_PROBABILITY = Schedule((0, 0.5), (8000, 0.125))


def _row(
    positive: tuple[float | Schedule, float | Schedule],
    absolute: tuple[float | Schedule, float | Schedule],
    probability: float | Schedule = _DEFAULT_PROBABILITY,
) -> BalancerSchedule:
    """Numbers are constants."""

    def schedule(value: float | Schedule) -> Schedule:
        return value if isinstance(value, Schedule) else Schedule(value)

    return BalancerSchedule(
        (schedule(positive[0]), schedule(positive[1])),
        (schedule(absolute[0]), schedule(absolute[1])),
        schedule(probability),
    )


BALANCERS: dict[str, BalancerSchedule] = {
    "feed_forward_hidden": _row((0.3, 1.0), (0.75, 5.0)),
    "nonlin_gate": _row((Schedule((0, 0.25), (20_000, 0.05)), Schedule((0, 0.75), (20_000, 0.95))), (0.5, 5.0)),
    "nonlin_output": _row((0.3, 0.7), (Schedule((0, 0.004), (4000, 0.02)), 100.0), 0.05),
    "feed_forward2_output": _row((0.3, 0.7), (Schedule((0, 0.0), (4000, 0.1)), 2.0), 0.05),
    "feed_forward3_output": _row((0.3, 0.7), (Schedule((0, 0.0), (4000, 0.2)), 4.0), 0.05),
    "convolution_gate": _row((Schedule((0, 0.05), (8000, 0.025)), 1.0), (1.5, Schedule((0, 5.0), (8000, 10.0)))),
    "convolution_depthwise": _row((Schedule((0, 0.1), (8000, 0.05)), 1.0), (Schedule((0, 0.2), (20_000, 0.5)), 10.0)),
    "attention_keys": _row((0.4, 0.6), (0.0, 100.0), 0.025),
    "layer_before_norm": _row((0.45, 0.55), (0.2, 4.0)),
    "layer_output": _row((0.45, 0.55), (0.1, 4.0)),
    "stem_conv1": _row((0.05, 0.95), (0.2, 1.0)),
    "stem_conv2": _row((0.05, 0.95), (0.2, 4.0)),
    "stem_conv3": _row((0.05, 0.95), (0.2, 4.0)),
    "convnext_hidden": _row((0.3, 1.0), (0.75, 5.0)),
    "convnext_output": _row((0.4, 0.6), (1.0, 6.0)),
}


@dataclass(frozen=True)
class WhitenSchedule:
    """A row of the recipe's table: the metric's limit, and the size of the penalty's gradient beside the loss's."""

    limit: Schedule
    gradient_scale: float = 0.01


WHITENS: dict[str, WhitenSchedule] = {
    "attention_keys": WhitenSchedule(Schedule((0, 3.0), (20_000, 6.0)), 0.025),
    "self_attention_output": WhitenSchedule(Schedule((0, 7.5), (20_000, 22.5))),
    "nonlin_value": WhitenSchedule(Schedule((0, 5.0), (20_000, 10.0))),
    "nonlin_output": WhitenSchedule(Schedule((0, 5.0), (20_000, 15.0))),
    "feed_forward_output": WhitenSchedule(Schedule((0, 7.5), (20_000, 15.0))),
    "convolution_depthwise": WhitenSchedule(Schedule((0, 7.5), (20_000, 15.0))),
    "layer_output": WhitenSchedule(Schedule((0, 4.0), (20_000, 12.0))),
    "stem_output": WhitenSchedule(Schedule((0, 4.0), (20_000, 8.0)), 0.02),
    "convnext_output": WhitenSchedule(Schedule(5.0)),
}
