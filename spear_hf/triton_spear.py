# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels of compiled_spear.py in Triton. None is compiled anew for another length or number of utterances.

The tests run them on a CPU, through Triton's interpreter (TRITON_INTERPRET=1).
"""

import torch
import triton
import triton.language as tl


COLUMNS = 1024  # of a row of scores, at a time
FRAMES = 128  # that a block of the convolution's gradient adds up
FRAMES_AT_ONCE = 4
CHANNELS, WARPS = 64, 4


@triton.jit(do_not_specialize=["length"])
def _scores_by_offset(scores, out, length, COLUMNS: tl.constexpr):
    """A row: of query i, entry j is that of key i + j - (length - 1)."""
    row = tl.program_id(0).to(tl.int64)
    first_key = tl.program_id(0) % length - (length - 1)
    for start in range(0, 2 * length, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        keys = first_key + columns
        values = tl.load(scores + row * length + keys, mask=(keys >= 0) & (keys < length), other=0.0)
        tl.store(out + row * 2 * length + columns, values, mask=columns < 2 * length)


@triton.jit(do_not_specialize=["frames", "blocks"])
def _depthwise_weight_gradient(
    grad,
    x,
    out,
    frames,
    blocks,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAMES: tl.constexpr,
    FRAMES_AT_ONCE: tl.constexpr,
):
    """The part of FRAMES frames of an utterance, of CHANNELS channels: grad, x (batch, frames, WIDTH), `out` (batch *
    blocks, TAPS, WIDTH). A row of the sums for each tap, ROWS being a power of two."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    begin = tl.program_id(0) % blocks * FRAMES
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    taps = tl.arange(0, ROWS)
    there = channels < WIDTH
    grad += batch * frames * WIDTH + channels
    seen_of = x + batch * frames * WIDTH + channels[None, :]
    summed = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(begin, tl.minimum(begin + FRAMES, frames), FRAMES_AT_ONCE):
        for step in tl.static_range(FRAMES_AT_ONCE):
            frame = start + step
            factor = tl.load(grad + frame * WIDTH, mask=there & (frame < frames), other=0.0).to(tl.float32)
            rows = frame - TAPS // 2 + taps
            inside = (rows >= 0) & (rows < frames) & (taps < TAPS)
            seen = tl.load(seen_of + rows[:, None] * WIDTH, mask=inside[:, None] & there[None, :], other=0.0)
            summed += seen.to(tl.float32) * factor[None, :]
    places = (tl.program_id(0).to(tl.int64) * TAPS + taps[:, None]) * WIDTH + channels[None, :]
    tl.store(out + places, summed, mask=(taps < TAPS)[:, None] & there[None, :])


def scores_by_offset(scores: torch.Tensor) -> torch.Tensor:
    """(..., length, length), contiguous -> (..., length, 2 * length), zeros where there is no key."""
    length = scores.shape[-1]
    out = scores.new_empty(*scores.shape[:-1], 2 * length)
    if scores.numel():
        columns = min(COLUMNS, triton.next_power_of_2(2 * length))
        with torch.cuda.device_of(scores):
            _scores_by_offset[(scores.numel() // length,)](scores, out, length, COLUMNS=columns)
    return out


def depthwise_weight_gradient(grad: torch.Tensor, x: torch.Tensor, taps: int) -> torch.Tensor:
    """(batch, frames, channels), contiguous, and an odd number of taps -> float32 (channels, 1, taps)."""
    batch, frames, width = x.shape
    blocks = triton.cdiv(frames, FRAMES)
    parts = x.new_empty(batch * blocks, taps, width, dtype=torch.float32)
    if parts.numel():
        shape = {"WIDTH": width, "TAPS": taps, "ROWS": triton.next_power_of_2(taps)}
        shape |= {"CHANNELS": CHANNELS, "FRAMES": FRAMES, "FRAMES_AT_ONCE": FRAMES_AT_ONCE}
        with torch.cuda.device_of(x):
            _depthwise_weight_gradient[(batch * blocks, triton.cdiv(width, CHANNELS))](
                grad, x, parts, frames, blocks, **shape, num_warps=WARPS
            )
    return parts.sum(dim=0).T.contiguous()[:, None]
