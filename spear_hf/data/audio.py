# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio files to waveforms: the only place that touches soundfile and torchaudio.

soundfile brings libsndfile with it, so WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF and twenty other formats are read
without any system package. torchaudio only resamples, and is imported when a file has another rate: a torchaudio whose
build does not match torch fails on import, and most audio for SPEAR is at 16 kHz already.
"""

import os
from fractions import Fraction
from typing import BinaryIO, cast

import numpy as np
import soundfile
import torch


SAMPLING_RATE = 16000
# The resampler's filters grow with the denominator of the ratio of rates. Every common rate is exact under this bound;
# an odd one (44,101 Hz) is off by less than one part in a million, where the exact filters would take gigabytes.
_MAX_DENOMINATOR = 4000


class AudioError(ValueError):
    """A file that cannot be used as audio; the message names the file and what is wrong with it."""


def load_audio(path: str | os.PathLike | BinaryIO, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Decodes a file to mono float32 (samples,) at `sampling_rate` Hz, in [-1, 1] but for the overshoot of filters.

    Channels are averaged. An open binary file is read from where it is; errors name it by its `name`, if it has one.

    Raises:
        AudioError: the file is missing, unreadable, empty, or holds values that are not finite.
        ImportError: resampling is needed and torchaudio cannot be imported; the message says what to install.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError(f"{_name(path)} cannot be decoded: {_reason(error, path)}") from error
    if len(samples) == 0:
        raise AudioError(f"{_name(path)} is empty: it decodes to 0 samples")
    waveform = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not np.isfinite(waveform).all():
        where = int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise AudioError(f"{_name(path)} is not finite: sample {where} is {waveform[where]}")
    if rate != sampling_rate:
        waveform = resample(waveform, rate, sampling_rate)
    return np.ascontiguousarray(waveform)


def audio_duration(path: str | os.PathLike | BinaryIO) -> float:
    """Seconds of audio by the file's header, without decoding it; for some MP3 a rough estimate.

    Raises:
        AudioError: the file is missing or its header cannot be read.
    """
    try:
        info = soundfile.info(path if hasattr(path, "read") else os.fspath(path))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise AudioError(f"{_name(path)} cannot be read: {_reason(error, path)}") from error
    return info.frames / info.samplerate


def resample(waveform: np.ndarray, rate: int, target: int) -> np.ndarray:
    """(..., samples) float32 from `rate` to `target` Hz. ImportError, with the fix, where torchaudio does not load."""
    try:
        import torchaudio.functional
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        version = torch.__version__.split("+")[0]
        raise ImportError(
            f"Audio at {rate} Hz must be resampled to {target} Hz, and torchaudio, which does it, cannot be imported "
            f"({error}). Its build must match torch's: pip install torch=={version} torchaudio=={version}"
        ) from error
    ratio = Fraction(target, rate).limit_denominator(_MAX_DENOMINATOR)
    samples = torch.from_numpy(np.ascontiguousarray(waveform))
    resampled = torchaudio.functional.resample(samples, ratio.denominator, ratio.numerator)
    return cast(np.ndarray, resampled.numpy())


def _name(path: str | os.PathLike | BinaryIO) -> str:
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else str(getattr(path, "name", "the audio"))


def _reason(error: Exception, path: str | os.PathLike | BinaryIO) -> str:
    """What went wrong, in a word: libsndfile calls a missing file a system error."""
    if isinstance(path, (str, os.PathLike)):
        if not os.path.exists(path):
            return "there is no such file"
        if os.path.isdir(path):
            return "it is a folder"
    return str(getattr(error, "error_string", error)) or type(error).__name__
