# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: F811 (the arguments of tests are fixtures)
"""Noise and token mixing: what is drawn and how often, what is heard, and what is predicted then."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from spear_hf.data.bucketing import BucketingSampler
from spear_hf.data.collation import CROP_GRID, StepDataset, loader_arguments
from spear_hf.data.manifest import Utterance
from spear_hf.data.mixing import (
    Mixer,
    MixingConfig,
    add_noise,
    gain,
    mean_power,
    mix_tokens,
    mix_waveforms,
    replacement_probability,
)
from spear_hf.data.seeding import keyed_generator
from spear_hf.pretraining.corpus import open_noise
from spear_hf.pretraining.setup import build_dataset

from .pretraining_corpus import small_config
from .test_collation import Prepared, make_dataset, prepared  # noqa: F401 (the last is a fixture)


ALWAYS = MixingConfig(token_probability=1.0)


def make_mixer(config: MixingConfig, count: int = 4000, seed: int = 0, every: int = 4) -> Mixer:
    """Of utterances of 1 to 10 s, every fourth of which is audio."""
    utterances = [
        Utterance(f"u{place}", Path(f"u{place}.wav"), domain="speech" if place % every else "audio")
        for place in range(count)
    ]
    lengths = np.random.default_rng(0).integers(16000, 160000, count)
    return Mixer(config, utterances, lengths, None, seed, CROP_GRID)


def mixing_dataset(prepared: Prepared, config: MixingConfig, noise=None, **arguments):
    utterances = prepared.corpus.training
    lengths = np.minimum(prepared.corpus.training_lengths, 19200)
    mixer = Mixer(config, utterances, lengths, noise, arguments.get("seed", 0), CROP_GRID)
    return make_dataset(prepared, mixer=mixer, cache_audio=True, **arguments)


def test_what_fills_an_empty_micro_batch_counts_as_nothing(prepared):
    dataset = mixing_dataset(prepared, MixingConfig(noise_probability=1.0, token_probability=1.0))
    index = next(place for place, utterance in enumerate(dataset.utterances) if utterance.domain == "speech")
    assert dataset.micro_batch([index], 0).num_mixed == dataset.micro_batch([index], 0).num_noisy == 1
    filler = dataset.filler(index, 0)
    assert [value for name, value in filler._asdict().items() if name.startswith("num_")] == [0] * 5


def test_the_share_the_ratios_and_the_offsets_are_those_of_the_paper():
    mixer = make_mixer(MixingConfig.paper())
    speech = [place for place in range(4000) if place % 4]
    drawn = [(place, mixer.token_mix(place, epoch)) for epoch in range(3) for place in speech]
    mixes = [(place, mix) for place, mix in drawn if mix is not None]
    assert len(mixes) / len(drawn) == pytest.approx(0.1, abs=0.01)
    snr, offset = (np.array([getattr(mix, name) for _, mix in mixes]) for name in ("snr", "offset"))
    assert (snr.min(), snr.mean(), snr.max()) == pytest.approx((-5, 0, 5), abs=0.4)
    assert not (offset % CROP_GRID).any()
    assert offset.max() < 32000
    long = [mix.offset for place, mix in mixes if mixer.lengths[place] > 32000]
    assert np.mean(long) == pytest.approx(16000 - CROP_GRID / 2, rel=0.06)
    for place, mix in mixes:
        assert mix.offset < mixer.lengths[place]
        assert mix.second != place
        assert mix.second % 4
        assert abs(mixer.lengths[mix.second] / mixer.lengths[place] - 1) <= 0.1
    noises = [mixer.noise_mix(place, 0) for place in range(4000)]
    found = [mix for mix in noises if mix is not None]
    assert len(found) / 4000 == pytest.approx(0.5, abs=0.03)
    levels = [mix.snr for mix in found]
    assert (min(levels), np.mean(levels), max(levels)) == pytest.approx((10, 15, 20), abs=0.3)
    assert {mix.clip.domain for mix in found} == {"audio"}
    assert all(mixer.token_mix(place, 0) is None for place in range(0, 4000, 4))


def test_any_second_is_drawn_alike_often_but_never_the_first():
    mixer = make_mixer(MixingConfig(token_probability=1.0, token_second="any"), count=6)
    mixer = Mixer(mixer.config, mixer.utterances, np.full(6, 16000), None, 0, CROP_GRID)
    seconds = [mix.second for epoch in range(3000) if (mix := mixer.token_mix(3, epoch))]
    counts = np.bincount(seconds, minlength=6)
    assert counts[3] == 0
    assert counts[[0, 1, 2, 4, 5]] == pytest.approx(600, abs=90)


def test_a_second_of_another_length_is_taken_where_none_is_alike():
    mixer = make_mixer(ALWAYS, count=3)
    mixer = Mixer(ALWAYS, mixer.utterances, np.array([16000, 16000, 160000]), None, 0, CROP_GRID)
    assert [mixer.token_mix(place, 0).second for place in (1, 2)] == [2, 1]


def test_draws_depend_on_seed_epoch_and_id_alone():
    config = MixingConfig(noise_probability=1.0, token_probability=1.0)
    one, other = make_mixer(config), make_mixer(config)
    other.token_mix(7, 3)  # what came before does not matter
    assert one.token_mix(5, 2) == other.token_mix(5, 2)
    assert one.noise_mix(5, 2) == other.noise_mix(5, 2)
    for changed in (one.token_mix(5, 3), one.token_mix(6, 2), make_mixer(config, seed=1).token_mix(5, 2)):
        assert changed != one.token_mix(5, 2)
    assert one.noise_mix(5, 3) != one.noise_mix(5, 2)


@pytest.mark.parametrize(("snr", "beta"), [(-5.0, 0.760), (0.0, 0.5), (5.0, 0.240)])
def test_targets_are_replaced_with_beta(snr, beta):
    assert replacement_probability(snr) == pytest.approx(beta, abs=5e-4)
    share = gain(2.0, 3.0, snr) ** 2 * 3.0
    assert share / (2.0 + share) == pytest.approx(replacement_probability(snr))  # the two forms of the formula
    main, second = np.zeros((5000, 4), np.uint8), np.ones((5000, 4), np.uint8)
    mixed = mix_tokens(main, second, 0, replacement_probability(snr), np.random.default_rng(0))
    assert mixed.mean() == pytest.approx(beta, abs=0.01)
    assert mixed.mean(axis=0) == pytest.approx(beta, abs=0.025)
    assert np.corrcoef(mixed.T) == pytest.approx(np.eye(4), abs=0.05)  # each codebook for itself


@pytest.mark.parametrize("snr", [-5.0, 0.3, 20.0])
def test_the_ratio_heard_is_the_ratio_drawn(snr):
    rng = np.random.default_rng(1)
    main, second = (
        scale * rng.standard_normal(size).astype(np.float32) for scale, size in ((0.1, 9000), (0.02, 7000))
    )
    added = mix_waveforms(main, second, snr, 2560).astype(np.float64)
    added[:9000] -= main
    assert len(added) == 9560
    heard = 10 * np.log10(mean_power(main) / (added @ added / 7000))
    assert heard == pytest.approx(snr, abs=1e-4)
    for noise in (second, np.tile(second, 2)):  # repeated, and cut
        added = add_noise(main, noise, snr, 0.4).astype(np.float64) - main
        assert 10 * np.log10(mean_power(main) / mean_power(added)) == pytest.approx(snr, abs=1e-4)


def test_noise_is_cut_or_repeated_from_a_drawn_place():
    main, ramp = np.ones(10, np.float32), np.arange(1, 5, dtype=np.float32)
    added = add_noise(main, ramp, 0.0, 0.5) - main
    assert added / added[0] * 3 == pytest.approx([3, 4, 1, 2, 3, 4, 1, 2, 3, 4])
    long = np.arange(1, 20, dtype=np.float32)
    first = [add_noise(main, long, 0.0, start) - main for start in (0.0, 0.9999)]
    assert first[0] / first[0][0] == pytest.approx(long[:10])
    assert first[1] / first[1][0] * 10 == pytest.approx(long[-10:])


def test_silence_is_left_alone():
    loud, silent = np.ones(100, np.float32), np.zeros(100, np.float32)
    for main, second in ((loud, silent), (silent, loud)):
        assert mix_waveforms(main, second, 0.0, 0) is None
        assert add_noise(main, second, 0.0, 0.0) is None


def slow_tokens(main, second, offset, probability, rng):
    """Token by token and codebook by codebook."""
    length = max(len(main), offset + len(second))
    both = [t for t in range(length) if t < len(main) and offset <= t < offset + len(second)]
    draws = iter(rng.random(len(both) * main.shape[1]))
    mixed = []
    for t in range(length):
        row = []
        for c in range(main.shape[1]):
            if t in both:
                row.append(second[t - offset][c] if next(draws) < probability else main[t][c])
            elif t < len(main):
                row.append(main[t][c])
            else:
                row.append(second[t - offset][c] if t >= offset else -100)
        mixed.append(row)
    return np.array(mixed)


@pytest.mark.parametrize(
    ("sizes", "offset"), [((30, 20), 5), ((30, 40), 0), ((20, 5), 19), ((20, 5), 23), ((9, 9), 9)]
)
def test_mixed_tokens_are_those_of_the_slow_reference(sizes, offset):
    rng = np.random.default_rng(2)
    main, second = (rng.integers(0, 256, (size, 3)).astype(np.uint8) for size in sizes)
    fast = mix_tokens(main, second, offset, 0.4, np.random.default_rng(5))
    assert np.array_equal(fast, slow_tokens(main, second, offset, 0.4, np.random.default_rng(5)))


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("second", ["speech", "any"])
def test_examples_are_those_of_the_slow_reference(prepared, second, factor):
    """Waveform and labels of every mixed example, sample by sample of the grid: a student of 50 or 25 Hz, teachers of
    both rates, an audio teacher that only utterances of audio have, and an offset of the labels."""
    config = MixingConfig(token_probability=1.0, token_second=second)
    arguments = {"factor": factor, "offsets": {"speech": 2}, "seed": 3}
    dataset, plain = mixing_dataset(prepared, config, **arguments), make_dataset(prepared, **arguments)
    windows, mixed_domains = set(), set()
    for index in range(8):  # of speech
        for epoch in range(4):
            mix, example = dataset.mixer.token_mix(index, epoch), dataset.example(index, epoch)
            main, other = plain._crop(index, epoch), plain._crop(mix.second, epoch)
            assert example.second == other.utterance.id
            size = len(main.waveform)
            mixture = mix_waveforms(main.waveform, other.waveform, mix.snr, mix.offset)
            (window,) = [
                place
                for place in range(0, len(mixture) - size + 1, 640)
                if np.array_equal(mixture[place : place + size], example.waveform)
            ]
            windows.add(window)
            mixed_domains.add(other.utterance.domain)
            for name, rate, codebooks in (("speech", 50, 2), ("audio", 25, 4)):
                needed = [name == "speech" or crop.utterance.domain == "audio" for crop in (main, other)]
                assert (name in example.labels) == any(needed)
                if not any(needed):
                    continue
                parts = []
                for crop, has in zip((main, other), needed):
                    count = -(-len(crop.waveform) * rate // 16000)
                    start = crop.start * rate // 16000
                    codes = prepared.stores[name][crop.utterance.id][start : start + count].astype(int)
                    parts.append(codes if has else np.full((count, codebooks), -100))
                rng = keyed_generator(3, epoch, main.utterance.id, "token mixing", name)
                beta = 1 / (1 + 10 ** (mix.snr / 10))
                tokens = slow_tokens(*parts, mix.offset * rate // 16000, beta, rng)
                first = window * rate // 16000 + (2 if name == "speech" else 0)
                stop = len(tokens)
                if window + size < len(mixture):
                    stop = min(stop, first + -(-size * rate // 16000))
                labels = example.labels[name]
                for frame in range(len(labels)):
                    if rate * factor == 100:  # two tokens a frame
                        places = [first + 2 * frame, first + 2 * frame + 1]
                    else:
                        places = [first + (frame if rate * factor == 50 else frame // 2)]
                    expected = [tokens[p] if p < stop else np.full(codebooks, -100) for p in places]
                    assert np.array_equal(labels[frame], np.concatenate(expected)), (name, frame)
    assert len(windows) > 1
    assert mixed_domains == ({"speech"} if second == "speech" else {"speech", "audio"})


def test_rows_keep_their_lengths_and_batches_their_caps(prepared):
    dataset = mixing_dataset(prepared, MixingConfig(noise_probability=1.0, token_probability=1.0))
    lengths = np.minimum(prepared.corpus.training_lengths, 19200)
    for index, length in enumerate(lengths):
        assert len(dataset.example(index, 0).waveform) == length
    (batch,) = StepDataset(dataset, BucketingSampler(lengths, 6 * 16000))[1]
    assert batch.num_padded_samples <= 6 * 16000


def test_noise_leaves_targets_and_masks_alone(prepared):
    dataset, plain = mixing_dataset(prepared, MixingConfig(noise_probability=1.0)), make_dataset(prepared)
    noisy = 0
    for index in range(len(dataset)):
        example, clean = dataset.example(index, 1), plain.example(index, 1)
        noisy += example.noisy
        assert example.noisy == (not np.array_equal(example.waveform, clean.waveform))
        assert np.array_equal(example.time_mask, clean.time_mask)
        assert example.labels.keys() == clean.labels.keys()
        assert all(np.array_equal(labels, clean.labels[name]) for name, labels in example.labels.items())
    assert noisy >= 14  # an utterance is not its own noise
    batch = dataset.micro_batch(range(16), 1)
    assert (batch.num_noisy, batch.num_mixed) == (noisy, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_mix_the_same(prepared, workers):
    dataset = mixing_dataset(prepared, MixingConfig(noise_probability=0.5, token_probability=0.5))
    sampler = BucketingSampler(np.minimum(prepared.corpus.training_lengths, 19200), 6 * 16000)
    whole, mixed = StepDataset(dataset, sampler), 0
    for rank in range(2):
        part = StepDataset(dataset, sampler, rank, num_ranks=2, max_part_seconds=2.4)
        loader = DataLoader(part, sampler=[4, 2, 3], **loader_arguments(workers))
        for step, micro_batches in zip((4, 2, 3), loader, strict=True):
            (everything,) = whole[step]
            rows = {id: row for row, id in enumerate(everything.ids)}
            for micro_batch in micro_batches:
                mixed += micro_batch.num_mixed
                for row, id in enumerate(micro_batch.ids):
                    for name in ("input_features", "speech_labels", "audio_labels"):
                        tensor = micro_batch.inputs[name][row]
                        kept = everything.inputs[name][rows[id], : len(tensor)]
                        valid = int(micro_batch.inputs["attention_mask"][row].sum())
                        size = valid if name == "input_features" else (valid - 7) // 2
                        assert torch.equal(kept[:size], tensor[:size]), name
    assert mixed == sum(whole[step][0].num_mixed for step in (2, 3, 4)) > 0


def test_a_configuration_makes_the_mixer(prepared, tmp_path):
    overrides = ["mixing.noise_probability=0.5", "mixing.token_probability=0.1"]
    folder = next(iter(prepared.corpus.training)).path.parent
    config = small_config(folder, *overrides)
    dataset = make_dataset(prepared)
    arguments = (prepared.corpus.training, prepared.stores, dataset.config, dataset.feature_extractor)
    lengths = prepared.corpus.training_lengths
    made = build_dataset(config, *arguments, lengths)
    assert made.mixer.lengths.max() == 19200  # after cropping
    assert {clip.domain for clip in made.mixer.noise[0]} == {"audio"}
    assert build_dataset(config, *arguments).mixer is None  # held-out audio
    assert build_dataset(small_config(folder), *arguments, lengths).mixer is None
    named = small_config(folder, *overrides, f"mixing.noise_manifest={folder}")
    noise = open_noise(named.mixing)
    assert {clip.path.parent for clip in build_dataset(named, *arguments, lengths, None, noise).mixer.noise[0]} == {
        folder
    }


def test_mistakes_are_named(prepared):
    speech = [replace(utterance, domain="speech") for utterance in prepared.corpus.training]
    with pytest.raises(ValueError, match=r"no noise.*mixing\.noise_manifest"):
        Mixer(MixingConfig.paper(), speech, np.full(len(speech), 16000), None, 0, CROP_GRID)
    with pytest.raises(ValueError, match="needs two utterances of speech"):
        Mixer(ALWAYS, speech[:1], np.full(1, 16000), None, 0, CROP_GRID)
    for name, value in (("noise_probability", 2), ("token_snr", (5, -5)), ("token_offset_seconds", -1)):
        with pytest.raises(ValueError, match=name):
            MixingConfig(**{name: value})
