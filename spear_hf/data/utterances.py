# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Sequences of utterances whose columns can be had at once, and which need not hold an object for each.

An `Utterance` takes about a kilobyte, and what Python objects are read by the workers of a loader is copied into each:
the 35 million utterances of 97,000 hours would not fit.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from .audio import SAMPLING_RATE
from .decoding import utterance_seconds
from .manifest import Utterance


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
    def domains(self) -> np.ndarray:
        """The domain of each, objects: str or None."""

    @property
    @abstractmethod
    def splits(self) -> np.ndarray:
        """The split of each, objects: str or None."""

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Samples at 16 kHz of each, int64."""

    @overload
    def __getitem__(self, place: int) -> Utterance: ...

    @overload
    def __getitem__(self, place: slice) -> "UtteranceList": ...

    def __getitem__(self, place: int | slice) -> "Utterance | UtteranceList":
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        return self.at(range(len(self))[place])

    @abstractmethod
    def at(self, place: int) -> Utterance:
        """The one at a place from 0 on."""


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
    def domains(self) -> np.ndarray:
        return np.array([utterance.domain for utterance in self._utterances], dtype=object)

    @property
    def splits(self) -> np.ndarray:
        return np.array([utterance.split for utterance in self._utterances], dtype=object)

    @property
    def lengths(self) -> np.ndarray:
        """From the list or else from the audio file's header."""
        seconds = (utterance_seconds(utterance) for utterance in self._utterances)
        return np.array([round(value * SAMPLING_RATE) for value in seconds], dtype=np.int64)


def listed(utterances: Sequence[Utterance]) -> UtteranceList:
    """The same with columns."""
    return utterances if isinstance(utterances, UtteranceList) else ListedUtterances(utterances)


def known_domains(utterances: Sequence[Utterance]) -> np.ndarray:
    """The domain of each, objects; those without one count as speech."""
    domains = listed(utterances).domains
    return np.where(domains == None, "speech", domains)  # noqa: E711 (elementwise)
