# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""README.md and the pages beside it: code blocks that run, in order, in one folder; links; figures of the tables."""

import csv
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


PAGES = ("README.md", "examples/README.md")  # the second goes on in the folder of the first
DOCUMENTS = [
    path for path in ROOT.rglob("*.md") if not {part for part in path.parts if part[0] == "." or part == "runs"}
]


def blocks():
    """Language and text of each."""
    return BLOCK.findall("\n".join((ROOT / page).read_text() for page in PAGES))


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
    groups: list[tuple[str, str]] = []
    for language, body in blocks():
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
    assert "(329, 32)" in outputs[0]
    assert "torch.Size([1, 46, 32])" in outputs[0]
    assert "9 torch.Size([2, 32])" in outputs[0]
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
    commands = re.findall(
        r"^make (\S+)", "\n".join(body for language, body in blocks() if language == "console"), re.M
    )
    assert commands == ["demo", "test"]
    for target in commands:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_map_names_what_is_there():
    table = (ROOT / "README.md").read_text().split("| folder | what |")[1].split("\n\n")[0]
    for path in re.findall(r"`([\w/*.]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:] if row)):
        assert list(ROOT.glob(path.rstrip("/"))), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or "{" in target:
            continue
        name, _, heading = target.partition("#")
        page = (document.parent / name) if name else document
        assert page.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def rows(name):
    with open(ROOT / "model_cards" / "benchmarks" / name, newline="") as file:
        return list(csv.DictReader(file))


def test_figures_are_those_of_the_tables():
    """What README says of speed and memory, from the committed tables."""
    times = {row["case"]: float(row["times_spear"]) for row in rows("speed.csv") if row["contender"] == "wavlm"}
    rates = {"spear": [], "wavlm": [], "hubert": []}
    for row in rows("speed.csv"):
        rates[row["contender"]].append(float(row["audio_per_second"]))
    training, memory = (
        {row["contender"]: row for row in rows(f"speed_{name}.csv")} for name in ("training", "memory")
    )
    peak = {
        name: float(table["spear"]["peak_megabytes"]) / float(table["wavlm"]["peak_megabytes"])
        for name, table in (("training", training), ("memory", memory))
    }
    gpu = {(row["what"], row["contender"], row["mode"]): row for row in rows("gpu.csv") if row["batch"] == "32"}

    def ratio(column, what, size, mode):
        wavlm = float(gpu[what, f"wavlm-{size}", "eager"][column])
        return float(gpu[what, f"spear-{size}", mode][column]) / wavlm

    export = {row["contender"]: row for row in rows("export.csv") if row["contender"] in ("torch", "int8")}
    text = " ".join((ROOT / "README.md").read_text().split())
    cases = ", ".join(f"{times[case]:.1f}" for case in ("1 x 10 s", "4 x 15 s", "1 x 60 s"))
    recorded, trained = ("inference", "large", "cuda-graph"), ("training", "large", "eager")
    for expected in (
        *(
            f"{name} {min(rates[key]):.0f} to {max(rates[key]):.0f}"
            for name, key in (("SPEAR", "spear"), ("WavLM", "wavlm"))
        ),
        f"| {cases} | {peak['memory']:.2f} at 60 s |",
        f"training on two cores, 2 x 10 s | {float(training['wavlm']['times_spear']):.1f} | {peak['training']:.2f} |",
        f"as a CUDA graph | {ratio('audio_per_second', *recorded):.1f} | {ratio('peak_mb', *recorded):.2f} |",
        f"(base: {ratio('audio_per_second', 'training', 'base', 'eager'):.1f}) | "
        f"{ratio('audio_per_second', *trained):.1f} | {ratio('peak_mb', *trained):.2f} |",
        f"and {float(export['int8']['seconds']) / float(export['torch']['seconds']):.1f} of the time (10 s, two cores",
    ):
        assert expected in text
    assert round(float(export["int8"]["megabytes"]) / float(export["torch"]["megabytes"]), 2) in (0.25, 0.26)
