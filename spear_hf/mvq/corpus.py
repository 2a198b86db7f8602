# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The audio of many utterances, decoded ahead in threads and handed out in batches of like length."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from spear_hf.data.audio import AudioError, audio_duration, load_audio
from spear_hf.data.manifest import Utterance
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher


Result = TypeVar("Result")

BATCHES_AHEAD = 2
DECODERS = 4  # threads; soundfile and the resampler work outside Python's lock


@dataclass(frozen=True)
class Decoded:
    """An utterance with its waveform at 16 kHz, or with what is wrong with it."""

    utterance: Utterance
    waveform: np.ndarray | None
    error: str | None = None


def decoded_batches(
    utterances: Sequence[Utterance], teacher: Teacher, batch_seconds: float
) -> Iterator[list[Decoded]]:
    """Batches of utterances of like length, longest first, within `batch_seconds` each (or one utterance).

    Waveforms have been found fit for the teacher; what cannot be decoded or is not fit comes with its error. The
    batches are a function of the utterances' lengths and ids, not of the order given. A few batches are decoded ahead.
    """
    with ThreadPoolExecutor(DECODERS, thread_name_prefix="decode") as pool:
        lengths = pool.map(_length, utterances)
        ordered = sorted(zip(lengths, utterances), key=lambda pair: (-pair[0], pair[1].id))
        batches = _batches(ordered, batch_seconds)
        ahead: deque[list[Future[Decoded]]] = deque()
        try:
            for batch in chain(batches, [None] * BATCHES_AHEAD):
                if batch is not None:
                    ahead.append([pool.submit(_decode, utterance, teacher) for utterance in batch])
                if ahead and (batch is None or len(ahead) > BATCHES_AHEAD):
                    yield [future.result() for future in ahead.popleft()]
        finally:
            for future in chain.from_iterable(ahead):
                future.cancel()


def _length(utterance: Utterance) -> float:
    """Seconds, from the manifest or else the file's header; 0 where that cannot be read (decoding will say why)."""
    if utterance.num_samples is not None:
        return utterance.num_samples / SAMPLING_RATE
    try:
        return audio_duration(utterance.path)
    except AudioError:
        return 0.0


def _batches(ordered: list[tuple[float, Utterance]], batch_seconds: float) -> Iterator[list[Utterance]]:
    batch: list[Utterance] = []
    longest = 0.0
    for seconds, utterance in ordered:
        if batch and (len(batch) + 1) * longest > batch_seconds:
            yield batch
            batch = []
        longest = longest if batch else seconds  # they descend
        batch.append(utterance)
    if batch:
        yield batch


def _decode(utterance: Utterance, teacher: Teacher) -> Decoded:
    try:
        waveform = load_audio(utterance.path, sampling_rate=SAMPLING_RATE)
        return Decoded(utterance, teacher.check(waveform, utterance.id))
    except ValueError as error:  # AudioError is one
        return Decoded(utterance, None, str(error))


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
