# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels of WavLM's forward pass on a GPU, in Triton: attention with its gated bias, and the convolutions.

float16 or bfloat16 in and out, float32 within. None is compiled anew for another length or number of utterances. The
tests run them on a CPU, through Triton's interpreter (TRITON_INTERPRET=1).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


# Of a block of attention, and of the convolutions; without spills on a Hopper GPU, two blocks of attention at a time.
QUERIES, KEYS, WARPS, STAGES = 128, 64, 8, 3
FIRST_FRAMES, CONVOLVED_FRAMES, POSITION_FRAMES = 16, 64, 128
CONVOLVED_DEPTH, CONVOLVED_WARPS, CONVOLVED_STAGES = 64, 8, 3
POSITION_WARPS, POSITION_STAGES = 4, 4
LOG2_E = math.log2(math.e)
LARGE_SHARED_MEMORY = 224 * 1024  # bytes, of a Hopper GPU


@dataclass(frozen=True)
class ConvolutionWeights:
    """Of a convolution with the layer norm after it; all but `weight` (taps * channels in, channels) float32."""

    weight: Tensor
    bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    taps: int
    stride: int

    @property
    def channels(self) -> int:
        return self.weight.shape[1]


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _normalised(x, weight, bias, eps, WIDTH: tl.constexpr):
    """Layer norm of the rows of x (rows, WIDTH)."""
    centred = x - (tl.sum(x, axis=1) / WIDTH)[:, None]
    variance = tl.sum(centred * centred, axis=1) / WIDTH
    return centred * tl.rsqrt(variance + eps)[:, None] * weight[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["frames", "blocks"])
