# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Long audio into stretches. The rule, for an utterance of more than `max_seconds`:

    silence   The next cut is in the middle of the quietest 10 ms of the last third before the limit (of equally quiet
              ones, the last), so stretches have 20 to 30 s with a limit of 30 s. The 10 ms frames are counted from the
              utterance's beginning, their loudness is the sum of the squares of their samples at 16 kHz. What is left
              after the last cut is never shorter than `min_seconds`.
    fixed     Cuts are at multiples of the limit. A remainder shorter than `min_seconds` is joined to the stretch
              before it.

Stretches tile the utterance: every sample is in exactly one of them. Their ids are ID@START-STOP, in samples of the
file at 16 kHz. They are a function of the audio and the rule alone. Only the places of possible cuts are decoded, or,
in formats that cannot be entered in the middle (Vorbis, Opus, MP3), the file once from beginning to end, with one
stretch in memory.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..mvq.atomic_files import NOT_KEPT, explained
from .audio import SAMPLING_RATE, AudioError, AudioReader
from .audio_encoding import encode_float_wav
from .decoding import audio_file
from .manifest import COLUMNS, Utterance


CUTS = ("silence", "fixed", "none")
FRAME = 160  # samples, 10 ms
SEARCH_SHARE = 3  # silence is looked for in the last third before the limit
_BLOCK = 10 * SAMPLING_RATE  # samples decoded at a time
_READERS = 8  # threads that plan the stretches of a manifest
_PLANNED = 256  # utterances planned at a time


@dataclass(frozen=True)
class CutRule:
    """Where utterances of more than `max_seconds` are cut: at "silence", or at "fixed" lengths."""

    at: str = "silence"
    max_seconds: float = 30.0
    min_seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.at not in CUTS[:2]:
            raise ValueError(f"cut={self.at!r} must be one of {', '.join(CUTS)}")
        if not 0 < self.min_seconds < float("inf") or not max(1.0, 4 * self.min_seconds) <= self.max_seconds < 1e6:
            raise ValueError(
                f"max_seconds={self.max_seconds} must be at least 1 and four times min_seconds={self.min_seconds}"
            )

    @property
    def limit(self) -> int:
        """Samples."""
        return round(self.max_seconds * SAMPLING_RATE)

    @property
    def least(self) -> int:
        """Samples."""
        return max(1, round(self.min_seconds * SAMPLING_RATE))


def cut_rule(at: str, max_seconds: float = 30.0, min_seconds: float | None = None) -> CutRule | None:
    """The rule that the options `--cut`, `--max-seconds` and `--min-seconds` mean; None where nothing is cut.

    `min_seconds` is by default 1, or a quarter of a `max_seconds` below 4.
    """
    if at == "none":
        return None
    return CutRule(at, max_seconds, min(1.0, max_seconds / 4) if min_seconds is None else min_seconds)


class Stretch(NamedTuple):
    """Samples [start, stop) of a file at 16 kHz, and these samples where they had to be decoded to find it."""

    start: int
    stop: int
    waveform: np.ndarray | None


def cut_utterance(utterance: Utterance, rule: CutRule) -> Iterator[Utterance]:
    """The stretches of a long utterance, in order, or the utterance itself.

    Audio that cannot be read is handed on for whoever decodes it to report: whole, or after some stretches as one more
    that has what cannot be read. A stretch of a file that cannot be entered in the middle comes with its audio as
    `content`.
    """
    done: Stretch | None = None
    try:
        for done in stretches(utterance, rule):
            stretch = _stretch_of(utterance, done.start, done.stop)
            if done.waveform is not None:
                stretch = replace(stretch, start=None, content=encode_float_wav(done.waveform))
            yield stretch
    except AudioError:
        if done is not None:
            yield _stretch_of(utterance, done.stop, done.stop + rule.limit + rule.least)
    if done is None:
        yield utterance


def may_be_cut(lengths: np.ndarray, rule: CutRule) -> np.ndarray:
    """Whether lengths that are listed, -1 where they are not, leave it open that an utterance is cut, bool."""
    return (lengths < 0) | (lengths > rule.limit)


def stretches(utterance: Utterance, rule: CutRule) -> Iterator[Stretch]:
    """The stretches of an utterance, none if it is not cut. AudioError where it cannot be read."""
    if utterance.num_samples is not None and utterance.num_samples <= rule.limit:
        return
    origin = start = utterance.start or 0
    end = None if utterance.start is None else origin + (utterance.num_samples or 0)
    with AudioReader(audio_file(utterance), name=str(utterance.path)) as reader:
        by_header = reader.num_samples if end is None else end
        if by_header - origin <= rule.limit:
            return
        audio = _Entered(reader, by_header) if reader.seeks else _Passed(reader, origin, end)
        while True:
            known = audio.reach(start + rule.limit + rule.least)
            if (cut := _next_cut(audio, origin, start, known, rule)) is None:
                break
            yield Stretch(start, cut, audio.take(start, cut))
            start = cut
        if start > origin:
            yield Stretch(start, known, audio.take(start, known))


