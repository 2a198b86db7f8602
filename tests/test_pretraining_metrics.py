# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Sums over micro-batches give the metrics of the whole step: by teacher, domain and codebook."""

import json
import os

import pytest
import torch
from accelerate import Accelerator

from spear_hf import SpearConfig, SpearForPreTraining
from spear_hf.data.collation import MicroBatch
from spear_hf.pretraining.metrics import (
    JsonLines,
    StepClock,
    StepSums,
    codebooks_of,
    numbers,
    read_json_lines,
    summary,
)


TARGETS = {
    "speech": {"num_codebooks": 3, "codebook_size": 4, "weight": 1.0},
    "audio": {"num_codebooks": 2, "codebook_size": 4, "weight": 0.1},
}


@pytest.fixture(scope="module")
def model() -> SpearForPreTraining:
    torch.manual_seed(0)
    config = SpearConfig(
        hidden_size=16,
        intermediate_size=16,
        stem_channels=[2, 2, 2],
        num_layers_per_stack=[1],
        downsampling_factors=[1],
        conv_kernel_sizes=[3],
        pretraining_targets=TARGETS,
    )
    return SpearForPreTraining(config).eval()


def batch(domains: list[str], seed: int, frames: int = 60) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    rows, length = len(domains), (frames - 7) // 2
    labels = {
        f"{name}_labels": torch.randint(
            target["codebook_size"], (rows, length, target["num_codebooks"]), generator=generator
        )
        for name, target in TARGETS.items()
    }
    for row, domain in enumerate(domains):
        if domain == "speech":
            labels["audio_labels"][row] = -100
    inputs = {
        "input_features": torch.randn(rows, frames, 128, generator=generator),
        "attention_mask": torch.ones(rows, frames, dtype=torch.long),
        "mask_time_indices": torch.rand(rows, frames, generator=generator) < 0.5,
        **labels,
    }
    ids = [f"{seed}-{row}" for row in range(rows)]
    return MicroBatch(inputs, ids, domains, rows * length, rows * 9600, rows * 10000)


