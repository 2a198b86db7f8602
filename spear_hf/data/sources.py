# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A corpus in fixed pieces: what `--data` of the command line names.

    source = open_source("folder", cut=CutRule())
    for piece in source:          # piece i becomes shard i of a token store
        for utterance in piece:   # read as it is iterated, never loaded whole
            waveform = load_utterance(utterance)

Where the pieces begin and end follows from the data alone, never from who reads them or how many. What `--data` is:

    a file .jsonl, .csv, .tsv              a manifest, see manifest.py
    a folder with manifest.jsonl           that manifest
    a folder with state.json and           a dataset of `Dataset.save_to_disk`, or a dictionary of them
      dataset_info.json, or
      with dataset_dict.json
    a file or a pattern (data/*.parquet)   these files: parquet, or tar in the format of WebDataset
      whose names end in .parquet or .tar
    any other folder                       the files in it of the one kind there is: audio, .parquet or .tar;
                                           of parquet and tar files, splits as `datasets.load_dataset` finds them
    NAME or OWNER/NAME                     a dataset of the Hub, streamed: of parquet or WebDataset files
"""

import glob
import hashlib
import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .audio import SAMPLING_RATE, AudioError
from .cutting import CutRule, cut_utterance, may_be_cut
from .decoding import utterance_seconds
from .manifest import AUDIO_SUFFIXES, DOMAINS, MANIFEST_NAME, MANIFEST_SUFFIXES, Utterance, find_files
from .manifest_columns import open_manifest
from .seeding import keyed_seeds
from .utterances import listed


PIECE_UTTERANCES = 1000
PIECE_HOURS = 24.0  # of audio, where lengths are known: 70 MB of 16 codebooks at 50 Hz
DATASET_SUFFIXES = (".parquet", ".tar")
_STORE_FILE = re.compile(r"(tokens-\d{5,}|index)\.parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Piece:
    """Utterances in their order, which are read, if they are not listed anyway, whenever it is iterated.

    `key` is a fingerprint of what it is made of: pieces of equal keys have utterances of the same ids, and of the same
    audio where it is inside the dataset's files. Where a corpus lies, and its domains, are no part of it. `ids` are
    known without reading for lists whose utterances are not cut.
    """

    index: int
    key: str
    ids: tuple[str, ...] | None
    read: Callable[[], Iterator[Utterance]] = field(repr=False, compare=False)

    def __iter__(self) -> Iterator[Utterance]:
        return self.read()


class AudioSource(ABC):
    """A corpus in pieces: `len(source)` of them, `source[index]`, or iterated."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Piece:
        """A piece, whose key takes a look at all that is listed of it, or at its file: ask when its turn comes."""

    def listed_lengths(self, index: int) -> np.ndarray | None:
        """Samples of the utterances of a piece, -1 where they are not known; None where they are not listed."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """What it is, in a few words for a person."""

    @abstractmethod
    def subset(self, seed: int, max_hours: float) -> "AudioSource":
        """At most about so many hours, spread over the corpus, a function of seed and data."""

    def check_ids(self) -> None:  # noqa: B027 (a list's are unique anyway)
        """ValueError where two pieces have an id in common, as far as that can be told without reading all."""

    def __iter__(self) -> Iterator[Piece]:
        return (self[index] for index in range(len(self)))


class ListSource(AudioSource):
    """Utterances that are listed: of a folder or a manifest. Pieces are consecutive, as `plan_pieces` has it."""

    def __init__(
        self,
        utterances: Sequence[Utterance],
        name: str = "the list",
        piece_utterances: int = PIECE_UTTERANCES,
        piece_hours: float = PIECE_HOURS,
    ) -> None:
        if not utterances:
            raise ValueError(f"{name} has no audio: the list of utterances is empty")
        self.utterances = listed(utterances)
        self.name = name
        self.piece_utterances = piece_utterances
        self.piece_hours = piece_hours
        self._lengths = self.utterances.listed_lengths
        self._starts = plan_pieces(self._lengths, piece_utterances, piece_hours)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Piece:
        places = self._places(index)
        utterances = self.utterances[places]
        ids = tuple(utterances.ids)
        starts, lengths = utterances.listed_starts.tolist(), self._lengths[places].tolist()
        stretches = [
            (id, start, length) if start >= 0 else (id, None, None) for id, start, length in zip(ids, starts, lengths)
        ]
        return Piece(range(len(self))[index], fingerprint(stretches), ids, lambda: iter(utterances))

    def listed_lengths(self, index: int) -> np.ndarray:
        return self._lengths[self._places(index)]

    def _places(self, index: int) -> slice:
        index = range(len(self))[index]
        return slice(int(self._starts[index]), int(self._starts[index + 1]))

    def describe(self) -> str:
        return f"{len(self.utterances)} utterances of {self.name}"

    def subset(self, seed: int, max_hours: float) -> "ListSource":
        """Utterances drawn by the seed, up to the one with which the hours are reached."""
        drawn = np.argsort(keyed_seeds((seed, "subset"), self.utterances.ids), kind="stable")
        chosen, seconds = 0, 0.0
        for place, length in zip(drawn, self._lengths[drawn]):
            if seconds >= 3600 * max_hours:
                break
            chosen += 1
            seconds += length / SAMPLING_RATE if length >= 0 else _seconds(self.utterances[int(place)])
        some = self.utterances.take(drawn[:chosen])
        return ListSource(some, self.name, self.piece_utterances, self.piece_hours)


class CutSource(AudioSource):
    """Another source with its long utterances cut: its pieces, of stretches."""

    def __init__(self, source: AudioSource, rule: CutRule) -> None:
        self.source = source
        self.rule = rule

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Piece:
        piece, rule = self.source[index], self.rule
        if self.listed_lengths(index) is not None:
            return piece
        key = fingerprint([piece.key, asdict(rule)])
        return Piece(piece.index, key, None, lambda: (cut for item in piece for cut in cut_utterance(item, rule)))

    def listed_lengths(self, index: int) -> np.ndarray | None:
        lengths = self.source.listed_lengths(index)
        return None if lengths is None or may_be_cut(lengths, self.rule).any() else lengths

    def describe(self) -> str:
        return f"{self.source.describe()}, those over {self.rule.max_seconds:g} s cut ({self.rule.at})"

    def check_ids(self) -> None:
        self.source.check_ids()

    def subset(self, seed: int, max_hours: float) -> "CutSource":
        return CutSource(self.source.subset(seed, max_hours), self.rule)


class HeadSource(AudioSource):
    """The beginning of every piece of another source: utterances up to the one with which `seconds` are reached."""

    def __init__(self, source: AudioSource, seconds: float) -> None:
        self.source = source
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Piece:
        piece = self.source[index]
        return Piece(piece.index, fingerprint([piece.key, self.seconds]), None, lambda: self._read(piece))

    def describe(self) -> str:
        return f"{self.source.describe()}, the first {self.seconds:g} s of every piece"

    def subset(self, seed: int, max_hours: float) -> "HeadSource":
        return HeadSource(self.source, min(self.seconds, 3600 * max_hours / len(self)))

    def _read(self, piece: Piece) -> Iterator[Utterance]:
        seconds = 0.0
        for utterance in piece:
            yield utterance
            seconds += _seconds(utterance)
            if seconds >= self.seconds:
                return


@dataclass(frozen=True)
class Columns:
    """Where a dataset has what an utterance needs; for WebDataset, `audio` is the suffix of the audio members.

    By default `audio` is the one column of audio there is, and ids are the column `id` or `path` if there is one, else
    FILE#ROW, which "#" asks for; of WebDataset, FILE#KEY, because keys often begin anew in every file. `domain` names
    a column, too.
    """

    audio: str | None = None
    id: str | None = None
    domain: str | None = None


def open_source(
    spec: str | os.PathLike,
    split: str | Sequence[str] | None = None,
    *,
    config: str | None = None,
    revision: str | None = None,
    columns: Columns | None = None,
    domain: str | None = None,
    cut: CutRule | None = None,
    piece_utterances: int = PIECE_UTTERANCES,
    piece_hours: float = PIECE_HOURS,
) -> AudioSource:
    """The corpus that `spec` names, by the rules of this module.

    Args:
        spec: a path, a pattern of paths, or a name on the Hub.
        split: one or more; by default all.
        config: of a dataset with several configurations.
        revision: branch, tag or commit of a dataset of the Hub.
        columns: of a dataset.
        domain: "speech" or "audio", of the utterances that have none.
        cut: how long utterances are cut; None: they are not.
        piece_utterances, piece_hours: of a list, in a piece at most.

    Raises:
        ValueError: no such source, split or column, nothing in it, or options that it does not take.
    """
    spec = os.fspath(spec)
    if not spec:
        raise ValueError("the data has an empty name: name a folder, a manifest, files, or a dataset of the Hub")
    splits = [split] if isinstance(split, str) else list(split or ())
    if domain not in (None, *DOMAINS):
        raise ValueError(f"domain={domain!r} must be one of {', '.join(DOMAINS)}")
    source: AudioSource
    if _is_list(spec):
        for name, value in {"config": config, "revision": revision, **asdict(columns or Columns())}.items():
            if value is not None:
                name = f"{name}_column" if name in ("audio", "id", "domain") else name
                raise ValueError(f"{name}={value!r} is for datasets, and {spec} is a folder of audio or a manifest")
        source = ListSource(open_manifest(spec, splits or None, domain), spec, piece_utterances, piece_hours)
    else:
        # Imported where it is needed: importing `datasets` takes a second.
        from .dataset_sources import dataset_source

        source = dataset_source(spec, splits, config, revision, columns or Columns(), domain)
    return source if cut is None else CutSource(source, cut)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def plan_pieces(
    lengths: np.ndarray, piece_utterances: int = PIECE_UTTERANCES, piece_hours: float = PIECE_HOURS
) -> np.ndarray:
    """Where consecutive pieces begin, and the last ends, int64 (pieces + 1,), of utterances of these lengths.

    A piece has at most `piece_utterances`, and ends with the one with which `piece_hours` are reached. Lengths that
    are not known (-1) count as nothing.
    """
    if piece_utterances < 1:
        raise ValueError(f"shard_utterances must be at least 1, not {piece_utterances}")
    limit = math.ceil(piece_hours * 3600 * SAMPLING_RATE)
    until = np.cumsum(np.clip(lengths, 0, limit))  # samples up to the end of each, where no more than these matter
    starts = [0]
    while (start := starts[-1]) < len(lengths):
        before = int(until[start - 1]) if start else 0
        last = max(start, int(np.searchsorted(until, before + limit)))
        starts.append(min(last + 1, start + piece_utterances, len(lengths)))
    return np.array(starts, np.int64)


def fingerprint(value: object) -> str:
    """16 hexadecimal digits that depend on a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _is_list(spec: str) -> bool:
    """Whether it is a folder of audio or a manifest, not a dataset. ValueError if it is nothing."""
    path = Path(spec)
    suffix = path.suffix.lower()
    if suffix in MANIFEST_SUFFIXES or (path.is_dir() and (path / MANIFEST_NAME).is_file()):
        return True
    if path.is_dir():
        return not is_saved_dataset(path) and _kind_of_files(path) == "audio"
    if suffix in DATASET_SUFFIXES or glob.has_magic(spec):
        return False
    if path.exists():
        raise ValueError(
            f"{spec} is none of what can be read: a folder, a manifest ({', '.join(MANIFEST_SUFFIXES)}), or a file "
            f"that ends in {' or '.join(DATASET_SUFFIXES)}"
        )
    if not _HUB_NAME.fullmatch(spec):
        raise ValueError(
            f"{spec} does not exist, and is no name on the Hub (OWNER/NAME): name a folder of audio, a manifest "
            f"({', '.join(MANIFEST_SUFFIXES)}), or a dataset"
        )
    return False


def _kind_of_files(folder: Path) -> str:
    """The kind of the files below a folder: "audio", "parquet" or "tar". ValueError if there are several, or none.

    A token store in a folder inside, such as that of the audio itself, does not count.
    """
    suffixes = {path.suffix.lower() for path in find_files(folder) if not _is_of_store(path, folder)}
    kinds = {suffix[1:] for suffix in suffixes if suffix in DATASET_SUFFIXES}
    kinds |= {"audio"} if suffixes & AUDIO_SUFFIXES else set()
    if len(kinds) > 1:
        raise ValueError(
            f"{folder} holds files of several kinds ({', '.join(sorted(kinds))}): name a manifest of the audio, or "
            f"files of one of the others by a pattern, as in '{folder}/*.parquet'"
        )
    if not kinds:
        raise ValueError(
            f"{folder} holds neither a {MANIFEST_NAME} nor a file of these kinds: "
            f"{' '.join(sorted((*AUDIO_SUFFIXES, *DATASET_SUFFIXES)))}"
        )
    return kinds.pop()


def _is_of_store(path: Path, folder: Path) -> bool:
    """Whether a file is one of a token store (mvq/store.py) below `folder`."""
    named = path.parent != folder and _STORE_FILE.fullmatch(path.name) is not None
    return named and (path.parent / "metadata.json").is_file()


def _seconds(utterance: Utterance) -> float:
    try:
        return utterance_seconds(utterance)
    except AudioError:  # counted as nothing, and reported by who decodes it
        return 0.0
