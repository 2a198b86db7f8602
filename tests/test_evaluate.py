# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf evaluate` from the command to the card, on tones that the filter bank tells apart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from spear_hf import SpearForCTC, SpearModel
from spear_hf.cli import app
from spear_hf.evaluation import protocols, untrained
from spear_hf.evaluation.benchmark import evaluate, representation_specs
from spear_hf.evaluation.card import REPORT_NAME
from spear_hf.evaluation.heads import grid, train_heads
from spear_hf.evaluation.metrics import equal_error_rate
from spear_hf.evaluation.protocols import Settings, feature_sets
from spear_hf.evaluation.report import (
    BEGIN,
    add_to_card,
    evaluation_section,
    markdown,
    model_index,
    name_of,
    read_report,
    write_report,
)
from spear_hf.evaluation.representations import load_representation
from spear_hf.evaluation.tasks import Clip
from spear_hf.evaluation.untrained import trials
from spear_hf.hub_card import write_card
from spear_hf.hub_checks import check_card

from .conftest import ROOT
from .evaluation_corpus import write_corpus, write_hear_task, write_model


QUICK = {"resamples": 40, "progress": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tones", train=36)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("single") / "tones", pair=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(model, task, output, cache, baselines=("log-mel",), **settings):
    return evaluate([str(model)], [task], output, baselines, cache, Settings(**QUICK | settings), device="cpu")


def headline(report, name):
    (task,) = report["tasks"]
    return report["representations"][name]["tasks"][task]["headline"]


def test_command(single, model, tmp_path):
    """All defaults but the number of resamples; then the card; then again, from what is there."""
    output, card = tmp_path / "out", tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\n---\n\n# A model\n", encoding="utf-8")
    arguments = ["evaluate", "--model", str(model), "--tasks", f"{single}#group_regex=.*", "--output", str(output)]
    arguments += ["--resamples", "40", "--device", "cpu", "--card", str(card)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = read_report(output / "report.json")
    names = list(report["representations"])
    assert names == [report["models"][0], "log-mel", "mfcc", f"random:{report['models'][0]}"]
    record = report["representations"][names[0]]["tasks"]["tones"]
    choices = {(item["features"], item["head"]) for item in record["results"]}
    linear = {(name, "linear") for name in ("weighted", "layer 0", "layer 1", "layer 2", "all")}
    assert choices == linear | {(name, "mlp") for name in ("weighted", "layer 2", "all")}
    assert {item["validated_by"] for item in record["results"]} == {"cross-validation", "held-out training clips"}
    assert record["headline"]["validated_by"] == "cross-validation"
    exact = [item["validation"] for item in record["results"] if item["solver"] != "gradient"]
    assert record["headline"]["validation"] == max(exact)
    assert headline(report, "log-mel")["value"] == 1
    assert headline(report, "log-mel")["more"]["confusion"] == [[4, 0, 0], [0, 4, 0], [0, 0, 4]]
    assert set(record["minus"]) == set(names[1:])
    assert (output / "tones-confusion.png").is_file()
    assert (output / "tones-layers.png").is_file()
    assert (output / "tones-weights.png").is_file()
    assert "| log-mel | 100.0 (100.0 to 100.0) |" in (output / "report.md").read_text(encoding="utf-8")
    loaded = ModelCard.load(card)
    assert loaded.data.license == "apache-2.0"
    assert loaded.data.eval_results[0].metric_value == round(record["headline"]["value"], 4)

    results = {path: path.stat().st_mtime_ns for path in (output / "results").rglob("*.json")}
    assert len(results) == 4
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in results} == results
    assert read_report(output / "report.json") == report
    once = card.read_text(encoding="utf-8")
    assert once.count(BEGIN) == 1

    nowhere = [*arguments[:-1], str(tmp_path / "none.md")]
    assert CliRunner().invoke(app, nowhere).exit_code == 1
    # Metadata that cannot be read would be lost, such as a result without a value; told before any work.
    for metadata in ("a: [1", "model-index:\n- name: a\n  results:\n  - metrics: [{type: wer}]"):
        card.write_text(f"---\n{metadata}\n---\n", encoding="utf-8")
        refused = CliRunner().invoke(app, [*arguments[:6], str(tmp_path / "new"), *arguments[7:]])
        assert refused.exit_code == 1
        assert f"the metadata of {card}, between the lines ---, cannot be read" in refused.output
        assert not (tmp_path / "new").exists()
    bad = CliRunner().invoke(app, [*arguments[:4], "nowhere#kind=x", *arguments[5:]])
    assert bad.exit_code == 1


def test_results_are_redone_where_something_changed(single, model, cache, tmp_path):
    settings = {"features": ("last",), "heads": ("linear",), "baselines": ()}
    task = f"{single}#group_regex=.*"
    first = run(model, task, tmp_path, cache, **settings)
    (path,) = (tmp_path / "results").rglob("*.json")
    before = path.stat().st_mtime_ns
    assert run(model, task, tmp_path, cache, **settings) == first
    assert path.stat().st_mtime_ns == before
    run(model, task, tmp_path, cache, **settings, seed=1)
    assert path.stat().st_mtime_ns != before
    for damaged, content in ((path, b"{}"), (path, b'{"key":'), (path, b"[1]"), (path.with_suffix(".npz"), b"PK")):
        damaged.write_bytes(content)
        assert run(model, task, tmp_path, cache, **settings) == first


@pytest.mark.parametrize(
    ("options", "metric", "best"),
    [
        ("/tags.jsonl#kind=tagging", "map", 0.9),
        ("#kind=frames,segments={0}/segments.jsonl", "frame_accuracy", 0.8),
        ("#kind=events,segments={0}/segments.jsonl", "event_f1", 0.6),
        ("#kind=asr", "wer", 0.5),
    ],
)
def test_kinds(corpus, model, cache, tmp_path, options, metric, best):
    """Tones are told apart by log-mel alone; the tiny model, whose weights are random, has to work, not to win."""
    task = str(corpus) + options.format(corpus)
    report = run(model, task, tmp_path, cache, features=("weighted", "last"), heads=("linear",))
    found, own = headline(report, "log-mel"), headline(report, report["models"][0])
    assert found["metric"] == metric
    assert found["low"] <= found["value"] <= found["high"]
    assert found["value"] >= best if found["higher_is_better"] else found["value"] <= best
    assert 0 <= own["low"] <= own["high"]
    assert markdown(report)
    json.dumps(report, allow_nan=False)


def test_segments_in_other_units_are_told(corpus, cache, tmp_path):
    rows = [json.loads(line) for line in (corpus / "segments.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"start": 1000 * row["start"] + 1000, "end": 1000 * row["end"] + 1000} for row in rows]
    table = tmp_path / "milliseconds.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no training frame lies in any.*from 1000 to 1400 s.*in seconds"):
        run("log-mel", f"{corpus}#kind=frames,segments={table}", tmp_path, cache, ())


def test_texts_by_recurrent_heads(corpus, model, cache, tmp_path, monkeypatch):
    """Smaller than the grid's and for a few epochs; its weights of the layers are drawn as those of other heads."""
    point = replace(*grid("blstm", "small"), hidden_dim=16, max_epochs=6)
    monkeypatch.setattr(protocols, "grid", lambda head, size: [point])
    report = run(model, f"{corpus}#kind=asr", tmp_path, cache, heads=("blstm",))
    (record,) = report["representations"]["log-mel"]["tasks"]["tones"]["results"]
    assert (record["head"], record["heads"][0]["settings"]["recurrent"]) == ("blstm", True)
    assert 0 <= record["low"] <= record["value"] <= record["high"]
    assert len(headline(report, report["models"][0])["heads"][0]["layer_weights"]) == 3
    write_report(report, tmp_path)
    assert (tmp_path / "tones-weights.png").is_file()


def test_verification(single, model, cache, tmp_path):
    """Hums of two voices that were not heard in training."""
    report = run(model, f"{single}#kind=verification", tmp_path, cache, baselines=("mfcc",))
    heads = {item["head"]: item for item in report["representations"]["mfcc"]["tasks"]["tones"]["results"]}
    assert set(heads) == {"cosine", "mlp"}
    assert heads["mlp"]["value"] <= 0.35
    assert heads["mlp"]["test_speakers"] == 2
    # With two speakers a resample would have one of them, and no trial, or both, and always the same ones.
    assert heads["cosine"]["units"] == 12
    assert heads["cosine"]["low"] < heads["cosine"]["value"] < heads["cosine"]["high"]
    assert "min_dcf 0." in markdown(report) or "min_dcf 1." in markdown(report)
    assert 0 <= heads["mlp"]["more"]["min_dcf"] <= 1
    write_report(report, tmp_path)
    assert (tmp_path / "tones-weights.png").is_file()  # of the x-vectors' heads
    own = report["representations"][report["models"][0]]["tasks"]["tones"]["results"]
    assert {(item["features"], item["head"]) for item in own} == {
        *((name, "cosine") for name in ("layer 0", "layer 1", "layer 2", "all")),
        *((name, "mlp") for name in ("weighted", "layer 2", "all")),
    }


def test_clips_that_are_trained_on_are_told(single, cache, tmp_path):
    settings = Settings(**QUICK, heads=("linear",))
    tasks = [f"{single}#test=train,name=same", f"{single}#group_regex=.*,name=other"]
    report = evaluate(["log-mel"], tasks, tmp_path, (), cache, settings, device="cpu")
    assert {name: task["test_clips_in_training"] for name, task in report["tasks"].items()} == {"same": 18, "other": 0}
    assert markdown(report).count("test clips are trained on too") == 1
    assert "**18 test clips are trained on too.**" in markdown(report)
    assert {name: task["test_groups_in_training"] for name, task in report["tasks"].items()} == {"same": 4, "other": 0}
    assert markdown(report).count("**4 speakers or groups of the test clips are in training too.**") == 1
    assert {name: task["bootstrap_units"] for name, task in report["tasks"].items()} == {"same": 18, "other": 12}


def test_trials():
    clips = [Clip(str(index), b"", speaker=speaker) for index, speaker in enumerate("aabb")]
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [1, 0.4]], dtype=np.float64)  # the last one sounds like a
    pairs = trials(vectors, clips, seed=0)
    assert pairs.same.tolist() == [1, 0, 0, 0, 0, 1]
    assert pairs.cosines[1] == 0
    plain, _ = equal_error_rate(pairs.cosines, pairs.same)
    assert pairs.score(np.ones(4, dtype=int)) == pytest.approx(plain)
    # Without the last clip all is well; a clip that counts twice makes its pairs count twice.
    assert pairs.score(np.array([1, 1, 1, 0])) == 0
    weights = np.array([2, 1, 1, 3])
    counts = weights[pairs.first] * weights[pairs.second]
    expected, _ = equal_error_rate(np.repeat(pairs.cosines, counts), np.repeat(pairs.same, counts))
    assert pairs.score(weights) == pytest.approx(expected)


