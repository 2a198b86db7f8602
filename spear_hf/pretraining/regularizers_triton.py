# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels of Balancer and Whiten in Triton: what is done with the channels of features, in a few launches.

None is compiled anew for another number of frames. The tests run them on a CPU, through Triton's interpreter
(TRITON_INTERPRET=1).
"""

import torch
import triton
import triton.language as tl

from .regularizers_schedules import BALANCER_GRADIENT_SCALE, BALANCER_SMALLEST_DEVIATION, BalancerLimits


FRAMES = 512  # that a block adds up
FRAMES_AT_ONCE = 32
CHANNELS = 64
COVARIANCES = 4096  # a block
WARPS = 4


@triton.jit(do_not_specialize=["frames"])
def _column_sums(
    x,
    out,
    frames,
    stride,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    FRAMES: tl.constexpr,
    FRAMES_AT_ONCE: tl.constexpr,
):
    """x (frames, WIDTH), a row every `stride` elements; `out` (blocks, 2, WIDTH): sums of values and of squares."""
    block = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = channels < WIDTH
    values = tl.zeros([FRAMES_AT_ONCE, CHANNELS], tl.float32)
    squares = tl.zeros([FRAMES_AT_ONCE, CHANNELS], tl.float32)
    for start in range(0, FRAMES, FRAMES_AT_ONCE):
        rows = block * FRAMES + start + tl.arange(0, FRAMES_AT_ONCE)
        inside = (rows < frames)[:, None] & there[None, :]
        seen = tl.load(x + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0).to(tl.float32)
        values += seen
        squares += seen * seen
    out += block * 2 * WIDTH + channels
    tl.store(out, tl.sum(values, axis=0), mask=there)
    tl.store(out + WIDTH, tl.sum(squares, axis=0), mask=there)


@triton.jit(do_not_specialize=["first", "last", "size"])
def _balancing_line(
    sums,
    out,
    first,
    last,
    size,
    count,
    min_mean,
    max_mean,
    min_rms,
    max_rms,
    gradient_scale,
    smallest_deviation,
    CHANNELS: tl.constexpr,
):
    """`balancing_line` of regularizers_balancer.py; `out` (2, size), zeros but for the channels `first` to `last`, of
    which `sums` are the sums."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channels >= first) & (channels < last)
    mean = tl.load(sums + channels - first, mask=inside, other=0.0) / count
    square = tl.load(sums + (last - first) + channels - first, mask=inside, other=0.0) / count
    rms = tl.maximum(tl.sqrt(square), 1e-10)
    deviation = tl.maximum(tl.sqrt(tl.maximum(rms * rms - mean * mean, 1e-20)), smallest_deviation * rms)
    ratio = mean / deviation
    by_mean = tl.where(ratio > max_mean, 1.0, tl.where(ratio < min_mean, -1.0, 0.0))
    by_rms = tl.where(rms > max_rms, 1.0, tl.where(rms < min_rms, -1.0, 0.0))
    quotient = 1.0 + ratio * ratio
    center = by_mean + by_rms * ratio / quotient
    slope = by_rms / quotient - by_mean * ratio
    scale = gradient_scale / tl.maximum(tl.sqrt(center * center + slope * slope), 1e-20)
    slope = slope / deviation
    kept = channels < size
    tl.store(out + channels, tl.where(inside, (center - slope * mean) * scale, 0.0), mask=kept)
    tl.store(out + size + channels, tl.where(inside, slope * scale, 0.0), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def _balance(
    grad,
    x,
    line,
    rows,
    width,
    grad_stride,
    stride,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad, x (rows, width), a row every so many elements: adds |grad| * (offset + slope * x) to `grad`, of the `line`
    (2, width)."""
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    inside = (places < rows)[:, None] & there[None, :]
    offset = tl.load(line + columns, mask=there, other=0.0)
    slope = tl.load(line + width + columns, mask=there, other=0.0)
    seen = tl.load(x + places[:, None] * stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    changing = grad + places[:, None] * grad_stride + columns[None, :]
    given = tl.load(changing, mask=inside, other=0.0).to(tl.float32)
    changed = given + tl.abs(given) * (offset[None, :] + slope[None, :] * seen)
    tl.store(changing, changed.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _mean_variance(products, sums, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CENTRED: tl.constexpr):
    """The mean of the covariance's diagonal; what is below 1e-5 of the mean square is the rounding of long sums."""
    columns = tl.arange(0, COLUMNS)
    diagonal = tl.load(products + columns * (WIDTH + 1), mask=columns < WIDTH, other=0.0)
    smallest = 1e-20
    if not CENTRED:
        smallest = tl.maximum(1e-5 * tl.sum(diagonal, axis=0) / WIDTH, smallest)
        total = tl.load(sums + columns, mask=columns < WIDTH, other=0.0)
        diagonal -= total * total / count
    return tl.maximum(tl.sum(diagonal, axis=0) / WIDTH, smallest)


@triton.jit
def _covariance_rows(
    products,
    sums,
    count,
    rows,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """These rows, (rows, COLUMNS), of the covariance with a mean diagonal of 1; 0 between the groups of channels."""
    columns = tl.arange(0, COLUMNS)
    inside = (rows < WIDTH)[:, None] & (columns < WIDTH)[None, :]
    found = tl.load(products + rows[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
    if not CENTRED:
        of_rows = tl.load(sums + rows, mask=rows < WIDTH, other=0.0)
        of_columns = tl.load(sums + columns, mask=columns < WIDTH, other=0.0)
        found -= of_rows[:, None] * (of_columns[None, :] / count)
    found /= _mean_variance(products, sums, count, WIDTH, COLUMNS, CENTRED)
    return tl.where((rows // GROUP)[:, None] == (columns // GROUP)[None, :], found, 0.0)


@triton.jit
def _covariance_squares(
    products,
    sums,
    out,
    count,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """`out` (blocks,): the sums of the covariance's squares, of ROWS rows each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    found = _covariance_rows(products, sums, count, rows, WIDTH, GROUP, COLUMNS, CENTRED)
    tl.store(out + tl.program_id(0), tl.sum(tl.sum(found * found, axis=1), axis=0))


@triton.jit
def _whitening_matrix(
    products,
    sums,
    squares,
    matrix,
    bias,
    metric,
    count,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """`matrix` (WIDTH, WIDTH), covariance - metric * I, and `bias` (WIDTH,), - mean @ `matrix`, which is symmetric."""
    blocks = tl.arange(0, BLOCKS)
    seen = tl.load(squares + blocks, mask=blocks < (WIDTH + ROWS - 1) // ROWS, other=0.0)
    found_metric = tl.sum(seen, axis=0) / WIDTH
    if tl.program_id(0) == 0:
        tl.store(metric, found_metric)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    found = _covariance_rows(products, sums, count, rows, WIDTH, GROUP, COLUMNS, CENTRED)
    found = tl.where(rows[:, None] == columns[None, :], found - found_metric, found).to(matrix.dtype.element_ty)
    inside = (rows < WIDTH)[:, None] & (columns < WIDTH)[None, :]
    tl.store(matrix + rows[:, None] * WIDTH + columns[None, :], found, mask=inside)
    if not CENTRED:
        mean = tl.load(sums + columns, mask=columns < WIDTH, other=0.0) / count
        push = -tl.sum(found.to(tl.float32) * mean[None, :], axis=1)
        tl.store(bias + rows, push.to(bias.dtype.element_ty), mask=rows < WIDTH)


@triton.jit(do_not_specialize=["index"])
def _whitening_scale(metric, norm, penalty_norm, votes, out, index, limit, gradient_scale):
    """What the penalty is to be multiplied by, 0 within the limit; and the vote of the place."""
    exceeded = tl.load(metric) > limit
    scale = gradient_scale * tl.load(norm) / (tl.load(penalty_norm) + 1e-20)
    tl.store(out, tl.where(exceeded, scale, 0.0))
    tl.store(votes + index, tl.maximum(tl.load(votes + index), tl.where(exceeded, 2.0, 1.0)))


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """(frames, channels), channels next to each other -> float32 (2, channels): sums of values and of squares."""
    frames, width = x.shape
    parts = x.new_empty(triton.cdiv(frames, FRAMES), 2, width, dtype=torch.float32)
    grid = len(parts), triton.cdiv(width, CHANNELS)
    with torch.cuda.device_of(x):
        _column_sums[grid](
            x,
            parts,
            frames,
            x.stride(0),
            WIDTH=width,
            CHANNELS=CHANNELS,
            FRAMES=FRAMES,
            FRAMES_AT_ONCE=FRAMES_AT_ONCE,
            num_warps=WARPS,
        )
    return parts.sum(dim=0)


def balancing_line(sums: torch.Tensor, count: int, limits: BalancerLimits, start: int, size: int) -> torch.Tensor:
    """Offset and slope (2, size), zeros outside of the channels from `start` on whose `sums` over `count` values are
    given."""
    line = sums.new_empty(2, size)
    with torch.cuda.device_of(sums):
        _balancing_line[(triton.cdiv(size, CHANNELS),)](
            sums,
            line,
            start,
            start + sums.shape[1],
            size,
            float(count),
            *limits[:4],
            BALANCER_GRADIENT_SCALE,
            BALANCER_SMALLEST_DEVIATION,
            CHANNELS=CHANNELS,
            num_warps=1,
        )
    return line


def balance_(grad: torch.Tensor, x: torch.Tensor, line: torch.Tensor) -> None:
    """Changes `grad`, as `x` (rows, columns), columns next to each other, by the `line` (2, columns)."""
    rows, width = x.shape
    with torch.cuda.device_of(x):
        _balance[triton.cdiv(rows, FRAMES_AT_ONCE), triton.cdiv(width, CHANNELS)](
            grad,
            x,
            line,
            rows,
            width,
            grad.stride(0),
            x.stride(0),
            COLUMNS=CHANNELS,
            ROWS=FRAMES_AT_ONCE,
            num_warps=WARPS,
        )


def whitening_matrix(
    products: torch.Tensor, sums: torch.Tensor | None, frames: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the products x' x of features (frames, channels) and their `column_sums`, None if they are centred: the
    metric (), and matrix and bias in bfloat16 that make the penalty: bias + x @ matrix."""
    width = len(products)
    columns = triton.next_power_of_2(width)
    rows = max(1, COVARIANCES // columns)
    blocks = triton.cdiv(width, rows)
    squares, metric = products.new_empty(blocks), products.new_empty(())
    matrix = torch.empty_like(products, dtype=torch.bfloat16)
    bias = products.new_empty(width, dtype=torch.bfloat16)
    shape = {"WIDTH": width, "GROUP": width // groups, "COLUMNS": columns, "ROWS": rows}
    shape |= {"CENTRED": sums is None, "num_warps": WARPS}
    totals = products if sums is None else sums
    with torch.cuda.device_of(products):
        _covariance_squares[(blocks,)](products, totals, squares, float(frames), **shape)
        shape["BLOCKS"] = triton.next_power_of_2(blocks)
        _whitening_matrix[(blocks,)](products, totals, squares, matrix, bias, metric, float(frames), **shape)
    return metric, matrix, bias


def whitening_scale(
    metric: torch.Tensor,
    norm: torch.Tensor,
    penalty_norm: torch.Tensor,
    limit: float,
    gradient_scale: float,
    votes: torch.Tensor,
    index: int,
) -> torch.Tensor:
    """What the penalty is to be multiplied by: (). Votes."""
    scale = torch.empty_like(metric)
    with torch.cuda.device_of(metric):
        _whitening_scale[(1,)](metric, norm, penalty_norm, votes, scale, index, limit, gradient_scale, num_warps=1)
    return scale
