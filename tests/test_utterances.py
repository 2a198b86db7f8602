# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Utterances that are made when they are asked for are those of a list, and take little memory."""

import dataclasses
import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from spear_hf.data.manifest import Utterance
from spear_hf.data.utterances import Column, known_domains, listed
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


def write_part(folder, ids) -> TokenStore:
    with TokenStoreWriter(folder, INFO) as writer:
        for id in ids:
            writer.add(id, np.zeros((5, 4), np.uint8), 16000)
    return TokenStore.open(folder)


def test_rows_of_another_store_are_those_of_its_ids(store, tmp_path):
    """Of the same utterances, of some in another order, of others, and of none."""
    everything = store.utterances()
    some = [f"utterance-{number}" for number in (7, 3, 19, 0)]
    for name, ids in {"same": store.ids, "some": some, "more": [*some, "x", *store.ids[8:12]], "none": []}.items():
        other = write_part(tmp_path / name, ids)
        expected = [ids.index(id) if id in ids else -1 for id in store.ids]
        assert other.rows_of_store(store).tolist() == expected, name
        assert store.rows_of_store(other).tolist() == store.rows_of(ids).tolist(), name
        taken = everything.take(np.array([3, 3, 0, 12]))
        for utterances in (taken, listed(list(taken))):
            assert other.rows_of_utterances(utterances).tolist() == [expected[row] for row in (3, 3, 0, 12)], name
    assert store.rows_of_utterances(taken).tolist() == [3, 3, 0, 12]


def test_equal_hashes_are_told_apart_by_their_ids(store):
    """As if all ids had one hash."""
    store._hashes = np.full_like(store._hashes, store._hashes[0])
    hashes = np.full(2, store._hashes[0])
    for row in range(len(store)):
        wanted = pa.array([store.id_at(row), f"other-{row}"], pa.large_string())
        assert store._rows_by_hash(hashes, wanted).tolist() == [row, -1]


def test_a_column_is_a_value_for_each():
    items = [None, "b", "a", "b", None, "c"]
    column = Column.of(items)
    assert list(column) == [column[place] for place in range(6)] == items
    assert list(column[1:4]) == list(column.take(np.array([1, 2, 3]))) == items[1:4]
    assert column.present == {None, "a", "b", "c"}
    assert column.take(np.array([0, 1])).present == {None, "b"}
    assert column.among({"a", None}).tolist() == [True, False, True, False, True, False]
    assert column.each(lambda value: 0 if value is None else ord(value), np.int64).tolist() == [0, 98, 97, 98, 0, 99]
    assert list(column.filled("b")) == ["b", "b", "a", "b", "b", "c"]
    assert list(column.filled("d")) == ["d", "b", "a", "b", "d", "c"]
    assert list(Column.of([])) == list(Column.of([]).filled("a")) == []


def test_many_take_little_memory(store):
    rows = np.zeros(100_000, dtype=np.int64)
    tracemalloc.start()
    many = store.utterances().take(rows)
    assert many[99_999].id == many[0].id
    assert tracemalloc.get_traced_memory()[1] < 1_000_000, "8 bytes each, where an object takes a kilobyte"
    tracemalloc.stop()
