# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The token store: what goes in comes out, and nothing half-written, doubled or foreign is taken for a store."""

import dataclasses
import fcntl
import json
import multiprocessing
import os
import pickle
import signal
import zlib

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spear_hf.mvq.atomic_files import create_atomically
from spear_hf.mvq.store import (
    FORMAT_VERSION,
    QuarantinedAudio,
    StoreInfo,
    TokenRow,
    TokenStore,
    TokenStoreWriter,
    waveform_checksum,
    write_atomically,
)


INFO = StoreInfo(
    num_codebooks=4,
    codebook_size=256,
    frame_rate=50.0,
    teacher="kaldi-mfcc",
    layer=None,
    quantizer_id="0123456789abcdef",
    extraction={"refine_iters": 5, "teacher": {"id": "kaldi-mfcc", "fingerprint": "", "dtype": "float32"}},
)


def make_rows(number: int) -> list[TokenRow]:
    rng = np.random.default_rng(7)
    return [
        TokenRow(
            id=f"speaker/{index:03d}.wav",
            codes=rng.integers(0, 256, (int(rng.integers(1, 90)), 4), dtype=np.uint8),
            num_samples=16000 + index,
            audio_checksum=index or None,
        )
        for index in range(number)
    ]


def write(folder, rows, info=INFO, shard_utterances=80):
    with TokenStoreWriter(folder, info, shard_utterances=shard_utterances) as writer:
        for row in rows:
            writer.add(row.id, row.codes, row.num_samples, row.audio_checksum)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def stored(tmp_path):
    rows = make_rows(200)
    write(tmp_path / "store", rows)
    return tmp_path / "store", rows


def test_round_trip(stored):
    folder, rows = stored
    store = TokenStore.open(folder)
    assert store.ids == [row.id for row in rows]
    assert len(store) == 200
    assert "speaker/003.wav" in store
    assert "missing" not in store
    for row in [*rows, rows[0]]:
        assert np.array_equal(store[row.id], row.codes)
        assert store[row.id].dtype == np.uint8
        assert store.num_frames(row.id) == len(row.codes)
        assert store.num_samples(row.id) == row.num_samples
    assert (store.num_codebooks, store.codebook_size, store.frame_rate) == (4, 256, 50.0)
    assert (store.teacher, store.layer, store.quantizer_id) == ("kaldi-mfcc", None, "0123456789abcdef")
    with pytest.raises(KeyError, match="is not in"):
        store["missing"]


def test_metadata_on_disk(stored):
    folder, _ = stored
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["format_version"] == FORMAT_VERSION
    assert metadata["complete"] is True
    assert [shard["num_utterances"] for shard in metadata["shards"]] == [80, 80, 40]
    assert not list(folder.glob(".*")), "no temporary files stay"


def test_plain_datasets_reads_it(stored, tmp_path):
    folder, rows = stored
    cache = str(tmp_path / "cache")
    for dataset in (
        datasets.load_dataset(str(folder), split="train", cache_dir=cache),
        datasets.load_dataset("parquet", data_files=str(folder / "tokens-*.parquet"), split="train", cache_dir=cache),
    ):
        assert len(dataset) == len(rows)
        item = dataset[123]
        codes = np.frombuffer(item["codes"], np.uint8).reshape(item["num_frames"], 4)
        assert item["id"] == rows[123].id
        assert np.array_equal(codes, rows[123].codes)
        assert item["checksum"] == zlib.crc32(item["codes"])


def test_bytes_are_a_function_of_the_content(stored, tmp_path):
    folder, rows = stored
    write(tmp_path / "again", rows)
    assert contents(folder) == contents(tmp_path / "again")


def test_store_travels_to_other_processes(stored):
    folder, rows = stored
    store = TokenStore.open(folder)
    store[rows[0].id]
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again[rows[199].id], rows[199].codes)


