# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Training of the quantiser on frames of real audio: MFCCs of the bundled recordings."""

import itertools
import json
import random

import numpy as np
import pytest
import torch

from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.training import (
    QuantizerTrainer,
    QuantizerTrainingConfig,
    _initialize,
    _multiplied_out,
    evaluate_quantizer,
)

from .conftest import ROOT


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The quantisers are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mfccs():
    """Frames (about 16,000, 39) of every eighth bundled recording, shuffled."""
    teacher = load_teacher("kaldi-mfcc")
    utterances = itertools.islice(read_manifest(ROOT / "examples" / "data"), 0, None, 8)
    frames = torch.cat(teacher([load_audio(utterance.path) for utterance in utterances]))
    return frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def heldout(mfccs):
    return mfccs[:2000]


@pytest.fixture(scope="module")
def frames(mfccs):
    return mfccs[2000:]


def trainer(steps=20, batch_size=256, num_codebooks=2, **settings):
    names = ("metadata", "metrics_path")
    extras = {name: settings.pop(name) for name in names if name in settings}
    config = QuantizerTrainingConfig(num_codebooks, steps=steps, batch_size=batch_size, **settings)
    return QuantizerTrainer(config, progress=False, **extras)


def test_training_reduces_the_error_of_heldout_frames(frames, heldout, tmp_path):
    metadata = {"teacher": "kaldi-mfcc", "frame_rate": 50, "provenance": {"data": "bundled"}}
    training = trainer(60, seed=3, metadata=metadata, metrics_path=tmp_path / "logs" / "metrics.jsonl")
    quantizer = training.train(frames)
    report = training.evaluate(heldout)
    print(f"relative error on held-out frames: {report}")
    assert report["frames"] == 2000
    assert report["relative_error"] < 0.55
    assert len(report["perplexity"]) == len(report["used"]) == 2
    assert min(report["perplexity"]) > 60
    assert max(report["used"]) <= 256
    assert evaluate_quantizer(quantizer, heldout, refine_iters=0)["relative_error"] > report["relative_error"]

    config = quantizer.config
    assert (config.num_codebooks, config.codebook_size, config.feature_size) == (2, 256, 39)
    assert (config.teacher, config.frame_rate, config.normalize) == ("kaldi-mfcc", 50.0, True)
    assert config.provenance["data"] == "bundled"
    assert config.provenance["training"]["frames"] == len(frames)
    assert config.provenance["training"]["seed"] == 3
    torch.testing.assert_close(quantizer.feature_mean, frames.mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantizer.feature_std, frames.std(dim=0), rtol=1e-3, atol=1e-4)
    assert not quantizer.training

    records = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 20, 40, 59, 60, 80, 100, 119]
    assert [record["phase"] for record in records] == [1] * 4 + [2] * 4
    rates = {record["step"]: record["learning_rate"] for record in records}
    assert rates == {
        0: 5e-3,
        20: 2.5e-3,
        40: 1.25e-3,
        59: 6.25e-4,
        60: 2.5e-3,
        80: 1.25e-3,
        100: 6.25e-4,
        119: 3.125e-4,
    }
    assert {record["passes"] for record in records} == {1, 2}
    assert records[3]["reconstruction"] < records[0]["reconstruction"]
    assert records[-1]["classifier"] < records[4]["classifier"]


def test_a_seed_decides_everything(frames, heldout):
    one = trainer(6, seed=1).train(frames)
    assert trainer(6, seed=1).train(frames).quantizer_id == one.quantizer_id
    assert trainer(6, seed=2).train(frames).quantizer_id != one.quantizer_id
    # Where the frames lie does not matter: numpy, half precision, more than two dimensions.
    whole = frames[:12_000].half()
    expected = trainer(4).train(whole.float())
    for same in (whole, whole.numpy(), whole.view(12, 1000, 39)):
        found = trainer(4).train(same)
        assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), expected.state_dict().values()))


def test_frames_of_a_memory_map(frames, tmp_path):
    np.save(tmp_path / "frames.npy", frames.numpy())
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    assert trainer(2).train(mapped).quantizer_id == trainer(2).train(frames).quantizer_id


def test_pairs_of_codebooks_are_multiplied_out(frames):
    small = trainer(10, num_codebooks=4, codebook_size=8).train(frames)
    product = _multiplied_out(small)
    assert (product.config.num_codebooks, product.config.codebook_size) == (2, 64)
    codes = small.encode(frames[:200]).long()
    joint = 8 * codes[:, 0::2] + codes[:, 1::2]
    torch.testing.assert_close(product.decode(joint), small.decode(codes), rtol=1e-5, atol=1e-4)
    assert torch.equal(
        product.encode(frames[:200], refine_iters=0).long(),
        8 * small.encode(frames[:200], refine_iters=0).long()[:, 0::2]
        + small.encode(frames[:200], refine_iters=0).long()[:, 1::2],
    )
    assert evaluate_quantizer(product, frames[:2000])["relative_error"] <= (
        evaluate_quantizer(small, frames[:2000])["relative_error"] * 1.01
    )


