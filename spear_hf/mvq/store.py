# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Token store: the tokens of a corpus in a folder of parquet shards, on disk or on the Hub.

    STORE/
      metadata.json         format version, what the tokens are (StoreInfo), and once complete the list of shards
      README.md             lets `datasets.load_dataset("STORE")` find the shards
      index.parquet         id, num_samples, num_frames, shard, row and id_hash of every utterance; domain, split
      tokens-00000.parquet  id, num_samples, num_frames, codes, checksum, audio_checksum; domain, split, audio
      quarantine.jsonl      id, path and error of utterances without tokens, if there are any

`codes` holds num_frames x num_codebooks bytes: `np.frombuffer(codes, np.uint8).reshape(num_frames, num_codebooks)`.
`checksum` is the CRC-32 of `codes`, `audio_checksum` that of the decoded waveform, `audio` a file of exactly its
samples as {bytes, path}; `domain`, `split` and `audio` are of a store with audio alone. A store of several teachers
(merge.py) has three columns of each: `speech_num_frames`, `speech_codes`, `speech_codes_checksum`. A shard's footer
repeats what the tokens are and holds the shard's part of the quarantine and the key of the piece of the list that it
was made from, so that a shard stands for all utterances it was given. Files are written under a temporary name, synced
and renamed; equal content gives equal bytes.