def _write_and_die(folder, rows, after):
    """Kills itself when `after` utterances have been handed over."""
    with TokenStoreWriter(folder, INFO, shard_utterances=80) as writer:
        for number, row in enumerate(rows):
            if number == after:
                os.kill(os.getpid(), signal.SIGKILL)
            writer.add(row.id, row.codes, row.num_samples, row.audio_checksum)


def test_killed_and_resumed_equals_uninterrupted(stored, tmp_path):
    folder, rows = stored
    target = tmp_path / "resumed"
    context = multiprocessing.get_context("fork")
    for after in (30, 100, 199):
        process = context.Process(target=_write_and_die, args=(target, rows, after))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is not complete"):
        TokenStore.open(target)
    assert TokenStore.open(target, allow_incomplete=True).ids == [row.id for row in rows[:160]]
    with TokenStoreWriter(target, INFO, shard_utterances=80) as writer:
        added = [writer.add(row.id, row.codes, row.num_samples, row.audio_checksum) for row in rows]
        assert rows[0].id in writer
    assert added == [False] * 160 + [True] * 40
    assert contents(target) == contents(folder)


def test_error_in_the_with_block_leaves_the_store_incomplete(tmp_path):
    writer = TokenStoreWriter(tmp_path / "s", INFO)
    writer.add("a", np.zeros((3, 4), np.uint8), 1600)
    with pytest.raises(RuntimeError), writer:
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="is not complete"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("field", "value"),
    [("quantizer_id", "other"), ("num_codebooks", 8), ("frame_rate", 25.0), ("teacher", "other"), ("layer", 3)],
)
def test_other_tokens_are_refused(stored, field, value):
    folder, _ = stored
    other = StoreInfo(**{**INFO.__dict__, field: value})
    with pytest.raises(ValueError, match=f"holds other tokens.*{field}"):
        TokenStoreWriter(folder, other)


def test_other_extraction_is_refused_but_a_moved_teacher_is_not(tmp_path):
    def info(**changes):
        teacher = {"id": "/old/place", "revision": None, "fingerprint": "abc", "dtype": "float32", **changes}
        return StoreInfo(4, 256, 50.0, teacher["id"], 3, "q", {"refine_iters": 5, "teacher": teacher})

    rows = make_rows(3)
    write(tmp_path / "s", rows, info=info())
    write(tmp_path / "s", rows, info=info(id="/new/place"))
    write(tmp_path / "s", rows, info=info(id="module:factory", options={"file": "/new/place.pt"}))
    for changed in ({"fingerprint": "xyz"}, {"dtype": "bfloat16"}, {"window": "slice"}, {"options": {"rate": 50}}):
        with pytest.raises(ValueError, match="holds other tokens"):
            TokenStoreWriter(tmp_path / "s", info(**changed))


def test_shards_stand_for_fixed_utterances(tmp_path):
    rows = make_rows(6)
    bad = QuarantinedAudio("bad", "bad.wav", "not finite")
    writer = TokenStoreWriter(tmp_path / "s", INFO)
    writer.write_shard(1, rows[3:], key="one")
    assert not writer.has_shard(0, "zero")
    with pytest.raises(ValueError, match="shards \\[0\\] have not been written"):
        writer.finish()
    writer.write_shard(0, rows[:3], [bad], key="zero")
    writer = TokenStoreWriter(tmp_path / "s", INFO)
    first = [row.id for row in rows[:3]]
    assert writer.has_shard(0, "zero"), "nothing but the key is needed"
    assert not writer.has_shard(0, "grown", [*first, "bad", "new"]), "the list has grown: to be written anew"
    for ids in (None, [*first, "other"], [*first, "bad"]):
        with pytest.raises(ValueError, match="another list of utterances"):
            writer.has_shard(0, "other", ids)
    with pytest.raises(ValueError, match="longer list"):
        writer.finish(num_shards=1)
    with pytest.raises(ValueError, match=r"tokens-00001\.parquet was made from another list"):
        writer.finish(num_shards=2, keys=["zero", "other"])
    writer.finish(num_shards=2, keys=["zero", "one"])
    assert writer.quarantined == [bad]
    assert json.loads((tmp_path / "s" / "quarantine.jsonl").read_text()) == {
        "id": "bad",
        "path": "bad.wav",
        "error": "not finite",
    }
    assert len(TokenStore.open(tmp_path / "s")) == 6


