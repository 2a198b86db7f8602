# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear probes: pooled features, the choice of the penalty, intervals and paired differences."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.evaluation.probe import (
    bootstrap_interval,
    concatenated,
    linear_probe,
    log_mel_features,
    paired_difference,
    pooled_features,
)

from .conftest import ROOT


@pytest.fixture(scope="module")
def clips():
    return read_manifest(ROOT / "examples" / "data", split="probe_test")[::40]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SpearModel(
        SpearConfig(
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_layers_per_stack=[1, 1],
            conv_kernel_sizes=[7, 7],
            downsampling_factors=[1, 2],
        )
    )


def blobs(utterances, dim, classes=4, spread=1.0, seed=0):
    """Clusters around centres that do not depend on the seed."""
    rng = np.random.default_rng(seed)
    labels = np.arange(utterances) % classes
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return centres[labels] + spread * rng.normal(size=(utterances, dim)), [f"class {label}" for label in labels]


def test_pooled_features_are_means_and_deviations_of_the_frames(model, clips):
    extractor = SpearFeatureExtractor()
    pooled = pooled_features(model.train(), extractor, clips, batch_seconds=4.0)
    assert model.training
    assert pooled.shape == (3, len(clips), 32)
    assert pooled.dtype == np.float32
    model.eval()
    for place in (0, len(clips) - 1):
        inputs = extractor(load_audio(clips[place].path), sampling_rate=16000, return_tensors="pt")
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            expected = torch.cat([state[0].mean(dim=0), state[0].std(dim=0, correction=0)])
            assert np.abs(pooled[layer, place] - expected.numpy()).max() < 1e-4
    assert concatenated(pooled).shape == (len(clips), 96)
    assert np.array_equal(concatenated(pooled)[2, 32:64], pooled[1, 2])


def test_log_mel_features(clips):
    features = log_mel_features(SpearFeatureExtractor(), clips[:3])
    assert features.shape == (1, 3, 256)
    frames = SpearFeatureExtractor()(load_audio(clips[1].path), sampling_rate=16000, return_tensors="np")
    assert np.allclose(features[0, 1, :128], frames["input_features"][0].mean(axis=0), atol=1e-5)


def test_a_clip_that_cannot_be_read_is_named(model, clips, tmp_path):
    import dataclasses

    broken = dataclasses.replace(clips[0], id="the broken one", path=tmp_path / "missing.wav")
    with pytest.raises(ValueError, match=r"the broken one: .*missing\.wav"):
        pooled_features(model, SpearFeatureExtractor(), [clips[1], broken])


def test_probe_agrees_with_scikit_learn_where_there_are_more_columns_than_rows():
    train_x, train_y = blobs(60, dim=200, spread=4.0)
    test_x, test_y = blobs(80, dim=200, spread=4.0, seed=1)
    result = linear_probe(train_x, train_y, test_x, test_y, penalties=[0.01])
    scaler = StandardScaler().fit(train_x)
    reference = LogisticRegression(C=0.01, max_iter=2000, tol=1e-8).fit(scaler.transform(train_x), train_y)
    expected = reference.predict(scaler.transform(test_x))
    assert (result.predictions == expected).mean() > 0.98  # the solvers stop at slightly different places
    assert result.accuracy == pytest.approx((result.predictions == np.asarray(test_y)).mean())


def test_result_has_an_interval_and_is_json():
    train_x, train_y = blobs(80, dim=10, spread=1.5)
    test_x, test_y = blobs(100, dim=10, spread=1.5, seed=1)
    result = linear_probe(train_x, train_y, test_x, test_y)
    assert result.low < result.accuracy < result.high
    assert result.accuracy > 0.6
    assert result.validation_accuracy == pytest.approx(result.accuracy, abs=0.2)
    again = linear_probe(train_x, train_y, test_x, test_y)
    assert result.to_dict() == again.to_dict()
    assert json.loads(json.dumps(result.to_dict()))["test_utterances"] == 100