Writing is in store_writer.py, the files in store_format.py, and what is public of them can be had from here.
"""

import copy
import io
import itertools
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spear_hf.data.audio import load_audio
from spear_hf.data.ids import id_hash, id_hashes
from spear_hf.data.utterances import CHUNK, Column, UtteranceList
from spear_hf.mvq.atomic_files import write_atomically
from spear_hf.mvq.store_format import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST_COLUMNS,
    METADATA,
    QUARANTINE,
    READERS,
    SHARD_UTTERANCES,
    SINGLE,
    Infos,
    QuarantinedAudio,
    StoreInfo,
    TokenRow,
    checksum_column,
    differences,
    hash_order,
    list_key,
    open_shard,
    prefix,
    read_columns,
    read_footer,
    read_infos,
    read_metadata,
    shard_files,
    waveform_checksum,
)
from spear_hf.mvq.store_location import CachedFolder, HubFolder, LocalFolder, find_store, named_teacher
from spear_hf.mvq.store_utterances import StoreUtterances
from spear_hf.mvq.store_writer import TokenStoreWriter


__all__ = [
    "FORMAT_VERSION",
    "QUARANTINE",
    "SHARD_UTTERANCES",
    "QuarantinedAudio",
    "StoreInfo",
    "TokenRow",
    "TokenStore",
    "TokenStoreWriter",
    "list_key",
    "waveform_checksum",
    "write_atomically",
]

CACHED_ROW_GROUPS = 32
OPEN_FILES = 128  # of the many thousands of a large store; opening one takes about 1.5 ms
Result = TypeVar("Result")
_CONTENT_LOCK = threading.Lock()  # `tokenize` decodes in threads, and the cache is for one at a time


class TokenStore:
    """Reads a store: `store[id]` -> uint8 (frames, codebooks). Codes are read when asked for, with their checksums.

    Opening reads metadata and index alone. Held of an utterance are its id and 32 bytes, with audio 34. May be sent to
    other processes (loader workers): it holds the index, and opens files where it is used.
    """

    def __init__(
        self,
        location: LocalFolder | HubFolder | CachedFolder,
        infos: Infos,
        teacher: str,
        shards: list[dict[str, Any]],
        table: pa.Table,
        with_audio: bool,
        num_quarantined: int | None = None,
    ) -> None:
        self.location = location
        self.info = infos[teacher]
        self._num_quarantined = num_quarantined
        self.with_audio = with_audio
        self._infos = infos
        self._prefix = prefix(teacher)
        self._checksum = checksum_column(teacher)
        self._shards = shards
        self._ids: pa.LargeStringArray = _one_chunk(table["id"])
        self._frames = _frames(table, teacher)
        self._samples = table["num_samples"].to_numpy()
        known = [name for name in MANIFEST_COLUMNS if name in table.column_names]
        self._manifest = {name: Column.of_strings(table[name]) for name in known}
        self._first_row = np.cumsum([0, *(shard["num_utterances"] for shard in shards)])
        self._hashes, self._order = hash_order(table, str(location))
        self._cache: OrderedDict[tuple[int, int, str], pa.Table] = OrderedDict()
        self._files: OrderedDict[int, tuple[Path, pq.ParquetFile]] = OrderedDict()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        allow_incomplete: bool = False,
        teacher: str | None = None,
        revision: str | None = None,
        any_teacher: bool = False,
    ) -> "TokenStore":
        """Opens a store: a folder, or "OWNER/NAME" of a dataset on the Hub, whose shards are downloaded when used.

        `teacher`: which of a store of several, which may also be named behind the store, "STORE#TEACHER", where only
        one text can be given. `revision`: branch, tag or commit on the Hub, or "OWNER/NAME@REVISION"; what the branch
        is now is what is read from then on. `allow_incomplete` takes the shards that are there of an interrupted one.
        `any_teacher`: the first of several, for what does not depend on the teacher, such as the audio.
        ValueError, with the way out, for what is no store, not complete, or plainly damaged; damage within a shard is
        found when it is read.
        """
        if teacher is None:
            folder, teacher = named_teacher(folder)
        location = find_store(folder, revision)
        metadata = read_metadata(location.fetch(METADATA).parent)
        infos = read_infos(metadata, Path(str(location)) / METADATA)
        if any_teacher:
            teacher = None if SINGLE in infos else next(iter(infos))
        name = _chosen(infos, teacher, str(location))
        if metadata.get("complete"):
            shards = metadata["shards"]
            location.check(shards)
        elif allow_incomplete and isinstance(location, LocalFolder):
            shards = [{"file": path.name} for path in shard_files(location.folder)]
        else:
            raise ValueError(
                f"{location} is not complete: run the command again that writes it, it goes on where it was"
            )
        columns = ["id", "num_samples", f"{prefix(name)}num_frames"]
        if metadata.get("complete") and metadata["format_version"] > 1:
            table = _read_index(location, [*columns, *MANIFEST_COLUMNS, "id_hash"], shards)
        else:
            table, shards = _scanned(location, shards, infos, columns)
        return cls(
            location,
            infos,
            name,
            shards,
            table,
            bool(metadata.get("with_audio")),
            metadata.get("num_quarantined") if metadata.get("complete") else None,
        )

    def of_teacher(self, teacher: str | None) -> "TokenStore":
        """The same store with the tokens of one of its teachers, None if it has one, without another index."""
        name = _chosen(self._infos, teacher, str(self.location))
        other = copy.copy(self)  # without the open files, as it is sent to another process
        other.info = self._infos[name]
        other._prefix, other._checksum = prefix(name), checksum_column(name)
        other._frames = _frames(_read_index(self.location, [f"{other._prefix}num_frames"], self._shards), name)
        return other

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self._find(id) is not None

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK):
            yield from self._ids[start : start + CHUNK].to_pylist()

    def __getitem__(self, id: str) -> np.ndarray:
        return self.codes_at(self._row(id))

    def codes_at(self, row: int) -> np.ndarray:
        """The tokens in a row, uint8 (frames, codebooks)."""
        _, table, place = self._place(row, f"{self._prefix}codes", self._checksum)
        codes = table[0][place].as_py()
        frames = int(self._frames[row])
        if len(codes) != frames * self.num_codebooks or zlib.crc32(codes) != table[1][place].as_py():
            self._refuse_codes(row)
        return np.frombuffer(codes, dtype=np.uint8).reshape(frames, self.num_codebooks).copy()

    def codes_of_rows(self, rows: np.ndarray) -> tuple[list[bytes], np.ndarray]:
        """The tokens in some rows as they are stored, and their checksums, uint32."""
        stored, sums = self.read_rows(rows, f"{self._prefix}codes", self._checksum).columns
        codes = stored.to_pylist()
        found = np.array([zlib.crc32(code) for code in codes], np.uint32)
        sizes = np.array([len(code) for code in codes])
        wrong = (found != sums.to_numpy()) | (sizes != self._frames[rows] * self.num_codebooks)
        if wrong.any():
            self._refuse_codes(int(rows[wrong.argmax()]))
        return codes, found

    def read_rows(self, rows: np.ndarray, *columns: str) -> pa.Table:
        """Columns of some rows, in the order of these. Of every shard that they are in is read once what is needed."""
        shards = self.shards_of_rows(rows)
        parts, places = [], []
        for shard in np.unique(shards).tolist():
            places.append(np.flatnonzero(shards == shard))
            path, file = self._shard(shard)
            size = file.metadata.row_group(0).num_rows
            groups, place = np.divmod(rows[places[-1]] - self._first_row[shard], size)
            groups, number = np.unique(groups, return_inverse=True)
            table = read_columns(file, path, list(columns), groups.tolist()).select(columns)
            parts.append(table.take(pa.array(number * size + place)))
        order = np.argsort(np.concatenate(places))
        return pa.concat_tables(parts).take(pa.array(order)).combine_chunks()

    def waveform(self, id: str) -> np.ndarray:
        """The audio that the tokens were made from, float32 (samples,) at 16 kHz; of a store with audio only."""
        content, _ = self.audio_file(id)
        waveform = load_audio(io.BytesIO(content))
        if self.audio_checksum(id) != waveform_checksum(waveform):
            raise ValueError(f"{self.location}: the audio of {id} is damaged; delete its shard and run tokenize again")
        return waveform

    def audio_file(self, id: str) -> tuple[bytes, str]:
        """(content of the audio file, its suffix); of a store with audio only."""
        return self.audio_at(self._row(id))

    def audio_at(self, row: int) -> tuple[bytes, str]:
        """The same of a row."""
        if not self.with_audio:
            raise ValueError(f"{self.location} was made without audio; `spear-hf tokenize --with-audio` joins it")
        _, table, place = self._place(row, "audio")
        cell = table[0][place].as_py()
        return cell["bytes"], Path(cell["path"]).suffix

    def utterances(self) -> StoreUtterances:
        """All of a store with audio, as a manifest would list them; the audio is read where it is decoded."""
        if not self.with_audio:
            raise ValueError(f"{self.location} was made without audio; `spear-hf tokenize --with-audio` joins it")
        return StoreUtterances(self, self._rows())

    def column(self, name: str) -> Column:
        """One of the `MANIFEST_COLUMNS`; None where it is not known."""
        return self._manifest.get(name) or Column([None], np.broadcast_to(np.int8(0), len(self)))

    def ids_at(self, rows: np.ndarray) -> pa.LargeStringArray:
        """The ids of some rows."""
        return self._ids.take(pa.array(rows))

    def id_at(self, row: int) -> str:
        """Of the utterance in this row."""
        return self._ids[row].as_py()

    def audio_content(self, id: str) -> bytes:
        """The audio file of an utterance; for several threads."""
        with _CONTENT_LOCK:
            return self.audio_file(id)[0]

    def audio_checksum(self, id: str) -> int | None:
        """CRC-32 of the waveform that the tokens were made from, where it is known."""
        _, table, place = self._place(self._row(id), "audio_checksum")
        return table[0][place].as_py()

    def audio_checksums(self) -> np.ndarray:
        """CRC-32 of every waveform in the order of the ids, int64 (utterances,), -1 where it is not known."""

        def read(path: Path, file: pq.ParquetFile) -> np.ndarray:
            column = read_columns(file, path, ["audio_checksum"])["audio_checksum"]
            return column.cast(pa.int64()).fill_null(-1).to_numpy()

        return np.concatenate([np.empty(0, np.int64), *self._of_every_shard(read)])

    def verify(self) -> None:
        """Reads everything; ValueError naming the first shard that is damaged."""
        for id in self:
            self[id]
            if self.with_audio:
                self.waveform(id)

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """Places of utterances in the order of this store, int64; -1 where it has them not."""
        parts = [np.empty(0, np.int64)]
        wanted = iter(ids)
        while chunk := list(itertools.islice(wanted, CHUNK)):
            parts.append(self._rows_by_hash(id_hashes(chunk), pa.array(chunk, pa.large_string())))
        return np.concatenate(parts)

    def rows_of_utterances(self, utterances: UtteranceList) -> np.ndarray:
        """The same of a list: at once where they are of this store, and without hashing where they are of another."""
        if not isinstance(utterances, StoreUtterances):
            return self.rows_of(utterances.ids)
        if utterances.store._ids is self._ids:
            return utterances.rows
        return self.rows_of_store(utterances.store)[utterances.rows]

    def rows_of_store(self, other: "TokenStore") -> np.ndarray:
        """Of all utterances of another store the places in the order of this one; -1 where it has them not."""
        if self._ids.equals(other._ids):
            return self._rows()
        rows = np.empty(len(other), np.int64)
        for start in range(0, len(other), CHUNK):  # by their hashes, so that those of a chunk lie together here
            theirs = other._order[start : start + CHUNK]
            rows[theirs] = self._rows_by_hash(other._hashes[start : start + CHUNK], other.ids_at(theirs))
        return rows

    def shards_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the shards that rows are in, int64; -1 of -1."""
        return np.searchsorted(self._first_row, rows, side="right") - 1

    def shards_of(self, ids: Iterable[str]) -> np.ndarray:
        """Numbers of the shards that utterances of this store are in, int64; -1 where it has them not."""
        return self.shards_of_rows(self.rows_of(ids))

    @property
    def shard_entries(self) -> list[dict[str, Any]]:
        """What is known of each shard: `file`, its name, and of a complete store `bytes`."""
        return self._shards

    @property
    def lengths(self) -> np.ndarray:
        """Samples of all utterances, int64, in the store's order."""
        return self._samples

    @property
    def quarantined(self) -> list[QuarantinedAudio]:
        """Utterances that gave no tokens, read from the shards."""
        if self._num_quarantined == 0:
            return []
        parts = self._of_every_shard(lambda path, file: read_footer(file, path).quarantine)
        return [item for part in parts for item in part]

    @property
    def ids(self) -> list[str]:
        """All ids, in the store's order: a list made anew, so take it once."""
        return list(self)

    def num_frames(self, id: str) -> int:
        """Token frames of an utterance, without reading them."""
        return int(self._frames[self._row(id)])

    def num_samples(self, id: str) -> int:
        """Samples (16 kHz) the tokens were made from."""
        return int(self._samples[self._row(id)])

    @property
    def folder(self) -> Path:
        """Where metadata and index are: the store, or its snapshot in the Hub's cache."""
        return self.location.fetch(METADATA).parent

    @property
    def teachers(self) -> list[str]:
        """Names of the teachers of a merged store; none of the store of one."""
        return [name for name in self._infos if name != SINGLE]

    @property
    def shard_sizes(self) -> list[int]:
        """Utterances of each shard."""
        return [int(size) for size in np.diff(self._first_row)]

    @property
    def num_codebooks(self) -> int:
        """Codes of a frame."""
        return self.info.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Values that a code may have."""
        return self.info.codebook_size

    @property
    def frame_rate(self) -> float:
        """Token frames a second."""
        return self.info.frame_rate

    @property
    def teacher(self) -> str:
        """Name of the model that the tokens are of."""
        return self.info.teacher

    @property
    def layer(self) -> int | None:
        """Of the teacher; None for its last one."""
        return self.info.layer

    @property
    def quantizer_id(self) -> str:
        """Digest of the quantiser: tokens of another one mean something else."""
        return self.info.quantizer_id

    def _rows(self) -> np.ndarray:
        return np.arange(len(self), dtype=np.int32 if len(self) < 2**31 else np.int64)

    def _rows_by_hash(self, hashes: np.ndarray, ids: pa.LargeStringArray) -> np.ndarray:
        """Places of the utterances with these ids, whose hashes are given; -1 where there are none."""
        if not len(self):
            return np.full(len(ids), -1)
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self) - 1)
        rows = self._order[places].astype(np.int64)
        other = np.flatnonzero(~pc.equal(self.ids_at(rows), ids).to_numpy(zero_copy_only=False))
        rows[other] = -1
        for place in other[self._hashes[places[other]] == hashes[other]]:  # of equal hashes perhaps another
            row = self._with_hash(hashes[place], ids[int(place)].as_py())
            rows[place] = -1 if row is None else row
        return rows

    def _find(self, id: str) -> int | None:
        return self._with_hash(np.uint64(id_hash(id)), id)

    def _with_hash(self, wanted: np.uint64, id: str) -> int | None:
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            row = int(self._order[place])
            if self._ids[row].as_py() == id:
                return row
            place += 1
        return None

    def _row(self, id: str) -> int:
        if (row := self._find(id)) is None:
            raise KeyError(f"{id!r} is not in {self.location} ({len(self)} utterances)")
        return row

    def _place(self, row: int, *columns: str) -> tuple[int, pa.Table, int]:
        """(shard, its row group with these columns, the place therein) of a row of the store."""
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        path, file = self._shard(shard)
        group, place = divmod(row - int(self._first_row[shard]), file.metadata.row_group(0).num_rows)
        key = (shard, group, columns[0])
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            self._cache[key] = read_columns(file, path, list(columns), [group]).select(columns)
            if len(self._cache) > CACHED_ROW_GROUPS:
                self._cache.popitem(last=False)
        return shard, self._cache[key], place

    def _refuse_codes(self, row: int) -> None:
        where = f"{self._shard(int(self.shards_of_rows(np.array(row))))[0]}: the codes of {self.id_at(row)}"
        raise ValueError(f"{where} are damaged; delete the shard and run tokenize again")

    def _shard(self, shard: int) -> tuple[Path, pq.ParquetFile]:
        """An open shard that has been found to be of this store."""
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        passing = isinstance(self.location, CachedFolder)
        path, file = self._open_shard(shard)
        if not passing:
            self._files[shard] = path, file
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return path, file

    def _open_shard(self, shard: int) -> tuple[Path, pq.ParquetFile]:
        entry = self._shards[shard]
        path = self.location.fetch(entry["file"])
        # Codes have checksums of their own, audio has those of its pages. A file that is open or mapped takes room on
        # the disk even when it is removed, so those of a cache are neither for longer than a read.
        passing = isinstance(self.location, CachedFolder)
        file = open_shard(path, verify=self.with_audio, memory_map=not passing)
        _check_footer(file, path, self._infos, entry)
        return path, file

    def _of_every_shard(self, read: Callable[[Path, pq.ParquetFile], Result]) -> Iterator[Result]:
        """What is read of each shard, in their order; some are read at a time."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(lambda shard: read(*self._open_shard(shard)), range(len(self._shards)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_files": OrderedDict()}


