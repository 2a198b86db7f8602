# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The waveform of an utterance, wherever its audio is: a file, a stretch of one, or bytes out of another file."""

import numpy as np

from .audio import SAMPLING_RATE, AudioFile, AudioReader, audio_duration, load_audio
from .manifest import Utterance


def load_utterance(utterance: Utterance, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """Mono float32 (samples,) at `sampling_rate` Hz. AudioError names the utterance's file and what is wrong with it.

    A stretch is, bit for bit, what slicing the whole would give; Vorbis, Opus and MP3 are decoded from their beginning
    for it (audio.py says why). At another rate than 16 kHz its ends are rounded down, so that stretches still tile.
    """
    if utterance.start is None:
        return load_audio(audio_file(utterance), sampling_rate, name=str(utterance.path))
    assert utterance.num_samples is not None  # Utterance sees to it
    first, stop = (
        samples * sampling_rate // SAMPLING_RATE
        for samples in (utterance.start, utterance.start + utterance.num_samples)
    )
    return load_audio(audio_file(utterance), sampling_rate, first, stop - first, name=str(utterance.path))


def utterance_seconds(utterance: Utterance) -> float:
    """Length, as the list says or else the file's header. AudioError if that cannot be read."""
    if utterance.num_samples is not None:
        return utterance.num_samples / SAMPLING_RATE
    return audio_duration(audio_file(utterance), name=str(utterance.path))


def decodes_exactly(utterance: Utterance) -> bool:
    """Whether its waveform at 16 kHz is the same, bit for bit, with every version of the libraries."""
    with AudioReader(audio_file(utterance), name=str(utterance.path)) as reader:
        return reader.is_exact


def audio_file(utterance: Utterance) -> AudioFile:
    """What holds its audio, for audio.py."""
    content = utterance.content() if callable(utterance.content) else utterance.content
    return utterance.path if content is None else content
