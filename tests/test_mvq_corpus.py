# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Utterances decoded ahead: batches within windows of any stream, bounds of memory, errors, bad audio."""

import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spear_hf.data.audio_encoding import encode_float_wav
from spear_hf.data.manifest import Utterance
from spear_hf.data.sources import ListSource, open_source
from spear_hf.mvq import corpus
from spear_hf.mvq.corpus import decoded_batches, decoded_pieces
from spear_hf.mvq.teachers import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("kaldi-mfcc")


def utterance(number: int, samples: int) -> Utterance:
    waveform = np.full(samples, number / 1000, np.float32)
    return Utterance(f"{number:04d}", Path(f"rows#{number}"), content=encode_float_wav(waveform))


def stream(count: int):
    """`count` utterances of 0.1 to 0.3 s."""
    rng = np.random.default_rng(0)
    return (utterance(number, int(rng.integers(1600, 4800))) for number in range(count))


def test_batches_of_a_stream(teacher, monkeypatch):
    monkeypatch.setattr(corpus, "WINDOW_UTTERANCES", 20)
    batches = list(decoded_batches(stream(50), teacher, 1.0))
    items = list(chain.from_iterable(batches))
    assert sorted(item.place for item in items) == list(range(50))
    for item in items:
        assert item.utterance.id == f"{item.place:04d}"
        assert item.utterance.content is None, "the file is let go when it is decoded"
        assert item.waveform is not None
        assert (item.waveform == np.float32(item.place / 1000)).all()
    windows = [{item.place // 20 for item in batch} for batch in batches]
    assert all(len(places) == 1 for places in windows), "a batch is of one window"
    assert [places.pop() for places in windows] == sorted(item.place // 20 for batch in batches for item in batch[:1])
    for batch in batches:
        lengths = [len(item.waveform) for item in batch if item.waveform is not None]
        assert lengths == sorted(lengths, reverse=True)
        assert len(lengths) * lengths[0] <= 16000
    again = list(decoded_batches(stream(50), teacher, 1.0))
    assert [[item.place for item in batch] for batch in again] == [[item.place for item in batch] for batch in batches]


def test_windows_are_bounded_by_seconds(teacher, monkeypatch):
    monkeypatch.setattr(corpus, "WINDOW_SECONDS", 1.0)
    batches = list(decoded_batches((utterance(number, 8000) for number in range(6)), teacher, 100.0))
    assert [[item.place for item in batch] for batch in batches] == [[0, 1], [2, 3], [4, 5]]


def test_pieces(teacher):
    utterances = list(stream(25))
    source = ListSource(utterances, piece_utterances=10)
    seen = {}
    for piece, batches in decoded_pieces(source, teacher, 1.0):
        seen[piece.index] = [[item.utterance.id for item in batch] for batch in batches]
        alone = decoded_batches(source[piece.index], teacher, 1.0)
        assert seen[piece.index] == [[item.utterance.id for item in batch] for batch in alone]
        assert sorted(chain.from_iterable(seen[piece.index])) == list(piece.ids or ())
    assert list(seen) == [0, 1, 2]
    assert list(decoded_pieces([], teacher, 1.0)) == []
    assert [list(batches) for _, batches in decoded_pieces([[]], teacher, 1.0)] == [[]]
    assert [piece.index for piece, _ in decoded_pieces(source, teacher, 1.0)] == [0, 1, 2], "batches passed over"


def test_reading_goes_ahead_but_not_far(teacher, monkeypatch):
    """While a batch is computed as much as a window is read, and no more."""
    monkeypatch.setattr(corpus, "WINDOW_UTTERANCES", 10)
    count = 0

    def counted():
        nonlocal count
        for item in stream(100):
            count += 1
            yield item

    batches = decoded_batches(counted(), teacher, 0.3)
    next(batches)
    deadline = time.monotonic() + 10
    while count < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 20 <= count <= 21  # one is held while it waits for room
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "read utt"))]


def test_memory_of_files_counts_before_they_are_decoded(teacher, monkeypatch):
    monkeypatch.setattr(corpus, "WINDOW_SECONDS", 1.0)
    count = 0

    def counted():
        nonlocal count
        for number in range(50):
            count += 1
            yield utterance(number, 16000)

    batches = decoded_batches(counted(), teacher, 10.0)
    next(batches)
    time.sleep(0.2)
    assert count <= 4
    batches.close()


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_errors_of_reading_reach_the_one_who_computes(teacher, kind):
    def broken():
        yield from stream(5)
        raise kind("a.tar cannot be read after row 5")

    batches = decoded_batches(broken(), teacher, 100.0)
    if kind is ValueError:  # what was read before it is not lost
        assert len(next(batches)) == 5
    with pytest.raises(kind, match=r"a\.tar cannot be read after row 5"):
        next(batches)


def test_all_kinds_of_bad_audio(teacher, tmp_path):
    """Corrupt, truncated, empty, too short, not finite: each is set aside with its reason, and the others are read."""
    speech = np.random.default_rng(0).uniform(-0.5, 0.5, 16000)
    soundfile.write(tmp_path / "good.wav", speech, 16000)
    soundfile.write(tmp_path / "50ms.wav", speech[:800], 16000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([speech, speech], axis=1), 16000)
    soundfile.write(tmp_path / "other.flac", speech, 44100)
    soundfile.write(tmp_path / "flac.ogg", speech, 16000, format="FLAC")  # a wrong suffix does not matter
    soundfile.write(tmp_path / "mp3.wav", speech, 16000, format="MP3")
    soundfile.write(tmp_path / "10ms.wav", speech[:160], 16000)
    soundfile.write(tmp_path / "nan.wav", np.where(np.arange(16000) == 5, np.nan, speech), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "none.wav", speech[:0], 16000)
    soundfile.write(tmp_path / "half.flac", speech, 16000)
    content = (tmp_path / "half.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(content[: len(content) // 2])
    for name, format in (("half.ogg", "OGG"), ("half.mp3", "MP3"), ("half.sph", "NIST")):
        soundfile.write(tmp_path / name, speech, 16000, format=format)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "text.mp3").write_bytes(b"this is a text\n" * 100)
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "header.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:40])
    (piece,) = open_source(tmp_path)
    items = {
        item.utterance.id: item for item in chain.from_iterable(decoded_batches(piece, teacher, batch_seconds=100.0))
    }
    assert len(items) == 16
    errors = {id: item.error for id, item in items.items() if item.error is not None}
    assert {id for id, item in items.items() if item.waveform is None} == set(errors)
    assert set(errors) == {
        *("10ms.wav", "nan.wav", "none.wav", "half.flac", "text.mp3", "zero.wav", "header.wav"),
        *("half.ogg", "half.mp3", "half.sph"),
    }
    assert all(id in error for id, error in errors.items())
    assert np.array_equal(items["stereo.wav"].waveform, items["good.wav"].waveform)
    assert len(items["50ms.wav"].waveform) == 800
