# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The distribution of the masks, and that they are functions of (seed, epoch, id)."""

import numpy as np
import pytest

from spear_hf.data.masking import MaskingConfig, sample_masks, span_mask
from spear_hf.data.seeding import keyed_seed


def mean_rates(config: MaskingConfig, num_frames: int = 1000, draws: int = 2000) -> tuple[float, float]:
    masks = [sample_masks(num_frames, 128, config, 0, 0, f"utterance-{i}") for i in range(draws)]
    return np.mean([time.mean() for time, _ in masks]), np.mean([feature.mean() for _, feature in masks])


def test_spans_are_those_of_the_paper():
    for config, bins in ((MaskingConfig.dual_domain(), 20), (MaskingConfig.speech_only(), 15)):
        assert (config.time_span, config.time_minimum_spans) == (10, 2)
        assert (config.feature_span, config.feature_minimum_spans) == (bins, 0)


def test_dual_domain_hides_49_percent_of_frames_and_23_percent_of_bins():
    time, feature = mean_rates(MaskingConfig.dual_domain())
    assert time == pytest.approx(0.49, abs=0.005)
    assert feature == pytest.approx(0.23, abs=0.01)


def test_speech_only_hides_40_percent_of_frames_and_23_percent_of_bins():
    time, feature = mean_rates(MaskingConfig.speech_only())
    assert time == pytest.approx(0.40, abs=0.005)
    assert feature == pytest.approx(0.23, abs=0.01)


def test_number_of_spans_is_right_on_average_and_starts_differ():
    rng = np.random.default_rng(0)
    # A span of one frame: the masked frames are the starts, which are drawn without replacement.
    counts = [span_mask(37, 0.5, 1, 0, rng).sum() for _ in range(4000)]
    assert set(counts) == {18, 19}
    assert np.mean(counts) == pytest.approx(18.5, abs=0.03)


def test_spans_have_their_length_and_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(200):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], span_mask(60, 0.2, 10, 0, rng), [0]])))
        assert all(stop - start >= 10 for start, stop in edges.reshape(-1, 2))


@pytest.mark.parametrize(("size", "spans"), [(9, 0), (10, 1), (19, 1), (20, 2), (40, 2)])
def test_minimum_holds_as_far_as_the_utterance_allows(size, spans):
    mask = span_mask(size, 0.01, 10, 2, np.random.default_rng(3))
    assert 10 * min(spans, 1) <= mask.sum() <= 10 * spans


def test_probability_zero_masks_nothing_whatever_the_minimum():
    assert not span_mask(100, 0.0, 10, 2, np.random.default_rng(0)).any()


def test_masks_depend_on_seed_epoch_and_id_and_on_nothing_else():
    config = MaskingConfig()
    reference, _ = sample_masks(500, 128, config, 1, 2, "a")
    assert np.array_equal(reference, sample_masks(500, 128, config, 1, 2, "a")[0])
    for other in ((2, 2, "a"), (1, 3, "a"), (1, 2, "b")):
        assert not np.array_equal(reference, sample_masks(500, 128, config, *other)[0])


def test_keys_mean_the_same_in_every_process_and_on_every_machine():
    assert keyed_seed(5, 7, "utterance é", "time mask") == 7997048400173181636
    assert keyed_seed(1, 23) != keyed_seed(12, 3)
    assert keyed_seed("1") != keyed_seed(1)


@pytest.mark.parametrize("bad", [{"time_probability": 1.5}, {"feature_span": 0}, {"time_minimum_spans": -1}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MaskingConfig(**bad)