def test_folds_do_not_share_groups():
    """Each group has an offset of its own. Folds that share groups overrate a probe that remembers them."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 5)
    labels = groups % 4
    offsets = rng.normal(size=(24, 40)) * 2.0
    train_x = offsets[groups] + 0.1 * rng.normal(size=(120, 40))
    train_x[:, :4] += 1.5 * np.eye(4)[labels]
    test_x, test_y = train_x[:4], labels[:4]
    shared = linear_probe(train_x, labels, test_x, test_y)
    whole = linear_probe(train_x, labels, test_x, test_y, groups=groups)
    assert shared.validation_accuracy > 0.95
    assert whole.validation_accuracy < 0.8


def test_a_single_example_of_a_class_leaves_no_cross_validation():
    train_x, train_y = blobs(4, dim=5, spread=0.1)
    test_x, test_y = blobs(40, dim=5, spread=0.1, seed=1)
    result = linear_probe(train_x, train_y, test_x, test_y, penalties=[0.01, 0.5, 1.0])
    assert result.validation_accuracy is None
    assert result.penalty == 0.5
    assert result.accuracy == 1.0


def test_groups_that_cannot_be_divided_leave_no_cross_validation():
    """Groups say both labels so unevenly that a fold would train on one label alone."""
    rng = np.random.default_rng(0)
    undivided = 0
    for _ in range(60):
        groups, labels = rng.integers(0, 3, size=8), rng.integers(0, 2, size=8)
        if len(set(labels.tolist())) == 2:
            x = rng.standard_normal((8, 3))
            result = linear_probe(x, labels.tolist(), x, labels.tolist(), groups.tolist())
            undivided += result.validation_accuracy is None
    assert 0 < undivided < 50


def test_constant_channels_do_no_harm():
    train_x, train_y = blobs(40, dim=6, spread=0.3)
    test_x, test_y = blobs(40, dim=6, spread=0.3, seed=1)
    train_x, test_x = (
        np.concatenate([x, np.full((40, 3), value)], axis=1) for x, value in ((train_x, 7), (test_x, 9))
    )
    assert linear_probe(train_x, train_y, test_x, test_y).accuracy > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": np.zeros((5, 3))}, "training features have shape"),
        ({"train_x": np.zeros((2, 8, 3))}, "Choose a layer"),
        ({"test_x": np.full((4, 3), np.nan)}, "test features hold NaN"),
        ({"test_x": np.zeros((4, 2))}, "3 columns, test features 2"),
        ({"test_y": ["a", "b", "c", "a"]}, "no training utterance has: c"),
        ({"groups": [1, 2]}, "2 groups for 8 training"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "train_x": np.random.default_rng(0).normal(size=(8, 3)),
        "train_y": ["a", "b"] * 4,
        "test_x": np.zeros((4, 3)),
        "test_y": ["a", "b"] * 2,
    }
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**arguments, **change})


def test_bootstrap_interval_is_that_of_the_binomial():
    values = np.arange(400) < 300
    low, high = bootstrap_interval(values)
    deviation = math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - 1.96 * deviation, abs=0.01)
    assert high == pytest.approx(0.75 + 1.96 * deviation, abs=0.01)
    assert (low, high) == bootstrap_interval(values)
    assert bootstrap_interval(values, resamples=50) != bootstrap_interval(values, seed=1, resamples=50)


def test_items_of_one_recording_are_drawn_together():
    """20 recordings of 50 items that are all right or all wrong tell no more than 20 items would."""
    recordings = np.repeat(np.arange(20), 50)
    values = recordings % 2 == 0
    alone, together = bootstrap_interval(values), bootstrap_interval(values, groups=recordings)
    assert together[1] - together[0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(20), rel=0.1)
    assert together[1] - together[0] > 5 * (alone[1] - alone[0])
    with pytest.raises(ValueError, match="19 groups for 1000 values"):
        bootstrap_interval(values, groups=np.arange(19))
    train_x, train_y = blobs(80, dim=8, spread=1.0)
    test_x, test_y = blobs(300, dim=8, spread=1.0, seed=1)
    groups = np.repeat(np.arange(len(test_y) // 10), 10)
    by_item = linear_probe(train_x, train_y, test_x, test_y)
    by_group = linear_probe(train_x, train_y, test_x, test_y, test_groups=groups)
    assert by_group.accuracy == by_item.accuracy
    assert (by_group.low, by_group.high) == bootstrap_interval(by_item.correct, groups=groups)


def test_paired_difference_is_sharper_than_two_intervals():
    train_x, train_y = blobs(80, dim=8, spread=1.0)
    test_x, test_y = blobs(300, dim=8, spread=1.0, seed=1)
    good = linear_probe(train_x, train_y, test_x, test_y)
    poor = linear_probe(train_x[:, :4], train_y, test_x[:, :4], test_y)
    difference = paired_difference(good, poor)
    assert difference.mean == pytest.approx(good.accuracy - poor.accuracy)
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.share_above_zero > 0.99
    assert paired_difference(good, good).mean == 0
    reverse = paired_difference(poor, good)
    assert reverse.mean == pytest.approx(-difference.mean)
    with pytest.raises(ValueError, match="the same ones in the same order"):
        paired_difference(good, linear_probe(train_x, train_y, test_x[:10], test_y[:10]))
