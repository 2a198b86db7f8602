# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Epochs by windows of shards: a function of (seed, epoch), nothing lost, little padding, company of one window."""

import itertools

import numpy as np
import pytest

from spear_hf.data.bucketing import BucketingSampler
from spear_hf.data.collation import CROP_GRID
from spear_hf.data.manifest import Utterance
from spear_hf.data.mixing import Mixer, MixingConfig
from spear_hf.data.windows import WindowedSampler, draw_windows


SECOND = 16000
SHARDS = np.repeat(np.arange(40), 300)  # 12,000 utterances


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.minimum(rng.lognormal(2, 0.6, len(SHARDS)).clip(1, 10), 10) * SECOND // 1


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return draw_windows(SHARDS, 6, seed=3)


def make(lengths, windows, **arguments) -> WindowedSampler:
    return WindowedSampler(lengths, 200 * SECOND, windows, seed=3, **arguments)


def test_windows_are_whole_shards_drawn_at_random(windows):
    assert all(len(np.unique(windows[shard == SHARDS])) == 1 for shard in range(40))
    shards_of = [np.unique(SHARDS[windows == window]) for window in range(7)]
    assert sorted(map(len, shards_of)) == [5, 5, 6, 6, 6, 6, 6]
    assert any(np.ptp(shards) > 20 for shards in shards_of)
    assert not np.array_equal(windows, draw_windows(SHARDS, 6, seed=4))
    missing = SHARDS[SHARDS != 7]  # a shard that nothing is left of
    assert len(np.unique(draw_windows(missing, 6, seed=3))) == 7


def test_an_epoch_hears_all_once_and_one_window_after_another(lengths, windows):
    sampler = make(lengths, windows)
    orders = []
    for epoch in range(3):
        batches = sampler.plan(epoch)
        assert len(batches) == sampler.batches_per_epoch
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        assert all(len(batch) * lengths[batch].max() <= 200 * SECOND for batch in batches)
        of_batch = [set(windows[batch].tolist()) for batch in batches]
        assert all(len(there) == 1 for there in of_batch)
        order = [there.pop() for there in of_batch]
        orders.append(list(dict.fromkeys(order)))
        assert sorted(orders[-1]) == list(range(7))
        assert sum(one != other for one, other in itertools.pairwise(order)) == 6  # each is heard to its end
    assert orders[0] != orders[1]


def test_padding_stays_within_five_percent(lengths, windows):
    sampler = make(lengths, windows)
    assert 0 < sampler.padding_share(0) <= 0.05
    assert sampler.padding_share(0) < BucketingSampler(lengths, 200 * SECOND, seed=3).padding_share(0) + 0.01


def test_the_position_is_the_only_state(lengths, windows):
    straight, resumed = make(lengths, windows), make(lengths, windows)
    per_epoch = straight.batches_per_epoch
    whole = [batch for epoch in range(2) for batch in straight.plan(epoch)]
    for position in (2 * per_epoch - 1, per_epoch, per_epoch - 1, 5, 0):
        epoch, batch = resumed.batch(position)
        assert epoch == position // per_epoch
        assert np.array_equal(batch, whole[position])
        turn = resumed.turn(position)
        assert turn.start <= position < turn.stop
        assert set(windows[batch].tolist()) == {turn.window}
        assert set(batch.tolist()) <= set(resumed.at_hand(position).tolist())


def test_what_is_upcoming_is_what_will_be_heard(lengths, windows):
    sampler = make(lengths, windows)
    per_epoch = sampler.batches_per_epoch
    for position in (0, 10, per_epoch - 3, per_epoch + 50):
        heard = [int(windows[sampler.batch(later)[1][0]]) for later in range(position, 3 * per_epoch)]
        assert sampler.upcoming(position, 3 * per_epoch) == list(dict.fromkeys(heard))
    assert sampler.upcoming(0, 1) == [sampler.turn(0).window]
    assert sampler.upcoming(7, 7) == []


def test_domains_are_heard_by_their_weights(lengths, windows):
    rates = np.where(np.arange(len(lengths)) % 3 == 0, 1.0, 0.5)
    sampler = make(lengths, windows, rates=rates)
    first, second = sampler.heard(0), sampler.heard(1)
    often = np.flatnonzero(rates == 1)
    assert np.isin(often, first).all()
    assert np.intersect1d(first, second).size <= len(often) + len(np.unique(windows))
    assert abs(len(first) - len(often) - (len(lengths) - len(often)) / 2) <= len(np.unique(windows))


def test_what_is_mixed_is_of_the_same_window(lengths, windows, tmp_path):
    utterances = [
        Utterance(str(number), tmp_path / str(number), domain="audio" if number % 4 == 0 else "speech")
        for number in range(len(lengths))
    ]
    config = MixingConfig(noise_probability=1.0, token_probability=1.0, token_second="any")
    mixer = Mixer(config, utterances, lengths, None, 3, CROP_GRID, windows)
    seconds = 0
    for index in range(1, 4000, 7):
        noise, mix = mixer.noise_mix(index, 0), mixer.token_mix(index, 0)
        assert noise is not None or index % 4 == 0  # never its own
        assert noise is None or windows[int(noise.clip.id)] == windows[index]
        if mix is not None:
            seconds += mix.second != index
            assert windows[mix.second] == windows[index]
    assert seconds > 300
    few = [
        utterance if windows[int(utterance.id)] else Utterance(utterance.id, utterance.path)
        for utterance in utterances
    ]
    with pytest.raises(ValueError, match=r"of one of the windows \(data.window_shards\) is of domain audio"):
        Mixer(config, few, lengths, None, 3, CROP_GRID, windows)
