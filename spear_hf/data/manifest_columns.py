# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Manifests of millions of rows, as columns.

A manifest is read in blocks of lines. Arrow reads those of plain rows, others are read row by row, as manifest.py does
it, and manifest.py alone tells what is wrong: so the utterances are those of `read_manifest`, and so are the errors.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from .audio import SAMPLING_RATE
from .decoding import utterance_seconds
from .manifest import (
    ALIASES,
    COLUMNS,
    DELIMITERS,
    DOMAINS,
    MANIFEST_NAME,
    Utterance,
    check_manifest,
    checked_splits,
    json_rows,
    read_manifest,
    row_values,
    table_rows,
)
from .utterances import CHUNK, Column, ListedUtterances, UtteranceList


BLOCK = 1 << 23  # bytes, of whole lines
_COUNTS = {"num_samples": 1, "start": 0, "sampling_rate": 1}  # and the least of each
_NAMES = (*COLUMNS, "sampling_rate", *ALIASES)
_OWN = ("id", "path", "transcript", "sha256")  # of every utterance another, as a rule; of other columns a few values
_HIGHEST = 2**39  # larger counts are left to Python's numbers; those of 16,000 times as many are exact yet
_LONGEST = 1 << 17  # bytes of a field in a table; `csv` refuses one of so many characters


class ManifestUtterances(UtteranceList):
    """Those of a manifest, or some `rows` of it. Held are the columns in which there is something."""

    def __init__(self, table: pa.Table, folder: Path, rows: np.ndarray | None = None) -> None:
        self.table = table
        self.folder = folder
        self.rows = rows

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def __iter__(self) -> Iterator[Utterance]:
        for start in range(0, len(self), CHUNK):
            some = self.between(start, min(start + CHUNK, len(self)))
            columns = {name: some._column(name).to_pylist() for name in self.table.column_names}
            for values in zip(*columns.values()):
                yield self._utterance(dict(zip(columns, values)))

    def at(self, place: int) -> Utterance:
        row = place if self.rows is None else int(self.rows[place])
        return self._utterance({name: self.table[name][row].as_py() for name in self.table.column_names})

    def between(self, start: int, stop: int) -> "ManifestUtterances":
        if self.rows is None:
            return ManifestUtterances(self.table.slice(start, stop - start), self.folder)
        return ManifestUtterances(self.table, self.folder, self.rows[start:stop])

    def take(self, places: np.ndarray) -> "ManifestUtterances":
        return ManifestUtterances(self.table, self.folder, places if self.rows is None else self.rows[places])

    def with_domain(self, domain: str) -> "ManifestUtterances":
        """The same, those of the manifest without a domain having this one."""
        known = ManifestUtterances(self.table, self.folder).domains.filled(domain)
        column = pa.DictionaryArray.from_arrays(pa.array(known.places), pa.array(known.values, pa.large_string()))
        others = self.table.select([name for name in self.table.column_names if name != "domain"])
        return ManifestUtterances(others.append_column("domain", column), self.folder, self.rows)

    @property
    def ids(self) -> Iterator[str]:
        return (id for chunk in self.id_chunks() for id in chunk.to_pylist())

    def id_chunks(self) -> Iterator[pa.LargeStringArray]:
        for start in range(0, len(self), CHUNK):
            yield self.between(start, min(start + CHUNK, len(self)))._column("id")

    @property
    def domains(self) -> Column:
        return self._few("domain")

    @property
    def splits(self) -> Column:
        return self._few("split")

    @property
    def lengths(self) -> np.ndarray:
        """From the manifest or else from the audio file's header."""
        lengths = self.listed_lengths
        for place in np.flatnonzero(lengths < 0).tolist():
            lengths[place] = round(utterance_seconds(self.at(place)) * SAMPLING_RATE)
        return lengths

    @property
    def listed_lengths(self) -> np.ndarray:
        return self._counts("num_samples")

    @property
    def listed_starts(self) -> np.ndarray:
        return self._counts("start")

    def _counts(self, name: str) -> np.ndarray:
        if name not in self.table.column_names:
            return np.full(len(self), -1)
        return np.array(self._column(name).fill_null(-1))

    def _few(self, name: str) -> Column:
        if name not in self.table.column_names:
            return Column([None], np.broadcast_to(np.int8(0), len(self)))
        return Column.of_strings(pa.chunked_array([self._column(name)]))

    def _column(self, name: str) -> pa.Array:
        column = self.table[name]
        array = column.chunk(0) if column.num_chunks else pa.array([], column.type)
        return array if self.rows is None else array.take(pa.array(self.rows))

    def _utterance(self, values: dict[str, Any]) -> Utterance:
        labels = values.pop("labels", None)
        if labels is not None:
            values["label"] = tuple(labels)
        return Utterance(**{**values, "path": self.folder / values["path"]})


