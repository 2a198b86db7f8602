# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Manifests as columns: the utterances, pieces, keys and draws are those of the lists that they stand for."""

import csv
import hashlib
import json
import pickle
import random

import numpy as np
import pytest

from spear_hf.data import manifest_columns
from spear_hf.data.cutting import CutRule
from spear_hf.data.manifest import read_manifest
from spear_hf.data.manifest_columns import ManifestUtterances, open_manifest
from spear_hf.data.seeding import keyed_seed
from spear_hf.data.sources import ListSource, open_source
from spear_hf.data.utterances import ListedUtterances


HOUR = 3600 * 16000


def make_rows(number: int, odd: bool) -> list[dict]:
    """`odd`: with what manifests may say in several ways."""
    rng = random.Random(number)
    rows = []
    for index in range(number):
        row = {"id": f"ü/{index}", "path": f"a//ü \u2028/{index}.wav", "domain": rng.choice(["speech", "audio", None])}
        row |= {"split": rng.choice(["train", "dev"]), "transcript": rng.choice(["", "one 'two'", None])}
        row |= {"num_samples": rng.choice([None, 1, 160000, HOUR]), "label": rng.choice(["dog", "3", None])}
        if row["num_samples"] and rng.random() < 0.3:
            row["start"] = rng.randrange(9)
        if odd and rng.random() < 0.2:
            row |= rng.choice(
                [
                    {"id": index},
                    {"label": ["dog", 3]},
                    {"speaker": 7.5},
                    {"num_samples": str(index + 1), "sampling_rate": 8000, "start": None},
                    {"num_samples": 2**40, "sampling_rate": 7, "start": None},
                ]
            )
        if rng.random() < 0.2 and "start" not in row:
            row |= {"num_samples": index + 1, "sampling_rate": rng.choice([8000, 16000, 44100])}
        if rng.random() < 0.2:
            row["id"] = rng.choice(["", None])
        rows.append({name: value for name, value in row.items() if value is not None or rng.random() < 0.1})
    return rows


