# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Utterances from folders and from manifests of three kinds, and the errors in them."""

import json
import os
from pathlib import Path

import pytest

from spear_hf.data.manifest import Utterance, find_audio, read_manifest


def write_jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("b.wav", "a/c.FLAC", "a/d.opus", "notes.txt", ".hidden.wav", ".git/e.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_folder(folder):
    utterances = read_manifest(folder)
    assert [utterance.id for utterance in utterances] == ["a/c.FLAC", "a/d.opus", "b.wav"]
    assert utterances[0] == Utterance(id="a/c.FLAC", path=folder / "a" / "c.FLAC")
    assert find_audio(str(folder)) == [utterance.path for utterance in utterances]


def test_folder_with_a_manifest(folder):
    write_jsonl(folder / "manifest.jsonl", {"id": "one", "path": "b.wav"})
    assert read_manifest(str(folder)) == [Utterance(id="one", path=folder / "b.wav")]


def test_jsonl(tmp_path):
    manifest = write_jsonl(
        tmp_path / "m.jsonl",
        {
            "id": 7,
            "path": "x/a.wav",
            "domain": "speech",
            "split": "pretrain",
            "label": "yes",
            "transcript": "ja",
            "num_samples": 8001,
            "sampling_rate": 8000,
            "speaker": None,
        },
        {"path": "/far/b.wav", "label": ["dog", 3], "num_samples": 5},
    )
    manifest.write_text(manifest.read_text() + "\n")  # an empty line is no row
    first, second = read_manifest(manifest)
    assert first == Utterance(
        id="7",
        path=tmp_path / "x/a.wav",
        domain="speech",
        split="pretrain",
        label="yes",
        transcript="ja",
        num_samples=16002,
    )
    assert second == Utterance(id="/far/b.wav", path=Path("/far/b.wav"), label=("dog", "3"), num_samples=5)


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path, suffix, delimiter):
    rows = [
        ("path", "id", "domain", "transcript", "num_samples"),
        ("a.wav", "a", "", '"one, two"', "300"),
        ("b.wav", "b", "audio", "", ""),
    ]
    manifest = tmp_path / f"m{suffix}"
    manifest.write_text("\ufeff" + "".join(delimiter.join(row) + "\n" for row in rows), encoding="utf-8")
    first, second = read_manifest(manifest)
    assert first == Utterance(id="a", path=tmp_path / "a.wav", transcript="one, two", num_samples=300)
    assert second == Utterance(id="b", path=tmp_path / "b.wav", domain="audio")


def test_splits(tmp_path):
    rows = [{"path": f"{i}.wav", "split": split} for i, split in enumerate(["train", "test", "train", "dev", None])]
    manifest = write_jsonl(tmp_path / "m.jsonl", *rows)
    assert len(read_manifest(manifest)) == 5
    assert [utterance.id for utterance in read_manifest(manifest, "train")] == ["0.wav", "2.wav"]
    assert [utterance.id for utterance in read_manifest(manifest, ["dev", "test"])] == ["1.wav", "3.wav"]
    with pytest.raises(ValueError, match=r"split='tset' is not in .*dev, test, train"):
        read_manifest(manifest, ["train", "tset"])


def test_columns_as_datasets_names_them(tmp_path):
    (tmp_path / "m.csv").write_text("file_name,text\na.wav,one\n")
    (utterance,) = read_manifest(tmp_path / "m.csv")
    assert (utterance.path, utterance.id, utterance.transcript) == (tmp_path / "a.wav", "a.wav", "one")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"path": "a.wav"}, {"path": "b.wav", "lable": 1}], "line 2: unknown column lable; known are domain, id"),
        ([{"path": "a.wav"}, {"id": "b"}], "line 2: path=None, but every utterance needs"),
        ([{"path": ""}], "line 1: path=''"),
        ([{"path": "a.wav"}, {"path": "b.wav", "id": "a.wav"}], "line 2: the id 'a.wav' is already on line 1"),
        ([{"path": "a.wav", "domain": "music"}], "line 1: domain='music' must be one of speech, audio"),
        ([{"path": "a.wav", "num_samples": -3}], "line 1: num_samples=-3 must be a whole number"),
        ([{"path": "a.wav", "num_samples": 2.5}], "line 1: num_samples=2.5 must be a whole number"),
        ([{"path": "a.wav", "transcript": ["a"]}], r"line 1: transcript=\['a'\] must be text"),
        ([{"path": "a.wav", "text": "a", "transcript": "a"}], "line 1: text and transcript are the same column"),
        ([], "lists no utterance"),
    ],
)
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_manifest(write_jsonl(tmp_path / "m.jsonl", *rows))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", '{"path": "a.wav"}\n{"path": \n', "m.jsonl, line 2 is not JSON"),
        ("m.jsonl", '["a.wav"]\n', "m.jsonl, line 1 is a list"),
        ("m.csv", "path,id\na.wav,a,b\n", "m.csv, line 2: there are more values than the 2 columns"),
        ("m.csv", "file\na.wav\n", "m.csv, line 2: unknown column file"),
        ("m.json", "{}", "suffix must be .jsonl, .csv or .tsv"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl does not exist"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"holds neither a manifest.jsonl nor a file of these kinds: .*\.flac"):
        read_manifest(tmp_path)
    (tmp_path / "a.wav").touch()
    with pytest.raises(ValueError, match=r"split='train': .* files found in a folder have no splits"):
        read_manifest(tmp_path, "train")


def test_links_are_followed_and_nothing_is_there_twice(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "deep").mkdir()
    for name in ("f.wav", "deep/g.wav"):
        (elsewhere / name).touch()
    for name, target in (
        ("far", elsewhere),
        ("far again", elsewhere),
        ("a/inner", elsewhere / "deep"),
        ("A", folder / "a"),  # comes first by name; the folder itself is the one that counts
        ("a/loop", folder),
        ("up", folder.parent),
        ("link.wav", elsewhere / "f.wav"),
        ("gone.wav", folder / "none.wav"),  # for the one who decodes it to report
    ):
        (folder / name).symlink_to(target)
    ids = [utterance.id for utterance in read_manifest(folder)]
    assert ids == ["a/c.FLAC", "a/d.opus", "b.wav", "far/deep/g.wav", "far/f.wav", "gone.wav", "link.wav"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_an_error(folder):
    (folder / "a").chmod(0)
    try:
        with pytest.raises(PermissionError, match="a"):
            read_manifest(folder)
    finally:
        (folder / "a").chmod(0o700)


def test_a_name_that_is_no_text_is_an_error(folder):
    Path(os.fsdecode(os.fsencode(folder) + b"/x\xff.wav")).touch()
    with pytest.raises(ValueError, match=r"x\\udcff\.wav' is not UTF-8: .* rename it"):
        read_manifest(folder)


def test_empty_lines_before_the_names_of_columns(tmp_path):
    (tmp_path / "m.csv").write_text("\n\nid,path\n\na,a.wav\n")
    assert [utterance.id for utterance in read_manifest(tmp_path / "m.csv")] == ["a"]
