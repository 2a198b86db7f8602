# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""examples/demo.py: its parts fit together, an interrupted demo goes on, and (slow) the whole one shows learning."""

import importlib.util
import json
import subprocess
import sys

import pytest
from safetensors import safe_open

from spear_hf.hub_checks import check_card

from .conftest import ROOT


@pytest.fixture(scope="module")
def demo():
    """The script as a module: its `main` takes a command line and returns the exit code."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo"]


def check_report(folder, words, notes):
    """Fields that the README and the card rely on."""
    report = json.loads((folder / "report.json").read_text())
    for name in ("masked_accuracy", "unigram_accuracy"):
        assert 0 < report[name] < 1
    for name in ("pretrained", "random", "log_mel"):
        for probe, items in (("probe", words), ("linear_probe", notes)):
            result = report[probe][name]
            assert 0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1
            assert result["test_utterances"] == items
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


def test_smoke(demo, tmp_path, capsys):
    folder = tmp_path / "demo"
    command = ["--smoke", "--output", str(folder)]
    assert demo.main(command) == 0
    report = check_report(folder, words=60, notes=30)
    assert f"{report['masked_accuracy']:.1%}" in capsys.readouterr().out
    # As if it had been stopped before the last stage: the others are not done again.
    (folder / "stages" / "plot.json").unlink()
    (folder / "report.json").unlink()
    assert demo.main(command) == 0
    assert capsys.readouterr().out.count("done before") == 5
    assert check_report(folder, words=60, notes=30)["masked_accuracy"] == report["masked_accuracy"]
    # Another demo does not mix with it.
    assert demo.main(["--output", str(folder)]) == 1
    assert "other settings" in capsys.readouterr().err


def test_force_deletes_demos_only(demo, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert demo.main(["--smoke", "--force", "--output", str(tmp_path)]) == 1
    assert "not the folder of a demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_claims_say_what_does_not_hold(demo):
    gain = {"mean": 0.05, "low": -0.01, "high": 0.11}
    report = {"masked_accuracy": 0.3, "unigram_accuracy": 0.1, "probe": {"pretrained_minus_random": gain}}
    assert [claim["holds"] for claim in demo.claims(report)] == [True, False]
    report = {
        "masked_accuracy": 0.19,
        "unigram_accuracy": 0.1,
        "probe": {"pretrained_minus_random": gain | {"low": 0.01}},
    }
    assert [claim["holds"] for claim in demo.claims(report)] == [False, True]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whole_demo(tmp_path):
    folder = tmp_path / "demo"
    script = ROOT / "examples" / "demo.py"
    done = subprocess.run([sys.executable, script, "--output", folder], capture_output=True, text=True, check=False)
    report = check_report(folder, words=166, notes=205)
    assert done.returncode == 0, done.stdout[-2000:]
    assert all(claim["holds"] for claim in report["claims"])
    assert report["wall_seconds"] < 480
