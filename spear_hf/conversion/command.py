# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A conversion as a command: its report on stdout, a refusal on stderr."""

import sys
from collections.abc import Callable
from typing import Any

from .errors import ConversionError


def run_conversion(conversion: Callable[..., object], *args: Any, **settings: Any) -> int:
    """Exit code of `conversion(*args, **settings)`: 0, or 1 for a refusal, which has been printed."""
    try:
        conversion(*args, **settings)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