def test_trials_are_drawn_where_there_are_too_many():
    """400 clips of 100 speakers are 79,800 pairs, of which 600 are of one speaker: all of these, and others."""
    rng = np.random.default_rng(0)
    clips = [Clip(str(index), b"", speaker=f"s{index % 100}") for index in range(400)]
    drawn = trials(rng.standard_normal((400, 4)), clips, seed=0)
    assert len(set(zip(drawn.first.tolist(), drawn.second.tolist()))) == len(drawn.same) == 50_000
    assert drawn.same.sum() == 600
    assert ((drawn.first % 100 == drawn.second % 100) == drawn.same).all()
    assert (drawn.first != drawn.second).all()
    assert set(drawn.first.tolist()) | set(drawn.second.tolist()) == set(range(400))
    # Two speakers: half of each kind; 100,000 clips take no memory for all of their pairs.
    half = trials(rng.standard_normal((400, 4)), [Clip("", b"", speaker=f"{n % 2}") for n in range(400)], seed=0)
    assert half.same.sum() == 25_000
    many = [Clip("", b"", speaker=f"{n // 20}") for n in range(100_000)]
    assert trials(rng.standard_normal((100_000, 2)), many, seed=0).same.sum() == 25_000


def test_trials_of_wide_vectors_take_little_memory():
    """All layers of a base model: pairs of them are 8 GB, and are compared part by part."""
    clips = [Clip(str(index), b"", speaker=f"{index % 50}") for index in range(320)]
    vectors = np.random.default_rng(0).standard_normal((320, 1000), dtype=np.float32)
    tracemalloc.start()
    pairs = trials(vectors, clips, seed=0)  # 50,000: 400 MB
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6
    norms = np.linalg.norm(vectors, axis=1)
    cosines = (vectors @ vectors.T)[pairs.first, pairs.second] / norms[pairs.first] / norms[pairs.second]
    assert np.allclose(pairs.cosines, cosines, atol=1e-5)


