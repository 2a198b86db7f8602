# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches stay within their cap, lose nothing, and are functions of (seed, epoch) whatever the number of ranks."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from spear_hf.data.bucketing import BucketingSampler, crop_window, split_batch, stable_order, visiting_rates
from spear_hf.data.windows import WindowedSampler, draw_windows


SECOND = 16000


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The bundled audio."""
    manifest = Path(__file__).parents[1] / "examples" / "data" / "manifest.jsonl"
    found = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [row for row in found if row["split"] == "pretrain"]


@pytest.fixture(scope="module")
def lengths(rows) -> np.ndarray:
    """Its durations, cropped to six seconds."""
    return np.array([min(row["num_samples"], 6 * SECOND) for row in rows])


@pytest.mark.parametrize("jitter", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("cap", [6, 31, 200])
def test_every_utterance_once_an_epoch_and_the_cap_includes_padding(lengths, jitter, cap):
    sampler = BucketingSampler(lengths, cap * SECOND, jitter=jitter)
    for epoch in range(5):
        batches = sampler.plan(epoch)
        assert len(batches) == sampler.batches_per_epoch
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        assert all(len(batch) * lengths[batch].max() <= cap * SECOND for batch in batches)


def test_epochs_differ_and_repeat_exactly(lengths):
    first, again = (BucketingSampler(lengths, 60 * SECOND, seed=3) for _ in range(2))
    for epoch in (1, 0):  # in another order than the first one is asked for below
        again.plan(epoch)
    for epoch in range(2):
        for one, other in zip(first.plan(epoch), again.plan(epoch), strict=True):
            assert np.array_equal(one, other)
    together = [{frozenset(batch.tolist()) for batch in first.plan(epoch)} for epoch in range(2)]
    assert len(together[0] & together[1]) <= 2  # the same company seldom meets again
    other_seed = BucketingSampler(lengths, 60 * SECOND, seed=4)
    assert [b.tolist() for b in other_seed.plan(0)] != [b.tolist() for b in first.plan(0)]


# Of the first, second and tenth epoch, as they were when runs were first published: a run of then goes on by them.
ORDERS = {
    "plain": "faade7ecae19cbed",
    "weighted": "726697c9481c30f7",
    "without jitter": "6dd07d6d84d98c05",
    "not shuffled": "6df0134457a2ccf1",
    "windows": "0260cb42dbd96f70",
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_a_seed_stays_for_good(name):
    numbers = np.arange(5000)
    lengths = SECOND + numbers * 7919 % (9 * SECOND)
    lengths[::5] = 10 * SECOND
    rates = visiting_rates(np.where(numbers % 7 == 0, "audio", "speech"), {"audio": 2.5})
    windows = draw_windows(numbers // 50, 7, seed=3)
    sampler = {
        "plain": lambda: BucketingSampler(lengths, 100 * SECOND, seed=3),
        "weighted": lambda: BucketingSampler(lengths, 100 * SECOND, seed=3, rates=rates),
        "without jitter": lambda: BucketingSampler(lengths, 100 * SECOND, jitter=0.0, rates=rates),
        "not shuffled": lambda: BucketingSampler(lengths, 100 * SECOND, shuffle=False),
        "windows": lambda: WindowedSampler(lengths, 100 * SECOND, windows, seed=3, rates=rates),
    }[name]()
    digest = hashlib.blake2b(digest_size=8)
    for epoch in (0, 1, 9):
        for place, batch in enumerate(sampler.plan(epoch)):
            alone = sampler.batch(epoch * sampler.batches_per_epoch + place)[1]
            assert alone.dtype == np.int64
            assert np.array_equal(alone, batch)
            digest.update(batch.astype("<i8").tobytes() + b"|")
    assert digest.hexdigest() == ORDERS[name]


@pytest.mark.parametrize("different", [1, 2, 50, 99_000, 10**9])
def test_equal_keys_stay_in_their_order(different):
    keys = np.random.default_rng(0).integers(0, different, 100_000) / 7
    assert np.array_equal(stable_order(keys), np.argsort(keys, kind="stable"))
    few = np.arange(100_000) * 1.0
    few[[5, 6, 7, 90_000, 50, 3]] = few[40_000]
    assert np.array_equal(stable_order(few), np.argsort(few, kind="stable"))


def test_the_position_is_the_only_state(lengths):
    straight = BucketingSampler(lengths, 60 * SECOND)
    order = [straight.batch(position) for position in range(2 * straight.batches_per_epoch + 3)]
    resumed = BucketingSampler(lengths, 60 * SECOND)
    for position in (len(order) - 1, straight.batches_per_epoch, straight.batches_per_epoch - 1, 5):
        epoch, indices = resumed.batch(position)
        assert epoch == order[position][0] == position // straight.batches_per_epoch
        assert np.array_equal(indices, order[position][1])


@pytest.mark.parametrize("weight", [1.0, 2.0, 2.5, 3.7])
def test_padding_of_the_bundled_audio_is_at_most_five_percent(rows, lengths, weight):
    rates = visiting_rates([row["domain"] for row in rows], {"audio": weight})
    sampler = BucketingSampler(lengths, 30 * SECOND, rates=rates)
    assert np.mean([sampler.padding_share(epoch) for epoch in range(5)]) <= 0.05


def test_without_shuffling_the_longest_come_first(lengths):
    batches = BucketingSampler(lengths, 60 * SECOND, shuffle=False).plan(0)
    assert np.array_equal(lengths[np.concatenate(batches)], np.sort(lengths)[::-1])


def test_only_one_batch_of_an_epoch_is_incomplete():
    sampler = BucketingSampler(np.full(103, SECOND), 10 * SECOND)
    assert sorted(len(batch) for batch in sampler.plan(0)) == [3] + [10] * 10


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_a_global_batch_is_the_same_whatever_the_ranks(lengths, num_ranks):
    sampler = BucketingSampler(lengths, 120 * SECOND)
    for indices in sampler.plan(0):
        ranks = split_batch(indices, lengths, num_ranks, max_part_samples=20 * SECOND)
        assert len({len(parts) for parts in ranks}) == 1
        parts = [part for parts in ranks for part in parts]
        assert sorted(np.concatenate(parts)) == sorted(indices)
        assert all(len(part) * lengths[part].max() <= 20 * SECOND for part in parts if len(part))


def test_fewer_utterances_than_ranks_leave_empty_parts():
    ranks = split_batch(np.array([4, 2]), np.full(5, SECOND), num_ranks=3)
    assert [[part.tolist() for part in parts] for parts in ranks] == [[[4]], [[2]], [[]]]


def test_what_cannot_fit_is_refused(lengths):
    with pytest.raises(ValueError, match=r"longest utterance has 96000 samples.*max_seconds"):
        BucketingSampler(lengths, 5 * SECOND)
    with pytest.raises(ValueError, match=r"micro-batch of 80000"):
        split_batch(np.array([int(lengths.argmax())]), lengths, 1, max_part_samples=5 * SECOND)
    with pytest.raises(ValueError, match="no utterances"):
        BucketingSampler(np.array([]), SECOND)


def test_crops_lie_on_the_grid_and_reach_everywhere():
    windows = {crop_window(21000, 16000, 640, 0, epoch, "a") for epoch in range(300)}
    assert all(start % 640 == 0 and stop == start + 16000 <= 21000 for start, stop in windows)
    assert {start for start, _ in windows} == set(range(0, 5001, 640))
    assert crop_window(16000, 16000, 640, 0, 0, "a") == (0, 16000)
    assert crop_window(21000, 16000, 640, 1, 2, "a") == crop_window(21000, 16000, 640, 1, 2, "a")


@pytest.mark.parametrize("weight", [1.0, 2.0, 2.5, 3.7])
def test_domains_are_heard_by_their_weights(lengths, weight):
    domains = np.array(["audio" if number % 5 == 0 else "speech" for number in range(len(lengths))])
    rates = visiting_rates(domains, {"audio": weight})
    sampler = BucketingSampler(lengths, 31 * SECOND, jitter=0.1, rates=rates)
    epochs = 40
    counts = np.zeros(len(lengths), dtype=int)
    for epoch in range(epochs):
        batches = sampler.plan(epoch)
        assert len(batches) == sampler.batches_per_epoch
        assert all(len(batch) * lengths[batch].max() <= 31 * SECOND for batch in batches)
        heard = np.concatenate(batches)
        assert len(np.unique(heard)) == len(heard)  # none twice in an epoch
        counts[heard] += 1
    assert (counts[domains == "audio"] == epochs).all()
    share = counts[domains == "speech"] / epochs
    assert share.mean() == pytest.approx(1 / weight, abs=0.005)
    assert share.max() - share.min() <= 1 / epochs + 1e-9  # evenly: no utterance is favoured


def test_weights_of_one_change_nothing(lengths):
    plain = BucketingSampler(lengths, 60 * SECOND, seed=3)
    weighted = BucketingSampler(lengths, 60 * SECOND, seed=3, rates=visiting_rates(["speech"] * len(lengths), {}))
    for epoch in range(3):
        for one, other in zip(plain.plan(epoch), weighted.plan(epoch), strict=True):
            assert np.array_equal(one, other)


def test_wrong_rates_are_refused(lengths):
    for rates in (np.zeros(len(lengths)), np.ones(3), np.full(len(lengths), 1.5)):
        with pytest.raises(ValueError, match="rates must hold"):
            BucketingSampler(lengths, 60 * SECOND, rates=rates)
