# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What torch, numpy and Python say when there is not enough memory."""

import torch


def lack_of_memory(error: BaseException) -> str | None:
    """The first line of an error that says so, of a device or of the machine; None of any other error."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    told = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first
    return first if told else None
