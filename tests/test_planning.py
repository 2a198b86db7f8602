# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`--dry-run` of every shipped configuration, on a list of 45 hours of audio that need not exist."""

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from spear_hf.pretraining.config import load_config, shipped_configs
from spear_hf.pretraining.planning import ASSUMED_MFU, Plan, plan_run


PAPERS_GPUS = {"base": 8, "large": 16, "xlarge": 32}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """12,000 utterances of 1 to 30 s, every fifth of domain audio."""
    path = tmp_path_factory.mktemp("planning") / "manifest.jsonl"
    seconds = np.random.default_rng(0).lognormal(2.4, 0.7, 60_000).clip(1, 30)
    with path.open("w") as file:
        for number, length in enumerate(seconds):
            row = {"path": f"{number}.flac", "num_samples": int(length * 16000)}
            file.write(json.dumps({**row, "domain": "speech" if number % 5 else "audio"}) + "\n")
    return path


def plan(name: str, manifest: Path, monkeypatch, ranks: int, *overrides: str) -> Plan:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    where = [f"data.manifest={manifest}", f"output_dir={manifest.parent / 'run'}"]
    return plan_run(load_config(name, [*where, *overrides]))


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_is_planned_in_little_memory(manifest, monkeypatch, name):
    config = load_config(name)
    ranks = 1 if name in ("tiny", "base-one-gpu") else PAPERS_GPUS[name.split("-")[0]]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    planned = plan(name, manifest, monkeypatch, ranks)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB; xlarge's weights alone: 2.4 GB
    assert time.process_time() - start < 30
    assert planned.padding_share <= 0.05
    hours = config.max_steps * config.data.batch_seconds / 3600
    assert 0.92 * hours < planned.hours_seen < hours  # the jitter of lengths leaves some of a batch free
    assert planned.micro_batches == 1
    assert planned.state_bytes == 16 * (planned.encoder_parameters + planned.head_parameters)
    assert planned.state_bytes + planned.activation_bytes < 80e9
    text = str(planned)
    assert f"{planned.encoder_parameters:,} encoder" in text
    assert f"on each of {ranks} ranks" in text


@pytest.mark.parametrize(("name", "hours"), [("base-speech-audio", 460), ("xlarge-speech-audio", 3800)])
def test_the_papers_cost_is_what_is_assumed(manifest, monkeypatch, name, hours):
    """A800 hours of the paper, at 312 TFLOP/s, against the operations of the plan."""
    planned = plan(name, manifest, monkeypatch, PAPERS_GPUS[name.split("-")[0]])
    mfu = planned.step_flops * planned.steps / (hours * 3600 * 312e12)
    assert mfu == pytest.approx(ASSUMED_MFU["cuda"], abs=0.005)


def test_activations_follow_the_audio_on_a_device(manifest, monkeypatch):
    device = "execution.batch_seconds_per_device"
    whole, half = (
        plan("base-speech", manifest, monkeypatch, 8, "data.max_seconds=10", f"{device}={seconds}")
        for seconds in (640, 320)
    )
    assert half.micro_batches == 2 * whole.micro_batches
    assert half.activation_bytes == pytest.approx(whole.activation_bytes / 2, rel=0.1)
    assert half.step_flops == whole.step_flops


@pytest.mark.parametrize(("name", "message"), [("base-speech", "no noise"), ("base-one-gpu", "targets.audio")])
def test_what_the_run_would_refuse_is_refused_before(tmp_path, monkeypatch, name, message):
    speech = tmp_path / "speech.jsonl"
    speech.write_text("".join(f'{{"path": "{number}.flac", "num_samples": 32000}}\n' for number in range(40)))
    with pytest.raises(ValueError, match=message):
        plan(name, speech, monkeypatch, 1)
