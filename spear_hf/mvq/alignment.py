# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Tokens at the teacher's frame rate -> labels at the student's (SPEAR, arXiv 2510.25955).

The one place that knows how 25 Hz and 50 Hz go together, and by how much lengths may differ.
"""

import math

import numpy as np


IGNORED = -100
FRAME_TOLERANCE = 5  # tokens by which two counts of the same audio may differ: the paper's recipe


def label_ratio(token_rate: float, frame_rate: float) -> tuple[int, int]:
    """(labels a student frame holds per codebook, student frames a token covers): (1, 1), (r, 1) or (1, r).

    Raises ValueError where neither rate is a whole multiple of the other.
    """
    if token_rate > 0 and frame_rate > 0:
        concatenated, repeated = token_rate / frame_rate, frame_rate / token_rate
        if round(concatenated) and abs(concatenated - round(concatenated)) < 1e-6:
            return round(concatenated), 1
        if round(repeated) and abs(repeated - round(repeated)) < 1e-6:
            return 1, round(repeated)
    raise ValueError(
        f"tokens at {token_rate} Hz cannot be aligned with student frames at {frame_rate} Hz: one rate must be a "
        "whole multiple of the other; resample the teacher's features to 50 or 25 Hz before they are quantised"
    )


def align_labels(
    codes: np.ndarray, token_rate: float, num_frames: int, frame_rate: float, tolerance: int = FRAME_TOLERANCE
) -> np.ndarray:
    """Tokens (tokens, codebooks) -> int64 labels (num_frames, codebooks x labels a frame), -100 without a token.

    Token t and student frame t start at the same time. Same rate: one to one. Slower teacher (25 against 50 Hz): each
    token is repeated. Faster teacher (50 against 25 Hz): the tokens of a frame are concatenated, [first token's
    codebooks, second token's codebooks]; a frame that is only half covered holds -100 in its second half.
    Surplus tokens are cut.

    `tolerance` counts tokens, at the token rate: the tokens that `num_frames` student frames span (rounded up to whole
    ones) and the tokens given may differ by that many, either way; more means that they are not of the same audio, a
    ValueError.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers of shape (frames, codebooks), not {codes.dtype} {codes.shape}")
    if num_frames < 0:
        raise ValueError(f"num_frames must not be negative: {num_frames}")
    concatenated, repeated = label_ratio(token_rate, frame_rate)
    num_tokens, num_codebooks = codes.shape
    needed = num_frames * concatenated if concatenated > 1 else math.ceil(num_frames / repeated)
    if abs(num_tokens - needed) > tolerance:
        raise ValueError(
            f"{num_tokens} tokens at {token_rate} Hz against {num_frames} student frames at {frame_rate} Hz, which "
            f"span {needed} tokens: they differ by {abs(num_tokens - needed)}, over the tolerance of {tolerance}; "
            "the tokens are of other audio, or of another frame rate"
        )
    tokens = np.full((needed, num_codebooks), IGNORED, dtype=np.int64)
    kept = min(num_tokens, needed)
    tokens[:kept] = codes[:kept]
    if concatenated > 1:
        return tokens.reshape(num_frames, concatenated * num_codebooks)  # (frames, [token 0 | token 1 | ...])
    return np.repeat(tokens, repeated, axis=0)[:num_frames]
