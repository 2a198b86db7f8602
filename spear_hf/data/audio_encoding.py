# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Waveforms to the bytes of an audio file that decodes to exactly the same samples.

Beside audio.py, the only place that touches soundfile.
"""

import io
import struct
from pathlib import Path

import numpy as np
import soundfile

from .audio import SAMPLING_RATE, AudioError, AudioFile, load_audio


# FLAC holds integers: 16 bits are what most speech is recorded in, the mean of two channels needs one more.
_FLAC: tuple[tuple[int, type[np.signedinteger], int], ...] = ((16, np.int16, 0), (24, np.int32, 8))


def encode_audio(waveform: np.ndarray, original: AudioFile | None = None) -> tuple[bytes, str]:
    """Mono float32 (samples,) at 16 kHz -> (content, suffix) of a file that `load_audio` decodes to the same bits.

    16-bit FLAC, else 24-bit FLAC; where FLAC would round (decoded MP3 or Vorbis, resampled audio), the `original` file
    as it is, if it is of just this waveform and smaller than WAV of 32-bit floats, which is the last resort. What an
    original decodes to may differ in the last bits between versions of decoder and resampler.
    """
    waveform = np.ascontiguousarray(waveform, dtype="<f4")
    for bits, kind, shift in _FLAC:
        scale = np.float64(2 ** (bits - 1))
        integers = np.clip(np.rint(waveform * scale), -scale, scale - 1).astype(kind)
        # By their bytes, as -0.0 would come back as 0.0.
        if (integers / scale).astype("<f4").tobytes() == waveform.tobytes():
            file = io.BytesIO()
            soundfile.write(file, np.left_shift(integers, shift), SAMPLING_RATE, format="FLAC", subtype=f"PCM_{bits}")
            return file.getvalue(), ".flac"
    wav = encode_float_wav(waveform)
    content = None if original is None else _same_audio(original, waveform, len(wav))
    return (wav, ".wav") if content is None else content


def _same_audio(file: AudioFile, waveform: np.ndarray, limit: int) -> tuple[bytes, str] | None:
    """The file and its suffix, if it is below `limit` bytes and decodes to this waveform: it may have been cut."""
    try:
        content = file if isinstance(file, bytes) else Path(str(file)).read_bytes()
        if len(content) >= limit or load_audio(content).tobytes() != waveform.tobytes():
            return None
        return content, f".{soundfile.info(io.BytesIO(content)).format.lower()}"
    except (OSError, AudioError):
        return None


def encode_float_wav(waveform: np.ndarray) -> bytes:
    """WAV of 32-bit floats at 16 kHz, of mono float32 (samples,).

    By hand, as libsndfile writes the time of day into such a file, and equal audio must give equal bytes.
    """
    samples = np.ascontiguousarray(waveform, dtype="<f4").tobytes()
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, 1, SAMPLING_RATE, 4 * SAMPLING_RATE, 4, 32)
    fact = struct.pack("<4sII", b"fact", 4, len(waveform))
    data = struct.pack("<4sI", b"data", len(samples)) + samples
    return struct.pack("<4sI4s", b"RIFF", 4 + len(form) + len(fact) + len(data), b"WAVE") + form + fact + data
