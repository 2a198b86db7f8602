# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Where Balancer and Whiten have kernels of their own."""

import functools
import warnings
from itertools import pairwise
from typing import Any

import torch


TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 1 << 21  # row: a grid has 65,535 blocks of 64 columns at most


def kernels_for(x: torch.Tensor) -> Any | None:
    """regularizers_triton.py where it can work on `x`, else None."""
    return _kernels(x.device) if x.is_cuda and x.dtype in TYPES else None


def columns_of(x: torch.Tensor, dim: int) -> torch.Tensor | None:
    """The view (frames, channels) of `x` with channels, along `dim`, next to each other; None where there is none."""
    columns = x.movedim(dim, -1)
    outer = list(zip(columns.shape, columns.stride()))[:-1]
    are_rows = all(stride == size * inner for (_, stride), (size, inner) in pairwise(outer))
    return columns.flatten(0, -2) if are_rows and columns.stride(-1) == 1 else None


def rows_of(grad: torch.Tensor, x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Views (rows, channels * inner) of both, with all that lies behind `dim` in a row; None where there are none."""
    of_grad, of_x = columns_of(grad, dim), columns_of(x, dim)
    if of_grad is not None and of_x is not None:
        return of_grad, of_x
    if not grad.is_contiguous() or not x.is_contiguous() or x.shape[dim:].numel() > WIDEST:
        return None
    return grad.flatten(dim).flatten(0, -2), x.flatten(dim).flatten(0, -2)


@functools.lru_cache(maxsize=16)
def _kernels(device: torch.device) -> Any | None:
    """None, with a warning, where one of them cannot be launched: better now than in the middle of a run."""
    try:
        from . import regularizers_triton

        regularizers_triton.column_sums(torch.zeros(1, 1, device=device))
    except Exception as error:  # no Triton, no C compiler, a driver that is too old: each in a way of its own
        warnings.warn(f"Balancer and Whiten take the slower way through torch's operations: {error}", stacklevel=2)
        return None
    return regularizers_triton
