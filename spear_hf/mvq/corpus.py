# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The audio of many utterances, decoded ahead in threads and handed out in batches of like length.

A thread reads the utterances (out of a tar file, say, or cutting long ones), others decode them, and whoever computes
takes batches. Utterances are gathered in windows of WINDOW_UTTERANCES or WINDOW_SECONDS of audio, in their order, and
the batches are made within a window: so any stream will do, the batches are a function of the utterances alone, and
memory is bounded by the window that is computed and the one that is decoded meanwhile, half a gigabyte.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, TypeVar, cast

import numpy as np

from spear_hf.data.decoding import load_utterance
from spear_hf.data.manifest import Utterance
from spear_hf.mvq.store_format import waveform_checksum
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher


Result = TypeVar("Result")
Utterances = TypeVar("Utterances", bound=Iterable[Utterance])

WINDOW_UTTERANCES = 1000
WINDOW_SECONDS = 3600.0  # 230 MB of samples
# Threads; soundfile and the resampler work outside Python's lock. A fast GPU hears what four decode.
DECODERS = max(4, min(8, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class Decoded:
    """An utterance with its waveform at 16 kHz, or with what is wrong with it.

    `place` counts the utterances given, from 0: batches are in another order. The utterance has its `content` no more,
    unless that was asked for.
    """

    utterance: Utterance
    waveform: np.ndarray | None
    error: str | None = None
    place: int = 0
    checksum: int = 0  # of the waveform


def decoded_pieces(
    pieces: Iterable[Utterances], teacher: Teacher, batch_seconds: float, keep_content: bool = False
) -> Iterator[tuple[Utterances, Iterator[list[Decoded]]]]:
    """Each piece of a corpus with its batches, as `decoded_batches` makes them of it alone.

    While the end of a piece is computed the next one is decoded. Batches that are not taken are passed over.
    """
    with _DecodingAhead(pieces, teacher, keep_content) as ahead:
        while (entry := ahead.take()) is not None:
            assert isinstance(entry, _Piece)
            batches = _batches_of(ahead, batch_seconds)
            yield cast(Utterances, entry.utterances), batches
            for _ in batches:
                pass


def decoded_batches(
    utterances: Iterable[Utterance], teacher: Teacher, batch_seconds: float
) -> Iterator[list[Decoded]]:
    """Batches of utterances of like length, within `batch_seconds` each (or one utterance).

    Within a window (see the module) the longest come first. Waveforms have been found fit for the teacher; what cannot
    be decoded or is not fit comes with its error. An error in reading the utterances themselves is raised after the
    windows before it.
    """
    for _, batches in decoded_pieces([utterances], teacher, batch_seconds):
        yield from batches


def _batches_of(ahead: "_DecodingAhead", batch_seconds: float) -> Iterator[list[Decoded]]:
    """The batches of the piece that has been begun."""
    more = True
    while more:
        window: list[Decoded] = []
        samples = 0
        while len(window) < WINDOW_UTTERANCES and samples < WINDOW_SECONDS * SAMPLING_RATE:
            try:
                entry = ahead.take()
            except ValueError:  # of reading the utterances: what is wrong with one comes as its error
                if not window:
                    raise
                break  # it is raised again when the window has been computed
            if more := isinstance(entry, Decoded):
                window.append(entry)
                samples += _samples(entry)
            else:
                break
        window.sort(key=lambda item: (-_samples(item), item.utterance.id))
        batches = _batches(window, batch_seconds)
        while batches:
            yield batches.pop()  # so that no one holds it when it has been computed


class _Piece(NamedTuple):
    """In the queue: a piece begins here."""

    utterances: Iterable[Utterance]


class _End:
    """In the queue: a piece ends here."""


class _DecodingAhead:
    """Decodes the utterances of pieces in threads, within bounds of memory, and hands them out in order."""

    def __init__(self, pieces: Iterable[Iterable[Utterance]], teacher: Teacher, keep_content: bool) -> None:
        self._pieces = pieces
        self._teacher = teacher
        self._keep_content = keep_content
        self._queue: SimpleQueue[Future[Decoded] | _Piece | _End | Exception | None] = SimpleQueue()
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._reader = threading.Thread(target=self._read, name="read utterances", daemon=True)
        self._changed = threading.Condition()
        self._waiting = 0  # utterances that are read and have not been handed out
        self._held = 0  # bytes of these, of files or of samples
        self._closed = False

    def __enter__(self) -> "_DecodingAhead":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reader.join()
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> "Decoded | _Piece | _End | None":
        """The next utterance, the beginning or the end of a piece, or None after the last."""
        entry = self._queue.get()
        if entry is None or isinstance(entry, Exception):
            self._queue.put(entry)  # nothing comes after it
        if isinstance(entry, Exception):
            raise entry
        if not isinstance(entry, Future):
            return entry
        item = entry.result()
        self._account(-1, -_bytes(item))
        return item

    def _read(self) -> None:
        """In a thread of its own: reads utterances and has them decoded, as long as there is room."""
        try:
            for piece in self._pieces:
                self._queue.put(_Piece(piece))
                for place, utterance in enumerate(piece):
                    with self._changed:
                        self._changed.wait_for(self._has_room)
                        if self._closed:
                            return
                    content = _content_size(utterance)
                    self._account(1, content)
                    self._queue.put(self._pool.submit(self._decode, utterance, place, content))
                self._queue.put(_End())
            self._queue.put(None)
        except Exception as error:  # whatever it is belongs to the one who computes
            self._queue.put(error)

    def _has_room(self) -> bool:
        full = self._waiting >= WINDOW_UTTERANCES or self._held >= 4 * WINDOW_SECONDS * SAMPLING_RATE
        return self._closed or not full

    def _account(self, utterances: int, size: int) -> None:
        with self._changed:
            self._waiting += utterances
            self._held += size
            self._changed.notify_all()

    def _decode(self, utterance: Utterance, place: int, content: int) -> Decoded:
        item = decode(utterance, self._teacher, place, self._keep_content)
        self._account(0, _bytes(item) - content)
        return item


def decode(utterance: Utterance, teacher: Teacher, place: int = 0, keep_content: bool = False) -> Decoded:
    """The utterance decoded, checked and with its checksum, or with its error."""
    kept = utterance if keep_content else replace(utterance, content=None)
    try:
        waveform = teacher.check(load_utterance(utterance), utterance.id)
        return Decoded(kept, waveform, place=place, checksum=waveform_checksum(waveform))
    except ValueError as error:  # AudioError is one
        return Decoded(kept, None, str(error), place)


def _samples(item: Decoded) -> int:
    return 0 if item.waveform is None else len(item.waveform)


def _bytes(item: Decoded) -> int:
    return _content_size(item.utterance) + (0 if item.waveform is None else item.waveform.nbytes)


def _content_size(utterance: Utterance) -> int:
    """Bytes that it holds in memory."""
    return len(utterance.content) if isinstance(utterance.content, bytes) else 0


def _batches(ordered: list[Decoded], batch_seconds: float) -> list[list[Decoded]]:
    """Consecutive utterances, longest first, while rows x longest stays within the seconds; the last batch first."""
    batches: list[list[Decoded]] = []
    for item in ordered:
        fits = batches and (len(batches[-1]) + 1) * _samples(batches[-1][0]) <= batch_seconds * SAMPLING_RATE
        if fits:
            batches[-1].append(item)
        else:
            batches.append([item])
    ordered.clear()
    return batches[::-1]


def computed(
    batch: Sequence[Decoded], compute: Callable[[list[np.ndarray], list[str]], Sequence[Result]]
) -> Iterator[tuple[Decoded, Result | None]]:
    """Each item of a batch with its result of `compute(waveforms, ids)`, None where it has an error.

    If `compute` refuses the batch (ValueError), it is done one by one, so that only the culprit is left out.
    """
    good = [(item, item.waveform) for item in batch if item.waveform is not None]
    yield from ((item, None) for item in batch if item.waveform is None)
    if not good:
        return
    try:
        results = compute([waveform for _, waveform in good], [item.utterance.id for item, _ in good])
    except ValueError as error:
        if len(good) == 1:
            yield replace(good[0][0], waveform=None, error=str(error)), None
            return
        for item, _ in good:
            yield from computed([item], compute)
        return
    yield from ((item, result) for (item, _), result in zip(good, results, strict=True))


def display_path(path: Path) -> str:
    """The path as the user would write it: relative to the working folder if it is inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