def test_grown_store_replaces_nothing_and_drops_an_old_quarantine(tmp_path):
    rows = make_rows(5)
    with TokenStoreWriter(tmp_path / "s", INFO, shard_utterances=2) as writer:
        writer.add(rows[0].id, rows[0].codes, 1)
        writer.add_bad("bad", "bad.wav", "broken")
    (tmp_path / "s" / "quarantine.jsonl").write_text("stale")
    with TokenStoreWriter(tmp_path / "s", INFO, shard_utterances=2) as writer:
        assert not writer.add_bad("bad", "bad.wav", "broken")
        for row in rows:
            writer.add(row.id, row.codes, 1)
    assert TokenStore.open(tmp_path / "s").ids == [row.id for row in rows]
    assert "stale" not in (tmp_path / "s" / "quarantine.jsonl").read_text()


def test_unknown_version_is_refused(stored):
    folder, _ = stored
    metadata = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps({**metadata, "format_version": 99}))
    for use in (TokenStore.open, lambda path: TokenStoreWriter(path, INFO)):
        with pytest.raises(ValueError, match="format version 99"):
            use(folder)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a token store"):
        TokenStore.open(tmp_path)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata\.json is damaged .*: restore it, or write to a new folder"):
        TokenStore.open(tmp_path)
    (tmp_path / "metadata.json").write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match="lacks num_codebooks"):
        TokenStore.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_truncated_shard_is_refused(stored, keep):
    folder, _ = stored
    shard = folder / "tokens-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:keep])
    for use in (TokenStore.open, lambda path: TokenStoreWriter(path, INFO).has_shard(1, "key")):
        with pytest.raises(ValueError, match=r"tokens-00001\.parquet is truncated.*delete it and run tokenize again"):
            use(folder)


def test_flipped_byte_is_found_by_the_checksum(stored):
    folder, rows = stored
    shard = folder / "tokens-00000.parquet"
    content = bytearray(shard.read_bytes())
    place = content.index(rows[5].codes.tobytes())
    content[place] ^= 1
    shard.write_bytes(content)
    store = TokenStore.open(folder)
    assert np.array_equal(store[rows[4].id], rows[4].codes)
    with pytest.raises(ValueError, match=r"speaker/005\.wav are damaged"):
        store[rows[5].id]


def replace_shard(folder, content):
    """By another, of which the metadata knows the size, so that it is found only when it is used."""
    (folder / "tokens-00001.parquet").write_bytes(content)
    metadata = json.loads((folder / "metadata.json").read_text())
    metadata["shards"][1]["bytes"] = len(content)
    (folder / "metadata.json").write_text(json.dumps(metadata))


def test_missing_foreign_and_doubled_shards_are_refused(stored, tmp_path):
    folder, rows = stored
    shard = folder / "tokens-00001.parquet"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        TokenStore.open(folder)
    shard.write_bytes(content[:-5] + content)
    with pytest.raises(ValueError, match="truncated, or not the shard of this store"):
        TokenStore.open(folder)
    write(tmp_path / "other", rows, info=StoreInfo(**{**INFO.__dict__, "quantizer_id": "other"}))
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "foreign")
    for other, message in (
        (folder / "tokens-00000.parquet", "is of another list of utterances"),
        (folder / "tokens-00002.parquet", "has 40 utterances"),
        (tmp_path / "other" / shard.name, r"does not belong to this store.*quantizer_id"),
        (tmp_path / "foreign", "was not written by spear_hf"),
    ):
        replace_shard(folder, other.read_bytes())
        store = TokenStore.open(folder)
        assert np.array_equal(store[rows[0].id], rows[0].codes)
        with pytest.raises(ValueError, match=message):
            store[rows[100].id]
        with pytest.raises(ValueError, match=message):
            store.verify()
    replace_shard(folder, content)
    TokenStore.open(folder).verify()