def open_manifest(
    source: str | os.PathLike, split: str | Sequence[str] | None = None, domain: str | None = None
) -> UtteranceList:
    """What `read_manifest` reads, in columns; `domain` is that of the utterances that have none."""
    source = Path(source)
    if (source / MANIFEST_NAME).is_file():
        source = source / MANIFEST_NAME
    table = None
    if source.is_file():
        table = _table(source)
        if table is None or _may_repeat(table["id"]):
            check_manifest(source)
    if table is None:
        listed = read_manifest(source, split)
        return ListedUtterances(listed if domain is None else [replace(u, domain=u.domain or domain) for u in listed])
    utterances = ManifestUtterances(table, source.parent)
    if split is not None:
        wanted = checked_splits(split, utterances.splits.present, source)
        utterances = utterances.take(np.flatnonzero(utterances.splits.among(wanted)))
    return utterances if domain is None else utterances.with_domain(domain)


def _table(source: Path) -> pa.Table | None:
    """The columns of a manifest; None where something is wrong, or cannot be held by columns."""
    try:
        table = pa.concat_tables(_tables(source), promote_options="default").unify_dictionaries()
    except ValueError:
        return None
    paths_are_ids = table["path"].equals(table["id"])
    for place, name in enumerate(table.column_names):  # one by one, so that only one is there twice
        column = table["id"] if name == "path" and paths_are_ids else table[name].combine_chunks()
        table = table.set_column(place, name, column)
    return table


def _may_repeat(ids: pa.ChunkedArray) -> bool:
    """Whether there are two of one hash: the same id, or once in ten thousand manifests of millions, not."""
    hashes = np.empty(len(ids), np.int64)
    for start in range(0, len(ids), CHUNK):
        hashes[start : start + CHUNK] = list(map(hash, ids.slice(start, CHUNK).to_pylist()))
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of lines into tables of the columns of utterances: those in which there is something
# ---------------------------------------------------------------------------------------------------------------------


def _tables(source: Path) -> Iterator[pa.Table]:
    suffix = source.suffix.lower()
    if suffix in DELIMITERS:
        yield from _of_delimited(_blocks(source), source, DELIMITERS[suffix])
    elif suffix == ".jsonl":
        for block in _blocks(source):
            table = _of_json(block)
            yield from _of_rows(json_rows(_text(block, None), source), source) if table is None else [table]


def _blocks(source: Path) -> Iterator[bytes]:
    """Whole lines, each with its end."""
    with open(source, "rb") as file:
        rest = file.read(BLOCK).removeprefix(b"\xef\xbb\xbf")
        while more := file.read(BLOCK):
            block, end, rest = (rest + more).rpartition(b"\n")
            yield block + end
    if rest:
        yield rest if rest.endswith(b"\n") else rest + b"\n"


def _text(block: bytes, newline: str | None) -> Iterable[str]:
    """Its lines as manifest.py reads them."""
    return io.TextIOWrapper(io.BytesIO(block), encoding="utf-8", errors="surrogateescape", newline=newline)


def _of_rows(rows: Iterator[tuple[int, dict[str, Any]]], source: Path) -> Iterator[pa.Table]:
    values = (row_values(row, str(source)) for _, row in rows)
    while some := list(islice(values, CHUNK)):
        columns = {name: [row.get(name) for row in some] for name in COLUMNS}
        labels = columns["label"]
        columns["label"] = [label if isinstance(label, str) else None for label in labels]
        columns["labels"] = [label if isinstance(label, tuple) else None for label in labels]
        arrays = {name: pa.array(values, _type(name)) for name, values in columns.items()}
        yield _packed(arrays)