def _chosen(infos: Infos, teacher: str | None, where: str) -> str:
    if list(infos) == [SINGLE]:
        if teacher is not None:
            raise ValueError(f"{where} holds the tokens of one teacher ({infos[SINGLE].teacher}): leave `teacher` out")
        return SINGLE
    if teacher is None or teacher not in infos:
        given = "" if teacher is None else f", not {teacher!r}"
        raise ValueError(f"{where} holds the tokens of several teachers: give teacher={' or '.join(infos)}{given}")
    return teacher


def _check_footer(file: pq.ParquetFile, path: Path, infos: Infos, entry: dict[str, Any]) -> None:
    footer = read_footer(file, path)
    if differing := differences(footer.infos, infos):
        raise ValueError(f"{path} does not belong to this store (shard / store): {'; '.join(differing)}")
    if footer.num_rows != entry.get("num_utterances", footer.num_rows):
        raise ValueError(
            f"{path} has {footer.num_rows} utterances, {METADATA} says {entry['num_utterances']}: delete the shard "
            "and run tokenize again"
        )
    if footer.key != entry.get("key", footer.key):
        raise ValueError(f"{path} is of another list of utterances: delete the shard and run tokenize again")


def _read_index(
    location: LocalFolder | HubFolder | CachedFolder, columns: list[str], shards: list[dict[str, Any]]
) -> pa.Table:
    path = location.fetch(INDEX)
    try:
        known = pq.read_schema(path).names  # of a store without audio, or of before they were, there are fewer
        columns = [name for name in columns if name in known or name not in MANIFEST_COLUMNS]
        table = pq.read_table(path, columns=columns, read_dictionary=MANIFEST_COLUMNS, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and run tokenize again to make it anew") from error
    if len(table) != sum(shard["num_utterances"] for shard in shards):
        raise ValueError(f"{location}: {INDEX} is not of this store: delete it, and run tokenize again")
    return table


def _scanned(
    location: LocalFolder | HubFolder, shards: list[dict[str, Any]], infos: Infos, columns: list[str]
) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The index of a store that has none yet (an incomplete one, or of format 1), from its shards."""
    tables, entries = [], []
    for entry in shards:
        path = location.fetch(entry["file"])
        file = open_shard(path)
        _check_footer(file, path, infos, entry)
        tables.append(read_columns(file, path, columns))
        entries.append({**entry, "num_utterances": len(tables[-1])})
    if not tables:
        types = (pa.string(), pa.int64(), pa.int64())
        tables.append(pa.schema(list(zip(columns, types))).empty_table())
    return pa.concat_tables(tables), entries


def _one_chunk(column: pa.ChunkedArray) -> pa.LargeStringArray:
    chunks = column.cast(pa.large_string()).combine_chunks()
    return pa.concat_arrays(chunks.chunks) if isinstance(chunks, pa.ChunkedArray) else chunks


def _frames(table: pa.Table, teacher: str) -> np.ndarray:
    return table[f"{prefix(teacher)}num_frames"].cast(pa.int32()).to_numpy()