def test_doubled_id_across_shards_is_refused(tmp_path):
    rows = make_rows(4)
    writer = TokenStoreWriter(tmp_path / "s", INFO)
    writer.write_shard(0, rows[:2])
    writer.write_shard(1, rows[1:])
    with pytest.raises(ValueError, match=r"'speaker/001\.wav' occurs twice"):
        writer.finish()


def write_format_1(folder, rows):
    """As the first version wrote it: no index, no keys, no sizes."""
    folder.mkdir()
    info = {name: getattr(INFO, name) for name in INFO.__dataclass_fields__}
    columns = {
        "id": [row.id for row in rows],
        "num_samples": [row.num_samples for row in rows],
        "num_frames": [len(row.codes) for row in rows],
        "codes": [row.codes.tobytes() for row in rows],
        "checksum": pa.array([zlib.crc32(row.codes.tobytes()) for row in rows], pa.uint32()),
        "audio_checksum": pa.array([row.audio_checksum for row in rows], pa.uint32()),
    }
    footer = json.dumps({"format_version": 1, "info": info, "shard": 0, "quarantine": []})
    table = pa.table(columns).replace_schema_metadata({"spear_hf": footer})
    pq.write_table(table, folder / "tokens-00000.parquet", row_group_size=64)
    shards = [{"file": "tokens-00000.parquet", "num_utterances": len(rows)}]
    metadata = {"format_version": 1, **info, "complete": True, "num_utterances": len(rows), "shards": shards}
    (folder / "metadata.json").write_text(json.dumps(metadata))


def test_first_format_is_read_but_not_added_to(tmp_path):
    rows = make_rows(100)
    write_format_1(tmp_path / "s", rows)
    store = TokenStore.open(tmp_path / "s")
    assert store.ids == [row.id for row in rows]
    assert all(np.array_equal(store[row.id], row.codes) for row in rows)
    with pytest.raises(ValueError, match=r"format version 1, which can be read but not added to.*new folder"):
        TokenStoreWriter(tmp_path / "s", INFO)


