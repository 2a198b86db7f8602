# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio files to waveforms: the only place that touches soundfile and torchaudio.

soundfile brings libsndfile with it, so WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF and twenty other formats are read
without any system package. torchaudio only resamples, and is imported when a file has another rate: a torchaudio whose
build does not match torch fails on import, and most audio for SPEAR is at 16 kHz already.

Any window of a file is, bit for bit, what a slice of the whole decoded file would be, in memory that does not grow
with the file. Two things make it so. A file is always decoded in chunks that begin at multiples of CHUNK, and
resampled in blocks of one shape that begin at multiples of a second, whatever part of it is asked for. And the decoder
jumps only in formats where it lands exactly: libsndfile's Vorbis, Opus and MP3 decoders do not (after a jump, samples
of real audio were off by up to 1.1, 0.006 and 1e-7), so these are decoded from where they are, or from the beginning.
"""

import io
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction
from functools import lru_cache
from types import TracebackType
from typing import BinaryIO, TypeVar, cast

import numpy as np
import soundfile
import torch

from ..feature_extraction_spear import one_thread_where_forked
from .truncation import counts_frames, cut_off, lacking


SAMPLING_RATE = 16000
CHUNK = 65536  # samples of a file decoded at a time; MP3 decodes to other last bits with another size
RATES = (1000, 1_000_000)  # Hz; a damaged header may say anything, and 1 Hz would become 16,000 samples for each
# The resampler's filters grow with the denominator of the ratio of rates. Every common rate is exact under this bound;
# an odd one (44,101 Hz) is off by less than one part in a million, where the exact filters would take gigabytes.
_MAX_DENOMINATOR = 4000
# The windowed sinc of torchaudio with its own defaults: zero crossings on either side, and the share of the band kept.
_ZEROS, _ROLLOFF = 6, 0.99
_EXACT_SEEKS = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW", "ALAC_", "IMA_ADPCM", "MS_ADPCM")  # beginnings of subtypes

# Samples; a FLAC file from a pipe does not say how many it has. libsndfile then says 2^63 - 1, and fails at its end.
_UNKNOWN = 2**40

Result = TypeVar("Result")
AudioFile = str | os.PathLike | BinaryIO | bytes


class AudioError(ValueError):
    """A file that cannot be used as audio; the message names the file and what is wrong with it."""


class AudioReader:
    """An audio file, open, as mono float32 at `sampling_rate`, read window by window. Use it in a `with` block.

    Channels are averaged. Not for several threads at once.

    Args:
        file: a path, an open binary file, or the bytes of a file.
        name: what errors call the file; by default its path.

    Attributes:
        num_samples: of the file at `sampling_rate`, by its header: for some MP3 a rough estimate.
        seeks: whether a window is read without decoding what is before it.
        is_exact: whether the samples follow from the file alone: of a lossless format, not resampled, one channel or
            the mean of two. Others may differ in their last bits between versions of decoder and resampler.

    Raises:
        AudioError: the file is missing or unreadable.
    """

    def __init__(self, file: AudioFile, sampling_rate: int = SAMPLING_RATE, name: str | None = None) -> None:
        self.name = name or _name(file)
        self._source = file
        self._origin = 0 if isinstance(file, (str, os.PathLike, bytes)) or not file.seekable() else file.tell()
        self._file = self._open()
        self.rate = self._file.samplerate
        if not RATES[0] <= self.rate <= RATES[1]:
            raise AudioError(f"{self.name} cannot be decoded: its header says {self.rate} Hz")
        if self._file.frames >= _UNKNOWN:
            raise AudioError(f"{self.name} cannot be decoded: its header does not say how long it is; write it anew")
        if missing := self._guarded(lambda: cut_off(self._file, self._excerpt)):
            raise AudioError(f"{self.name} cannot be decoded: it is cut off, {missing}")
        self.sampling_rate = sampling_rate
        self._resampler = None if self.rate == sampling_rate else _resampler(self.rate, sampling_rate)
        self.num_samples = self._resampled_length(self._file.frames)
        self.seeks = self._file.seekable() and self._file.subtype.startswith(_EXACT_SEEKS)
        lossless = self._file.subtype.startswith(("PCM_", "FLOAT"))
        self.is_exact = lossless and self._resampler is None and self._file.channels <= 2
        self._next = 0  # the chunk that the decoder is at
        self._chunks: dict[int, np.ndarray] = {}  # the two read last: margins of the resampler reach back
        self._block: tuple[int, np.ndarray] | None = None  # the one resampled last
        self._frames: int | None = None  # of the file, once its end has been seen
        self._counts_frames = self._guarded(lambda: counts_frames(self._file, self._excerpt))

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        """(samples,): the window of `num_samples` from `start`, fewer at the end of the file; None: all the rest.

        AudioError where the file is damaged. Values that are not finite are handed on.
        """
        stop = None if num_samples is None else start + num_samples
        if self._resampler is None:
            return _gathered(self._chunk, CHUNK, start, stop)
        return _gathered(self._resampled_block, self._resampler.block, start, stop)

    def _resampled_length(self, frames: int) -> int:
        return frames if self._resampler is None else -(-frames * self._resampler.new // self._resampler.orig)

    def _resampled_block(self, index: int) -> np.ndarray:
        """Block `index` of the resampled file; shorter, or empty, at its end."""
        resampler = self._resampler
        assert resampler is not None
        if self._block is not None and self._block[0] == index:
            return self._block[1]
        first = index * resampler.periods * resampler.orig - resampler.margin
        stop = first + resampler.span
        decoded = _gathered(self._chunk, CHUNK, max(0, first), stop)
        padded = np.zeros(resampler.span, np.float32)  # zeros beyond the ends of the file
        padded[max(0, -first) : max(0, -first) + len(decoded)] = decoded
        block = resampler(padded)
        if self._frames is not None:
            block = block[: max(0, self._resampled_length(self._frames) - index * resampler.block)]
        self._block = (index, block)
        return block

    def _chunk(self, index: int) -> np.ndarray:
        """Mono samples from index * CHUNK on, CHUNK of them; fewer, or none, at the file's end."""
        if index in self._chunks:
            return self._chunks[index]
        if self.seeks and index != self._next:
            if index * CHUNK >= self._file.frames:
                self._frames = self._file.frames
                return np.zeros(0, np.float32)
            self._guarded(lambda: self._file.seek(index * CHUNK))
            self._next = index
        elif index < self._next:
            self._file.close()
            self._file, self._next = self._open(), 0
        while self._next <= index:
            if self._frames is not None and self._next * CHUNK >= self._frames:
                return np.zeros(0, np.float32)
            self._decode_next()
        return self._chunks[index]

    def _decode_next(self) -> None:
        samples = self._guarded(lambda: self._file.read(CHUNK, dtype="float32", always_2d=True))  # (samples, channels)
        if len(samples) < CHUNK:
            frames = self._next * CHUNK + len(samples)
            if self._counts_frames and (missing := lacking(self._file, self._file.frames, frames)):
                raise AudioError(f"{self.name} cannot be decoded: it is cut off or damaged, {missing}")
            self._frames = frames
        while len(self._chunks) > 1:
            del self._chunks[next(iter(self._chunks))]
        self._chunks[self._next] = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
        self._next += 1

    def _open(self) -> soundfile.SoundFile:
        source = self._source
        _refuse_special(source, self.name)
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif not isinstance(source, (str, os.PathLike)) and source.seekable():
            source.seek(self._origin)
        return self._guarded(lambda: soundfile.SoundFile(source))

    def _excerpt(self, start: int, size: int) -> bytes:
        """Bytes of the file as it is stored; a negative `start` counts from its end."""
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        with open(source, "rb") if isinstance(source, (str, os.PathLike)) else nullcontext(source) as content:
            here, end = content.tell(), content.seek(0, os.SEEK_END)
            content.seek(max(0, end + start) if start < 0 else start)
            excerpt = content.read(size)
            content.seek(here)
            return excerpt

    def _guarded(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
            raise AudioError(f"{self.name} cannot be decoded: {_reason(error, self._source)}") from error


def load_audio(
    file: AudioFile,
    sampling_rate: int = SAMPLING_RATE,
    start: int = 0,
    num_samples: int | None = None,
    name: str | None = None,
) -> np.ndarray:
    """Decodes a file to mono float32 (samples,) at `sampling_rate` Hz, in [-1, 1] but for the overshoot of filters.

    Channels are averaged. `start` and `num_samples`, at `sampling_rate`, choose a window of it, exactly what slicing
    the whole would give; where `num_samples` is given, the file must have them all. An open binary file is read from
    where it is. Errors call the file `name`, by default its path.

    Raises:
        AudioError: the file is missing, unreadable, empty, too short, or holds values that are not finite.
        ImportError: resampling is needed and torchaudio cannot be imported; the message says what to install.
    """
    with AudioReader(file, sampling_rate, name) as reader:
        waveform = reader.read(start, num_samples)
        if num_samples is not None and len(waveform) < num_samples:
            raise AudioError(
                f"{reader.name} has no samples {start + len(waveform)} to {start + num_samples} ({sampling_rate} Hz): "
                "it is shorter than its list says"
            )
        if len(waveform) == 0:
            raise AudioError(f"{reader.name} is empty: it decodes to 0 samples")
        if not np.isfinite(waveform).all():
            where = int(np.flatnonzero(~np.isfinite(waveform))[0])
            raise AudioError(f"{reader.name} is not finite: sample {start + where} is {waveform[where]}")
        return np.ascontiguousarray(waveform)


def audio_duration(file: AudioFile, name: str | None = None) -> float:
    """Seconds of audio by the file's header, without decoding it; for some MP3 a rough estimate.

    Raises:
        AudioError: the file is missing or its header cannot be read.
    """
    _refuse_special(file, name or _name(file))
    try:
        info = soundfile.info(io.BytesIO(file) if isinstance(file, bytes) else _plain(file))
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise AudioError(f"{name or _name(file)} cannot be read: {_reason(error, file)}") from error
    return info.frames / info.samplerate


def resample(waveform: np.ndarray, rate: int, target: int) -> np.ndarray:
    """(..., samples) float32 from `rate` to `target` Hz. ImportError, with the fix, where torchaudio does not load."""
    return _resampler(rate, target).whole(waveform)


class _Resampler:
    """From `orig` samples to `new`, a period, in blocks of `periods` periods with `margin` samples on either side."""

    def __init__(self, rate: int, target: int) -> None:
        try:
            import torchaudio.transforms
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            version = torch.__version__.split("+")[0]
            raise ImportError(
                f"Audio at {rate} Hz must be resampled to {target} Hz, and torchaudio, which does it, cannot be "
                f"imported ({error}). Its build must match torch's: pip install torch=={version} torchaudio=={version}"
            ) from error
        ratio = Fraction(target, rate).limit_denominator(_MAX_DENOMINATOR)
        self.orig, self.new = ratio.denominator, ratio.numerator
        self._transform = torchaudio.transforms.Resample(
            self.orig, self.new, lowpass_filter_width=_ZEROS, rolloff=_ROLLOFF
        )
        reach = math.ceil(_ZEROS * self.orig / (min(self.orig, self.new) * _ROLLOFF))
        self.periods = max(1, target // self.new)
        self.block = self.periods * self.new  # samples out: a second
        self.margin = (math.ceil(reach / self.orig) + 1) * self.orig
        self.span = self.periods * self.orig + 2 * self.margin  # samples in

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """(span,) -> (block,)"""
        lead = self.margin // self.orig * self.new
        return self.whole(samples)[lead : lead + self.block]

    @one_thread_where_forked()
    def whole(self, waveform: np.ndarray) -> np.ndarray:
        """(..., samples) at once, with zeros beyond its ends."""
        with torch.no_grad():
            resampled = self._transform(torch.from_numpy(np.ascontiguousarray(waveform, np.float32)))
        return cast(np.ndarray, resampled.numpy())


@lru_cache(maxsize=16)
def _resampler(rate: int, target: int) -> _Resampler:
    return _Resampler(rate, target)


def _gathered(block: Callable[[int], np.ndarray], size: int, start: int, stop: int | None) -> np.ndarray:
    """Samples [start, stop) of a sequence of blocks of `size`; fewer where a block is shorter, which is the last."""
    if start < 0:
        raise ValueError(f"start={start} must not be negative")
    first = index = start // size
    parts = []
    while stop is None or index * size < stop:
        parts.append(block(index))
        if len(parts[-1]) < size:
            break
        index += 1
    whole = parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])
    return whole[start - first * size : None if stop is None else stop - first * size]


