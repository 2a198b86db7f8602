# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf benchmark --measure ...`: features, unlike lengths, training steps and memory; right before fast."""

import csv

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
from spear_hf.cli import app
from spear_hf.evaluation import speed_parts, speed_steps
from spear_hf.evaluation.embedding import embed_files
from spear_hf.evaluation.speed import noise
from spear_hf.evaluation.speed_parts import (
    BATCH_IN_ORDER,
    benchmark_lengths,
    embed_in_order,
    parse_lengths,
    torchaudio_features,
    write_noise,
)
from spear_hf.evaluation.speed_steps import benchmark_memory, benchmark_training, check_gradients

from .test_speed import TINY


PEER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}


def test_features_of_a_batch_are_those_of_torchaudio():
    waveforms = noise(5, 2.0) + noise(1, 0.7)
    features = SpearFeatureExtractor()(waveforms, sampling_rate=16000, padding=False)["input_features"]
    for ours, theirs in zip(features, torchaudio_features(waveforms), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=speed_parts.FEATURE_TOLERANCE)


def test_table_of_features(tmp_path, monkeypatch):
    table = tmp_path / "features.csv"
    options = ["--measure", "features", "--cases", "2x0.5", "--repeats", "1", "--output", str(table)]
    result = CliRunner().invoke(app, ["benchmark", *options])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert [row["contender"] for row in rows] == ["spear", "torchaudio"]
    assert [path.name for path in tmp_path.iterdir()] == ["features.csv"]
    monkeypatch.setattr(speed_parts, "FEATURE_TOLERANCE", -1.0)
    result = CliRunner().invoke(app, ["benchmark", *options])
    assert result.exit_code == 1
    assert "nothing is timed" in result.output


def test_batches_of_unlike_lengths_have_little_padding(tmp_path):
    """What `embed_files` gives the encoder, against batches in order of the same files."""
    lengths = np.random.default_rng(0).uniform(2.0, 30.0, size=64)
    files = write_noise(tmp_path, lengths)
    model = SpearModel(SpearConfig(**TINY)).eval()
    frames = []
    model.stem.register_forward_pre_hook(lambda module, args: frames.append(args[0].shape[0] * args[0].shape[1]))
    ours = {file.path: file.embedding for file in embed_files(files, model, SpearFeatureExtractor(), pool="mean")}
    planned = sum(frames) / 100
    frames.clear()
    expected = embed_in_order(files, model, SpearFeatureExtractor())
    naive = sum(frames) / 100
    assert planned <= 1.02 * lengths.sum()
    assert naive == pytest.approx(
        sum(BATCH_IN_ORDER * lengths[first : first + BATCH_IN_ORDER].max() for first in range(0, 64, BATCH_IN_ORDER)),
        rel=0.01,
    )
    assert naive > 1.5 * planned
    assert np.allclose(np.stack([ours[path] for path in files]), expected, atol=1e-4)


def test_lengths(monkeypatch):
    assert parse_lengths("64x2-30") == (64, 2.0, 30.0)
    rows = list(benchmark_lengths([], "3x0.3-0.9", 1, SpearConfig(**TINY)))
    assert [(row.case, row.contender) for row in rows] == [("3 x 0.3-0.9 s", "spear"), ("3 x 0.3-0.9 s", "in order")]
    monkeypatch.setattr(speed_parts, "EMBEDDING_TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="nothing is timed"):
        next(benchmark_lengths([], "3x0.3-0.9", 1, SpearConfig(**TINY)))


@pytest.mark.parametrize("text", ["", "64x10", "ax2-3", "0x2-3", "4x3-2", "4x0-2", "4x2-300"])
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match=r"case|file"):
        parse_lengths(text)


def test_gradients_are_checked(monkeypatch):
    model = SpearModel(SpearConfig(**TINY))
    assert 0 < check_gradients(model, noise(2, 10.0)) <= speed_steps.GRADIENT_TOLERANCE

    def spoil(module, args, output):
        return output if type(output) is speed_steps.PlainTensor else output * 1.001

    model.stacks[0].register_forward_hook(spoil)
    with pytest.raises(ValueError, match="nothing is timed"):
        check_gradients(model, noise(2, 10.0))


def test_training_and_memory_in_processes():
    sizes = {"spear": TINY, "wavlm": PEER}
    rows = list(benchmark_training(["wavlm"], "1x0.5", 1, sizes))
    assert [row.contender for row in rows] == ["spear", "wavlm"]
    assert all(row.peak_megabytes > row.grown_megabytes > 0 for row in rows)

    # 8 heads of 1,246 frames: 50 MB of weights, of which blocks hold a part.
    rows = list(benchmark_memory([], "1x25", 1, {"spear": TINY | {"num_attention_heads": 8}}))
    ours, plain = rows
    assert (ours.contender, plain.contender) == ("spear", "all weights")
    assert plain.grown_megabytes - ours.grown_megabytes > 40


def test_a_process_that_ends_is_told_of():
    worker = speed_steps._Worker({"contender": "wavlm"})  # no threads
    with pytest.raises(ValueError, match="process of wavlm ended with code 1"):
        worker.answer()
    worker.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measure", "speed"], "measure='speed'"),
        (["--measure", "features", "--against", "wavlm"], "not measured against other encoders"),
        (["--measure", "lengths", "--cases", "4x15"], "not a case of unlike lengths"),
        (["--measure", "training", "--against", "whisper"], "unknown encoder whisper"),
        (["--measure", "memory", "--repeats", "0"], "repeats=0"),
    ],
)
def test_bad_options(options, message):
    result = CliRunner().invoke(app, ["benchmark", *options])
    assert result.exit_code == 1
    assert message in result.output
