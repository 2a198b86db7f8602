# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Waveforms to the bytes of a small audio file that decodes to exactly the same samples.

Beside audio.py, the only place that touches soundfile.
"""

import io
import struct

import numpy as np
import soundfile

from .audio import SAMPLING_RATE


# FLAC holds integers: 16 bits are what most speech is recorded in, the mean of two channels needs one more.
_FLAC: tuple[tuple[int, type[np.signedinteger], int], ...] = ((16, np.int16, 0), (24, np.int32, 8))


def encode_audio(waveform: np.ndarray, sampling_rate: int = SAMPLING_RATE) -> tuple[bytes, str]:
    """Mono float32 (samples,) -> (content, suffix): the smallest of three files that gives back every bit.

    16-bit FLAC, else 24-bit FLAC, else (resampled audio, decoded MP3) WAV of 32-bit floats. Not the original file: its
    samples are what this version of this decoder and resampler made of it, and tokens are of these samples.
    """
    waveform = np.ascontiguousarray(waveform, dtype="<f4")
    for bits, kind, shift in _FLAC:
        scale = np.float64(2 ** (bits - 1))
        integers = np.clip(np.rint(waveform * scale), -scale, scale - 1).astype(kind)
        # By their bytes, as -0.0 would come back as 0.0.
        if (integers / scale).astype("<f4").tobytes() == waveform.tobytes():
            file = io.BytesIO()
            soundfile.write(file, np.left_shift(integers, shift), sampling_rate, format="FLAC", subtype=f"PCM_{bits}")
            return file.getvalue(), ".flac"
    return _float_wav(waveform, sampling_rate), ".wav"


def _float_wav(waveform: np.ndarray, sampling_rate: int) -> bytes:
    """By hand, as libsndfile writes the time of day into such a file, and equal audio must give equal bytes."""
    samples = waveform.tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, sampling_rate, 4 * sampling_rate, 4, 32)
    fact = struct.pack("<4sII", b"fact", 4, len(waveform))
    data = struct.pack("<4sI", b"data", len(samples)) + samples
    return struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(fact) + len(data), b"WAVE") + form + fact + data