def _attention(
    query,
    key,
    value,
    hidden,
    out,
    table,
    gate_weight,
    gate_bias,
    gate_scale,
    lengths,
    frames,
    blocks,
    table_head,
    table_row,
    origin,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries of one head of one utterance; the blocks of a head are neighbours: they share its keys."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % HEADS
    batch = tl.program_id(0) // blocks // HEADS
    length = tl.load(lengths + batch)
    rows = block * QUERIES + tl.arange(0, QUERIES)
    columns = tl.arange(0, KEYS)
    dims = tl.arange(0, HEAD_DIM)
    start = batch.to(tl.int64) * frames * WIDTH + head * HEAD_DIM
    places = start + rows[:, None] * WIDTH + dims[None, :]
    inside = (rows < frames)[:, None]
    if block * QUERIES >= length:
        tl.store(out + places, tl.zeros([QUERIES, HEAD_DIM], out.dtype.element_ty), mask=inside)
        return

    entering = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
    update = tl.sum(entering * tl.load(gate_weight + dims)[None, :], axis=1) + tl.load(gate_bias)
    reset = tl.sum(entering * tl.load(gate_weight + HEAD_DIM + dims)[None, :], axis=1) + tl.load(gate_bias + 1)
    gate = tl.sigmoid(update) * (tl.sigmoid(reset) * tl.load(gate_scale + head) - 1.0) + 2.0
    # Scores are scaled, for powers of two, when these are taken. Negative: a sum would become the product's first
    # summand, to which biases come late.
    gate *= -1.4426950408889634 / scale

    q = tl.load(query + places, mask=inside, other=0.0)
    keys = key + start + columns[None, :] * WIDTH + dims[:, None]
    values = value + start + columns[:, None] * WIDTH + dims[None, :]
    biases = table + head.to(tl.int64) * table_head + (origin - block * QUERIES)
    biases += tl.arange(0, QUERIES)[:, None] * table_row + columns[None, :]
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    summed = tl.zeros([QUERIES, HEAD_DIM], tl.float32)
    for first in range(0, length, KEYS):
        there = first + columns < length
        k = tl.load(keys + first * WIDTH, mask=there[None, :], other=0.0)
        bias = tl.load(biases + first).to(tl.float32)
        scores = tl.dot(q, k) - gate[:, None] * bias
        scores = tl.where(there[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores * scale - (larger * scale)[:, None])
        shrink = tl.exp2((largest - larger) * scale)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(values + first * WIDTH, mask=there[:, None], other=0.0)
        summed = tl.dot(weights.to(v.dtype), v, summed * shrink[:, None])
        largest = larger
    tl.store(out + places, (summed / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["in_frames", "frames", "blocks"])
def _convolution(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    out,
    in_frames,
    frames,
    blocks,
    eps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    FRAMES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Convolution, layer norm and GELU of FRAMES frames: x (batch, in_frames, IN), weight (TAPS * IN, OUT).

    What a frame sees lies in one stretch of memory: rows of a matrix product that overlap.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks) * FRAMES
    rows = tl.arange(0, FRAMES)
    inside = (block + rows < frames)[:, None]
    depth, channels = tl.arange(0, DEPTH), tl.arange(0, OUT)
    seen = x + (batch * in_frames + block * STRIDE) * IN + rows[:, None] * (STRIDE * IN) + depth[None, :]
    taken = weight + depth[:, None] * OUT + channels[None, :]
    summed = tl.zeros([FRAMES, OUT], tl.float32)
    for first in range(0, TAPS * IN, DEPTH):
        left = tl.load(seen + first, mask=inside, other=0.0)
        summed = tl.dot(left, tl.load(taken + first * OUT), summed)
    summed += tl.load(bias + channels)[None, :]
    normalised = _normalised(summed, tl.load(norm_weight + channels), tl.load(norm_bias + channels), eps, OUT)
    places = (batch * frames + block) * OUT + rows[:, None] * OUT + channels[None, :]
    tl.store(out + places, _gelu(normalised).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["samples", "frames", "blocks"])
def _first_convolution(
    x,
    weight,
    bias,
    norm_weight,
    norm_bias,
    out,
    samples,
    frames,
    blocks,
    eps,
    OUT: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    FRAMES: tl.constexpr,
):
    """As `_convolution`, of one channel: x (batch, samples), weight (TAPS, OUT)."""
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    block = (tl.program_id(0) % blocks) * FRAMES
    rows = tl.arange(0, FRAMES)
    inside = block + rows < frames
    channels = tl.arange(0, OUT)
    seen = x + batch * samples + block * STRIDE + rows * STRIDE
    summed = tl.zeros([FRAMES, OUT], tl.float32) + tl.load(bias + channels)[None, :]
    for tap in tl.static_range(TAPS):
        sample = tl.load(seen + tap, mask=inside, other=0.0).to(tl.float32)
        summed += sample[:, None] * tl.load(weight + tap * OUT + channels).to(tl.float32)[None, :]
    normalised = _normalised(summed, tl.load(norm_weight + channels), tl.load(norm_bias + channels), eps, OUT)
    places = (batch * frames + block) * OUT + rows[:, None] * OUT + channels[None, :]
    tl.store(out + places, _gelu(normalised).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["frames", "blocks"])
def _position_convolution(
    x,
    weight,
    bias,
    out,
    frames,
    blocks,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    FRAMES: tl.constexpr,
):
    """Convolution and GELU of one group: x (batch, frames, GROUPS * WIDTH), weight (GROUPS, TAPS, WIDTH, WIDTH)."""
    batch = (tl.program_id(0) // blocks // GROUPS).to(tl.int64)
    group = (tl.program_id(0) // blocks) % GROUPS
    rows = (tl.program_id(0) % blocks) * FRAMES + tl.arange(0, FRAMES)
    channels = tl.arange(0, WIDTH)
    start = batch * frames * (GROUPS * WIDTH) + group * WIDTH
    taken = weight + group * (TAPS * WIDTH * WIDTH) + channels[:, None] * WIDTH + channels[None, :]
    summed = tl.zeros([FRAMES, WIDTH], tl.float32)
    for tap in range(TAPS):
        seen = rows + (tap - TAPS // 2)
        there = (seen >= 0) & (seen < frames)
        left = tl.load(
            x + start + seen[:, None] * (GROUPS * WIDTH) + channels[None, :], mask=there[:, None], other=0.0
        )
        summed = tl.dot(left, tl.load(taken + tap * (WIDTH * WIDTH)), summed)
    summed += tl.load(bias + group * WIDTH + channels)[None, :]
    places = start + rows[:, None] * (GROUPS * WIDTH) + channels[None, :]
    tl.store(out + places, _gelu(summed).to(out.dtype.element_ty), mask=(rows < frames)[:, None])


def skewed(table: Tensor) -> Tensor:
    """Biases by distance (heads, 2 * padded - 1) -> (heads, QUERIES, 2 * padded - QUERIES): row i is moved by i.

    So every block of scores finds its biases in rows that begin where memory is read at its full width.
    """
    rows = table.unfold(-1, table.shape[1] - QUERIES + 1, 1).flip(1)
    return rows.contiguous()  # flip takes overlapping rows for columns


def has_shared_memory(device: torch.device, size: int) -> bool:
    """Whether a multiprocessor has so many bytes, nearly all of which a block may have."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= size


def padded(frames: int) -> int:
    """The frames that the blocks of attention cover."""
    return triton.cdiv(frames, QUERIES) * QUERIES


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    table: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    gate_scale: Tensor,
    lengths: Tensor,
) -> Tensor:
    """softmax(query key' / sqrt(head_dim) + gate * bias) value, of keys within the lengths; zeros, or anything finite,
    for queries beyond.

    query, key, value, hidden (batch, frames, heads * head_dim) contiguous; `table` as `skewed` makes it, of distances
    1 - padded(frames) and up, or before that; float32 gate_weight (2, head_dim), gate_bias (2,) and gate_scale
    (heads,): update = sigmoid(hidden gate_weight[0] + gate_bias[0]), reset likewise, gate = update * (reset *
    gate_scale - 1) + 2; int32 lengths (batch,), at least 1.
    """
    batch, frames, width = query.shape
    heads = len(gate_scale)
    blocks = triton.cdiv(frames, QUERIES)
    out = torch.empty_like(query)
    if table.ndim == 3:
        row, origin = table.stride(1), blocks * QUERIES - QUERIES
    else:
        row, origin = -1, blocks * QUERIES - 1
    with torch.cuda.device_of(query):
        _attention[(blocks * heads * batch,)](
            query,
            key,
            value,
            hidden,
            out,
            table,
            gate_weight,
            gate_bias,
            gate_scale,
            lengths,
            frames,
            blocks,
            table.stride(0),
            row,
            origin,
            (width // heads) ** -0.5 * LOG2_E,
            HEADS=heads,
            HEAD_DIM=width // heads,
            QUERIES=QUERIES,
            KEYS=KEYS,
            **attention_options(width // heads),
        )
    return out


def attention_options(head_dim: int) -> dict[str, int]:
    """Of the compiler: up to 64 channels two blocks at a time, for which Triton 3.8 took two registers too many."""
    if head_dim > 64:
        return {"num_warps": WARPS, "num_stages": 2}
    return {"num_warps": WARPS, "num_stages": STAGES, "maxnreg": 65536 // (2 * 32 * WARPS)}


def convolution(x: Tensor, weights: ConvolutionWeights) -> Tensor:
    """Convolution, layer norm over channels and GELU: (batch, frames, channels), or (batch, samples) -> the same."""
    batch, in_frames = x.shape[:2]
    frames = (in_frames - weights.taps) // weights.stride + 1
    out = x.new_empty(batch, frames, weights.channels)
    rows = FIRST_FRAMES if x.ndim == 2 else CONVOLVED_FRAMES
    blocks = triton.cdiv(frames, rows)
    given = (x, weights.weight, weights.bias, weights.norm_weight, weights.norm_bias, out, in_frames, frames, blocks)
    shape = {"OUT": weights.channels, "TAPS": weights.taps, "STRIDE": weights.stride, "FRAMES": rows}
    with torch.cuda.device_of(x):
        if x.ndim == 2:
            _first_convolution[(blocks * batch,)](*given, weights.eps, **shape, num_warps=8)
        else:
            stages = CONVOLVED_STAGES if has_shared_memory(x.device, LARGE_SHARED_MEMORY) else 2
            shape |= {"IN": x.shape[2], "DEPTH": min(CONVOLVED_DEPTH, x.shape[2])}
            _convolution[(blocks * batch,)](*given, weights.eps, **shape, num_warps=CONVOLVED_WARPS, num_stages=stages)
    return out


def position_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Grouped convolution that keeps the number of frames, and GELU: x (batch, frames, dim) contiguous -> the same.

    `weight` (groups, taps, dim / groups in, dim / groups out); of an even number of taps, one more lies before.
    """
    batch, frames, _ = x.shape
    groups, taps, width, _ = weight.shape
    out = torch.empty_like(x)
    blocks = triton.cdiv(frames, POSITION_FRAMES)
    shape = {"GROUPS": groups, "WIDTH": width, "TAPS": taps, "FRAMES": POSITION_FRAMES}
    with torch.cuda.device_of(x):
        _position_convolution[(blocks * groups * batch,)](
            x, weight, bias, out, frames, blocks, **shape, **position_options(width)
        )
    return out


def position_options(width: int) -> dict[str, int]:
    """For groups of so many channels. Those of 128 need twice the registers and shared memory of 64."""
    if width > 64:
        return {"num_warps": 2 * POSITION_WARPS, "num_stages": 2}
    return {"num_warps": POSITION_WARPS, "num_stages": POSITION_STAGES}
