# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`NAME#key=value,key=value`: a model or a task together with its options, as one word of the command line."""

import re
from collections.abc import Collection


def split_options(text: str, known: Collection[str] | None) -> tuple[str, dict[str, str]]:
    """The name and its options. ValueError for an option that is not `known` (None: any), comes twice or is empty."""
    name, mark, tail = text.partition("#")
    options: dict[str, str] = {}
    if not mark:
        return name, options
    for item in re.split(r",(?=\s*\w+\s*=)", tail):  # a comma without an option behind it is of the value
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            keys = "" if known is None else f"; the keys are {', '.join(known)}"
            raise ValueError(f"{text!r}: {item!r} must read KEY=VALUE{keys}")
        if known is not None and key not in known:
            raise ValueError(f"{text!r}: unknown option {key!r}; known are {', '.join(known)}")
        if key in options:
            raise ValueError(f"{text!r}: the option {key!r} comes twice")
        options[key] = value
    return name, options
