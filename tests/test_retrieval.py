# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Dynamic time warping against a plain reference, and retrieval of items that are known to match."""

import numpy as np
import pytest

from spear_hf.evaluation import retrieval
from spear_hf.evaluation.probe import paired_difference
from spear_hf.evaluation.retrieval import dtw_distances, match_recordings


def slow_dtw(query: np.ndarray, reference: np.ndarray) -> float:
    table = {(0, 0): 0.0}
    for i in range(1, len(query) + 1):
        for j in range(1, len(reference) + 1):
            steps = [table[place] for place in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if place in table]
            table[i, j] = min(steps) + 1 - float(query[i - 1] @ reference[j - 1])
    return table[len(query), len(reference)] / (len(query) + len(reference))


def directions(rng, frames, dim=6):
    rows = rng.standard_normal((frames, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_distances_are_those_of_the_plain_recursion(monkeypatch):
    rng = np.random.default_rng(0)
    for frames in (1, 2, 9):
        query = directions(rng, frames)
        references = [directions(rng, length) for length in (1, 12, 3, 7)]
        expected = [slow_dtw(query, reference) for reference in references]
        for numbers in (10**6, 200, 1):  # in a table: all references at once, some, one after the other
            monkeypatch.setattr(retrieval, "_TABLE_NUMBERS", numbers)
            np.testing.assert_allclose(dtw_distances(query, references), expected, rtol=1e-12)
    stretched = np.repeat(query, 3, axis=0)
    assert dtw_distances(query, [stretched])[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="without frames"):
        dtw_distances(query, [query[:0]])


def voices(items: int, noise: float):
    """Two voices say items at their own speed; each voice has its own offset and scale in every channel."""
    rng = np.random.default_rng(1)
    sides = ([], [])
    for _ in range(items):
        content = np.cumsum(rng.standard_normal((8, 5)), axis=0)
        for voice, side in enumerate(sides):
            times = np.sort(rng.integers(0, 8, size=14 + 6 * voice))
            frames = content[times] + noise * rng.standard_normal((len(times), 5))
            side.append(frames * (1 + 9 * voice) + 100 * voice)
    return sides


def test_the_accuracy_is_that_of_all_triples():
    first, second = voices(6, noise=2.0)
    result = match_recordings(first, second, labels=list("abcdef"))
    sides = [
        [(item - np.concatenate(side).mean(0)) / np.concatenate(side).std(0) for item in side]
        for side in (first, second)
    ]
    sides = [[item / np.linalg.norm(item, axis=1, keepdims=True) for item in side] for side in sides]
    answers = [
        slow_dtw(sides[voice][x], sides[1 - voice][x]) < slow_dtw(sides[voice][x], sides[1 - voice][b])
        for voice in range(2)
        for x in range(6)
        for b in range(6)
        if b != x
    ]
    assert 0.5 < np.mean(answers) < 1
    assert result.accuracy == pytest.approx(np.mean(answers))
    np.testing.assert_allclose(result.correct, np.reshape(answers, (12, 5)).mean(axis=1))


def test_the_same_items_are_found_in_another_voice():
    labels = [f"word {item}" for item in range(20)]
    result = match_recordings(*voices(20, noise=0.1), labels)
    assert result.accuracy > 0.98
    assert len(result.correct) == 40
    assert (result.predictions[:20] == np.array(labels)).mean() > 0.9
    poor = match_recordings(*voices(20, noise=3.0), labels)
    assert poor.low <= poor.accuracy <= poor.high < result.low
    difference = paired_difference(result, poor)
    assert difference.mean == pytest.approx(result.accuracy - poor.accuracy)
    assert difference.low > 0


def test_only_the_own_pool_is_searched():
    first, second = voices(4, noise=0.0)
    again = [*first, *first], [*second, *second]  # every item twice: in one pool a coin would have to decide
    result = match_recordings(*again, labels=list(range(8)), pools=[0] * 4 + [1] * 4)
    assert result.accuracy == 1
    assert list(result.predictions) == [*range(8), *range(8)]
    together = match_recordings(*again, labels=list(range(8)))
    assert together.accuracy == pytest.approx(6.5 / 7)  # one of seven is as near
    with pytest.raises(ValueError, match="item 2 is alone in its pool"):
        match_recordings(first, second, [0, 1, 2, 3], [0, 0, 1, 0])


def test_wrong_arguments():
    first, second = voices(3, noise=0.1)
    with pytest.raises(ValueError, match="3 and 2 recordings of 3 items"):
        match_recordings(first, second[:2], [0, 1, 2])
    with pytest.raises(ValueError, match="2 pools for 3 items"):
        match_recordings(first, second, [0, 1, 2], [0, 0])
    second[1][0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        match_recordings(first, second, [0, 1, 2])