@torch.no_grad()
def test_sums_of_parts_are_those_of_the_whole(model):
    parts = [batch(["speech", "audio", "speech"], 1), batch(["audio"], 2)]
    sums = StepSums(codebooks_of(model), ["speech", "audio"], torch.device("cpu"))
    for part in parts:
        sums.add(part, model(**part.inputs), torch.tensor(0.25), flops=10)
    sums.reduce(Accelerator())
    totals, (others,) = sums.read(torch.tensor([2.0, 3.0]))
    assert others == [2.0, 3.0]
    metrics = sums.metrics(totals)
    assert totals.counters["loss"] == 0.5
    assert (totals.counters["utterances"], totals.counters["samples"], totals.counters["flops"]) == (4, 38400, 20)
    assert totals.counters["stop"] == 0

    joined = {name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    domains = [domain for part in parts for domain in part.domains]
    whole = model(**joined)
    assert metrics["speech_loss"] == pytest.approx(float(whole.speech_loss), rel=1e-5)
    assert metrics["audio_masked_accuracy"] == pytest.approx(float(whole.audio_masked_accuracy), rel=1e-5)
    for domain in ("speech", "audio"):
        rows = [place for place, name in enumerate(domains) if name == domain]
        alone = model(**{name: tensor[rows] for name, tensor in joined.items()})
        assert metrics[f"speech_loss_on_{domain}"] == pytest.approx(float(alone.speech_loss), rel=1e-5)
        accuracy = metrics[f"speech_masked_accuracy_on_{domain}"]
        assert accuracy == pytest.approx(float(alone.speech_masked_accuracy), rel=1e-5)
    assert metrics["audio_loss_on_audio"] == pytest.approx(metrics["audio_loss"])
    assert "audio_loss_on_speech" not in metrics
    assert [len(metrics[f"{name}_codebook_accuracy"]) for name in TARGETS] == [3, 2]
    for name in TARGETS:
        mean = sum(metrics[f"{name}_codebook_accuracy"]) / len(metrics[f"{name}_codebook_accuracy"])
        assert mean == pytest.approx(metrics[f"{name}_masked_accuracy"], rel=1e-5)


@torch.no_grad()
def test_domains_are_those_that_the_configuration_gives_a_teacher(model):
    """Disjoint targets: the audio of a corpus does not predict the speech teacher's tokens."""
    part = batch(["speech", "audio"], 1)
    chosen = {"speech": ["speech"], "audio": ["speech", "audio"]}
    sums = StepSums(codebooks_of(model), ["speech", "audio"], torch.device("cpu"), chosen)
    sums.add(part, model(**part.inputs))
    sums.reduce(Accelerator())
    found = {name for name in sums.metrics(sums.read()[0]) if "_loss_on_" in name}
    assert found == {"speech_loss_on_speech", "audio_loss_on_speech", "audio_loss_on_audio"}


@torch.no_grad()
def test_a_corpus_of_one_domain_is_not_divided(model):
    sums = StepSums(codebooks_of(model), ["speech"], torch.device("cpu"))
    part = batch(["speech"], 1)
    sums.add(part, model(**part.inputs))
    sums.reduce(Accelerator())
    metrics = sums.metrics(sums.read()[0])
    assert not [name for name in metrics if "_on_" in name]
    assert metrics["audio_loss"] is None
    assert metrics["audio_codebook_accuracy"] == [None, None]
    assert "audio" not in summary(metrics)


def test_trackers_get_numbers_and_the_entries_of_lists():
    record = {"step": 3, "loss": 1.5, "skipped": ["a"], "batch": "ff", "accuracy": [0.1, None], "none": None}
    assert numbers(record, "training") == {"training/loss": 1.5, "training/accuracy/0": 0.1}


def test_a_summary_says_that_nothing_is_masked():
    assert summary({"loss": 1.5, "speech_masked_accuracy": 0.25}) == "loss 1.500, speech masked accuracy 0.250"
    assert summary({"speech_masked_accuracy": None}) == "no frame with a target is masked"


def test_mfu_is_work_over_what_the_device_could_do(monkeypatch):
    clock = StepClock(peak=1e9)
    monkeypatch.setattr("time.perf_counter", lambda: clock.start + 2.0)
    lap = clock.lap(samples=32000, flops=5e8)
    assert (lap["mfu"], lap["audio_seconds_per_second"], lap["step_seconds"]) == (0.25, 1.0, 2.0)


def test_json_lines_go_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as file:
        for step in range(1, 6):
            file.write({"step": step, "loss": float("nan") if step == 2 else 1.0, "list": [None, 1.0]})
    with path.open("a") as raw:
        raw.write('{"step": 6, "lo')
    with JsonLines(path, keep_until=3) as file:
        file.write({"step": 4, "loss": 2.0})
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3, 4]
    assert read_json_lines(path)[1]["loss"] is None
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 2.0


def test_lines_that_a_crash_has_damaged_are_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as file:
        for step in (1, 2, 3, 4):
            file.write({"step": step})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        lines[0] + b"\0" * 10 + lines[1][10:] + lines[2] + b'{"step": "\xff"}\n' + lines[3] + b'{"step": 5'
    )
    assert [record["step"] for record in read_json_lines(path)] == [1, 3, 4]
    assert [record.message[:6] for record in caplog.records] == ["Line 2", "Line 4"]
    with JsonLines(path, keep_until=3) as file:
        file.write({"step": 4})
    assert path.read_bytes() == lines[0] + lines[2] + lines[3]


def test_a_full_disk_is_named_by_the_file(tmp_path):
    def fill() -> None:
        with JsonLines(tmp_path / "metrics.jsonl") as file:
            file._file.close()
            file._file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
            file.write({"step": 1})

    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: the disk is full"):
        fill()
