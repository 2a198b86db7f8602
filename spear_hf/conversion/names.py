# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Names of tensors in published checkpoints and ours. Both directions come from PUBLISHED_NAMES, the only table."""

import re

from ..configuration_spear import SpearConfig
from ..modeling_spear import PUBLISHED_NAMES
from .errors import ConversionError


PREFIX = "model.model."  # of all published names; icefall's checkpoints are without it
LEFT_OVER = "bypass_scale"  # one vector per layer, of an older layer: published, and used by nobody
LEFT_OVER_VALUE = 0.5  # what it is initialised with, and stays at


def _reversed_rules() -> list[tuple[str, str]]:
    """(pattern, replacement) that undo PUBLISHED_NAMES, last rule first."""
    rules = []
    for pattern, replacement in reversed(PUBLISHED_NAMES.items()):
        back = pattern.removeprefix("^").replace(r"(\d+)", r"\1").replace(r"\.", ".")
        rules.append(("^" + re.escape(replacement).replace(r"\\1", r"(\d+)"), back))
    return rules


_REVERSED = _reversed_rules()


def from_published(name: str) -> str:
    """Our name of a published tensor; unknown names may come back changed or not."""
    for pattern, replacement in PUBLISHED_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def to_published(name: str) -> str:
    """The published name of a tensor of `SpearModel`; ConversionError if there is none."""
    published = name
    for pattern, replacement in _REVERSED:
        published = re.sub(pattern, replacement, published)
    if not published.startswith(PREFIX) or from_published(published) != name:
        raise ConversionError(f"{name} has no published name; add a rule to PUBLISHED_NAMES in modeling_spear.py.")
    return published


def left_over_names(config: SpearConfig) -> list[str]:
    """Published names of the unused vectors, one per layer."""
    return [
        to_published(f"stacks.{stack}.{'' if factor == 1 else 'stack.'}layers.{layer}.{LEFT_OVER}")
        for stack, (factor, layers) in enumerate(zip(config.downsampling_factors, config.num_layers_per_stack))
        for layer in range(layers)
    ]


def name_table() -> str:
    """The table in `conversion/README.md`, in Markdown: beginnings of names, S being the number of a stack."""
    number = "7777"  # stands for S: no number that occurs in a name
    rows = ["| published | ours |", "|---|---|"]
    for replacement in PUBLISHED_NAMES.values():
        ours = replacement.replace(r"\1", number)
        if replacement == "stacks.":  # the rule does not say that a number follows
            ours += f"{number}."
        pair = [f"`{name.replace(number, 'S')}`" for name in (to_published(ours), ours)]
        rows.append(f"| {pair[0]} | {pair[1]} |")
    return "\n".join(rows)
