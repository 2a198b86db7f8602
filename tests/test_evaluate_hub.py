# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf evaluate` on a model and on datasets of the Hub by name, with the real clients, twice, and offline.

The Hub is that of hub_server.py. Its datasets are the tones of evaluation_corpus.py, and a task on them must give what
the same task on the folder gives.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import ModelCard

from spear_hf.data.segments import read_segments
from spear_hf.evaluation.benchmark import evaluate
from spear_hf.evaluation.protocols import Settings
from spear_hf.evaluation.report import read_report
from spear_hf.finetuning.datasets import ENCODED_AUDIO

from .evaluation_corpus import write_corpus, write_model
from .hub_process import GOOD, Client, environment
from .hub_server import HubServer


MODEL, TONES, FILES = "tester/tiny", "tester/tones", "tester/files"
SETTINGS = ["--no-default-baselines", "--baseline", "log-mel", "--feature", "last", "--head", "linear"]
SETTINGS += ["--resamples", "20", "--device", "cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tones", train=18, test=12, pair=False)


def rows_of(corpus: Path, split: str) -> list[dict]:
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["split"] == split]


def tones(corpus: Path, split: str) -> datasets.Dataset:
    """Without ids of the rows, as most datasets are; `sentence`, a number that several rows share, is called `id`."""
    rows = rows_of(corpus, split)
    segments = read_segments(str(corpus / "segments.jsonl"))
    segment = {"start": datasets.Value("float64"), "end": datasets.Value("float64"), "label": datasets.Value("string")}
    features = datasets.Features(
        {
            "sound": ENCODED_AUDIO,
            "tone": datasets.ClassLabel(names=["a", "b", "c"]),
            "voice": datasets.Value("string"),
            "id": datasets.Value("int32"),
            "turns": datasets.List(segment),
        }
    )
    columns = {
        "sound": [{"path": Path(row["path"]).name, "bytes": (corpus / row["path"]).read_bytes()} for row in rows],
        "tone": ["abc".index(row["label"]) for row in rows],
        "voice": [row["speaker"] for row in rows],
        "id": [index % 5 for index in range(len(rows))],
        "turns": [[vars(item) for item in segments[row["id"]]] for row in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features).cast_column("sound", datasets.Audio())


@pytest.fixture(scope="module")
def hub(corpus, tmp_path_factory):
    """With the model, the tones in two revisions, of which the newer has fewer, and the tones as files in folders."""
    folder = tmp_path_factory.mktemp("stock")
    whole = datasets.DatasetDict({split: tones(corpus, split) for split in ("train", "test")})
    fewer = datasets.DatasetDict({split: part.select(range(9)) for split, part in whole.items()})
    whole.save_to_disk(folder / "whole")
    fewer.save_to_disk(folder / "fewer")
    for split in ("train", "test"):
        for row in rows_of(corpus, split):
            (folder / "files" / split / row["label"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(corpus / row["path"], folder / "files" / split / row["label"])
    pushes = [[str(folder / name), TONES, "default", False] for name in ("whole", "fewer")]
    folders = [[str(write_model(folder / "tiny")), MODEL, "model"], [str(folder / "files"), FILES, "dataset"]]
    with HubServer(tokens={GOOD: "tester"}) as server:
        Client(server, "stock", folder, {"datasets": pushes, "folders": folders}).result()
        yield server


@pytest.fixture(scope="module")
def commits(hub):
    """Of the tones, the newest first; the last one is empty."""
    return [commit.sha for commit in hub.repos[f"datasets/{TONES}"].history()]


@pytest.fixture(scope="module")
def runs(hub, corpus, commits, tmp_path_factory):
    """What a process did that had nothing of the Hub's: a run, the same again, and specifications, right and wrong."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "README.md").write_text("# A model\n", encoding="utf-8")
    columns = "audio=sound,label=tone"
    specs = [f"{TONES}#{columns}", f"{TONES}#{columns},revision={commits[1]},name=older", FILES]
    task = {
        "runs": [arguments(specs, folder / "out", folder / "README.md")] * 2,
        "tasks": {
            "events": f"{TONES}#kind=events,audio=sound,segments=turns,revision={commits[1]}",
            "split": f"{TONES}#{columns},test=tets",
            "column": f"{TONES}#audio=sound",
            "audio": f"{TONES}#label=tone",
            "config": f"{TONES}#{columns},config=noisy",
            "revision": f"{TONES}#{columns},revision=v9",
            "kind": f"{TONES}#{columns},kind=verification",
            "segments": f"{TONES}#kind=events,audio=sound,segments={corpus}/segments.jsonl",
            "name": "tester/tunes",
        },
    }
    client = Client(hub, "evaluate", folder, task)
    results = client.result()
    assert results["codes"] == [0, 0], client.errors()[-3000:]
    return folder, results


def arguments(specs: list[str], output: Path, card: Path | None = None) -> list[str]:
    tasks = [item for spec in specs for item in ("--tasks", spec)]
    added = [] if card is None else ["--card", str(card)]
    return ["--model", MODEL, *tasks, "--output", str(output), *SETTINGS, *added]


def results_of(report, task):
    return {name: entry["tasks"][task]["headline"] for name, entry in report["representations"].items()}


def test_results_are_those_of_the_folder(runs, corpus, tmp_path):
    report = read_report(runs[0] / "out" / "report.json")
    model = write_model(tmp_path / "tiny")
    settings = Settings(features=("last",), heads=("linear",), resamples=20, progress=False)
    no_groups = f"{corpus}#speaker=domain"
    own = evaluate([str(model)], [no_groups], tmp_path / "own", ("log-mel",), None, settings, "cpu")
    for found, result in zip(results_of(report, "older").values(), results_of(own, "tones").values()):
        for name in ("value", "penalty", "more"):  # the bootstrap draws in the order of ids
            assert found[name] == result[name]
    for task, clips in (("tones", (9, 9)), ("older", (18, 12)), ("files", (18, 12))):
        assert report["tasks"][task]["clips"] == dict(zip(("train", "test"), clips)) | {"valid": 0}
        assert results_of(report, task)["log-mel"]["value"] == 1


def test_the_report_and_the_card_name_the_commits(runs, commits, hub):
    report = read_report(runs[0] / "out" / "report.json")
    expected = {"tones": commits[0], "older": commits[1], "files": hub.repos[f"datasets/{FILES}"].history()[0].sha}
    assert {name: task["hub"]["revision"] for name, task in report["tasks"].items()} == expected
    results = {result.dataset_name: result for result in ModelCard.load(runs[0] / "README.md").data.eval_results}
    assert (results["older"].dataset_type, results["older"].dataset_revision) == (TONES, commits[1])
    assert f"Revision {commits[1]} of {TONES}." in (runs[0] / "out" / "report.md").read_text(encoding="utf-8")


def test_the_second_run_computes_nothing(runs):
    folder, results = runs
    kept = [path for path in (folder / "out").rglob("*.*") if path.suffix in (".npz", ".safetensors")]
    assert len(kept) == 3 * 2 + 2 * 30  # of every result, and of the features of every file
    assert max(path.stat().st_mtime_ns for path in kept) < results["times"][1]


def test_without_the_hub(runs, hub, commits, tmp_path):
    """A process of the command, to another folder, from the caches of the Hub alone."""
    columns = "audio=sound,label=tone"
    named = [f"{TONES}#{columns},revision={commit},name={name}" for commit, name in zip(commits, ("tones", "older"))]
    before = len(hub.log)
    done = subprocess.run(
        [sys.executable, "-m", "spear_hf.cli", "evaluate", *arguments([*named, FILES], tmp_path / "out")],
        env={**environment(hub, runs[0] / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(hub.log) == before
    alone, report = (read_report(folder / "out" / "report.json") for folder in (tmp_path, runs[0]))
    for task in ("tones", "older", "files"):
        assert results_of(alone, task) == results_of(report, task)
        assert alone["tasks"][task] == report["tasks"][task]


def test_what_tasks_name(runs, corpus, commits):
    results = runs[1]["tasks"]
    segments = read_segments(str(corpus / "segments.jsonl"))
    assert results["events"] == {
        "ids": [f"test/{index % 5}{f', {index // 5 + 1}' if index > 4 else ''}" for index in range(12)],
        "segments": [[vars(item) for item in segments[row["id"]]] for row in rows_of(corpus, "test")],
        "hub": {"config": None, "revision": commits[1]},
    }
    for name, pattern in {
        "split": f"{TONES}.*tets.*train.*test",
        "column": f"{TONES} has no column 'label'; it has: audio, tone, voice, turns, id",
        "audio": rf"{TONES} has no column 'audio' of audio; .*audio=.*: sound, tone, voice, id, turns",
        "config": f"{TONES}.*'noisy' not found.*default",
        "revision": f"{TONES} at revision v9 .*Revision 'v9' doesn't exist",
        "kind": f"{TONES} has no column 'speaker'; it has:",
        "segments": f"{TONES}: none of its clips is in segments=.*'train0'.*'test/0'",
        "name": "tester/tunes is neither",
    }.items():
        assert re.search(pattern, results[name]["error"]), (name, results[name])
