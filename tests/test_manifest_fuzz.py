# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Hundreds of damaged manifests: each is read, or refused with a ValueError that names the file and the line."""

import json
import random
import re
from dataclasses import fields
from pathlib import Path

import pytest

from spear_hf.data import manifest_columns
from spear_hf.data.manifest import DOMAINS, Utterance, read_manifest


ROWS = [
    {"id": "a", "path": "x/a.wav", "domain": "speech", "num_samples": 16000, "transcript": 'one, "two"\tü'},
    {"id": "b", "path": "b.flac", "domain": "audio", "split": "train", "label": "dog", "start": 5, "num_samples": 7},
    {"id": "c", "path": "ç.mp3", "speaker": "7", "num_samples": 8000, "sampling_rate": 8000},
]
COLUMNS = ("id", "path", "domain", "split", "label", "transcript", "num_samples", "start", "speaker", "sampling_rate")
# What breaks parsers: halves of characters and of quotes, numbers that are none or too large, deep nesting, controls.
# fmt: off
TOKENS = [
    b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"\x00", b"\r", b"\n", b"\r\n", b'"', b'""', b"'", b",",
    b"\t", b";", b"\\", b"{", b"}", b"[" * 5000, b"]", b":", b"null", b"true", b"NaN", b"Infinity", b"-Infinity",
    b"1e400", b"-1", b"0", b"0.5", b"9" * 5000, b"9" * 30, b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"num_samples", b"start",
    b"path", b"id", b" ", b"a" * 200000, b"\x1a", b"\x0b", b"\x85",
]
# fmt: on


def jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=row["id"] == "a") + "\n" for row in ROWS).encode()


def table(delimiter: str) -> bytes:
    lines = [COLUMNS, *(tuple(row.get(name, "") for name in COLUMNS) for row in ROWS)]
    quoted = ['"' + str(value).replace('"', '""') + '"' for line in lines for value in line]
    rows = [quoted[start : start + len(COLUMNS)] for start in range(0, len(quoted), len(COLUMNS))]
    return "".join(delimiter.join(row) + "\n" for row in rows).encode()


def mutated(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(content) + 1)
        other = min(len(content), place + rng.choice([0, 1, 1, 3, 10, 50]))
        content = rng.choice(
            [
                content[:place] + rng.choice(TOKENS) + content[other:],
                content[:place] + content[other:],
                content[:place] + content[place:other] * 2 + content[other:],
                content[:place] + rng.randbytes(other - place) + content[other:],
                content[:other],
            ]
        )
    return content


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_damaged_manifests(tmp_path, monkeypatch, suffix):
    whole = jsonl() if suffix == ".jsonl" else table({".csv": ",", ".tsv": "\t"}[suffix])
    manifest = tmp_path / f"m{suffix}"
    manifest.write_bytes(whole)
    assert [utterance.id for utterance in read_manifest(manifest)] == ["a", "b", "c"]
    rng = random.Random(suffix)
    read = refused = 0
    for number in range(300):
        # Without quotes a table is read by the block.
        content = mutated(whole if suffix == ".jsonl" or number % 2 else whole.replace(b'"', b""), rng)
        manifest.write_bytes(content)
        monkeypatch.setattr(manifest_columns, "BLOCK", rng.choice([100, 1000, 1 << 25]))
        try:
            utterances = read_manifest(manifest)
        except ValueError as error:
            refused += 1
            check_message(str(error), manifest)
            with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
                manifest_columns.open_manifest(manifest)
            continue
        read += 1
        assert list(manifest_columns.open_manifest(manifest)) == utterances
        for utterance in utterances:
            check(utterance)
    assert read >= 10
    assert refused > 100


def check_message(message: str, manifest: Path) -> None:
    assert re.match(re.escape(str(manifest)) + r"(, line \d+\b| lists no utterance)", message), message


def check(utterance: Utterance) -> None:
    """What is read can be written: to a file system, a token store, another manifest."""
    assert utterance.id
    assert "\0" not in str(utterance.path)
    assert utterance.domain in (None, *DOMAINS)
    for field in fields(utterance):
        str(getattr(utterance, field.name)).encode()
    assert utterance.num_samples is None or 1 <= utterance.num_samples < 2**63
    assert utterance.start is None or (utterance.start >= 0 and utterance.num_samples is not None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b'{"path": "a.wav"}\n{"path": "\xff.wav"}\n', r"m\.jsonl, line 2 is not UTF-8: '\\udcff' at"),
        ("m.csv", b"path,id\na.wav,a\n\xc3,b\n", r"m\.csv, line 3 is not UTF-8"),
        ("m.jsonl", b'{"path": "\\ud800.wav"}\n', r"m\.jsonl, line 1 is not UTF-8: '\\ud800' at character 1"),
        ("m.jsonl", b'{"path": "a.wav", "id": "\\udc00"}\n', r"m\.jsonl, line 1: id is not UTF-8"),
        ("m.jsonl", b'{"path": "a\\u0000.wav"}\n', r"m\.jsonl, line 1: path='a\\x00.wav'"),
        ("m.jsonl", b"[" * 100000, r"m\.jsonl, line 1 is not JSON"),
        ("m.jsonl", b'{"path": "a.wav", "num_samples": ' + b"9" * 5000 + b"}", r"m\.jsonl, line 1 is not JSON"),
        ("m.jsonl", b'{"path": "a.wav", "num_samples": Infinity}', r"line 1: num_samples=inf must be a whole number"),
        ("m.jsonl", b'{"path": "a.wav", "num_samples": true}', r"line 1: num_samples=True must be a whole number"),
        ("m.jsonl", b'{"path": "a.wav", "num_samples": 1e300}', r"line 1: num_samples=1e\+300 must be a whole"),
        ("m.jsonl", b'{"path": "a.wav", "start": 5}', r"line 1: start=5 goes with num_samples"),
        ("m.jsonl", b'{"path": "a.wav", "start": -5, "num_samples": 1}', r"line 1: start=-5 must be .* 0 or more"),
        (
            "m.jsonl",
            b'{"path": "a.wav", "start": 5, "num_samples": 1, "sampling_rate": 8000}',
            r"start=5 goes with num_samples, both in samples at 16000 Hz",
        ),
        (
            "m.jsonl",
            b'{"path": "a.wav", "sampling_rate": 1, "num_samples": 9007199254740992}',
            "num_samples=9007199254740992 at sampling_rate=1 are too many",
        ),
        ("m.csv", b"path,path\na,b\n", r"m\.csv, line 1: a column is named twice"),
        ("m.csv", b'path,id\n"a.wav,b\n', r"m\.csv, line 2: unexpected end of data"),
        ("m.csv", b"path\n" + b"a" * 200000, r"m\.csv, line 2: field larger than field limit"),
    ],
)
def test_what_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for read in (read_manifest, manifest_columns.open_manifest):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