def test_index_is_what_is_read_when_a_store_is_opened(stored):
    folder, rows = stored
    index = pq.read_table(folder / "index.parquet").to_pylist()
    assert [row["id"] for row in index] == [row.id for row in rows]
    assert [(row["shard"], row["row"]) for row in index] == [divmod(place, 80) for place in range(200)]
    assert [row["num_frames"] for row in index] == [len(row.codes) for row in rows]
    for shard in folder.glob("tokens-*"):
        shard.write_bytes(bytes(shard.stat().st_size))
    store = TokenStore.open(folder)
    assert store.num_frames(rows[123].id) == len(rows[123].codes)
    with pytest.raises(ValueError, match="no parquet file"):
        store[rows[123].id]
    (folder / "index.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"index\.parquet is damaged.*run tokenize again"):
        TokenStore.open(folder)


def test_index_of_another_store_is_refused(stored, tmp_path):
    folder, rows = stored
    write(tmp_path / "other", rows[:100])
    (folder / "index.parquet").write_bytes((tmp_path / "other" / "index.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"index\.parquet is not of this store"):
        TokenStore.open(folder)


def test_writing_again_makes_a_damaged_index_anew(stored, tmp_path):
    folder, rows = stored
    before = contents(folder)
    write(tmp_path / "other", rows[:100])
    for damaged in b"", before["index.parquet"][:-9], (tmp_path / "other" / "index.parquet").read_bytes():
        (folder / "index.parquet").write_bytes(damaged)
        write(folder, rows)
        assert contents(folder) == before


def test_memory_of_an_utterance(tmp_path):
    """Its id, and 32 bytes: offset 8, frames 4, samples 8, hash 8, order 4. Arrow counts its own, numpy is counted."""
    codes = np.zeros((1, 4), np.uint8)
    writer = TokenStoreWriter(tmp_path / "s", INFO)
    ids = [f"a/speaker/of/some/name/{place:07d}.flac" for place in range(20_000)]
    writer.write_shard(0, [TokenRow(id, codes, 1) for id in ids])
    writer.finish()
    store = TokenStore.open(tmp_path / "s")
    arrays = (store._frames, store._samples, store._hashes, store._order)
    held = store._ids.nbytes + sum(array.nbytes for array in arrays)
    assert held / len(ids) < len(ids[0]) + 33
    assert len(pickle.dumps(store)) / len(ids) < len(ids[0]) + 50
    assert all(id in store for id in ids[::997])
    assert "a/speaker/of/some/name/9999999.flac" not in store
    assert list(store.rows_of([ids[7], "missing", ids[19_999]])) == [7, -1, 19_999]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    writer = TokenStoreWriter(tmp_path / "s", INFO)
    dead, living = tmp_path / "s" / ".tokens-00000.parquet.aa.tmp", tmp_path / "s" / ".tokens-00000.parquet.bb.tmp"
    dead.write_bytes(b"half")
    with living.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        TokenStoreWriter(tmp_path / "s", INFO)
        assert not dead.exists()
        assert living.exists()
    TokenStoreWriter(tmp_path / "s", INFO)
    assert not living.exists()
    writer.finish()


def test_of_two_that_create_a_file_one_does(tmp_path):
    assert create_atomically(tmp_path / "file", b"first")
    assert not create_atomically(tmp_path / "file", b"second")
    assert contents(tmp_path) == {"file": b"first"}


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 4), np.int64), "not uint8"),
        (np.zeros((3, 5), np.uint8), r"\(3, 5\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
        (np.full((3, 4), 16, np.uint8), "code 16 is beyond"),
    ],
)
def test_bad_codes_are_refused(tmp_path, codes, message):
    writer = TokenStoreWriter(tmp_path / "s", StoreInfo(**{**INFO.__dict__, "codebook_size": 16}), shard_utterances=1)
    with pytest.raises(ValueError, match=message):
        writer.add("a", codes, 1)


def test_doubled_id_is_refused(tmp_path):
    row = make_rows(1)[0]
    writer = TokenStoreWriter(tmp_path / "s", INFO)
    writer.add(row.id, row.codes, 1)
    writer.add(row.id, row.codes, 1)
    with pytest.raises(ValueError, match="occurs twice"):
        writer.finish()


def test_bad_info_is_refused():
    with pytest.raises(ValueError, match="codebook_size=512"):
        StoreInfo(**{**INFO.__dict__, "codebook_size": 512})


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_waveform_checksum_ignores_the_precision_given():
    waveform = np.linspace(-1, 1, 100, dtype=np.float32)
    assert waveform_checksum(waveform) == waveform_checksum(waveform.astype(np.float64))
    assert waveform_checksum(waveform) != waveform_checksum(-waveform)


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty, and no token store \(it has README\.md\)"):
        write(tmp_path, make_rows(2))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    with pytest.raises(ValueError, match=r"README\.md is a file"):
        write(tmp_path / "README.md", make_rows(2))


@pytest.mark.parametrize(
    "content",
    [
        {"teachers": [1]},
        {"teachers": {"speech": 1}},
        {"info": 3},
        {entry.name: "x" for entry in dataclasses.fields(StoreInfo)},
    ],
)
def test_damaged_metadata_is_named(tmp_path, content):
    (tmp_path / "metadata.json").write_text(json.dumps({"format_version": 2, "complete": True, **content}))
    with pytest.raises(ValueError, match=r"metadata\.json is damaged: .*restore it"):
        TokenStore.open(tmp_path)
