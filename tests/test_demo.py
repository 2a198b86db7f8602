# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""examples/demo.py: its parts fit together, an interrupted demo goes on, and (slow) the whole one shows learning."""

import json
import os
import subprocess
import sys

import pytest
from safetensors import safe_open

from spear_hf.hub_checks import check_card

from .conftest import ROOT


def demo(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def check_report(folder, clips):
    """Fields that the README and the card rely on."""
    report = json.loads((folder / "report.json").read_text())
    for name in ("masked_accuracy", "unigram_accuracy"):
        assert 0 < report[name] < 1
    for name in ("pretrained", "random", "log_mel"):
        result = report["probe"][name]
        assert 0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1
        assert result["test_utterances"] == clips
    assert len(report["probe"]["per_layer"]["pretrained"]) == report["model"]["num_hidden_layers"] + 1
    assert set(report["stages"]) == {"quantize", "tokenize", "pretrain", "embed", "probe", "plot"}
    assert all(stage["complete"] for stage in report["stages"].values())
    assert report["wall_seconds"] >= sum(stage["seconds"] for stage in report["stages"].values())
    assert report["peak_memory_mb"] < 6000
    assert set(report["versions"]) >= {"torch", "transformers", "spear_hf", "python", "machine"}
    assert len(report["claims"]) == 2
    for name in ("loss", "masked_accuracy", "probe_layers", "tokens"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 10_000
    assert check_card(folder / "pretraining" / "final" / "README.md") == []
    with safe_open(folder / "embeddings.safetensors", framework="np") as embeddings:
        assert len(list(embeddings.keys())) == report["data"]["heldout_utterances"]
    return report


def test_smoke(tmp_path):
    folder = tmp_path / "demo"
    done = demo("--smoke", "--output", folder)
    assert done.returncode == 0, done.stderr
    report = check_report(folder, clips=30)
    assert f"{report['masked_accuracy']:.1%}" in done.stdout
    # As if it had been stopped before the last stage: the others are not done again.
    (folder / "stages" / "plot.json").unlink()
    (folder / "report.json").unlink()
    again = demo("--smoke", "--output", folder)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 5
    assert check_report(folder, clips=30)["masked_accuracy"] == report["masked_accuracy"]
    # Another demo does not mix with it, and a folder of something else is not deleted.
    other = demo("--output", folder)
    assert other.returncode == 1
    assert "other settings" in other.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    kept = demo("--smoke", "--force", "--output", tmp_path / "mine")
    assert kept.returncode == 1
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_demo(tmp_path):
    folder = tmp_path / "demo"
    done = demo("--output", folder)
    report = check_report(folder, clips=205)
    assert done.returncode == 0, done.stdout[-2000:]
    assert all(claim["holds"] for claim in report["claims"])
    assert report["wall_seconds"] < 480
