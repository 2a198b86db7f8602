# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Which filter-bank frames and mel bins of an utterance are hidden from the encoder in pre-training.

Whole mel bins are set to zero for the utterance, and spans of frames are replaced by the learned mask embedding; both
happen inside the model, this module draws the masks. Paper settings: `MaskingConfig.dual_domain()` hides about 49 % of
the frames of a ten-second utterance, `MaskingConfig.speech_only()` about 40 %; both about 23 % of the bins.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from .ranges import Range, check_ranges
from .seeding import keyed_generator


@dataclass(frozen=True)
class MaskingConfig:
    """Spans of frames (10 ms each) and of mel bins to hide. The defaults are the paper's for speech + audio."""

    time_probability: Annotated[float, Range(0, 1)] = 0.65
    """Sum of the span lengths over the utterance's length, overlaps counted twice. 0 turns time masking off."""

    time_span: Annotated[int, Range(1, 10**6)] = 10
    """Length of one span in filter-bank frames."""

    time_minimum_spans: Annotated[int, Range(0, 10**6)] = 2
    """At least so many spans, however short the utterance (but never more than fit side by side)."""

    feature_probability: Annotated[float, Range(0, 1)] = 0.25
    """The same for the mel bins. 0 turns feature masking off."""

    feature_span: Annotated[int, Range(1, 10**6)] = 20
    """Width of one span in mel bins."""

    feature_minimum_spans: Annotated[int, Range(0, 10**6)] = 0
    """At least so many spans of mel bins."""

    def __post_init__(self) -> None:
        check_ranges(self)

    @classmethod
    def dual_domain(cls) -> "MaskingConfig":
        """The paper's setting for models of speech and audio."""
        return cls()

    @classmethod
    def speech_only(cls) -> "MaskingConfig":
        """The paper's setting for models of speech."""
        return cls(time_probability=0.5, feature_span=15)


def span_mask(size: int, probability: float, span: int, minimum: int, rng: np.random.Generator) -> np.ndarray:
    """A boolean mask (size,) covered by random spans, which may overlap.

    The number of spans is probability * size / span, rounded up or down at random so that its mean is exact, then
    raised to `minimum` and cut to size // span. A probability of 0 masks nothing.
    """
    mask = np.zeros(size, dtype=bool)
    if probability == 0:
        return mask
    num_spans = int(probability * size / span + rng.random())
    num_spans = min(max(num_spans, minimum), size // span)
    if num_spans > 0:
        starts = rng.choice(size - span + 1, num_spans, replace=False)
        mask[starts[:, None] + np.arange(span)] = True
    return mask


def sample_masks(
    num_frames: int, num_bins: int, config: MaskingConfig, seed: int, epoch: int, utterance_id: str
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of one utterance in one epoch: time (num_frames,) and feature (num_bins,), True = hidden."""
    time = span_mask(
        num_frames,
        config.time_probability,
        config.time_span,
        config.time_minimum_spans,
        keyed_generator(seed, epoch, utterance_id, "time mask"),
    )
    feature = span_mask(
        num_bins,
        config.feature_probability,
        config.feature_span,
        config.feature_minimum_spans,
        keyed_generator(seed, epoch, utterance_id, "feature mask"),
    )
    return time, feature
