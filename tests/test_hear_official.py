# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The official tools of HEAR on our module, and our tasks and metrics beside theirs. Skipped where they are absent.

They pin versions that no Python of today has; without the pins they run (Python 3.11, numpy 2, TensorFlow 2.21):

    pip install --no-deps heareval hearvalidator
    pip install tensorflow-cpu click python-slugify more-itertools intervaltree sed_eval dcase_util pytorch-lightning \
        torchinfo pynvml
    python -m pytest tests/test_hear_official.py
"""

import json

import numpy as np
import pytest
import soundfile
import torch

from spear_hf.evaluation import hear
from spear_hf.evaluation.event_metrics import EventF1, SegmentF1
from spear_hf.evaluation.metrics import DPrime, MeanAveragePrecision
from spear_hf.evaluation.problems import Events
from spear_hf.evaluation.representations import Mfcc
from spear_hf.evaluation.tasks import Fold, Task, load_task

from .evaluation_corpus import write_hear_task, write_model


FOLDS = ["fold01", "fold02", "fold00", "fold03"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("suffix", ["", "#layers=all,scene=mean+std"])
def test_the_validator_says_looks_good(model, suffix):
    validate = pytest.importorskip("hearvalidator.validate")
    validate.ValidateModel("spear_hf.evaluation.hear", f"{model}{suffix}", "cpu")()


@pytest.mark.parametrize("by", ["--model", "--model-options"])
def test_the_runner_embeds_tasks(model, tmp_path, by):
    runner = pytest.importorskip("heareval.embeddings.runner")
    from click.testing import CliRunner

    tasks = tmp_path / "tasks"
    write_hear_task(tasks / "scenes", sample_duration=0.4)
    write_hear_task(tasks / "events", events=True, sample_duration=None)  # clips one by one
    options = ["--tasks-dir", str(tasks), "--embeddings-dir", str(tmp_path / "embeddings")]
    options += [by, str(model) if by == "--model" else json.dumps({"model_file_path": str(model), "layers": "all"})]
    result = CliRunner().invoke(runner.runner, ["spear_hf.evaluation.hear", *options])
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "embeddings").iterdir()
    own = hear.load_model(str(model), layers="last" if by == "--model" else "all")
    for split in ("train", "valid", "test"):
        for index in range(6):
            name = f"{split}/{index}.wav"
            audio = torch.from_numpy(soundfile.read(tasks / "scenes/16000" / name, dtype="float32")[0])[None]
            found = np.load(folder / "scenes" / f"{name}.embedding.npy")
            assert found == pytest.approx(hear.get_scene_embeddings(audio, own)[0].numpy(), abs=1e-5)
            audio = torch.from_numpy(soundfile.read(tasks / "events/16000" / name, dtype="float32")[0])[None]
            expected, times = hear.get_timestamp_embeddings(audio, own)
            assert np.load(folder / "events" / f"{name}.embedding.npy") == pytest.approx(expected[0].numpy(), abs=1e-5)
            written = json.loads((folder / "events" / f"{name}.timestamps.json").read_text())
            assert written == pytest.approx(times[0].tolist())


def test_folds_are_those_of_heareval(tmp_path):
    theirs = pytest.importorskip("heareval.predictions.task_predictions")
    task = load_task(str(write_hear_task(tmp_path / "folds", splits=FOLDS)))
    for fold, split in zip(task.folds, theirs.data_splits_from_folds(FOLDS), strict=True):
        for part in ("train", "valid", "test"):
            assert {clip.id.split("/")[0] for clip in getattr(fold, part)} == set(split[part])


@pytest.mark.parametrize("tuning", [(250.0, 125.0), (250.0, 250.0), (60.0, 0.0), (0.0, 50.0)])
def test_events_are_those_of_heareval(tuning):
    theirs = pytest.importorskip("heareval.predictions.task_predictions")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((300, 3))
    logits = np.stack([np.convolve(column, np.ones(9), "same") for column in noise.T], axis=1).astype(np.float32)
    problem = Events(Task("t", "events", "s", (Fold((), (), ()),), ("a", "b", "c")), Mfcc())
    probabilities = torch.from_numpy(logits).sigmoid()
    milliseconds = 1000 * problem.representation.centres(len(logits))
    expected = theirs.create_events_from_prediction(
        dict(zip(milliseconds.tolist(), probabilities)),
        dict(enumerate("abc")),
        median_filter_ms=tuning[0],
        min_duration=tuning[1],
    )
    found = problem.events(logits, tuning)
    assert len(expected) > 5
    key = [(event["label"], round(event["start"]), round(event["end"])) for event in expected]
    assert sorted(key) == sorted((e.label, round(1000 * e.start), round(1000 * e.end)) for e in found)


def random_events(rng, clips):
    return [
        [
            {"label": str(rng.choice(list("abc"))), "start": float(start), "end": float(start + length)}
            for start, length in zip(rng.uniform(0, 8, 6).round(2), rng.uniform(0.1, 2, 6).round(2))
        ]
        for _ in range(clips)
    ]


def test_event_metrics_are_those_of_sed_eval():
    theirs = pytest.importorskip("heareval.score")
    rng = np.random.default_rng(1)
    references = random_events(rng, 20)
    predictions = [
        [
            {**event, "start": event["start"] + float(shift), "end": event["end"] + 2 * float(shift)}
            for event, shift in zip(clip, rng.uniform(-0.08, 0.08, 6))
            if rng.random() < 0.8
        ]
        for clip in references
    ]
    predictions = [[*clip, *extra[:1]] for clip, extra in zip(predictions, random_events(rng, 20))]
    labels = {"a": 0, "b": 1, "c": 2}

    def score(name):
        both = [
            {
                str(place): [{**event, "start": 1000 * event["start"], "end": 1000 * event["end"]} for event in clip]
                for place, clip in enumerate(side)
            }
            for side in (predictions, references)
        ]
        return dict(theirs.available_scores[name](label_to_idx=labels)(*both))

    compute = {"predictions": predictions, "references": references}
    for name, settings in (
        ("event_onset_200ms_fms", {}),
        ("event_onset_50ms_fms", {"collar": 0.05}),
        ("event_onset_offset_50ms_20perc_fms", {"collar": 0.05, "with_offset": True, "offset_share": 0.2}),
    ):
        found, expected = EventF1().compute(**compute, **settings), score(name)
        assert 0.1 < expected["f_measure"] < 0.99
        assert found["event_f1"] == pytest.approx(expected["f_measure"])
        assert found["event_precision"] == pytest.approx(expected["precision"])
        assert found["event_recall"] == pytest.approx(expected["recall"])
    assert SegmentF1().compute(**compute)["segment_er"] == pytest.approx(score("segment_1s_er")["error_rate"])


def test_tagging_metrics_are_those_of_heareval():
    theirs = pytest.importorskip("heareval.score")
    rng = np.random.default_rng(2)
    truth = (rng.random((80, 5)) < 0.3).astype(int)
    scores = (rng.standard_normal((80, 5)) + truth).astype(np.float32)
    both = {"predictions": scores.tolist(), "references": truth.tolist()}
    labels = dict.fromkeys("abcde", 0)
    assert MeanAveragePrecision().compute(**both)["map"] == pytest.approx(
        theirs.MeanAveragePrecision(labels)(scores, truth)
    )
    found = DPrime().compute(**both)
    assert found["d_prime"] == pytest.approx(theirs.DPrime(labels)(scores, truth))
    assert found["auc"] == pytest.approx(theirs.AUCROC(labels)(scores, truth))
