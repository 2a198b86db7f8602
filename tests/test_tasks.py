# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Tasks from manifests and from HEAR's folders, and the clips that are held out for validation."""

import json

import pytest

from spear_hf.data.segments import Segment
from spear_hf.evaluation.tasks import Clip, held_out, load_task, query_items

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
    lines = (corpus / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**json.loads(line), "path": str(corpus / json.loads(line)["path"])} for line in lines]
    rows[0]["label"] = " "
    (tmp_path / "empty.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
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
        (f"{tmp_path}/empty.jsonl", "train0 has an empty label"),
        (f"{corpus}#label=colour", "no column 'colour'"),
        (f"{corpus}#group_regex=zzz", "finds nothing in the id"),
        (f"{corpus}/tags.jsonl", "labels, and classification needs one"),
        (f"{corpus}/tags.jsonl#kind=asr", "has no transcript"),
        (f"{corpus}#label=speaker", "no training clip has: cid, dan"),
        (f"{corpus}#group_regex=(", r"group_regex=\( is no regular expression"),
        (f"{corpus}#kind=query", "train0 and train3 of one split are both 'a'"),
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
    # Frames of a task without events are all background, and every head was right.
    scene, event = write_hear_task(tmp_path / "d"), write_hear_task(tmp_path / "e", events=True, task_name=7)
    for wrong in (f"{scene}#kind=frames", f"{scene}#kind=asr", f"{event}#kind=tagging", f"{event}#kind=other"):
        with pytest.raises(ValueError, match=r"kind=.* is not of a"):
            load_task(wrong)
    assert load_task(f"{event}#kind=frames").name == "7"
    folds = write_hear_task(tmp_path / "c", splits=("fold00", "fold01", "fold02"))
    for kind in ("query", "verification"):
        with pytest.raises(ValueError, match=f"kind={kind} has one fold, not 3"):
            load_task(f"{folds}#kind={kind}")
    with pytest.raises(ValueError, match=r"group_regex=zzz finds nothing in the id '0\.wav'"):
        load_task(f"{folds}#group_regex=zzz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.json", '{"0.wav": ["z"]}', "labels of test that are not in the vocabulary: z"),
        ("train.json", '{"0.wav": "a"}', "train.json, 0.wav: 'a' must be a list"),
        ("valid.json", "[1]", "valid.json is a list: a JSON object"),
        ("task_metadata.json", "{nope", "task_metadata.json is not JSON"),
        ("labelvocabulary.csv", "index,name\n0,a\n", "labelvocabulary.csv: rows of idx.*KeyError"),
        ("labelvocabulary.csv", "idx,label\n0,a\n1,a\n2,b\n3,c\n", "labels come twice: a"),
        ("labelvocabulary.csv", "idx,label\nx,a\n", "labelvocabulary.csv: rows of idx.*invalid literal"),
    ],
)
def test_damaged_hear_folders(tmp_path, name, content, message):
    folder = write_hear_task(tmp_path / "scene")
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_task(str(folder))


def test_events_of_hear_folders(tmp_path):
    folder = write_hear_task(tmp_path / "event", events=True)
    (folder / "test.json").write_text('{"0.wav": [{"start": 10, "end": 10, "label": "a"}]}', encoding="utf-8")
    assert load_task(str(folder)).folds[0].test[0].segments == (Segment(0.01, 0.01, "a"),)
    for event, message in (
        ({"begin": 1, "label": "a"}, "must have start and end"),
        ({"start": "soon", "end": 3, "label": "a"}, "must have start and end"),
        ({"start": 5, "end": 3, "label": "a"}, "must begin before it ends"),
        ({"start": 1, "end": 3, "label": "zz"}, "not in the vocabulary: zz"),
    ):
        (folder / "test.json").write_text(json.dumps({"0.wav": [event]}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_task(str(folder))


def rows_of(corpus, table="manifest"):
    return [json.loads(line) for line in (corpus / f"{table}.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(corpus, rows):
    path = corpus / "changed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_items_of_a_query_are_told_apart_by_their_language(corpus):
    """The same word in two languages is two items, and what one voice alone says is left out."""
    rows = [{**row, "language": "xy"[index % 6 > 2]} for index, row in enumerate(rows_of(corpus))]
    task = load_task(f"{write_rows(corpus, rows[:-1])}#kind=query")
    first, second = query_items(task)
    assert list(first) == list(second) == [*(("x", label) for label in "abc"), *(("y", label) for label in "ab")]
    assert [clip.id for clip in first.values()] == ["train0", "train1", "train2", "train3", "train4"]
    assert [clip.id for clip in second.values()] == ["test6", "test7", "test8", "test9", "test10"]
    alone = write_rows(corpus, [row for row in rows if row["language"] == "x" or row["label"] == "a"])
    assert {language for language, _ in query_items(load_task(f"{alone}#kind=query"))[0]} == {"x"}
    for row in rows:
        row["language"] += row["split"]
    with pytest.raises(ValueError, match=r"no language has two items.*\('xtest', 'a'\)"):
        load_task(f"{write_rows(corpus, rows)}#kind=query")


def test_what_cannot_be_scored_is_found_before_anything_is_embedded(corpus):
    for table, change, kind, message in (
        ("tags", {"test": {"label": []}}, "tagging", "none of the 6 clips of test has a label"),
        ("tags", {"train": {"label": []}}, "tagging", "none of the 6 clips of train has a label"),
        ("manifest", {"test": {"transcript": "?!"}}, "asr", "transcripts of test hold no letter"),
        ("manifest", {"test": {"speaker": "ann"}}, "verification", "6 test clips of 1 speakers; two speakers"),
    ):
        rows = [row | change.get(row["split"], {}) for row in rows_of(corpus, table)]
        with pytest.raises(ValueError, match=message):
            load_task(f"{write_rows(corpus, rows)}#kind={kind}")
    trained = [row for row in rows_of(corpus, "segments") if row["id"].startswith("train")]
    table = write_rows(corpus, trained)  # of which test clips would be all background
    with pytest.raises(ValueError, match="none of the 6 clips of test, such as test6, has a segment"):
        load_task(f"{corpus}#kind=frames,segments={table}")
    rows = [row for row in rows_of(corpus, "tags") if row["split"] == "test" or row["id"] == "train0"]
    with pytest.raises(ValueError, match="1 clips to train on and 6 to test on; two are needed"):
        load_task(f"{write_rows(corpus, rows)}#kind=tagging")


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
    # Held out without any label, clips would have no mAP; two of which one is held out leave too little.
    rare = [Clip(id=str(index), source=b"", labels=("a",) if index == 3 else ()) for index in range(20)]
    assert held_out(rare, seed=0) == (rare, [])
    assert held_out(clips[:11:10], seed=0) == (clips[:11:10], [])
