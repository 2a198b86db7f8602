# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Writing a token store, shard by shard and by any number of processes, or utterance by utterance by one.

Every shard is a fixed piece of a list of utterances, so whoever writes it writes the same bytes; whoever finds all of
them there may finish the store. Files appear whole (atomic_files.py), metadata.json says last that it is complete.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear_hf.mvq.atomic_files import create_atomically, remove_leftovers, write_atomically
from spear_hf.mvq.store_format import (
    CARD,
    FORMAT_VERSION,
    INDEX,
    MANIFEST_COLUMNS,
    METADATA,
    QUARANTINE,
    READERS,
    SHARD_UTTERANCES,
    SINGLE,
    Footer,
    Infos,
    QuarantinedAudio,
    StoreInfo,
    TokenRow,
    card,
    differences,
    index_content,
    list_key,
    open_shard,
    prefix,
    read_columns,
    read_footer,
    read_infos,
    read_metadata,
    refuse_duplicates,
    shard_columns,
    shard_content,
    shard_files,
    shard_index,
    shard_path,
    to_json,
)


Result = TypeVar("Result")


class StoreWriter:
    """Writes a store of one or more teachers, or goes on with one that was interrupted.

    Several processes may write the same store at once: has_shard() looks at the folder, and finish() is safe to do
    twice. ValueError if the folder holds other tokens.
    """

    def __init__(self, folder: str | Path, infos: Infos, with_audio: bool = False) -> None:
        self.folder = Path(folder)
        self.infos = dict(infos)
        self.with_audio = with_audio
        if self.folder.is_file():
            raise ValueError(f"{self.folder} is a file: a token store is a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        path = self.folder / METADATA
        others = sorted(item.name for item in self.folder.iterdir() if not item.name.startswith("."))
        if not path.exists():
            if shard_files(self.folder):
                raise ValueError(f"{self.folder} holds shards but no {METADATA}: restore it, or write to a new folder")
            if others:  # which may be of the names that are written here
                raise ValueError(
                    f"{self.folder} is not empty, and no token store (it has {', '.join(others[:3])}): write to a new "
                    "folder"
                )
            create_atomically(path, self._metadata({}, complete=False))
        metadata = read_metadata(self.folder)
        if metadata["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{self.folder} is of format version {metadata['format_version']}, which can be read but not added to "
                f"by this spear_hf, which writes {FORMAT_VERSION}; write to a new folder"
            )
        self._check(read_infos(metadata, path), bool(metadata.get("with_audio")), f"{self.folder} holds other tokens")
        self._footers: dict[int, Footer] = {}

    def has_shard(self, index: int, key: str, ids: Sequence[str] | None = None) -> bool:
        """Whether shard `index` is there, made of the piece of this `key`.

        One that stands for fewer utterances, the first of `ids`, is to be written anew (the list has grown); one of
        another piece is a ValueError.
        """
        if not shard_path(self.folder, index).exists():
            return False
        footer = self.footer(index)
        if footer.key != key:  # it may have been replaced since it was read
            del self._footers[index]
            footer = self.footer(index)
        if footer.key == key:
            return True
        if ids is not None:
            have = {*self._ids(index), *(item.id for item in footer.quarantine)}
            if len(have) < len(ids) and have == set(ids[: len(have)]):
                return False
        raise ValueError(
            f"{shard_path(self.folder, index)} was made from another list of utterances (or another shard size); "
            "write to a new folder"
        )

    def write(
        self,
        index: int,
        key: str,
        rows: Mapping[str, Sequence[TokenRow]],
        quarantined: Sequence[QuarantinedAudio] = (),
    ) -> None:
        """Writes one shard: for every teacher the same utterances, in the order given.

        Nothing is done if another process has made it in the meantime. StorageFullError, and no shard, where there is
        no room.
        """
        lists = [[row.id for row in part] for part in rows.values()]
        if list(rows) != list(self.infos) or any(ids != lists[0] for ids in lists):
            raise ValueError(f"shard {index}: the teachers {', '.join(self.infos)} need rows of the same utterances")
        self.write_columns(index, key, shard_columns(self.infos, rows, self.with_audio), quarantined)

    def write_columns(
        self,
        index: int,
        key: str,
        columns: Mapping[str, Any],
        quarantined: Sequence[QuarantinedAudio] = (),
    ) -> None:
        """The same of columns as `shard_columns` has them."""
        refuse_duplicates([*columns["id"], *(item.id for item in quarantined)], f"shard {index}")
        content = shard_content(self.infos, index, key, columns, quarantined, self.with_audio)
        self._footers.pop(index, None)
        if shard_path(self.folder, index).exists() and self.footer(index).key == key:
            return
        if read_metadata(self.folder).get("complete"):  # a finished store that is extended or repaired
            write_atomically(self.folder / METADATA, self._metadata({}, complete=False))
        write_atomically(shard_path(self.folder, index), content)
        self._footers.pop(index, None)

    def finish(self, num_shards: int | None = None, keys: Sequence[str] | None = None) -> None:
        """Writes the quarantine, the index and the list of shards: the store is complete.

        `num_shards` is how many there must be, ValueError where some are missing or over; `keys` are those of their
        pieces. A store that is complete as it is stays as it is.
        """
        indices = self.shards
        planned = range(len(keys) if keys is not None else max(indices, default=-1) + 1)
        planned = planned if num_shards is None else range(num_shards)
        if missing := sorted(set(planned) - set(indices)):
            raise ValueError(f"{self.folder}: shards {missing} have not been written; run the rest before finishing")
        if surplus := sorted(set(indices) - set(planned)):
            raise ValueError(
                f"{self.folder}: shards {surplus} are of a longer list of utterances; write to a new folder"
            )
        if self._is_finished(keys):
            return
        entries: list[dict[str, Any]] = []
        bad: list[QuarantinedAudio] = []
        tables = [_empty_index(self.infos, self.with_audio)]
        for index, (footer, table) in zip(planned, self._of_shards(self._index_of, planned)):
            if keys is not None and footer.key != keys[index]:
                self.has_shard(index, keys[index])  # says what is wrong
            bad += footer.quarantine
            tables.append(table)
            path = shard_path(self.folder, index)
            entries.append(
                {
                    "file": path.name,
                    "num_utterances": footer.num_rows,
                    "bytes": path.stat().st_size,
                    "key": footer.key,
                }
            )
        index_table = pa.concat_tables(tables)
        content = index_content(index_table, str(self.folder))
        if bad:
            write_atomically(self.folder / QUARANTINE, "".join(to_json(asdict(b)) + "\n" for b in bad).encode())
        else:
            (self.folder / QUARANTINE).unlink(missing_ok=True)
        filled = {entry["file"]: entry["num_utterances"] for entry in entries}
        write_atomically(self.folder / CARD, card(self.infos, self.with_audio, filled).encode())
        write_atomically(self.folder / INDEX, content)
        totals = {"num_utterances": len(index_table), "num_quarantined": len(bad), "shards": entries}
        write_atomically(self.folder / METADATA, self._metadata(totals, complete=True))

    @property
    def shards(self) -> list[int]:
        """The numbers of the shards that are there now."""
        return [shard_index(path) for path in shard_files(self.folder)]

    @property
    def quarantined(self) -> list[QuarantinedAudio]:
        """All bad utterances of the shards that are there."""
        return [item for index in self.shards for item in self.footer(index).quarantine]

    def footer(self, index: int) -> Footer:
        """Of a shard that is there; ValueError if it is damaged, or of another store."""
        if index not in self._footers:
            path = shard_path(self.folder, index)
            self._footers[index] = self._checked_footer(read_footer(open_shard(path), path), index)
        return self._footers[index]

    def read_footers(self) -> None:
        """Of all shards that are there, so that they need not be read one by one."""
        for _ in self._of_shards(self.footer, self.shards):
            pass

    def _of_shards(self, read: Callable[[int], Result], indices: Iterable[int]) -> Iterator[Result]:
        """What is read of each of them, in their order; some are read at a time."""
        with ThreadPoolExecutor(READERS) as pool:
            yield from pool.map(read, indices)

    def _checked_footer(self, footer: Footer, index: int) -> Footer:
        path = shard_path(self.folder, index)
        if footer.index != index:
            raise ValueError(f"{path} is shard {footer.index} under another name; give it its name back, or delete it")
        self._check(footer.infos, footer.with_audio, f"{path} holds other tokens")
        return footer

    def _check(self, there: Infos, with_audio: bool, what: str) -> None:
        differing = differences(there, self.infos)
        if with_audio != self.with_audio:
            differing.append(f"with_audio: {with_audio} / {self.with_audio}")
        if differing:
            raise ValueError(f"{what} (there / now): {'; '.join(differing)}; write to a new folder")

    def _is_finished(self, keys: Sequence[str] | None) -> bool:
        metadata = read_metadata(self.folder)
        if not metadata.get("complete") or not (self.folder / CARD).exists():
            return False
        try:
            indexed = pq.read_metadata(self.folder / INDEX).num_rows
        except (pa.ArrowException, OSError):  # gone or damaged: it is made anew
            return False
        entries = metadata["shards"]
        there = [(path.name, path.stat().st_size) for path in shard_files(self.folder)]
        counted = sum(entry["num_utterances"] for entry in entries) == indexed
        return (
            counted
            and there == [(entry["file"], entry["bytes"]) for entry in entries]
            and (keys is None or [entry["key"] for entry in entries] == list(keys))
        )

    def _index_of(self, index: int) -> tuple[Footer, pa.Table]:
        path = shard_path(self.folder, index)
        file = open_shard(path, verify=True)
        footer = self._checked_footer(read_footer(file, path), index)
        schema = _empty_index(self.infos, self.with_audio).schema
        table = read_columns(file, path, [name for name in schema.names[:-2] if name in file.schema_arrow.names])
        for name in schema.names[len(table.column_names) : -2]:  # a shard of before there were MANIFEST_COLUMNS
            table = table.append_column(schema.field(name), pa.nulls(len(table), pa.string()))
        table = table.append_column(schema.field("shard"), pa.array(np.full(len(table), index, np.int32)))
        return footer, table.append_column(schema.field("row"), pa.array(np.arange(len(table), dtype=np.int32))).cast(
            schema
        )

    def _ids(self, index: int) -> list[str]:
        path = shard_path(self.folder, index)
        return read_columns(open_shard(path, verify=True), path, ["id"])["id"].to_pylist()

    def _metadata(self, totals: dict[str, Any], complete: bool) -> bytes:
        single = list(self.infos) == [SINGLE]
        teachers = {name: asdict(info) for name, info in self.infos.items()}
        content: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            **(teachers[SINGLE] if single else {"teachers": teachers}),
            "with_audio": self.with_audio,
            "complete": complete,
            **totals,
        }
        return (to_json(content, indent=2) + "\n").encode()


