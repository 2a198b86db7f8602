# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Features of labelled stretches of recordings, such as phones: the mean of the frames that are centred in each.

    segments = read_segments("examples/data/phones.tsv")
    features, labels, recordings = segment_features(model, extractor, utterances, segments)

`features` goes into `probe.linear_probe`, layer by layer or concatenated; `recordings` are the groups that belong
together in its cross-validation and its bootstrap.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel

from ..data.manifest import Utterance
from ..data.segments import FrameGrid, Segment
from ..feature_extraction_spear import SpearFeatureExtractor
from .probe import frame_states, log_mel_frames


FILTER_BANK_CENTRE, FILTER_BANK_STEP = 0.005, 0.010  # seconds: frame t stands for the 10 ms from 10 t on


def segment_features(
    model: PreTrainedModel,
    feature_extractor: SpearFeatureExtractor,
    utterances: Sequence[Utterance],
    segments: Mapping[str, Sequence[Segment]],
    batch_seconds: float = 120.0,
) -> tuple[np.ndarray, list[str], list[str]]:
    """Hidden states of a SPEAR encoder, averaged over each segment: float32 (layers, segments, dim), labels, ids.

    Layer 0 is the stem's output. A segment in which no frame is centred takes the nearest one. ValueError for an
    utterance without segments, or one that cannot be embedded.
    """
    states = frame_states(model, feature_extractor, utterances, batch_seconds)
    frames = {utterance.id: hidden for utterance, hidden in zip(utterances, states)}
    times = {name: FrameGrid().centres(hidden.shape[1]) for name, hidden in frames.items()}
    return _averaged(frames, times, utterances, segments)


def log_mel_segments(
    feature_extractor: SpearFeatureExtractor,
    utterances: Sequence[Utterance],
    segments: Mapping[str, Sequence[Segment]],
) -> tuple[np.ndarray, list[str], list[str]]:
    """The same of the filter bank, which is the input of the model: (1, segments, num_mel_bins), labels, ids."""
    frames, times = {}, {}
    for utterance in utterances:
        frames[utterance.id] = log_mel_frames(feature_extractor, utterance)[None]  # (1, frames, bins)
        times[utterance.id] = FILTER_BANK_CENTRE + FILTER_BANK_STEP * np.arange(frames[utterance.id].shape[1])
    return _averaged(frames, times, utterances, segments)


def _averaged(
    frames: Mapping[str, np.ndarray],
    times: Mapping[str, np.ndarray],
    utterances: Sequence[Utterance],
    segments: Mapping[str, Sequence[Segment]],
) -> tuple[np.ndarray, list[str], list[str]]:
    """`frames` (layers, frames, dim), and the centres of the frames in seconds, by utterance id."""
    rows, labels, recordings = [], [], []
    for utterance in utterances:
        if utterance.id not in segments:
            raise ValueError(f"{utterance.id} has no segments.")
        centres = times[utterance.id]
        for segment in segments[utterance.id]:
            inside = (centres >= segment.start) & (centres < segment.end)
            if not inside.any():
                inside[np.abs(centres - (segment.start + segment.end) / 2).argmin()] = True
            rows.append(frames[utterance.id][:, inside].mean(axis=1))
            labels.append(segment.label)
            recordings.append(utterance.id)
    return np.stack(rows, axis=1), labels, recordings