def write(path, rows: list[dict], rng: random.Random):
    ending = rng.choice(["\n", "\r\n"])
    if path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
        path.write_bytes(rng.choice(["", "\ufeff"]).encode() + ending.join(lines).encode() + rng.choice([b"", b"\n"]))
        return path
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        delimiter = "," if path.suffix == ".csv" else "\t"
        writer = csv.DictWriter(file, names, delimiter=delimiter, lineterminator=ending, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("odd", [False, True])
def test_same_utterances(tmp_path, monkeypatch, suffix, odd):
    rng = random.Random(suffix)
    for number in (1, 2, 40, 300):
        path = write(tmp_path / f"m{suffix}", make_rows(number, odd), rng)
        expected = read_manifest(path)
        for block in (3, 50, 1000, 1 << 25):
            monkeypatch.setattr(manifest_columns, "BLOCK", block)
            utterances = open_manifest(path)
            assert isinstance(utterances, ManifestUtterances)
            assert list(utterances) == expected
        check_columns(utterances, expected)
        places = np.random.default_rng(number).permutation(number)[: number // 2 + 1]
        some = utterances.take(places)
        check_columns(some, [expected[place] for place in places])
        check_columns(some[1:], [expected[place] for place in places[1:]])
        check_columns(some.take(np.arange(len(some))[::-1]), [expected[place] for place in places[::-1]])
        assert list(pickle.loads(pickle.dumps(some))) == list(some)
        with_domain = open_manifest(path, domain="audio")
        assert [item.domain for item in with_domain] == [item.domain or "audio" for item in expected]
        if expected[0].split:
            assert list(open_manifest(path, "train")) == read_manifest(path, "train")
            with pytest.raises(ValueError, match=r"split='test' is not in .*, whose splits are: "):
                open_manifest(path, ["train", "test"])


def check_columns(utterances, expected):
    of_list = ListedUtterances(expected)
    assert [utterances[place] for place in range(len(expected))] == expected
    assert list(utterances[:-1]) == expected[:-1]
    for name in ("ids", "domains", "splits", "listed_lengths", "listed_starts"):
        assert list(getattr(utterances, name)) == list(getattr(of_list, name)), name
    assert utterances.domains.present == of_list.domains.present


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_plain_rows_make_no_objects(tmp_path, monkeypatch, suffix):
    rows = [{"file_name": f"{index}.wav", "text": "a", "num_samples": 9, "domain": "audio"} for index in range(50)]
    path = write(tmp_path / f"m{suffix}", rows, random.Random(0))
    if suffix == ".csv":
        path.write_bytes(path.read_bytes().replace(b'"', b""))
    monkeypatch.setattr(manifest_columns, "row_values", None)
    monkeypatch.setattr(manifest_columns, "BLOCK", 200)
    assert open_manifest(path).listed_lengths.tolist() == [9] * 50


def test_what_columns_cannot_hold_is_a_list(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"path": "a.wav", "label": ["\\ud800"]}\n{"path": "b.wav"}\n')
    assert open_manifest(path, domain="speech")[0].label == ("\ud800",)
    assert [item.domain for item in open_manifest(path, domain="speech")] == ["speech"] * 2


def test_equal_hashes_of_other_ids_are_none_of_a_duplicate(tmp_path, monkeypatch):
    path = write(tmp_path / "m.jsonl", make_rows(20, odd=False), random.Random(0))
    monkeypatch.setattr(manifest_columns, "_may_repeat", lambda ids: True)
    assert list(open_manifest(path)) == read_manifest(path)
    path.write_text('{"path": "a.wav"}\n\n{"path": "b.wav", "id": "a.wav"}\n{"path": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 3: the id 'a.wav' is already on line 1; ids must be unique"):
        open_manifest(path)


def pieces_of(utterances, piece_utterances, piece_hours):
    """As they were made when there was an object for each utterance."""
    pieces, samples = [], 0
    for utterance in utterances:
        if not pieces or len(pieces[-1]) >= piece_utterances or samples >= piece_hours * HOUR:
            pieces.append([])
            samples = 0
        pieces[-1].append(utterance)
        samples += utterance.num_samples or 0
    return pieces


def key_of(piece):
    places = [(item.id, item.start, item.num_samples if item.start is not None else None) for item in piece]
    return hashlib.sha256(json.dumps(places).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("most", "hours"), [(1000, 24.0), (7, 1.5), (1, 1.0), (10**12, 0.001), (5, 0.0)])
def test_pieces_and_keys_are_what_they_were(tmp_path, most, hours):
    path = write(tmp_path / "m.jsonl", make_rows(300, odd=True), random.Random(1))
    expected = pieces_of(read_manifest(path), most, hours)
    source = open_source(path, piece_utterances=most, piece_hours=hours)
    assert [list(piece) for piece in source] == expected
    assert [piece.key for piece in source] == [key_of(piece) for piece in expected]
    assert [list(piece.ids) for piece in source] == [[item.id for item in piece] for piece in expected]
    assert [len(source.listed_lengths(index)) for index in range(len(source))] == [len(piece) for piece in expected]
    rule = CutRule("fixed", 30.0)
    for piece, cut in zip(expected, open_source(path, piece_utterances=most, piece_hours=hours, cut=rule)):
        may_be_cut = any(item.num_samples is None or item.num_samples > rule.limit for item in piece)
        assert (cut.ids is None) == may_be_cut
        assert (cut.key != key_of(piece)) == may_be_cut


def test_keys_and_draws_of_a_corpus_do_not_change(tmp_path):
    path = write(tmp_path / "m.jsonl", make_rows(300, odd=True), random.Random(1))
    source = open_source(path, piece_utterances=7)
    digest = hashlib.sha256("".join(piece.key for piece in source).encode())
    listed = [item for item in source.utterances if item.num_samples]
    drawn = ListSource(listed).subset(seed=5, max_hours=20.0)
    digest.update(" ".join(drawn.utterances.ids).encode())
    assert digest.hexdigest()[:16] == "fed594f6bd2b5f76"
    chosen, seconds = [], 0.0
    for utterance in sorted(listed, key=lambda item: keyed_seed(5, "subset", item.id)):
        if seconds >= 3600 * 20.0:
            break
        chosen.append(utterance)
        seconds += utterance.num_samples / 16000
    assert list(drawn.utterances) == chosen
    assert 1 < len(chosen) < len(listed)
