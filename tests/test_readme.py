# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The code blocks of README.md, in order, in one folder, as a reader would run them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
# Training for long would prove nothing more here.
SHORTER = {r"max_steps=\d+": "max_steps=2", r"--steps \d+": "--steps 20"}


def blocks(*languages):
    return [body for language, body in BLOCK.findall((ROOT / "README.md").read_text()) if language in languages]


@pytest.fixture(scope="module")
def reader(tmp_path_factory, golden_folder):
    """A folder with audio, and a published checkpoint where its Hub id points, which is looked up before the Hub."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(golden_folder, folder / "marcoyang" / "spear-base-speech-audio-v2")
    (folder / "examples").symlink_to(ROOT / "examples")  # as in a clone
    (folder / "my_audio").mkdir()
    rows = [json.loads(line) for line in (ROOT / "examples/data/manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "pretrain" and 32000 < row["num_samples"] < 64000]
    for row in rows[:12]:
        shutil.copyfile(ROOT / "examples/data" / row["path"], folder / "my_audio" / Path(row["path"]).name)
    return folder


@pytest.mark.timeout(1200)
def test_python_and_shell_blocks_run(reader):
    environment = os.environ | {
        "PATH": os.pathsep.join([Path(sys.executable).parent.as_posix(), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
    }
    # What uses the results of the shell blocks stands after them; the Python blocks share a process to be quick.
    order = BLOCK.findall((ROOT / "README.md").read_text())
    groups: list[tuple[str, str]] = []
    for language, body in order:
        if language not in ("python", "bash"):
            continue
        for pattern, replacement in SHORTER.items():
            body = re.sub(pattern, replacement, body)
        if groups and groups[-1][0] == language:
            body = groups.pop()[1] + "\n" + body
        groups.append((language, body))
    assert [language for language, _ in groups] == ["python", "bash", "python", "bash"]
    outputs = []
    for language, body in groups:
        command = [sys.executable, "-c", body] if language == "python" else ["bash", "-euc", body]
        result = subprocess.run(command, cwd=reader, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f"{body}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        outputs.append(result.stdout)
    assert "torch.Size([1, 46, 32])" in outputs[0]
    assert "9 torch.Size([2, 32])" in outputs[0]
    assert "set() set()" in outputs[0]
    assert "(49, 4) uint8" in outputs[2]
    assert "3 ['chunks', 'text']" in outputs[2]
    assert {path.name for path in (reader / "my-asr").glob("*.json")} >= {"preprocessor_config.json", "vocab.json"}
    assert (reader / "embeddings.safetensors").is_file()
    config = json.loads((reader / "my-spear-int8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "spear_int8"
    assert (reader / "my-spear.onnx").is_file()
    assert (reader / "eval" / "report.md").is_file()
    for run in ("mine", "mine2", "mine4"):
        assert (reader / "runs" / run / "final" / "model.safetensors").is_file()
        lines = (reader / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_make_targets_exist():
    commands = re.findall(r"^make (\S+)", "\n".join(blocks("console")), re.M)
    assert commands == ["demo", "test"]
    for target in commands:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_map_names_what_is_there():
    table = (ROOT / "README.md").read_text().split("| folder | what |")[1].split("\n\n")[0]
    for path in re.findall(r"`([\w/*.]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:] if row)):
        assert list(ROOT.glob(path.rstrip("/"))), path
