# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Alignment of tokens with student frames, at every boundary length."""

import math

import numpy as np
import pytest

from spear_hf.mvq.alignment import FRAME_TOLERANCE, IGNORED, align_labels, label_ratio
from spear_hf.mvq.mfcc import mfcc_frames


def tokens(num_tokens: int, codebooks: int = 3) -> np.ndarray:
    return (np.arange(num_tokens * codebooks) % 251).astype(np.uint8).reshape(num_tokens, codebooks)


def test_ratios():
    assert label_ratio(50, 50) == (1, 1)
    assert label_ratio(50.0, 25.0) == (2, 1)
    assert label_ratio(25, 50) == (1, 2)
    assert label_ratio(12.5, 50) == (1, 4)
    for rates in ((62.5, 50), (50, 62.5), (48, 50), (50, 48), (1, 50.5), (0, 50), (50, 0), (-50, 50)):
        with pytest.raises(ValueError, match="whole multiple"):
            label_ratio(*rates)


CASES = {"one to one": (50, 50), "repeated": (25, 50), "repeated 4 times": (12.5, 50), "concatenated": (50, 25)}


def plain_labels(codes: np.ndarray, token_rate: float, num_frames: int, frame_rate: float) -> np.ndarray:
    """Frame by frame, by time: the tokens that start while the frame lasts, else the one that covers its start."""
    per_frame = max(1, round(token_rate / frame_rate))
    rows = []
    for frame in range(num_frames):
        start = frame / frame_rate
        places = [int(start * token_rate + 1e-9) + place for place in range(per_frame)]
        rows.append([codes[p] if p < len(codes) else np.full(codes.shape[1], IGNORED) for p in places])
    return np.array(rows, dtype=np.int64).reshape(num_frames, per_frame * codes.shape[1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_frames", range(65))
def test_every_length_at_every_difference(case, num_frames):
    """The frames of the student span so many tokens, rounded up; 5 more or fewer pass, 6 are other audio."""
    token_rate, frame_rate = CASES[case]
    spanned = math.ceil(num_frames * token_rate / frame_rate)
    for difference in range(-8, 9):
        if spanned + difference < 0:
            continue
        codes = tokens(spanned + difference)
        if abs(difference) > FRAME_TOLERANCE:
            with pytest.raises(ValueError, match=f"they differ by {abs(difference)}, over the tolerance of 5"):
                align_labels(codes, token_rate, num_frames, frame_rate)
            continue
        labels = align_labels(codes, token_rate, num_frames, frame_rate)
        expected = plain_labels(codes, token_rate, num_frames, frame_rate)
        assert labels.dtype == np.int64
        assert labels.shape == expected.shape
        assert np.array_equal(labels, expected)


def test_the_tolerance_is_the_recipes():
    assert FRAME_TOLERANCE == 5


@pytest.mark.parametrize("num_tokens", range(92, 109))
def test_same_rate_at_every_difference(num_tokens):
    codes = tokens(num_tokens)
    if abs(num_tokens - 100) > 5:
        with pytest.raises(ValueError, match=f"{num_tokens} tokens .* 100 student frames"):
            align_labels(codes, 50, 100, 50)
        return
    labels = align_labels(codes, 50, 100, 50)
    assert labels.shape == (100, 3)
    assert labels.dtype == np.int64
    kept = min(num_tokens, 100)
    assert np.array_equal(labels[:kept], codes[:kept])
    assert (labels[kept:] == IGNORED).all()


@pytest.mark.parametrize("num_frames", [99, 100])
@pytest.mark.parametrize("num_tokens", range(42, 59))
def test_slower_teacher_is_repeated(num_tokens, num_frames):
    """25 Hz tokens, 50 Hz student: 99 and 100 frames both span 50 tokens; the tolerance is 5 tokens."""
    codes = tokens(num_tokens)
    if abs(num_tokens - 50) > 5:
        with pytest.raises(ValueError, match="span 50 tokens"):
            align_labels(codes, 25, num_frames, 50)
        return
    labels = align_labels(codes, 25, num_frames, 50)
    assert labels.shape == (num_frames, 3)
    for frame in range(num_frames):
        expected = codes[frame // 2] if frame // 2 < num_tokens else IGNORED
        assert (labels[frame] == expected).all()


@pytest.mark.parametrize("num_tokens", range(92, 109))
def test_faster_teacher_is_concatenated(num_tokens):
    """50 Hz tokens, 25 Hz student: 50 frames of 2 x 3 labels span 100 tokens."""
    codes = tokens(num_tokens)
    if abs(num_tokens - 100) > 5:
        with pytest.raises(ValueError, match="differ by"):
            align_labels(codes, 50, 50, 25)
        return
    labels = align_labels(codes, 50, 50, 25)
    assert labels.shape == (50, 6)
    for frame in range(50):
        for half in range(2):
            token = 2 * frame + half
            expected = codes[token] if token < num_tokens else IGNORED
            assert (labels[frame, 3 * half : 3 * half + 3] == expected).all()


def test_half_covered_frame_keeps_its_first_half():
    labels = align_labels(tokens(99), 50, 50, 25)
    assert (labels[49, :3] != IGNORED).all()
    assert (labels[49, 3:] == IGNORED).all()


def test_tolerance_is_a_setting():
    assert align_labels(tokens(93), 50, 100, 50, tolerance=7).shape == (100, 3)
    with pytest.raises(ValueError, match="tolerance of 0"):
        align_labels(tokens(99), 50, 100, 50, tolerance=0)


def test_empty_and_bad_input():
    assert align_labels(tokens(0), 50, 0, 50).shape == (0, 3)
    assert align_labels(tokens(0), 50, 0, 25).shape == (0, 6)
    with pytest.raises(ValueError, match="integers of shape"):
        align_labels(np.zeros((3, 3)), 50, 3, 50)
    with pytest.raises(ValueError, match="integers of shape"):
        align_labels(np.zeros(3, np.uint8), 50, 3, 50)
    with pytest.raises(ValueError, match="negative"):
        align_labels(tokens(3), 50, -1, 50)


TEACHERS = {
    "wav2vec2 and kaldi-mfcc": (50, mfcc_frames),
    "whisper": (50, lambda n: n // 320),
    "centred frames": (50, lambda n: 1 + n // 320),
    "25 Hz, rounded down": (25, lambda n: n // 640),
    "25 Hz, rounded up": (25, lambda n: -(-n // 640)),
}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("frame_rate", [50, 25])
def test_every_length_of_audio_is_within_the_tolerance(teacher, frame_rate):
    """The student has (m - 7) // 2 frames of m filter bank frames, at 25 Hz half of that rounded up."""
    token_rate, count = TEACHERS[teacher]
    for num_samples in range(1360, 1360 + 2 * 1280):
        frames = ((num_samples + 80) // 160 - 7) // 2
        num_frames = frames if frame_rate == 50 else (frames + 1) // 2
        labels = align_labels(tokens(count(num_samples), 1), token_rate, num_frames, frame_rate)
        assert (labels != IGNORED).all(), "the student's frames end before the teacher's"