def test_query_by_example(single, model, cache, tmp_path):
    """Three tones by two voices: the training split's item against the test split's."""
    rows = [json.loads(line) for line in (single / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = {(row["split"], row["label"]): json.dumps(row) for row in rows}
    (single / "items.jsonl").write_text("\n".join(chosen.values()), encoding="utf-8")
    report = run(model, f"{single}/items.jsonl#kind=query", tmp_path, cache)
    assert headline(report, "log-mel")["value"] >= 0.8
    name = report["models"][0]
    features = [item["features"] for item in report["representations"][name]["tasks"]["items.jsonl"]["results"]]
    assert features == ["selected", "layer 0", "layer 1", "layer 2"]
    assert len(headline(report, name)["layers"]) == 2


def test_names_and_labels_of_any_kind(single, model, cache, tmp_path):
    """What Markdown, matplotlib's formulas or file systems would take for something else."""
    rows = [json.loads(line) for line in (single / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = {"a": "$x_$", "b": "b|\n", "c": "\\frac$"}
    rows = [row | {"label": labels[row["label"]]} for row in rows]
    (single / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = ["..", "n" * 300, "$a_$|b", "$a_$-b"]
    tasks = [f"{single}/odd.jsonl#group_regex=.*,name={name}" for name in names]
    settings = Settings(**QUICK, features=("layers",), heads=("linear",))
    output = tmp_path / "out"
    report = evaluate([str(model)], tasks, output, ("log-mel",), cache, settings, device="cpu")
    write_report(report, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(output.glob("*-layers.png"))) == len(list(output.glob("*-confusion.png"))) == 4
    assert all(path.name[0] != "." for path in output.iterdir())
    text = (output / "report.md").read_text(encoding="utf-8")
    assert "## $a_$\\|b\n" in text
    card = evaluation_section(report, report["models"][0])
    assert {line.replace("\\|", "").count("|") for line in card.splitlines() if line.startswith("|")} == {6}


def test_hear_folds(cache, tmp_path):
    """Every fold tests once, and the score is the mean of the folds'."""
    folder = write_hear_task(tmp_path / "folds", splits=("fold00", "fold01", "fold02"))
    settings = Settings(**QUICK, seeds=2)
    report = evaluate(["log-mel"], [str(folder)], tmp_path / "out", (), cache, settings, device="cpu")
    assert report["tasks"]["tones"]["folds"] == 3
    assert report["tasks"]["tones"]["clips"] == {"train": 18, "valid": 18, "test": 18}
    results = {item["head"]: item for item in report["representations"]["log-mel"]["tasks"]["tones"]["results"]}
    linear, mlp = results["linear"], results["mlp"]
    assert linear["value"] == 1
    assert mlp["value"] > 0.8
    assert (mlp["value"] * 36) == pytest.approx(round(mlp["value"] * 36))  # a mean of 6 accuracies of 6 clips
    assert len(linear["penalty"]) == 3
    assert [(item["seed"], item["fold"]) for item in mlp["heads"]] == [(s, f) for s in (0, 1) for f in (0, 1, 2)]
    assert {item["validated_by"] for item in results.values()} == {"validation clips"}
    assert report["tasks"]["tones"]["chance"] == pytest.approx(1 / 3)


def test_feature_sets(model):
    own, mel = load_representation(str(model), device="cpu"), load_representation("log-mel")
    assert feature_sets(own, ("last", "layers"), "linear") == ["layer 2", "layer 0", "layer 1"]
    assert feature_sets(own, ("weighted", "layers", "last", "all"), "mlp") == ["weighted", "layer 2", "all"]
    assert feature_sets(mel, ("weighted", "layers"), "mlp") == ["features"]


def test_representations_by_name(model):
    specs = representation_specs([str(model)], ["log-mel", "random", "teacher:kaldi-mfcc", "log-mel"])
    short = "/".join(model.parts[-2:])
    assert list(specs) == [short, "log-mel", f"random:{short}", "teacher:kaldi-mfcc"]
    assert specs[f"random:{short}"] == f"random:{model}"
    assert representation_specs(["mfcc"], ["random"]) == {"mfcc": "mfcc"}


def test_card_and_report(single, model, cache, tmp_path):
    report = run(model, f"{single}#group_regex=.*", tmp_path / "out", cache, features=("last",), heads=("linear",))
    name = report["models"][0]
    value = headline(report, name)["value"]
    section = evaluation_section(report, name)
    assert f"{100 * value:.1f} (" in section
    assert "log-mel" in section
    assert model_index(report, name)[0].metric_value == round(value, 4)
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\nText that stays.\n", encoding="utf-8")
    add_to_card(card, report)
    first = card.read_text(encoding="utf-8")
    add_to_card(card, report)
    assert card.read_text(encoding="utf-8") == first
    assert "Text that stays." in first
    assert ModelCard(first).data.eval_results[0].metric_type == "accuracy"
    with pytest.raises(ValueError, match="not in the report"):
        add_to_card(card, report, "other")
    write_report(report, tmp_path / "out")
    for content, message in (({}, "no report"), (report | {"format_version": 9}, "format_version 9")):
        (tmp_path / "bad.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_report(tmp_path / "bad.json")


def test_the_model_index_tells_the_tasks_of_one_source_apart(single, tmp_path):
    """As the Hub's own library writes and reads it: it merged them under the name of the first."""
    tasks = [f"{single}#name=first", f"{single}#label=speaker,train=train,test=train,name=second"]
    settings = Settings(features=("last",), heads=("linear",), resamples=20, progress=False)
    report = evaluate(["mfcc"], tasks, tmp_path, (), None, settings, "cpu")
    card = tmp_path / "README.md"
    for hub in (None, {"config": "default", "revision": "a" * 40}):
        for task in report["tasks"].values():
            task.update({"hub": hub, "split": "test"})
        card.write_text("# Mine\n", encoding="utf-8")
        add_to_card(card, report)
        found = ModelCard.load(card).data.eval_results
        values = [report["representations"]["mfcc"]["tasks"][name]["headline"]["value"] for name in report["tasks"]]
        assert [result.metric_value for result in found] == [round(value, 4) for value in values]
        names = [result.metric_name if hub else result.dataset_name for result in found]
        assert [name.split(":")[0] for name in names] == ["first", "second"]


def test_published_card(single, model, cache, tmp_path):
    """`spear-hf publish` states the report in the model's folder, if it is of this model."""
    folder = shutil.copytree(model, tmp_path / "model")
    task = f"{single}#group_regex=.*"
    report = run(folder, task, tmp_path / "out", cache, features=("last",), heads=("linear",), baselines=("mfcc",))
    shutil.copyfile(tmp_path / "out" / "report.json", folder / REPORT_NAME)
    encoder = SpearModel.from_pretrained(folder)
    staged = tmp_path / "staged"
    staged.mkdir()
    write_card(staged, folder, encoder, "me/mine", False)
    card = ModelCard.load(staged / "README.md")
    value = headline(report, report["models"][0])["value"]
    assert f"| {100 * value:.1f} (" in card.text
    assert card.data.eval_results[0].metric_value == round(value, 4)
    assert all("licence" in note for note in check_card(staged / "README.md"))
    assert name_of(report, SpearForCTC.from_pretrained(folder)) == report["models"][0]
    with torch.no_grad():
        encoder.stem.conv1.weight.mul_(1.01)
    with pytest.raises(ValueError, match="not of this model"):
        write_card(staged, folder, encoder, "me/mine", False)


def test_heads_that_were_trained_before_a_stop_are_kept(single, model, cache, tmp_path, monkeypatch):
    """A grid takes hours, and was begun anew."""
    settings = {"features": ("weighted", "last"), "heads": ("linear", "mlp"), "baselines": ()}
    whole = run(model, str(single), tmp_path / "whole", cache, **settings)
    trained = []

    def counted(*arguments):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(1)
        return train_heads(*arguments)

    monkeypatch.setattr(protocols, "train_heads", counted)
    for resamples in (21, QUICK["resamples"]):  # the results of other settings are of no use
        trained.clear()
        with pytest.raises(KeyboardInterrupt):
            run(model, str(single), tmp_path / "out", cache, **settings, resamples=resamples)
        assert len(list(tmp_path.glob("out/results/*/*.parts/*.npz"))) == 3  # one of them is solved exactly
    (part,) = tmp_path.glob("out/results/*/*.parts/weighted-linear.npz")
    part.write_bytes(part.read_bytes()[:-50])  # a crash of the machine
    trained.clear()
    monkeypatch.setattr(protocols, "train_heads", lambda *arguments: trained.append(1) or train_heads(*arguments))
    assert run(model, str(single), tmp_path / "out", cache, **settings) == whole
    assert not list(tmp_path.glob("out/results/*/*.parts"))
    assert len(trained) == 2


def test_x_vectors_that_were_trained_before_a_stop_are_kept(single, model, cache, tmp_path, monkeypatch):
    settings = {"features": ("weighted", "last"), "heads": ("mlp",), "baselines": ()}
    task = f"{single}#kind=verification"
    whole = run(model, task, tmp_path / "whole", cache, **settings)
    trained = []

    def counted(*arguments):
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train_heads(*arguments)

    monkeypatch.setattr(untrained, "train_heads", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, task, tmp_path / "out", cache, **settings)
    assert run(model, task, tmp_path / "out", cache, **settings) == whole
    assert len(trained) == 3
    assert not list(tmp_path.glob("out/results/*/*.parts"))


@pytest.mark.slow
def test_a_killed_run_goes_on(single, model, tmp_path):
    """SIGKILL after the first result; the rest is computed later, and all is as without the interruption."""
    tasks = [f"{single}#group_regex=.*", f"{single}#kind=verification,name=voices"]
    arguments = [item for task in tasks for item in ("--tasks", task)]
    command = [
        sys.executable,
        "-m",
        "spear_hf.cli",
        "evaluate",
        "--model",
        str(model),
        *arguments,
        "--resamples",
        "40",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--resamples", "40", "--device", "cpu", "--output", str(output)], env=environment
    )
    deadline = time.monotonic() + 120
    while not list(output.rglob("results/*/*.json")):
        assert process.poll() is None, "it ended before its first result"
        assert time.monotonic() < deadline, "no result came"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "report.json").exists()
    done = {path: path.stat().st_mtime_ns for path in output.rglob("results/*/*.json")}
    settings = Settings(resamples=40, progress=False)
    resumed = evaluate([str(model)], tasks, output, settings=settings, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert resumed == evaluate([str(model)], tasks, tmp_path / "whole", settings=settings, device="cpu")


def test_wrong_settings(single, model, tmp_path):
    for settings, message in (
        ({"features": ("best",)}, "features: best"),
        ({"heads": ("svm",)}, "heads: svm"),
        ({"pool": "max"}, "pool: max"),
        ({"seeds": 0}, "seeds=0"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**settings)
    with pytest.raises(ValueError, match="two tasks are called tones"):
        evaluate([str(model)], [str(single), str(single)], tmp_path)
    with pytest.raises(OSError, match="there is no model nobody/nothing"):
        evaluate([str(model), "random:nobody/nothing"], [str(single)], tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="name at least one"):
        evaluate([], [str(single)], tmp_path, ())
