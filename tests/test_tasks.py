# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Tasks from manifests and from HEAR's folders, and the clips that are held out for validation."""

import json

import pytest

from spear_hf.data.segments import Segment
from spear_hf.evaluation.tasks import Clip, held_out, load_task

from .evaluation_corpus import write_corpus, write_hear_task


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tones", train=6, test=6)


def test_manifest(corpus):
    task = load_task(str(corpus))
    assert (task.name, task.kind, task.labels) == ("tones", "classification", ("a", "b", "c"))
    (fold,) = task.folds
    assert [len(part) for part in (fold.train, fold.valid, fold.test)] == [6, 0, 6]
    first = fold.train[0]
    assert (first.id, first.labels, first.speaker, first.group) == ("train0", ("a",), "ann", "ann")
    assert first.source.is_file()
    assert len(task.clips) == 12
    assert load_task(f"{corpus}#group_regex=train(.)|test,train=train,test=train,name=x").folds[0].test[3].group == "3"
    assert load_task(f"{corpus}/tags.jsonl#kind=tagging").folds[0].train[3].labels == ("a", "b")
    # Who speaks, as a class: speakers are no groups then.
    speakers = load_task(f"{corpus}#label=speaker,train=train,test=train")
    assert speakers.folds[0].train[0].group is None
    events = load_task(f"{corpus}#kind=events,segments={corpus}/segments.jsonl")
    assert events.folds[0].train[0].segments == (Segment(0.0, 0.4, "a"), Segment(0.5, 0.9, "a"))
    assert load_task(f"{corpus}#kind=asr").folds[0].train[3].transcript == "a b"


def test_rows_of_one_kind(corpus):
    task = load_task(f"{corpus}#where=label=a,label=speaker,train=train,test=train")
    assert [clip.id for clip in task.folds[0].train] == ["train0", "train3"]


def test_parts_of_files_are_refused(corpus, tmp_path):
    row = {"path": str(corpus / "audio" / "train0.wav"), "label": "a", "start": 800, "num_samples": 3200}
    rows = [{**row, "id": split, "split": split} for split in ("train", "test")]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match="parts of files"):
        load_task(str(tmp_path / "parts.jsonl"))


def test_errors_of_manifests(corpus, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"id": "zebra", "start": 0, "end": 1, "label": "a"}\n', encoding="utf-8")
    for spec, message in (
        (f"{corpus}#kind=events,segments={tmp_path}/other.jsonl", "none of its clips.*'zebra'.*'test6'"),
        (f"{corpus}#config=clean,revision=v1", "config, revision of a dataset of the Hub"),
        (f"{corpus}#where=label=zebra", r"where label=zebra: no row.*a \(2\)"),
        (f"{corpus}#where=label=a", "all training clips have the label a; two classes"),
        (f"{corpus}#where=label", "must read COLUMN=VALUE"),
        (f"{corpus}#kind=singing", "kind='singing'"),
        (f"{corpus}#probe=x", "split|probe"),
        (f"{corpus}#kind=events", "needs segments"),
        (f"{corpus}#segments={corpus}/segments.jsonl", "takes no segments"),
        (f"{corpus}#label=colour", "no column 'colour'"),
        (f"{corpus}#group_regex=zzz", "finds nothing in the id"),
        (f"{corpus}/tags.jsonl", "labels, and classification needs one"),
        (f"{corpus}/tags.jsonl#kind=asr", "has no transcript"),
        (f"{corpus}#label=speaker", "no training clip has: cid, dan"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(spec)


def test_hear_folders(tmp_path):
    task = load_task(str(write_hear_task(tmp_path / "scene")))
    assert (task.name, task.kind, task.labels) == ("tones", "classification", ("a", "b", "c"))
    assert [clip.id for clip in task.folds[0].valid][:2] == ["valid/0.wav", "valid/1.wav"]
    assert task.folds[0].test[1].labels == ("b",)
    events = load_task(f"{write_hear_task(tmp_path / 'event', events=True)}#name=other")
    assert (events.name, events.kind, events.collar) == ("other", "events", 0.05)
    assert events.postprocessing == ((250.0, 125.0), (250.0, 250.0))
    assert events.folds[0].train[1].segments[1] == Segment(0.5, 0.9, "b")
    folds = load_task(str(write_hear_task(tmp_path / "folds", splits=("fold00", "fold01", "fold02", "fold03"))))
    assert len(folds.folds) == 4
    last = folds.folds[3]
    assert {clip.id.split("/")[0] for clip in last.test} == {"fold03"}
    assert {clip.id.split("/")[0] for clip in last.valid} == {"fold00"}
    assert {clip.id.split("/")[0] for clip in last.train} == {"fold01", "fold02"}
    assert len(folds.test_clips) == len(folds.clips) == 24
    own = {"event_postprocessing_grid": {"median_filter_ms": [150], "min_duration": [50]}}
    tuned = write_hear_task(tmp_path / "tuned", events=True, evaluation_params=own)
    assert load_task(str(tuned)).postprocessing == ((150, 50),)


def test_errors_of_hear_folders(tmp_path):
    folder = write_hear_task(tmp_path / "a", prediction_type="seld")
    with pytest.raises(ValueError, match="seld"):
        load_task(str(folder))
    with pytest.raises(ValueError, match="tells label itself"):
        load_task(f"{folder}#label=x")
    with pytest.raises(ValueError, match="neither train"):
        load_task(str(write_hear_task(tmp_path / "b", splits=("one", "two"))))


def test_held_out_keeps_groups_together():
    clips = [
        Clip(id=str(index), source=b"", labels=("ab"[index % 2],), group=f"g{index % 2}{index // 10}")
        for index in range(60)
    ]
    train, valid = held_out(clips, seed=0)
    groups = {clip.group for clip in valid}
    assert len(train) + len(valid) == 60
    assert not groups & {clip.group for clip in train}
    assert {clip.labels[0] for clip in valid} == {"a", "b"}
    assert len(groups) == 2  # a fifth of 6 groups, of either label
    assert held_out(clips, seed=0)[1] == valid
    assert any(held_out(clips, seed=seed)[1] != valid for seed in (1, 2, 3))
    single = [Clip(id=str(index), source=b"", labels=(str(index),)) for index in range(5)]
    assert held_out(single, seed=0) == (single, [])
