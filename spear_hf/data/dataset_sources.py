# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Datasets as sources of audio, through the `datasets` library: of the Hub, of parquet and tar files, and saved ones.

A piece is one of the dataset's own files. Audio is taken out as it is stored and decoded by audio.py, so neither
torchcodec nor FFmpeg is needed.
"""

import glob
import hashlib
import json
import os
import re
import tarfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .ids import id_hashes
from .manifest import AUDIO_SUFFIXES, DOMAINS, Utterance, check_unicode
from .sources import DATASET_SUFFIXES, AudioSource, Columns, HeadSource, Piece, fingerprint, is_saved_dataset


ID_COLUMNS = ("id", "path")  # looked for where no column is named
PLACE = "#"  # in place of a column of ids: FILE#ROW, whatever columns there are
ROWS = 16  # of a parquet file, turned into Python objects at a time
_PLAIN = ("binary", "large_binary", "string", "large_string")  # types of columns that hold files, or paths of files
_ENDS = 1 << 16  # bytes at either end of a file that its fingerprint takes in; the footer of parquet is there
_REMOTE = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<commit>[^/]+)/(?P<name>.+)")
_READING = (OSError, ValueError, pa.ArrowException, tarfile.TarError, EOFError, RuntimeError)


class RowError(ValueError):
    """A row that was read, and is wrong; the message says how."""


@dataclass(frozen=True)
class DataFile:
    """A file of a dataset: where it is (a path, or hf://...), and its name in the dataset."""

    where: str
    name: str

    def key(self) -> str:
        """Of a file of the Hub the commit and name; of others name, size and both ends of the content."""
        if _REMOTE.fullmatch(self.where):
            return fingerprint(self.where)
        size = os.path.getsize(self.where)
        with open(self.where, "rb") as file:
            digest = hashlib.sha256(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
        return fingerprint([self.name, size, digest.hexdigest()])


def dataset_source(
    spec: str, splits: Sequence[str], config: str | None, revision: str | None, columns: Columns, domain: str | None
) -> AudioSource:
    """The dataset that `spec` names, see sources.py."""
    path = Path(spec)
    folder = path.is_dir()
    named = not folder and (path.suffix.lower() in DATASET_SUFFIXES or glob.has_magic(spec))
    saved = folder and is_saved_dataset(path)
    for name, value, is_local in (("revision", revision, folder or named), ("config", config, saved or named)):
        if value is not None and is_local:
            raise ValueError(f"{name}={value!r} is for datasets of the Hub, and {spec} is none")
    if saved:
        return SavedSource(path, splits, columns, domain)
    if not named:
        kind, files = _resolved(spec, splits, config, revision)
    else:
        if splits:
            raise ValueError(f"split={', '.join(splits)}: files that are named themselves have no splits, as {spec}")
        kind, files = _matching(spec)
    source = ParquetSource if kind == "parquet" else TarSource
    return source(spec, files, columns, domain)


class DatasetSource(AudioSource):
    """What datasets of all kinds have in common; subclasses read the rows of a piece."""

    def __init__(self, name: str, columns: Columns, domain: str | None) -> None:
        self.name = name
        self.columns = replace(columns, id=None) if columns.id == PLACE else columns
        self.domain = domain

    @abstractmethod
    def _piece_file(self, index: int) -> tuple[str, str]:
        """Name and key of the file of a piece."""

    @abstractmethod
    def _rows(self, index: int) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
        """Id where no column is named for it, row, and the audio as it is stored."""

    def __getitem__(self, index: int) -> Piece:
        index = range(len(self))[index]
        name, key = self._piece_file(index)
        made_of = fingerprint([key, self.columns.audio, self.columns.id])
        return Piece(index, made_of, None, lambda: self._utterances(index, name))

    def describe(self) -> str:
        return f"{len(self)} files of {self.name}"

    def check_ids(self) -> None:
        if self.columns.id is None:
            return  # FILE#ROW
        parts = [id_hashes(self._piece_ids(index)) for index in range(len(self))]
        hashes, owners = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        order = np.argsort(hashes, kind="stable")
        hashes, owners = hashes[order], owners[order]
        alike = np.flatnonzero((hashes[1:] == hashes[:-1]) & (owners[1:] != owners[:-1]))
        for one, other in zip(owners[alike].tolist(), owners[alike + 1].tolist()):
            if both := {*self._piece_ids(one)} & {*self._piece_ids(other)}:
                names = [self._piece_file(index)[0] for index in (one, other)]
                raise ValueError(
                    f"{' and '.join(names)} of {self.name} have the same id, {min(both)!r}: name a column of ids that "
                    "are unique over all files (--id-column), or none of them (--id-column '#': FILE#ROW)"
                )

    def _piece_ids(self, index: int) -> list[str]:
        """The column of ids, as far as it can be had without reading all of a piece."""
        return []

    def subset(self, seed: int, max_hours: float) -> HeadSource:
        """An equal share of every piece, from its beginning: what lies further back need not be fetched for it."""
        return HeadSource(self, 3600 * max_hours / len(self))

    def _utterances(self, index: int, name: str) -> Iterator[Utterance]:
        seen: dict[str, int] = {}
        rows = self._rows(index)
        for number in range(2**63):
            try:
                row = next(rows, None)
            except RowError:
                raise
            except _READING as error:
                raise ValueError(
                    f"{name} cannot be read after row {number}: {type(error).__name__}: {error} (truncated? fetch it "
                    "anew, or leave it out)"
                ) from error
            if row is None:
                return
            utterance = self._utterance(*row, place=f"{name}#{number}")
            if utterance.id in seen:
                raise ValueError(
                    f"{name}: rows {seen[utterance.id]} and {number} have the same id, {utterance.id!r}: name a "
                    "column of ids that are unique (--id-column, or '#' for FILE#ROW), or rename one"
                )
            check_unicode(utterance.id, f"{name}, row {number}: the id {utterance.id!r}")
            seen[utterance.id] = number
            yield utterance

    def _utterance(self, id: str, row: Mapping[str, Any], stored: Any, place: str) -> Utterance:
        if self.columns.id is not None:
            value = row.get(self.columns.id)
            if not isinstance(value, (str, int)) or value == "":
                raise ValueError(f"{place}: {self.columns.id}={value!r:.80} is no id; name another (--id-column)")
            id = str(value)
        domain = self.domain
        if self.columns.domain is not None:
            domain = row.get(self.columns.domain) or domain
            if domain not in (None, *DOMAINS):
                raise ValueError(f"{place}: {self.columns.domain}={domain!r} must be one of {', '.join(DOMAINS)}")
        content, path = stored, None
        if isinstance(stored, Mapping):
            content, path = stored.get("bytes"), stored.get("path")
        elif isinstance(stored, str):
            content, path = None, stored
        if content is None and path:
            return Utterance(id=id, path=self._folder() / path, domain=domain)
        return Utterance(id=id, path=Path(place), domain=domain, content=bytes(content or b""))

    def _folder(self) -> Path:
        """What paths of audio files are relative to."""
        folder = Path(self.name)
        return folder if folder.is_dir() else folder.parent


class _FileSource(DatasetSource):
    """One of many files, each a piece."""

    def __init__(self, name: str, files: Sequence[DataFile], columns: Columns, domain: str | None) -> None:
        super().__init__(name, columns, domain)
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def _piece_file(self, index: int) -> tuple[str, str]:
        return self.files[index].name, self.files[index].key()


class ParquetSource(_FileSource):
    """Parquet files, each a piece; streamed, with a row group in memory (usual: 100 rows), or 32 MB of small ones."""

    def __init__(self, name: str, files: Sequence[DataFile], columns: Columns, domain: str | None) -> None:
        features = _guarded(lambda: self._dataset(files[0].where).features or {}, files[0].name)
        super().__init__(name, files, _chosen(columns, features, name), domain)
        self._has_plain_ids = isinstance(features.get(self.columns.id), datasets.Value)

    def _rows(self, index: int) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
        audio = self.columns.audio
        wanted = [name for name in (audio, self.columns.id, self.columns.domain) if name is not None]
        dataset = self._dataset(self.files[index].where, columns=list(dict.fromkeys(wanted)))
        for number, row in enumerate(_stored(dataset, audio)):
            yield f"{self.files[index].name}#{number}", row, row[audio]

    def _dataset(self, where: str, **options: Any) -> datasets.IterableDataset:
        name = where if _REMOTE.fullmatch(where) else glob.escape(where)  # it is taken for a pattern
        return datasets.load_dataset(
            "parquet", data_files={"piece": [name]}, split="piece", streaming=True, batch_size=ROWS, **options
        )

    def _piece_ids(self, index: int) -> list[str]:
        file, id = self.files[index], self.columns.id
        if _REMOTE.fullmatch(file.where) or not self._has_plain_ids:
            return []
        return _texts(_guarded(lambda: pq.read_table(file.where, columns=[id])[id].to_pylist(), file.name))


class SavedSource(DatasetSource):
    """Datasets of `save_to_disk`, mapped into memory; pieces are as many rows as one of its files has."""

    def __init__(self, folder: Path, splits: Sequence[str], columns: Columns, domain: str | None) -> None:
        found = _guarded(lambda: datasets.load_from_disk(str(folder)), str(folder))
        if isinstance(found, datasets.DatasetDict):
            chosen = [(name, found[name]) for name in _known(splits, list(found), str(folder))]
        elif splits:
            raise ValueError(f"split={', '.join(splits)}: the saved dataset {folder} has no splits")
        else:
            chosen = [("", found)]
        chosen = [(name, dataset) for name, dataset in chosen if len(dataset)]
        if not chosen:
            raise ValueError(f"{folder} has no rows")
        super().__init__(str(folder), _chosen(columns, chosen[0][1].features, str(folder)), domain)
        self._pieces = [
            (dataset, place, len(dataset.cache_files) or 1, name)
            for name, dataset in chosen
            for place in range(len(dataset.cache_files) or 1)
        ]

    def __len__(self) -> int:
        return len(self._pieces)

    def _piece_file(self, index: int) -> tuple[str, str]:
        dataset, place, _, split = self._pieces[index]
        where = dataset.cache_files[place]["filename"]
        name = f"{split}/{Path(where).name}" if split else Path(where).name
        return name, DataFile(where, name).key()

    def _piece_ids(self, index: int) -> list[str]:
        dataset, place, count, _ = self._pieces[index]
        if not isinstance(dataset.features[self.columns.id], datasets.Value):
            return []
        return _texts(dataset.shard(count, place, contiguous=True)[self.columns.id])

    def _rows(self, index: int) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
        dataset, place, count, _ = self._pieces[index]
        name = self._piece_file(index)[0]
        # `save_to_disk` divides rows among files as `shard` does.
        rows = _stored(dataset.shard(count, place, contiguous=True), self.columns.audio)
        for number, row in enumerate(rows):
            yield f"{name}#{number}", row, row[self.columns.audio]


class TarSource(_FileSource):
    """Tar files in the format of WebDataset, each a piece: members of one name and several suffixes make a row.

    The name goes up to the first dot of the file's own name. The fields of a .json member are the row's columns, and
    so are texts, by their suffix.
    """

    def _rows(self, index: int) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
        file = self.files[index]
        if not _REMOTE.fullmatch(file.where):
            _check_end(file.where)
        key: str | None = None
        row: dict[str, Any] = {}
        audio: bytes | None = None
        for member, opened in datasets.StreamingDownloadManager().iter_archive(file.where):
            folder, base = os.path.split(member)
            stem, _, suffix = base.partition(".")
            if not suffix:
                continue
            name = f"{folder}/{stem}" if folder else stem
            if name != key and key is not None:
                yield f"{file.name}#{key}", row, audio
            if name != key:
                key, row, audio = name, {"__key__": name}, None
            place = f"{file.name}, member {member}"
            if not self._is_audio(suffix.lower()):
                self._add(row, suffix.lower(), opened, place)
            elif audio is None:
                audio = opened.read()
            else:
                raise RowError(
                    f"{place}: the row has audio already; name the suffix of the one that is meant (--audio-column)"
                )
        if key is not None:
            yield f"{file.name}#{key}", row, audio

    def _is_audio(self, suffix: str) -> bool:
        if self.columns.audio is None:
            return "." + suffix.rpartition(".")[2] in AUDIO_SUFFIXES
        return suffix == self.columns.audio.lower().removeprefix(".")

    def _add(self, row: dict[str, Any], suffix: str, opened: Any, place: str) -> None:
        if suffix == "json":
            try:
                fields = json.loads(opened.read())
            except (ValueError, RecursionError) as error:
                raise RowError(f"{place} is not JSON: {error}") from error
            row.update(fields if isinstance(fields, dict) else {})
        elif suffix in (self.columns.id, self.columns.domain):
            row[suffix] = opened.read().decode().strip()


def _check_end(where: str) -> None:
    """A tar file cut off between two members would read as a shorter one."""
    with open(where, "rb") as file:
        file.seek(max(0, os.path.getsize(where) - tarfile.BLOCKSIZE))
        if file.read() != bytes(tarfile.BLOCKSIZE):
            raise ValueError("the mark at the end of a tar file is missing")


def _resolved(
    spec: str, splits: Sequence[str], config: str | None, revision: str | None
) -> tuple[str, list[DataFile]]:
    """Kind and files of a dataset that `datasets` finds by itself: of the Hub or a local folder."""
    local = os.path.isdir(spec)
    try:
        builder = datasets.load_dataset_builder(
            os.path.abspath(spec) if local else spec, config, revision=None if local else revision
        )
    except _READING as error:
        raise ValueError(
            f"{spec} cannot be opened as a dataset{'' if local else ' of the Hub, and there is no such path'}: "
            f"{type(error).__name__}: {error}"
        ) from error
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in ("parquet", "webdataset"):
        raise ValueError(
            f"{spec} consists of files that `datasets` reads as {kind}; parquet and WebDataset files can be streamed. "
            "Download it, and name the folder of its audio or a manifest"
        )
    found = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    root = os.path.abspath(spec)
    files = [
        DataFile(where, match["name"] if (match := _REMOTE.fullmatch(where)) else os.path.relpath(where, root))
        for split in _known(splits, list(found), spec)
        for where in found[split]
    ]
    return kind, files


def _matching(pattern: str) -> tuple[str, list[DataFile]]:
    """Kind and files of a path or a pattern of paths."""
    found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)  # a name may hold a [
    paths = sorted(path for path in found if os.path.isfile(path))
    if not paths:
        raise ValueError(f"{pattern} matches no file: name an existing file or folder, or a pattern that matches some")
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    if len(suffixes) > 1 or not suffixes <= set(DATASET_SUFFIXES):
        raise ValueError(
            f"{pattern} matches files that end in {', '.join(sorted(suffixes))}: all must end in one of "
            f"{', '.join(DATASET_SUFFIXES)}"
        )
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return suffixes.pop()[1:], [DataFile(path, os.path.relpath(path, root)) for path in paths]


def _known(splits: Sequence[str], known: Sequence[str], name: str) -> Sequence[str]:
    """The splits asked for, or all."""
    for split in splits:
        if split not in known:
            raise ValueError(f"split={split!r} is not in {name}, whose splits are: {', '.join(known)}")
    return splits or known


def _chosen(columns: Columns, features: Mapping[str, Any], name: str) -> Columns:
    """The columns with what was left open filled in. ValueError naming one that is missing or of no use."""
    for column in (columns.audio, columns.id, columns.domain):
        if column not in (None, PLACE) and column not in features:
            raise ValueError(f"{name} has no column {column!r}; it has: {', '.join(features)}")
    audio = columns.audio
    if audio is None:
        found = [column for column, feature in features.items() if _is_audio(feature)]
        if len(found) != 1 and "audio" in features:
            found = ["audio"]
        if len(found) != 1:
            raise ValueError(
                f"{name} has {len(found)} columns of audio; name the one that is meant (--audio-column). It has: "
                f"{', '.join(features)}"
            )
        audio = found[0]
    feature = features[audio]
    if not (_is_audio(feature) or (isinstance(feature, datasets.Value) and feature.dtype in _PLAIN)):
        raise ValueError(
            f"{name}: column {audio!r} is {feature}; audio must be of the type Audio, the bytes of a file, or its path"
        )
    id = columns.id or next((column for column in ID_COLUMNS if column in features), None)
    return Columns(audio, None if id == PLACE else id, columns.domain)


_PLAIN = ("binary", "large_binary", "string", "large_string")


def _is_audio(feature: Any) -> bool:
    return isinstance(feature, datasets.Audio) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _stored(dataset: Any, audio: str | None) -> Any:
    """The dataset with its audio as it is stored, whatever could decode it."""
    if isinstance(dataset.features[audio], datasets.Audio):
        return dataset.cast_column(audio, datasets.Audio(decode=False))
    return dataset


def _texts(ids: Iterable[Any]) -> list[str]:
    """Those that are there; who reads the row of one that is not says so."""
    return [str(id) for id in ids if id is not None]


def _guarded(action: Callable[[], Any], name: str) -> Any:
    try:
        return action()
    except _READING as error:
        raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}") from error
