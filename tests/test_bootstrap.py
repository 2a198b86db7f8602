# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Intervals of metrics that are functions of weights, and of paired differences."""

import numpy as np
import pytest

from spear_hf.evaluation.bootstrap import difference, estimate, mean_of, ratio, resampled_weights
from spear_hf.evaluation.probe import bootstrap_interval


def test_weights_draw_whole_units():
    units = ["x", "x", "y", "z"]
    for weights in resampled_weights(units, 0, 50):
        assert weights[0] == weights[1]
        assert weights[0] + weights[2] + weights[3] == 3
    again = list(resampled_weights([1, 1, 2, 3], 0, 50))
    assert np.array_equal(again, list(resampled_weights(units, 0, 50)))
    assert not np.array_equal(again, list(resampled_weights(units, 1, 50)))


def test_interval_of_an_accuracy_is_that_of_the_probes():
    correct = np.random.default_rng(0).random(80) < 0.7
    found = estimate(ratio(correct, np.ones(80)), range(80), resamples=4000)
    low, high = bootstrap_interval(correct, resamples=4000)
    assert found.value == correct.mean()
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_differences_are_paired():
    rng = np.random.default_rng(1)
    base = rng.random(200) < 0.5
    better = base.copy()
    better[np.flatnonzero(~base)[:20]] = True  # right wherever the other is, and on 20 more
    one, other = (estimate(ratio(values, np.ones(200)), range(200)) for values in (better, base))
    gain = difference(one, other)
    assert gain["mean"] == pytest.approx(0.1)
    assert 0.05 < gain["low"] < 0.1 < gain["high"] < 0.15
    assert one.low < other.high  # the single intervals overlap
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(one, estimate(ratio(base, np.ones(200)), range(200), resamples=10))


def test_means_of_folds_and_undefined_resamples():
    scores = [(ratio([1, 0], [1, 1]), slice(0, 2)), (ratio([1], [1]), slice(2, 3))]
    assert mean_of(scores)(np.ones(3)) == pytest.approx(0.75)
    rare = ratio([0, 0, 1], [0, 0, 1])  # defined where the third unit is drawn, in 70 % of the resamples
    found = estimate(rare, range(3), resamples=300)
    assert found.value == 1
    assert 0.6 < np.isfinite(found.samples).mean() < 0.8
    never = estimate(lambda weights: 1.0 if (weights == 1).all() else rare(0 * weights), range(9), resamples=50)
    assert np.isnan(never.low)