def _next_cut(audio: "_Entered | _Passed", origin: int, start: int, known: int, rule: CutRule) -> int | None:
    """Where the stretch from `start` ends, None where it is the last. The audio goes at least up to `known`.

    `known` is short of start + limit + least only if the audio ends there.
    """
    if known - start <= rule.limit:
        return None
    limit = start + rule.limit
    if rule.at == "fixed":
        return limit if known - limit >= rule.least else None
    latest = min(limit, known - rule.least)
    frame = -(-(limit - rule.limit // SEARCH_SHARE - origin) // FRAME)  # counted from the utterance's beginning
    first = origin + frame * FRAME
    samples = audio.window(first, first + (latest - first) // FRAME * FRAME)
    frames = samples.reshape(-1, FRAME).astype(np.float64)  # (frames, samples)
    loudness = np.nan_to_num(np.square(frames).sum(axis=1), nan=np.inf)
    quietest = len(loudness) - 1 - int(np.argmin(loudness[::-1]))
    return first + quietest * FRAME + FRAME // 2


class _Entered:
    """A file that is read where it is needed."""

    def __init__(self, reader: AudioReader, end: int) -> None:
        self._reader = reader
        self._end = end

    def reach(self, stop: int) -> int:
        """`stop`, or the audio's end where that comes first."""
        return min(stop, self._end)

    def window(self, start: int, stop: int) -> np.ndarray:
        samples = self._reader.read(start, stop - start)
        if len(samples) < stop - start:
            raise AudioError(f"{self._reader.name} ends at sample {start + len(samples)}, before its length")
        return samples

    def take(self, start: int, stop: int) -> None:
        """Nothing: who wants the samples reads them."""


class _Passed:
    """A file that is decoded once, from beginning to end; `end` is where the utterance ends, if before the file."""

    def __init__(self, reader: AudioReader, start: int, end: int | None) -> None:
        self._reader = reader
        self._end = end
        self._start = start
        self._held = np.zeros(0, np.float32)

    def reach(self, stop: int) -> int:
        """`stop`, or the audio's end where that comes first. Samples up to there are held."""
        stop = stop if self._end is None else min(stop, self._end)
        while (have := self._start + len(self._held)) < stop:
            block = self._reader.read(have, min(_BLOCK, stop - have))
            if len(block) == 0:
                return have
            self._held = np.concatenate([self._held, block])
        return stop

    def window(self, start: int, stop: int) -> np.ndarray:
        return self._held[start - self._start : stop - self._start]

    def take(self, start: int, stop: int) -> np.ndarray:
        """The samples [start, stop), which are let go."""
        samples = self.window(start, stop).copy()
        self._held = self._held[stop - self._start :].copy()
        self._start = stop
        return samples


def _stretch_of(utterance: Utterance, start: int, stop: int) -> Utterance:
    """Without the transcript, which is of the whole."""
    id = f"{utterance.id}@{start}-{stop}"
    return replace(utterance, id=id, start=start, num_samples=stop - start, transcript=None)


# ---------------------------------------------------------------------------------------------------------------------
# Manifests of stretches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmentation:
    """What `write_segments` did."""

    utterances: int  # of the source, with audio
    rows: int  # of the manifest
    bad: list[tuple[str, str]]  # ids of what cannot be read, which is left out, and why


def write_segments(utterances: Iterable[Utterance], rule: CutRule, output: str | Path) -> Segmentation:
    """Writes the manifest `output` (.jsonl) of all stretches and of the utterances that are not cut, in order.

    It has the utterances' columns, and `start` and `num_samples` where a row is a stretch of its file. Paths inside
    the manifest's folder are relative to it. Written under another name and renamed when it is whole. ValueError for
    an utterance that is inside another file, and where nothing can be read.
    """
    output = Path(output)
    if output.suffix.lower() != ".jsonl":
        raise ValueError(f"output={output} must be a manifest with the suffix .jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    count = rows = 0
    bad: list[tuple[str, str]] = []
    remaining = iter(utterances)
    try:
        with (
            explained(output, NOT_KEPT),
            open(temporary, "w", encoding="utf-8") as file,
            ThreadPoolExecutor(_READERS) as pool,
        ):
            while some := list(islice(remaining, _PLANNED)):
                for utterance, planned in zip(some, pool.map(lambda item: _planned(item, rule), some)):
                    if isinstance(planned, str):
                        bad.append((utterance.id, planned))
                        continue
                    count += 1
                    rows += len(planned)
                    file.writelines(json.dumps(_row(item, output.parent)) + "\n" for item in planned)
            if rows == 0:
                raise ValueError(f"no audio can be read; the first error: {bad[0][1] if bad else 'the list is empty'}")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return Segmentation(count, rows, bad)


def _planned(utterance: Utterance, rule: CutRule) -> list[Utterance] | str:
    """The rows of one utterance, or why there are none."""
    if utterance.content is not None:
        raise ValueError(
            f"{utterance.path} is inside another file, which a manifest cannot point into: `spear-hf tokenize` and "
            "`quantize` cut it as they read it"
        )
    try:
        planned = [_stretch_of(utterance, start, stop) for start, stop, _ in stretches(utterance, rule)]
        if planned or utterance.num_samples is not None:
            return planned or [utterance]
        with AudioReader(utterance.path) as reader:
            if reader.num_samples == 0:
                return f"{reader.name} is empty: it has 0 samples"
            return [replace(utterance, num_samples=reader.num_samples) if reader.seeks else utterance]
    except AudioError as error:
        return str(error)


def _row(utterance: Utterance, folder: Path) -> dict[str, Any]:
    path, base = Path(os.path.abspath(utterance.path)), Path(os.path.abspath(folder))
    values = {name: getattr(utterance, name) for name in COLUMNS}
    values["path"] = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
    return {name: value for name, value in values.items() if value is not None}
