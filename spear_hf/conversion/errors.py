# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The error of all conversions."""


class ConversionError(ValueError):
    """The source cannot be converted without guessing or losing something, or the result is not the same model."""


def listed(names: object, limit: int = 8) -> str:
    """Names for an error message: sorted, the first `limit` and how many more."""
    ordered = sorted(names)  # type: ignore[call-overload]
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
