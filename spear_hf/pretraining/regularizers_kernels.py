# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Where Balancer and Whiten have kernels of their own."""

import functools
import importlib
from typing import Any

import torch


TYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: torch.Tensor) -> Any | None:
    """regularizers_triton.py where it can work on `x`, else None."""
    return _kernels() if x.is_cuda and x.dtype in TYPES else None


def columns_of(x: torch.Tensor, dim: int) -> torch.Tensor | None:
    """The view (frames, channels) of `x` with channels, along `dim`, next to each other; None where there is none."""
    columns = x.movedim(dim, -1)
    try:
        columns = columns.view(-1, columns.shape[-1])
    except RuntimeError:
        return None
    return columns if columns.stride(1) == 1 else None


@functools.cache
def _kernels() -> Any | None:
    try:
        return importlib.import_module(".regularizers_triton", __package__)
    except ImportError:
        return None
