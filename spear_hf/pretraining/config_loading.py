# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""YAML and `key=value` overrides -> nested frozen dataclasses. Unknown keys and wrong types are errors."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml


Config = TypeVar("Config")


def build(kind: Any, value: Any, key: str = "") -> Any:
    """`value` (as YAML gives it) as an instance of the type `kind`; `key` is its dotted name for error messages.

    Knows dataclasses, int, float, bool, str, Any, Literal, `X | None`, `tuple[X, ...]` and `dict[str, X]`; in such a
    dict an entry that is None is dropped, so that an override can remove it.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return build(next(argument for argument in arguments if argument is not type(None)), value, key)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{key}={value!r} must be one of {', '.join(map(repr, arguments))}.")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(build(arguments[0], item, f"{key}[{place}]") for place, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {
            str(name): build(arguments[1], item, f"{key}.{name}") for name, item in value.items() if item is not None
        }
    if kind is float and not isinstance(value, bool):
        try:  # PyYAML reads 1e-3 as a string
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    wanted = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ValueError(f"{key}={value!r} is a {type(value).__name__}, but must be {wanted}.")


def _build_dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key or 'The configuration'}={value!r} must be a mapping of names to values.")
    hints, prefix = typing.get_type_hints(kind), f"{key}." if key else ""
    names = [field.name for field in dataclasses.fields(kind)]
    for name in value:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(names)}."
            raise ValueError(f"Unknown key {prefix}{name}: {hint}")
    arguments = {name: build(hints[name], item, prefix + name) for name, item in value.items()}
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from None
    except TypeError:
        fields = dataclasses.fields(kind)
        required = {f.name for f in fields if f.default is dataclasses.MISSING is f.default_factory}
        missing = sorted(prefix + name for name in required - set(arguments))
        raise ValueError(f"Missing from the configuration: {', '.join(missing)}.") from None


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Sets every `a.b=value` (value read as YAML) in the nested `values`, which are changed in place and returned."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"Override {override!r} must have the form key=value, for instance max_steps=100.")
        *parents, last = key.strip().split(".")
        target: Any = values
        for parent in parents:
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict):
                raise ValueError(f"Override {override!r}: {parent} holds a value, not a section.")
        try:
            target[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"Override {override!r}: the value is not valid YAML ({error}).") from None
    return values


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key} comes twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. yaml.YAMLError if it is none, or if a key comes twice."""
    return yaml.load(text, Loader=_StrictLoader)


def to_plain(config: Any) -> dict[str, Any]:
    """A config as nested dicts, lists and scalars, as YAML and JSON have them; `build` takes it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ between two nested dicts."""
    changed = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed += changed_keys(before, after, f"{prefix}{name}.")
        elif before != after:
            changed.append(prefix + name)
    return changed
