# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Teachers whose settings are published, so that `spear-hf quantize --teacher NAME` needs no others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownTeacher:
    """How a teacher is quantised, and who says so."""

    codebooks: int
    layer: int | None  # None: the last
    normalize: bool  # standardise every channel
    source: str
    factory: str | None = None  # where transformers has no class for it: module:factory, called with model=NAME


KNOWN_TEACHERS: dict[str, KnownTeacher] = {
    # Output of block 21 of 24, 1024 channels at 50 Hz.
    "microsoft/wavlm-large": KnownTeacher(16, 21, True, "SPEAR, arXiv 2510.25955: its speech teacher"),
    # Last layer, 1536 channels at 25 Hz.
    "mispeech/dasheng-1.2B": KnownTeacher(
        8, None, False, "SPEAR, arXiv 2510.25955: its audio teacher", "spear_hf.mvq.dasheng:dasheng"
    ),
}

_BY_FACTORY = [(name, known.factory) for name, known in KNOWN_TEACHERS.items()]


@dataclass(frozen=True)
class TeacherSettings:
    """How to quantise a teacher, complete."""

    layer: int | None
    codebooks: int
    normalize: bool
    note: str | None
    """Which of them were filled in, and whence; None where all were given."""


def resolve_settings(
    spec: str,
    layer: int | None = None,
    codebooks: int | None = None,
    normalize: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> TeacherSettings:
    """Fills in what is not given: from KNOWN_TEACHERS, else the last layer, standardised.

    ValueError without `codebooks` for a teacher that is not known: there is no good guess.
    """
    name = next((str((options or {}).get("model", known)) for known, its in _BY_FACTORY if its == spec), spec)
    known = KNOWN_TEACHERS.get(name)
    said = []
    if layer is None:
        layer = known.layer if known is not None else None
        if known is not None or not (spec == "kaldi-mfcc" or ":" in spec):  # these may not have layers
            said.append("the last layer" if layer is None else f"layer {layer}")
    if codebooks is None:
        if known is None:
            raise ValueError(
                f"how many codebooks for {name}? Say --codebooks, a power of two (the paper takes 16 for speech and 8 "
                f"for audio); only {', '.join(KNOWN_TEACHERS)} have a default"
            )
        codebooks = known.codebooks
        said.append(f"{codebooks} codebooks")
    if normalize is None:
        normalize = known.normalize if known is not None else True
        said.append("standardised" if normalize else "not standardised")
    origin = "the default" if known is None else known.source
    return TeacherSettings(layer, codebooks, normalize, f"{name}: {', '.join(said)} ({origin})" if said else None)
