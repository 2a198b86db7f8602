# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Lists of utterances: from a folder of audio files, or from a manifest (JSON lines, CSV or TSV).

A manifest has one utterance a row. Only `path` is compulsory, relative to the manifest's folder or absolute; the other
columns are the fields of `Utterance`; `file_name` and `text`, as `datasets` has them, stand for `path` and
`transcript`. With `start` and `num_samples` a row is a stretch of its file. A folder that
holds a `manifest.jsonl` is read by it, any other folder is searched for audio files, whose ids are their paths
relative to the folder.
"""

import csv
import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .audio import SAMPLING_RATE


MANIFEST_NAME = "manifest.jsonl"
DOMAINS = ("speech", "audio")
# What libsndfile decodes and people have; any other file is looked at only when it is named itself.
# fmt: off
AUDIO_SUFFIXES = frozenset({
    ".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".sph", ".w64",
    ".wav", ".wave",
})
# fmt: on
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MANIFEST_SUFFIXES = (".jsonl", *DELIMITERS)


@dataclass(frozen=True)
class Utterance:
    """One audio file, or a stretch of one, and what is known of it.

    `num_samples` counts samples at 16 kHz: a manifest's own count is converted when its `sampling_rate` is another.
    With `start`, also in samples at 16 kHz, the utterance is [start, start + num_samples) of its file. `content` is
    the file itself where it lies inside another one (a row of a parquet file, a member of a tar file), or what reads
    it; `path` is then the name that errors give it. `load_utterance` in decoding.py takes all this into account.
    """

    id: str
    path: Path
    domain: str | None = None  # "speech" or "audio"
    split: str | None = None
    label: str | tuple[str, ...] | None = None  # several for multi-label tasks
    transcript: str | None = None
    num_samples: int | None = None
    probe: str | None = None  # the labelled task it belongs to
    language: str | None = None
    speaker: str | None = None
    licence: str | None = None
    source: str | None = None
    sha256: str | None = None  # of the file
    start: int | None = None
    content: bytes | Callable[[], bytes] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.start is not None and (self.start < 0 or self.num_samples is None):
            raise ValueError(f"{self.id}: start={self.start} must not be negative, and needs num_samples with it")


COLUMNS = tuple(entry.name for entry in fields(Utterance) if entry.name != "content")  # of a manifest
_TEXT_COLUMNS = frozenset(COLUMNS) - {"id", "path", "label", "num_samples", "start"}
_COLUMNS = frozenset((*COLUMNS, "sampling_rate"))
_MOST = 2**53  # from where on the floating-point numbers of tables are not exact
ALIASES = {"file_name": "path", "text": "transcript"}


def find_audio(folder: str | os.PathLike) -> list[Path]:
    """Audio files below a folder by their suffix, sorted by relative path, as `find_files` has them."""
    found = [path for path in find_files(folder) if path.suffix.lower() in AUDIO_SUFFIXES]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def find_files(folder: str | os.PathLike) -> Iterator[Path]:
    """Files below a folder, in no order. What is hidden is skipped, and links to folders are followed.

    A folder that several links lead to is gone through once, and a link to one that `folder` is in not at all. OSError
    for one that may not be read.
    """
    above = {str(path) for path in Path(folder, "x").resolve().parents}
    seen: set[str] = set()
    pending = [os.fspath(folder)]
    while pending:
        links = []
        for top in pending:
            for parent, subfolders, names in os.walk(top, onerror=_raise):
                if (real := os.path.realpath(parent)) in seen:
                    subfolders.clear()
                    continue
                seen.add(real)
                subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
                inside = [os.path.join(parent, name) for name in subfolders]
                links += [path for path in inside if os.path.islink(path) and os.path.realpath(path) not in above]
                yield from (Path(parent) / name for name in names if not name.startswith("."))
        pending = links  # after the folders themselves, so that these keep their own names


def _raise(error: OSError) -> None:
    raise error


def read_manifest(source: str | os.PathLike, split: str | Sequence[str] | None = None) -> list[Utterance]:
    """The utterances of a folder or a manifest, in its order, or those of one or more splits. Files are not opened.

    Raises:
        ValueError: no such source, an unknown column, a missing path, a value of the wrong kind, an id that comes
            twice, an unknown split, or nothing found. The message names the manifest and the line.
    """
    source = Path(source)
    if source.is_dir():
        if (source / MANIFEST_NAME).is_file():
            source = source / MANIFEST_NAME
        else:
            return _read_folder(source, split)
    if not source.is_file():
        raise ValueError(f"{source} does not exist: name a folder of audio, or a manifest (.jsonl, .csv or .tsv)")

    with _collector_resting():
        utterances = [Utterance(**{**row, "path": source.parent / row["path"]}) for row in _unique_rows(source)]
    if not utterances:
        raise ValueError(f"{source} lists no utterance")
    if split is None:
        return utterances
    wanted = checked_splits(split, {utterance.split for utterance in utterances}, source)
    return [utterance for utterance in utterances if utterance.split in wanted]


def check_manifest(source: Path) -> None:
    """The ValueError of `read_manifest`, if there is one."""
    with _collector_resting():
        rows = sum(1 for _ in _unique_rows(source))
    if not rows:
        raise ValueError(f"{source} lists no utterance")


@contextmanager
def _collector_resting() -> Iterator[None]:
    """The collector of cycles looks at everything again whenever there is a quarter more: half the time of reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _unique_rows(source: Path) -> Iterator[dict[str, Any]]:
    """The rows of a manifest as `row_values` has them; ValueError where an id comes again."""
    lines: dict[str, int] = {}
    for line, row in rows_of_table(source):
        values = row_values(row, f"{source}, line {line}")
        id = values["id"]
        if id in lines:
            raise ValueError(
                f"{source}, line {line}: the id {id!r} is already on line {lines[id]}; "
                "ids must be unique (without an id column they are the paths)"
            )
        lines[id] = line
        yield values


