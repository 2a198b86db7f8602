# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Ids of utterances as numbers, by which millions are searched and compared without being held as text."""

import hashlib
from collections.abc import Iterable

import numpy as np


def id_hash(id: str) -> int:
    """64 bits of BLAKE2b. They are on disk, in `index.parquet` of token stores."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def id_hashes(ids: Iterable[str]) -> np.ndarray:
    """Those of many, uint64."""
    return np.fromiter(map(id_hash, ids), np.uint64)