def _plain(file: AudioFile) -> str | BinaryIO:
    return file if not isinstance(file, (str, os.PathLike)) else os.fspath(file)  # type: ignore[return-value]


def _name(file: AudioFile) -> str:
    return os.fspath(file) if isinstance(file, (str, os.PathLike)) else str(getattr(file, "name", "the audio"))


def _refuse_special(file: AudioFile, name: str) -> None:
    """AudioError for a pipe, a socket or a device: to open one may wait forever, and its audio can be read once."""
    if not isinstance(file, (str, os.PathLike)) or "\0" in os.fspath(file) or not os.path.exists(file):
        return
    if not os.path.isfile(file) and not os.path.isdir(file):
        raise AudioError(f"{name} cannot be decoded: it is a pipe, a socket or a device, not a file")


def _reason(error: Exception, file: AudioFile) -> str:
    """What went wrong, in a word: libsndfile calls a missing file a system error, and some damaged ones missing."""
    if isinstance(file, (str, os.PathLike)) and "\0" not in os.fspath(file):
        if not os.path.exists(file):
            return "there is no such file"
        if os.path.isdir(file):
            return "it is a folder"
        if not os.access(file, os.R_OK):
            return "it may not be read (permission denied)"
    if file == b"":
        return "there is no audio, 0 bytes"
    reason = str(getattr(error, "error_string", error)) or type(error).__name__
    return "Format not recognised." if reason.startswith("File does not exist") else reason
