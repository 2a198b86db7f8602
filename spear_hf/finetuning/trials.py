# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Pairs of utterances that a speaker verification is measured on: from a list, or all pairs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.seeding import keyed_generator


MAX_PAIRS = 1_000_000  # of all pairs; of more, so many are drawn


def read_trials(path: str, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A list in the format of VoxCeleb, a line `1 A B` (same speaker) or `0 A B` (not) for each trial.

    Returns the row numbers (trials, 2) of A and B among `ids`, and the 1s and 0s (trials,).

    Raises:
        ValueError: there is no such file, a line of another form, or an utterance that is not among the ids.
    """
    if not Path(path).is_file():
        raise ValueError(f"trials={path} does not exist: a list with lines such as `1 A B` is needed")
    rows = {row_id: index for index, row_id in enumerate(ids)}
    pairs, same = [], []
    for line, text in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        parts = text.split()
        if not parts:
            continue
        if len(parts) != 3 or parts[0] not in ("0", "1"):
            raise ValueError(f"{path}, line {line}: {text!r} must read `1 A B` or `0 A B`")
        for name in parts[1:]:
            if name not in rows:
                raise ValueError(f"{path}, line {line}: {name!r} is not among the {len(rows)} evaluation rows")
        same.append(int(parts[0]))
        pairs.append([rows[name] for name in parts[1:]])
    if not pairs:
        raise ValueError(f"{path} lists no trial")
    return np.array(pairs), np.array(same)


def all_pairs(speakers: Sequence[str], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """As `read_trials`, of all pairs of rows, or of `MAX_PAIRS` that the seed chooses if there are more.

    ValueError if all rows are of one speaker, or no two rows are of the same.
    """
    rows = len(speakers)
    if rows * (rows - 1) // 2 <= MAX_PAIRS:
        pairs = np.stack(np.triu_indices(rows, k=1), axis=1)
    else:
        generator = keyed_generator(seed, "trials")
        first = generator.integers(rows, size=MAX_PAIRS)
        pairs = np.stack([first, (first + generator.integers(1, rows, size=MAX_PAIRS)) % rows], axis=1)
    numbers = np.unique(list(speakers), return_inverse=True)[1]
    same = (numbers[pairs[:, 0]] == numbers[pairs[:, 1]]).astype(np.int64)
    if not 0 < same.sum() < len(same):
        raise ValueError(
            f"{rows} evaluation rows of {len(set(speakers))} speakers give {int(same.sum())} pairs of the same "
            f"speaker and {len(same) - int(same.sum())} of two: both kinds are needed; choose another --eval_split, "
            "or a larger --eval_share"
        )
    return pairs, same


def cosine_scores(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosines (trials,) between the embeddings (rows, dim) of the pairs (trials, 2)."""
    embeddings = embeddings.astype(np.float64)  # cosines near 1 would be rounded to the same number
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    units = embeddings / np.maximum(norms, 1e-12)
    return np.einsum("td,td->t", units[pairs[:, 0]], units[pairs[:, 1]])
