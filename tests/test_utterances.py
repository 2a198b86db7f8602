# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Utterances that are made when they are asked for are those of a list, and take little memory."""

import dataclasses
import pickle
import tracemalloc

import numpy as np
import pytest

from spear_hf.data.manifest import Utterance
from spear_hf.data.utterances import known_domains, listed
from spear_hf.mvq.store import TokenRow, TokenStore, TokenStoreWriter

from .test_store import INFO


@pytest.fixture
def store(tmp_path) -> TokenStore:
    rows = [
        TokenRow(
            f"utterance-{number}",
            np.full((5, 4), number, np.uint8),
            16000 + number,
            number,
            (bytes([number]) * 10, ".flac"),
            domain=(None, "speech", "audio")[number % 3],
            split="train" if number % 2 else None,
        )
        for number in range(20)
    ]
    with TokenStoreWriter(tmp_path / "store", INFO, with_audio=True) as writer:
        for index in range(3):
            writer.write_shard(index, rows[7 * index : 7 * index + 7])
    return TokenStore.open(tmp_path / "store")


def known(utterance: Utterance) -> dict:
    """Without what reads the audio, which no two share, but with what it reads."""
    return dataclasses.asdict(dataclasses.replace(utterance, content=None)) | {"audio": utterance.content()}


def test_those_of_a_store_are_those_of_a_list(store):
    made = store.utterances()
    plain = listed(list(made))
    assert len(made) == len(plain) == 20
    places = np.array([19, 3, 3, 0])
    for one, other in ((made, plain), (made.take(places), plain.take(places)), (made[-4:], plain[-4:])):
        assert list(one.ids) == list(other.ids) == [utterance.id for utterance in one]
        for column in ("domains", "splits", "lengths"):
            assert list(getattr(one, column)) == list(getattr(other, column)), column
        assert list(map(known, one)) == list(map(known, other))
    assert known(made[-1]) == known(plain[19])
    assert list(known_domains(made[:4])) == ["speech", "speech", "audio", "speech"]
    assert known(pickle.loads(pickle.dumps(made))[5]) == known(plain[5])
    with pytest.raises(IndexError):
        made[20]


def test_rows_are_found_for_many_ids_at_once(store):
    ids = [f"utterance-{number}" for number in (3, 19, 20, 0, 3)]
    assert store.rows_of(ids).tolist() == [3, 19, -1, 0, 3]
    assert store.shards_of(ids).tolist() == [0, 2, -1, 0, 0]
    assert store.rows_of([]).tolist() == []


def test_many_take_little_memory(store):
    rows = np.zeros(100_000, dtype=np.int64)
    tracemalloc.start()
    many = store.utterances().take(rows)
    assert many[99_999].id == many[0].id
    assert tracemalloc.get_traced_memory()[1] < 1_000_000, "8 bytes each, where an object takes a kilobyte"
    tracemalloc.stop()
