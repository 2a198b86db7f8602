# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Models that are not there, damaged or pickled, devices that do not exist and full disks: one line, no traceback."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import spear_hf
from spear_hf.cli import app
from spear_hf.loading_errors import loading

from .conftest import ROOT


MARK = "unpickled"
PROBE = (("a", "train", "x"), ("b", "train", "y"), ("c", "test", "x"), ("d", "test", "y"))  # id, split, label


class Harmful:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, (MARK,)


@pytest.fixture
def desk(tmp_path, monkeypatch, golden_folder):
    """A working folder with a clip and models: `whole`, and others with faults."""
    monkeypatch.chdir(tmp_path)
    for name in ("clip.wav", "other.wav"):
        soundfile.write(name, 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    for name in ("whole", "cut", "pickled", "misfit"):
        shutil.copytree(golden_folder, name)
    os.truncate("cut/model.safetensors", 5000)
    os.remove("pickled/model.safetensors")
    torch.save({"weight": Harmful()}, "pickled/pytorch_model.bin")
    config = tmp_path / "misfit" / "config.json"
    config.write_text(config.read_text().replace("64,64,64,64,64,64,64", "48,48,48,48,48,48,48"))
    torch.save({"model": {"weight": torch.zeros(2)}}, "strange.pt")
    return tmp_path


FAULTS = {
    "nowhere": "there is no (model|teacher) nowhere here, and the Hub gives none: HF_HUB_OFFLINE is set",
    "cut": "cut is cut off or damaged",
    "pickled": "pickled holds a pickle of more than tensors",
    "misfit": r"the weights of misfit do not fit its config\.json",
}
COMMANDS = {
    "embed": "embed clip.wav --output out.npz --model {}",
    "export": "export {} out.onnx",
    "quantize": "quantize --codebooks 2 --steps 2 --data . --output out --teacher {}",
}


def refused(command, message):
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    # The last line: transformers reports tensors that do not fit above it.
    assert [line for line in result.output.splitlines() if line][-1].startswith(("error: ", "spear-hf "))
    assert re.search(message, result.output), result.output


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(("model", "message"), FAULTS.items(), ids=FAULTS)
def test_models_that_do_not_load(desk, command, model, message):
    refused(command.format(model), message)
    assert not [path.name for path in desk.iterdir() if path.name.startswith("out") or path.name == MARK]


def test_evaluate_names_the_model(desk):
    row = '{"id": "%s", "path": "clip.wav", "split": "probe_%s", "probe": "p", "label": "%s"}\n'
    (desk / "manifest.jsonl").write_text("".join(row % values for values in PROBE))
    refused("evaluate --tasks manifest.jsonl#probe=p --output out --model nowhere", "there is no model nowhere here")


def test_pretraining_names_the_model(desk):
    settings = "data.manifest=clips output_dir=out model.size=null max_steps=2"
    (desk / "clips").mkdir()
    for name in ("clip.wav", "other.wav"):
        shutil.copyfile(name, f"clips/{name}")
    refused(f"pretrain --config tiny --set {settings} model.config={{}} model.init_from=nowhere", "no model nowhere")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("quantize --teacher kaldi-mfcc --codebooks 2 --data . --output out --device cudda", "device='cudda' cannot"),
        ("tokenize --tokenizer nowhere --data . --output out", "there is no quantiser nowhere here"),
        ("convert strange.pt out", "numbers of stacks and layers have gaps: there are none"),
        ("embed clip.wav --output out.npz --model whole --batch-seconds nan", "batch_seconds=nan"),
        ("embed clip.wav --output out.npz --model whole --window-seconds nan", "window_seconds=nan must be positive"),
    ],
)
def test_wrong_arguments(desk, command, message):
    refused(command, message)
    assert not list(desk.glob("out*"))


def test_negative_passes_make_no_store(desk):
    command = "quantize --teacher kaldi-mfcc --codebooks 2 --steps 2 --data . --output q"
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    refused(
        "tokenize --tokenizer q --data . --output out --refine-iters -1", "refine_iters must be at least 0, not -1"
    )
    assert not (desk / "out").exists()


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("embed clip.wav --model whole --layer all --output out.safetensors", "out.safetensors"),
        ("embed clip.wav --model whole --layer all --output out.parquet", "out.parquet"),
        ("quantize --teacher kaldi-mfcc --codebooks 2 --steps 2 --data . --output out", "out/quantizer.png"),
        ("segment --data clip.jsonl --output out.jsonl", "out.jsonl"),
        ("convert whole out", "out"),
        ("evaluate --model whole --tasks probe.jsonl#probe=p --no-default-baselines --output out", ""),
    ],
)
def test_full_disks(desk, command, output):
    row = '{"id": "%d", "path": "clip.wav"}\n'
    (desk / "clip.jsonl").write_text("".join(row % number for number in range(500)))
    probe = '{"id": "%s", "path": "clip.wav", "split": "probe_%s", "probe": "p", "label": "%s"}\n'
    (desk / "probe.jsonl").write_text("".join(probe % row for row in PROBE))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        refused(command, f"{output} cannot be written: ")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    left = {path.name for path in desk.glob("out*/*")} | {output} & set(os.listdir())
    assert left <= {"metrics.jsonl", "report.json", "cache", "results"}
    assert not list(desk.rglob(".*"))


def test_other_errors_pass():
    with pytest.raises(KeyError), loading("x"):
        raise KeyError("x")


def test_missing_packages_are_named(desk):
    """One line in place of a traceback, of a package that a command imports when it runs."""
    (desk / "jiwer.py").write_text("raise ModuleNotFoundError('No module named jiwer', name='jiwer')")
    command = "from spear_hf.cli import main; main()"
    arguments = ["evaluate", "--model", "whole", "--tasks", "clip.wav", "--output", "out"]
    path = os.pathsep.join([str(desk), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("spear-hf: the package jiwer is not installed.")


def test_versions_and_order_of_the_commands():
    assert CliRunner().invoke(app, ["--version"]).output.startswith(f"spear_hf {spear_hf.__version__}, transformers ")
    text = CliRunner().invoke(app, ["--help"]).output
    commands = ["embed", "evaluate", "quantize", "tokenize", "pretrain", "convert", "publish"]
    places = [re.search(rf"^\W*{name} ", text, re.M).start() for name in commands]
    assert places == sorted(places)
