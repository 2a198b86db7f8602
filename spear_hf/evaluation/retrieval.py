# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Recordings of the same content in two voices, compared by dynamic time warping of frozen frames: ABX and retrieval.

    result = match_recordings(first, second, labels, pools)
    result.accuracy, result.low, result.high

Nothing is trained, so this tells how a representation is laid out. Each of the two voices says every item once. The
accuracy is that of ABX tests, as in the Zero Resource challenges: given an item X by one voice, and A and B by the
other, of which A is the same item, is X closer to A? Chance is 50 %. `predictions` are the nearest items.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from .probe import ProbeResult, bootstrap_interval


_TABLE_NUMBERS = 4_000_000  # of a table of costs, of which there are two: 64 MB


def match_recordings(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    labels: Sequence[Hashable],
    pools: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> ProbeResult:
    """ABX accuracy over all triples, X by either voice.

    Args:
        first, second: frames (frames, dim) of item k by one voice and by the other.
        labels: of the items.
        pools: an item is looked up among those of its own pool (a language). Every pool has a pair of voices: frames
            are standardised by voice, and compared by the angle between them.
        seed: of the bootstrap, which draws items with both directions.

    Returns:
        X by the first voice, then by the second, in the order of `labels`; `correct` is the share of the items B for
        which the answer is right (one half where A and B are equally far), (2 * items,).
    """
    if not len(first) == len(second) == len(labels) > 0:
        raise ValueError(
            f"{len(first)} and {len(second)} recordings of {len(labels)} items: one by each voice is needed."
        )
    names = np.asarray(labels)
    pool_of = (
        np.zeros(len(names), dtype=int) if pools is None else np.unique(np.asarray(pools), return_inverse=True)[1]
    )
    if len(pool_of) != len(names):
        raise ValueError(f"There are {len(pool_of)} pools for {len(names)} items.")
    nearest, shares = np.zeros((2, len(names)), dtype=int), np.zeros((2, len(names)))
    for pool in np.unique(pool_of):
        items = np.flatnonzero(pool_of == pool)
        sides = [_directions([side[item] for item in items.tolist()]) for side in (first, second)]
        distances = np.stack([dtw_distances(query, sides[1]) for query in sides[0]])  # (items, items)
        if len(items) < 2:
            raise ValueError(f"The item {names[items[0]]} is alone in its pool: there is nothing to compare it with.")
        for direction, rows in enumerate((distances, distances.T)):  # (item X, item of the other voice)
            nearest[direction, items] = items[rows.argmin(axis=1)]
            same = np.diagonal(rows)[:, None]
            # The same item, which is as far as itself, counts one half: taken away again.
            farther = (rows > same).sum(axis=1) + (rows == same).sum(axis=1) / 2 - 0.5
            shares[direction, items] = farther / (len(items) - 1)
    correct = shares.reshape(-1)
    groups = np.tile(np.arange(len(names)), 2)
    low, high = bootstrap_interval(correct, seed, groups=groups)
    return ProbeResult(
        accuracy=float(correct.mean()),
        low=low,
        high=high,
        penalty=None,
        validation_accuracy=None,
        predictions=names[nearest.reshape(-1)],
        correct=correct,
        groups=groups,
    )


def _directions(recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Recordings (frames, dim) of one voice, standardised by all its frames, every frame of length 1."""
    frames = np.concatenate(recordings)
    if not np.isfinite(frames).all():
        raise ValueError("The frames hold NaN or infinity.")
    mean, scale = frames.mean(axis=0), frames.std(axis=0)
    scale[scale < 1e-8] = 1.0  # a channel that is constant says nothing
    found = []
    for recording in recordings:
        standardised = (recording - mean) / scale
        found.append(standardised / np.maximum(np.linalg.norm(standardised, axis=1, keepdims=True), 1e-8))
    return found


def dtw_distances(query: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """Costs of the best alignments of a query (n, dim) with references (m, dim): float64 (references,).

    Frames are of length 1 and cost 1 - cosine; a step goes on by a frame in one or in both, and the sum over the path
    is divided by n + m. References are done many at once, an antidiagonal of the table after the other.
    """
    longest = max(map(len, references), default=0)
    at_once = max(1, _TABLE_NUMBERS // max(1, len(query) * longest))
    parts = (references[start : start + at_once] for start in range(0, len(references), at_once))
    costs = [_dtw_distances(query, part) for part in parts]
    return np.concatenate(costs) if costs else np.zeros(0)


def _dtw_distances(query: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    n, lengths = len(query), np.array([len(reference) for reference in references])
    if n == 0 or lengths.min() == 0:
        raise ValueError("A recording without frames cannot be aligned.")
    longest = int(lengths.max())
    costs = np.full((len(references), n, longest), np.inf)
    for place, reference in enumerate(references):
        costs[place, :, : len(reference)] = 1.0 - query @ reference.T
    table = np.full((len(references), n + 1, longest + 1), np.inf)
    table[:, 0, 0] = 0.0
    for diagonal in range(2, n + longest + 1):
        i = np.arange(max(1, diagonal - longest), min(n, diagonal - 1) + 1)
        j = diagonal - i
        before = np.minimum(np.minimum(table[:, i - 1, j - 1], table[:, i - 1, j]), table[:, i, j - 1])
        table[:, i, j] = before + costs[:, i - 1, j - 1]
    return table[np.arange(len(references)), n, lengths] / (n + lengths)