def _read_folder(folder: Path, split: str | Sequence[str] | None) -> list[Utterance]:
    if split is not None:
        raise ValueError(
            f"split={split!r}: {folder} has no {MANIFEST_NAME}, and files found in a folder have no splits"
        )
    paths = find_audio(folder)
    if not paths:
        raise ValueError(
            f"{folder} holds neither a {MANIFEST_NAME} nor a file of these kinds: {' '.join(sorted(AUDIO_SUFFIXES))}"
        )
    for path in paths:
        check_unicode(os.fspath(path), f"the name of {os.fspath(path)!r}", "rename it, for it is an utterance's id")
    return [Utterance(id=path.relative_to(folder).as_posix(), path=path) for path in paths]


def checked_splits(split: str | Sequence[str], present: set[str | None], source: Path) -> tuple[str, ...]:
    """The splits that are wanted; ValueError for one that no utterance has."""
    wanted = (split,) if isinstance(split, str) else tuple(split)
    known = sorted(name for name in present if name is not None)
    for name in wanted:
        if name not in known:
            raise ValueError(f"split={name!r} is not in {source}, whose splits are: {', '.join(known) or 'none'}")
    return wanted


def rows_of_table(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and rows as written, of JSON lines, CSV or TSV. ValueError names the line at fault."""
    suffix = source.suffix.lower()
    if suffix not in MANIFEST_SUFFIXES:
        raise ValueError(f"{source} is not a manifest: its suffix must be .jsonl, .csv or .tsv")
    # What is not UTF-8 is let through as surrogates, so that it is found line by line and can be named.
    newline = "" if suffix in DELIMITERS else None
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
        yield from json_rows(file, source) if suffix == ".jsonl" else table_rows(file, source, DELIMITERS[suffix])


def json_rows(file: Iterable[str], source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of JSON lines, empty ones left out. ValueError names the line that is not an object."""
    for line, text in enumerate(_checked_lines(file, source), start=1):
        if text.strip():
            yield line, _json_row(text, f"{source}, line {line}")


def _checked_lines(file: Iterable[str], source: Path) -> Iterator[str]:
    for line, text in enumerate(file, start=1):
        if not text.isascii():
            check_unicode(text, f"{source}, line {line}")
        yield text


def check_unicode(text: str, place: str, helps: str = "") -> None:
    """ValueError where a text holds bytes that are no UTF-8 (as surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        helps = helps and f"; {helps}"
        raise ValueError(
            f"{place} is not UTF-8: {text[error.start]!r} at character {error.start + 1}{helps}"
        ) from None


def table_rows(
    file: Iterable[str], source: Path, delimiter: str, names: Sequence[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """`names` are the columns where the first line does not name them."""
    reader = csv.DictReader(_checked_lines(file, source), names, delimiter=delimiter, strict=True)
    try:
        while reader.fieldnames == []:  # lines without anything in them
            reader.fieldnames = None
        names = reader.fieldnames or ()
        if len(set(names)) < len(names):
            raise ValueError(f"{source}, line 1: a column is named twice: {', '.join(names)}")
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{source}, line {reader.line_num}: there are more values than the {len(names)} columns"
                )
            yield reader.line_num, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.reader.line_num}: {error}") from error


def _json_row(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}: each line must be one JSON object")
    return row


def row_values(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The fields of an utterance that a row has, with the path as it is written; ValueError for what is wrong."""
    if not row.keys().isdisjoint(ALIASES):
        for alias, name in ALIASES.items():
            if alias in row and name in row:
                raise ValueError(f"{place}: {alias} and {name} are the same column: leave one out")
        row = {ALIASES.get(name, name): value for name, value in row.items()}
    if not row.keys() <= _COLUMNS:
        unknown = sorted(row.keys() - _COLUMNS)
        known = ", ".join(sorted(_COLUMNS))
        raise ValueError(f"{place}: unknown column {', '.join(unknown)}; known are {known}: rename it or leave it out")
    path = row.get("path")
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{place}: path={path!r}, but every utterance needs the path of its audio file")
    check_unicode(path, place)  # JSON may spell halves of characters, which no file system takes
    values: dict[str, Any] = {"id": _text(row, "id", place) or path, "path": path}
    for name, value in row.items():
        if value is not None and name in _TEXT_COLUMNS:
            values[name] = _text(row, name, place)
    if "domain" in values and values["domain"] not in DOMAINS:
        raise ValueError(f"{place}: domain={values['domain']!r} must be one of {', '.join(DOMAINS)}, or left out")
    label = row.get("label")
    values["label"] = tuple(map(str, label)) if isinstance(label, list) else _text(row, "label", place)
    num_samples, rate = _count(row, "num_samples", place), _count(row, "sampling_rate", place)
    start = _count(row, "start", place, least=0)
    if start is not None and (num_samples is None or rate not in (None, SAMPLING_RATE)):
        raise ValueError(
            f"{place}: start={start} goes with num_samples, both in samples at {SAMPLING_RATE} Hz (sampling_rate "
            "left out)"
        )
    if num_samples is not None and rate is not None and rate != SAMPLING_RATE:
        num_samples = -(-num_samples * SAMPLING_RATE // rate)  # rounded up, as the resampler does
        if num_samples > _MOST:
            raise ValueError(f"{place}: num_samples={row['num_samples']!r} at sampling_rate={rate} are too many")
    return {"num_samples": num_samples, "start": start, **values}


def _text(row: dict[str, Any], name: str, place: str) -> str | None:
    value = row.get(name)
    if isinstance(value, str):
        check_unicode(value, f"{place}: {name}")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):  # ids, speakers and labels are often numbers
        return str(value)
    raise ValueError(f"{place}: {name}={value!r} must be text or a number")


def _count(row: dict[str, Any], name: str, place: str, least: int = 1) -> int | None:
    """A whole number from `least` to _MOST."""
    value = row.get(name)
    if value is None:
        return None
    try:
        number = -1 if isinstance(value, bool) else int(value)
        if number != float(value):
            number = -1
    except (TypeError, ValueError, OverflowError):
        number = -1
    if not least <= number <= _MOST:
        raise ValueError(f"{place}: {name}={value!r} must be a whole number, {least} or more")
    return number
