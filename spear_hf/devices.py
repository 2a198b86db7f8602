# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The device that a name stands for, and small tensors that go there."""

from collections.abc import Sequence
from typing import Any

import torch


def pick_device(device: str) -> torch.device:
    """The device of that name, or for "auto" the first of cuda, mps and cpu. ValueError if it cannot be used."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # of "meta" there are no values
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used: {error}") from error
    return torch.device(device)


def to_device(values: Sequence[Any] | float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor; the host does not wait until it is there, nor for what the device does before."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