def test_sizes_and_phases(frames, heldout):
    assert QuantizerTrainingConfig(16).phases == [(32, 16), (16, 256)]
    assert QuantizerTrainingConfig(4, codebook_size=16).phases == [(8, 4), (4, 16)]
    assert QuantizerTrainingConfig(4, codebook_size=32).phases == [(4, 32)]
    assert QuantizerTrainingConfig(4, codebook_size=2).phases == [(4, 2)]
    single = trainer(30, num_codebooks=4, codebook_size=32)
    assert single.train(frames).config.codebook_size == 32
    assert single.evaluate(heldout)["relative_error"] < 0.6


def test_without_normalisation(frames):
    quantizer = trainer(10, normalize=False).train(frames)
    assert not quantizer.config.normalize
    assert "feature_mean" not in quantizer.state_dict()
    report = evaluate_quantizer(quantizer, frames[:1000])
    decoded = quantizer.decode(quantizer.encode(frames[:1000]))
    spread = (frames[:1000] - frames[:1000].mean(dim=0)).square().sum()
    assert report["relative_error"] == pytest.approx(
        float((decoded - frames[:1000]).square().sum() / spread), rel=1e-4
    )


def test_constant_channels_and_identical_frames(frames):
    """Mel bins above a recording's bandwidth are constant; digital silence repeats one frame."""
    odd = torch.cat([frames[:3000], torch.zeros(3000, 39)])
    odd[:, 7] = -15.9
    quantizer = trainer(10).train(odd)
    assert quantizer.feature_std[7] == 1
    assert evaluate_quantizer(quantizer, odd)["relative_error"] < 0.7
    silence = trainer(3).train(torch.zeros(500, 8))
    assert torch.equal(silence.decode(silence.encode(torch.zeros(3, 8))).round(decimals=2), torch.zeros(3, 8))


def test_unusable_frames_and_settings_are_refused(frames):
    with pytest.raises(ValueError, match="10 frames cannot train codebooks of 16"):
        trainer().train(frames[:10])
    with pytest.raises(ValueError, match=r"not torch.int64 \(14"):
        trainer().train(frames[:140, :10].long())
    with pytest.raises(ValueError, match=r"floating-point numbers \(frames, feature_size\), not float32 \(5,\)"):
        trainer().train(np.zeros(5, dtype=np.float32))
    broken = frames.clone()
    broken[9000, 3] = torch.nan
    with pytest.raises(ValueError, match=r"frame 9000 of .* is not finite"):
        trainer().train(broken)
    with pytest.raises(ValueError, match="call train"):
        trainer().evaluate(frames)
    with pytest.raises(ValueError, match="steps must be positive, not 0"):
        QuantizerTrainingConfig(4, steps=0)
    with pytest.raises(ValueError, match="power of two"):
        QuantizerTrainingConfig(5)


def test_initialisation_is_better_than_random(frames):
    """K-means leaves less than half of the error to training; random parameters leave all of it."""
    quantizer = MultiCodebookQuantizer(39, 16, 4)
    standardised = (frames - frames.mean(dim=0)) / frames.std(dim=0)
    before = evaluate_quantizer(quantizer, standardised[:2000])["relative_error"]
    _initialize(quantizer, standardised, seed=0)
    after = evaluate_quantizer(quantizer, standardised[:2000])["relative_error"]
    print(f"relative error before any training: random {before:.3f}, k-means {after:.3f}")
    assert after < 0.6 < before
    assert quantizer.centers.square().mean().sqrt().item() == pytest.approx((3 * 39) ** -0.5, rel=1e-3)


def compare_with_reference(frames, heldout, num_codebooks, steps, batch_size):
    """Relative errors on held-out frames after as many steps on the same standardised frames: (theirs, ours)."""
    package = pytest.importorskip("multi_quantization", reason="multi_quantization is not installed (extra dev)")
    mean, std = frames.mean(dim=0), frames.std(dim=0)
    frames, heldout = (frames - mean) / std, (heldout - mean) / std
    random.seed(0)
    torch.manual_seed(0)
    reference = package.QuantizerTrainer(39, num_codebooks, torch.device("cpu"), steps, steps)
    generator = torch.Generator().manual_seed(0)
    while not reference.done():
        reference.step(frames[torch.randint(len(frames), (batch_size,), generator=generator)])
    theirs = MultiCodebookQuantizer.from_multi_quantization(reference.get_quantizer().state_dict())
    ours = trainer(steps, batch_size, num_codebooks, normalize=False).train(frames)
    errors = [evaluate_quantizer(quantizer, heldout)["relative_error"] for quantizer in (theirs, ours)]
    print(
        f"{num_codebooks} codebooks, {steps} steps a phase of {batch_size} frames: relative error of "
        f"multi_quantization {errors[0]:.4f}, ours {errors[1]:.4f} ({errors[1] / errors[0] - 1:+.1%})"
    )
    return errors


def test_error_is_not_above_that_of_the_reference_package(frames, heldout):
    theirs, ours = compare_with_reference(frames, heldout, num_codebooks=2, steps=60, batch_size=256)
    assert ours <= 1.01 * theirs


@pytest.mark.slow
def test_error_is_not_above_that_of_the_reference_package_after_long_training(frames, heldout):
    theirs, ours = compare_with_reference(frames, heldout, num_codebooks=4, steps=1000, batch_size=512)
    assert ours <= 1.01 * theirs
