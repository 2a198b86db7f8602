# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Sequences of utterances whose columns can be had at once, and which need not hold an object for each.

An `Utterance` takes about a kilobyte, and what Python objects are read by the workers of a loader is copied into each:
the 35 million utterances of 97,000 hours would not fit.
"""

import itertools
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from .audio import SAMPLING_RATE
from .decoding import utterance_seconds
from .manifest import Utterance


CHUNK = 1 << 16  # utterances looked at together


class Column(Sequence[str | None]):
    """One of a few values for each utterance: held are the values, and for each utterance the place of its own.

    Args:
        values: all different.
        places: of each utterance, whole numbers of any type.
    """

    def __init__(self, values: Sequence[str | None], places: np.ndarray) -> None:
        self.values = list(values)
        self.places = places

    @classmethod
    def of(cls, items: Iterable[str | None]) -> "Column":
        """Of a value for each utterance."""
        known: dict[str | None, int] = {}
        places = np.fromiter((known.setdefault(item, len(known)) for item in items), np.int32)
        return cls(list(known), places)

    @classmethod
    def of_strings(cls, strings: pa.ChunkedArray) -> "Column":
        """Of a column of texts, with None first among the values."""
        encoded = strings.dictionary_encode().unify_dictionaries()
        values = [None, *(encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else [])]
        kind = np.int8 if len(values) < 2**7 else np.int32
        places = [chunk.indices.fill_null(-1).to_numpy().astype(kind) + kind(1) for chunk in encoded.chunks]
        return cls(values, np.concatenate([np.empty(0, kind), *places]))

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), CHUNK):
            yield from (self.values[place] for place in self.places[start : start + CHUNK].tolist())

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Column(self.values, self.places[place])
        return self.values[self.places[place]]

    def take(self, places: np.ndarray) -> "Column":
        """Of the utterances at `places`."""
        return Column(self.values, self.places[places])

    @property
    def present(self) -> set[str | None]:
        """The values that some utterance has."""
        counts = np.bincount(self.places, minlength=len(self.values))
        return {value for value, count in zip(self.values, counts) if count}

    def among(self, wanted: Container[str | None]) -> np.ndarray:
        """Whether the value of each utterance is one of these, bool."""
        return self.each(lambda value: value in wanted, np.bool_)

    def each(self, function: Callable[[str | None], Any], dtype: Any) -> np.ndarray:
        """What a function makes of the value of each utterance; it is asked once for each value."""
        return np.array([function(value) for value in self.values], dtype=dtype)[self.places]

    def filled(self, value: str) -> "Column":
        """The same with `value` where there is none."""
        if None not in self.values:
            return self
        values = [known for known in self.values if known is not None]
        values += [] if value in values else [value]
        moved = np.array([values.index(value if known is None else known) for known in self.values])
        return Column(values, moved.astype(self.places.dtype)[self.places])


class UtteranceList(Sequence[Utterance]):
    """Utterances in an order."""

    @abstractmethod
    def take(self, places: np.ndarray) -> "UtteranceList":
        """Those at `places`, in that order."""

    @property
    @abstractmethod
    def ids(self) -> Iterable[str]:
        """All ids, made as they are read."""

    @property
    @abstractmethod
    def domains(self) -> Column:
        """The domain of each."""

    @property
    @abstractmethod
    def splits(self) -> Column:
        """The split of each."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Samples at 16 kHz of each, int64."""

    @property
    def listed_lengths(self) -> np.ndarray:
        """The same without a look at any file: -1 where the list does not say."""
        return np.array([-1 if item.num_samples is None else item.num_samples for item in self], np.int64)

    @property
    def listed_starts(self) -> np.ndarray:
        """Where each begins in its file, int64, -1 of a whole file."""
        return np.array([-1 if item.start is None else item.start for item in self], np.int64)

    @overload
    def __getitem__(self, place: int) -> Utterance: ...

    @overload
    def __getitem__(self, place: slice) -> "UtteranceList": ...

    def __getitem__(self, place: int | slice) -> "Utterance | UtteranceList":
        places = range(len(self))[place]
        if isinstance(places, int):
            return self.at(places)
        return self.between(places.start, places.stop) if places.step == 1 else self.take(np.array(places, np.int64))

    def between(self, start: int, stop: int) -> "UtteranceList":
        """Those at `start` and up to before `stop`."""
        return self.take(np.arange(start, stop))

    @abstractmethod
    def at(self, place: int) -> Utterance:
        """The one at a place from 0 on."""

    def id_chunks(self) -> Iterator[pa.LargeStringArray]:
        """All ids, so many at a time that work on them costs little memory."""
        remaining = iter(self.ids)
        while chunk := list(itertools.islice(remaining, CHUNK)):
            yield pa.array(chunk, pa.large_string())


class ListedUtterances(UtteranceList):
    """Of a list."""

    def __init__(self, utterances: Iterable[Utterance]) -> None:
        self._utterances = list(utterances)

    def __len__(self) -> int:
        return len(self._utterances)

    def at(self, place: int) -> Utterance:
        return self._utterances[place]

    def take(self, places: np.ndarray) -> "ListedUtterances":
        return ListedUtterances(self._utterances[place] for place in places)

    @property
    def ids(self) -> Iterable[str]:
        return (utterance.id for utterance in self._utterances)

    @property
    def domains(self) -> Column:
        return Column.of(utterance.domain for utterance in self._utterances)

    @property
    def splits(self) -> Column:
        return Column.of(utterance.split for utterance in self._utterances)

    @property
    def lengths(self) -> np.ndarray:
        """From the list or else from the audio file's header."""
        seconds = (utterance_seconds(utterance) for utterance in self._utterances)
        return np.array([round(value * SAMPLING_RATE) for value in seconds], dtype=np.int64)


def listed(utterances: Sequence[Utterance]) -> UtteranceList:
    """The same with columns."""
    return utterances if isinstance(utterances, UtteranceList) else ListedUtterances(utterances)


def known_domains(utterances: Sequence[Utterance]) -> Column:
    """The domain of each; those without one count as speech."""
    return listed(utterances).domains.filled("speech")