def _of_json(block: bytes) -> pa.Table | None:
    """None where the block is to be read row by row."""
    block = block.replace(b"\r\n", b"\n")
    # Every line begins and ends with an object. If there are as many objects as lines, each is one.
    lines = block.count(b"\n")
    if not (block.startswith(b"{") and block.endswith(b"}\n") and block.count(b"}\n{") == lines - 1):
        return None
    # What is spelled otherwise, "p\u0061th", is unknown to Arrow.
    names = [name for name in _NAMES if f'"{name}"'.encode() in block]
    if b"\r" in block or b"\\u0000" in block:
        return None
    schema = pa.schema([(name, pa.int64() if name in _COUNTS else pa.large_string()) for name in names])
    try:
        block.decode()
        rows = pyarrow.json.read_json(
            pa.BufferReader(block),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(block)),
            pyarrow.json.ParseOptions(schema, newlines_in_values=False, unexpected_field_behavior="error"),
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    return _of_arrow(rows) if len(rows) == lines else None


def _of_delimited(blocks: Iterator[bytes], source: Path, delimiter: str) -> Iterator[pa.Table]:
    """Where Arrow cannot read a block, the rest of the manifest is read by the rows: quotes may hold ends of lines."""
    first = next(blocks, b"")
    header, _, rows = first.partition(b"\n")
    names = header.removesuffix(b"\r").decode().split(delimiter)
    plain = len(set(names)) == len(names) and set(names) <= set(_NAMES)
    blocks = chain([rows if plain else first], blocks)
    for block in blocks:
        table = _of_plain(block, names, delimiter) if plain else None
        if table is not None:
            yield table
            continue
        lines = (line for part in chain([block], blocks) for line in _text(part, ""))
        yield from _of_rows(table_rows(lines, source, delimiter, names if plain else None), source)


def _of_plain(block: bytes, names: list[str], delimiter: str) -> pa.Table | None:
    """Without quotes, lines are rows. None where the block is to be read row by row."""
    block = block.replace(b"\r\n", b"\n")
    if b'"' in block or b"\r" in block or b"\0" in block:
        return None
    try:
        rows = pyarrow.csv.read_csv(
            pa.BufferReader(block),
            pyarrow.csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=False),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.large_string())),
        )
        columns = []
        for name, column in zip(names, rows.columns):
            if pc.max(pc.binary_length(column)).as_py() >= _LONGEST:
                return None
            column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
            if name in _COUNTS:
                if not pc.all(pc.match_substring_regex(column, "^[0-9]{1,15}$"), min_count=0).as_py():
                    return None
                column = column.cast(pa.int64())
            columns.append(column)
    except pa.ArrowException:
        return None
    return _of_arrow(pa.table(columns, names))


def _of_arrow(rows: pa.Table) -> pa.Table | None:
    """None where something may be wrong, which is then looked at row by row."""
    columns = {ALIASES.get(name, name): rows[name].combine_chunks() for name in rows.column_names}
    if len(columns) < rows.num_columns or "path" not in columns:
        return None
    path = columns["path"]
    if path.null_count or pc.any(pc.equal(path, "")).as_py():
        return None
    if "id" in columns:
        named = pc.fill_null(pc.not_equal(columns["id"], ""), False)
        columns["id"] = pc.if_else(named, columns["id"], path)
    domains = pc.is_in(columns.get("domain", path[:0]), pa.array([*DOMAINS, None], pa.large_string()))
    if not pc.all(domains, min_count=0).as_py():
        return None
    for name in _COUNTS.keys() & columns.keys():
        bounds = pc.min_max(columns[name]).as_py()
        if bounds["min"] is not None and not _COUNTS[name] <= bounds["min"] <= bounds["max"] <= _HIGHEST:
            return None
    rate, start = columns.pop("sampling_rate", None), columns.get("start")
    samples = columns.get("num_samples", pa.nulls(len(path), pa.int64()))
    if start is not None and (rate is not None or pc.any(pc.and_(start.is_valid(), samples.is_null())).as_py()):
        return None
    if rate is not None:
        counted, rates = samples.fill_null(0).to_numpy(), rate.fill_null(SAMPLING_RATE).to_numpy()
        counted = -(-counted * SAMPLING_RATE // rates)  # rounded up
        columns["num_samples"] = pa.array(counted, mask=samples.is_null().to_numpy(zero_copy_only=False))
    return _packed({"id": path, **columns})


def _packed(columns: dict[str, pa.Array]) -> pa.Table:
    """Without what is empty."""
    kept = {name: column for name, column in columns.items() if column.null_count < len(column)}
    few = {name for name, column in kept.items() if pa.types.is_large_string(column.type)} - {*_OWN}
    return pa.table({name: column.dictionary_encode() if name in few else column for name, column in kept.items()})


def _type(name: str) -> pa.DataType:
    if name == "labels":
        return pa.list_(pa.string())
    return pa.int64() if name in _COUNTS else pa.large_string()
