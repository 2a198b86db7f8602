# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Ranges of the numbers in a configuration, said where their fields are.

    @dataclass(frozen=True)
    class Settings:
        every: Annotated[int, Range(1, 10**9)] = 200

        def __post_init__(self) -> None:
            check_ranges(self)

They are wide: what lies outside is no setting but a slip, which would end a run late, or let it learn nothing.
"""

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included unless `below`."""

    low: float
    high: float
    below: bool = False
    """Whether `high` is left out."""

    def __contains__(self, number: float) -> bool:
        return self.low <= number < self.high if self.below else self.low <= number <= self.high  # NaN is nowhere

    def __str__(self) -> str:
        end = f"less than {self.high:g}" if self.below else f"at most {self.high:g}"
        return f"at least {self.low:g} and {end}"


def check_ranges(config: Any) -> None:
    """ValueError naming the first number in a dataclass that is out of its range, alone, in a tuple or in a dict."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        if (allowed := range_of(hint)) is not None:
            for key, number in _numbers(name, getattr(config, name)):
                if number not in allowed:
                    raise ValueError(f"{key}={number} must be {allowed}.")


def range_of(hint: Any) -> Range | None:
    """The one in an annotation, however deep."""
    if isinstance(hint, Range):
        return hint
    parts = (*typing.get_args(hint), *getattr(hint, "__metadata__", ()))
    return next(filter(None, map(range_of, parts)), None)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"{name}.{key}", number) for key, number in value.items())
    elif isinstance(value, tuple):
        yield from ((f"{name}[{place}]", number) for place, number in enumerate(value))
    elif value is not None:
        yield name, value