class TokenStoreWriter(StoreWriter):
    """Writes the store of one teacher: by shards of TokenRow, or by `add`, in a `with` block that finishes it."""

    def __init__(
        self,
        folder: str | Path,
        info: StoreInfo,
        shard_utterances: int = SHARD_UTTERANCES,
        with_audio: bool = False,
    ) -> None:
        super().__init__(folder, {SINGLE: info}, with_audio)
        self.info = info
        self.shard_utterances = shard_utterances
        self._pending: list[TokenRow | QuarantinedAudio] = []
        self._known: set[str] | None = None
        self._next = 0  # no shard before this one is free

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def __contains__(self, id: str) -> bool:
        """Whether a shard holds this utterance, or holds it as bad."""
        return id in self._done

    def add(self, id: str, codes: np.ndarray, num_samples: int, audio_checksum: int | None = None) -> bool:
        """Adds an utterance; False if a shard has it already."""
        return self._append(TokenRow(id, codes, num_samples, audio_checksum))

    def add_bad(self, id: str, path: str, error: str) -> bool:
        """Adds an utterance to the quarantine; False if a shard has it already."""
        return self._append(QuarantinedAudio(id, path, error))

    def write_shard(
        self,
        index: int,
        rows: Sequence[TokenRow],
        quarantined: Sequence[QuarantinedAudio] = (),
        key: str | None = None,
    ) -> None:
        """Writes one shard; without a `key` it is that of a list of these ids."""
        ids = [*(row.id for row in rows), *(item.id for item in quarantined)]
        self.write(index, list_key((id, None) for id in ids) if key is None else key, {SINGLE: rows}, quarantined)
        if self._known is not None:
            self._known.update(ids)

    def finish(self, num_shards: int | None = None, keys: Sequence[str] | None = None) -> None:
        """Writes what is pending as a shard, and completes the store."""
        self._flush()
        super().finish(num_shards, keys)

    @property
    def _done(self) -> set[str]:
        if self._known is None:
            bad: Iterable[str] = (item.id for item in self.quarantined)
            self._known = {*(id for index in self.shards for id in self._ids(index)), *bad}
        return self._known

    def _append(self, item: TokenRow | QuarantinedAudio) -> bool:
        if item.id in self._done:
            return False
        self._pending.append(item)
        if len(self._pending) >= self.shard_utterances:
            self._flush()
        return True

    def _flush(self) -> None:
        if self._pending:
            rows = [item for item in self._pending if isinstance(item, TokenRow)]
            bad = [item for item in self._pending if isinstance(item, QuarantinedAudio)]
            free = (n for n in itertools.count(self._next) if not shard_path(self.folder, n).exists())
            self._next = next(free)
            self.write_shard(self._next, rows, bad)
            self._pending = []


def _empty_index(infos: Infos, with_audio: bool) -> pa.Table:
    counts = [(f"{prefix(name)}num_frames", pa.int64()) for name in infos]
    texts = [(name, pa.string()) for name in MANIFEST_COLUMNS if with_audio]
    columns = [("id", pa.large_string()), ("num_samples", pa.int64()), *counts, *texts]
    columns += [("shard", pa.int32()), ("row", pa.int32())]
    return pa.schema([pa.field(*column, nullable=column in texts) for column in columns]).empty_table()
