# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Decoding: formats, rates, channels, and files that are no audio."""

import io
import os
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import soundfile
import torch

from spear_hf.data import audio as module
from spear_hf.data.audio import AudioError, AudioReader, audio_duration, load_audio


@pytest.fixture(scope="module")
def speech(golden):
    """3.25 s at 16 kHz."""
    return golden["0.waveform"].numpy()


def tone(rate: int, seconds: float = 1.0, frequency: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.wav", {"subtype": "FLOAT"}, 0.0),
        ("a.wav", {"subtype": "PCM_16"}, 1 / 32768),
        ("a.flac", {"subtype": "PCM_24"}, 1e-6),
        ("a.aiff", {"subtype": "PCM_16"}, 1 / 32768),
        ("a.w64", {"subtype": "FLOAT"}, 0.0),
        ("a.caf", {"subtype": "PCM_32"}, 1e-6),
    ],
)
def test_lossless_formats(tmp_path, speech, name, options, tolerance):
    soundfile.write(tmp_path / name, speech, 16000, **options)
    waveform = load_audio(tmp_path / name)
    assert waveform.dtype == np.float32
    assert waveform.shape == speech.shape
    assert np.abs(waveform - speech).max() <= tolerance
    assert audio_duration(tmp_path / name) == len(speech) / 16000


@pytest.mark.parametrize(
    "options", [{"format": "OGG", "subtype": "VORBIS"}, {"format": "OGG", "subtype": "OPUS"}, {"format": "MP3"}]
)
def test_lossy_formats(tmp_path, options):
    path = tmp_path / f"tone.{options['format'].lower()}"
    soundfile.write(path, tone(16000), 16000, **options)
    waveform = load_audio(str(path))
    assert abs(len(waveform) - 16000) <= 1152  # MP3 has whole frames
    spectrum = np.abs(np.fft.rfft(waveform[:16000]))
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert audio_duration(path) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000, 44101])
def test_resampling(tmp_path, rate):
    soundfile.write(tmp_path / "tone.wav", tone(rate), rate, subtype="FLOAT")
    waveform = load_audio(tmp_path / "tone.wav")
    assert len(waveform) == 16000
    inner = slice(200, -200)  # the filters see zeros beyond the ends
    assert np.abs(waveform[inner] - tone(16000)[inner]).max() < 1e-3
    assert audio_duration(tmp_path / "tone.wav") == 1.0


def test_other_target_rate(tmp_path):
    soundfile.write(tmp_path / "tone.wav", tone(16000), 16000)
    assert load_audio(tmp_path / "tone.wav", sampling_rate=8000).shape == (8000,)


def test_channels_are_averaged(tmp_path, speech):
    soundfile.write(tmp_path / "a.wav", np.stack([speech, np.zeros_like(speech)], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), speech / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.wav cannot be decoded"),
        (b"not audio at all " * 100, r"bad\.wav cannot be decoded: Format not recognised"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", r"bad\.wav cannot be decoded"),
    ],
)
def test_no_audio(tmp_path, content, message):
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message):
        load_audio(path)
    with pytest.raises(AudioError, match=r"bad\.wav cannot be read"):
        audio_duration(path)


def test_damaged_flac(tmp_path, speech):
    path = tmp_path / "half.flac"
    soundfile.write(path, speech, 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"half.flac cannot be decoded"):
        load_audio(path)


def test_missing_file_and_folder(tmp_path):
    for function in (load_audio, audio_duration):
        with pytest.raises(AudioError, match=r"none.wav .*no such file"):
            function(tmp_path / "none.wav")
        with pytest.raises(AudioError, match="it is a folder"):
            function(tmp_path)


def test_empty_and_not_finite(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(AudioError, match=r"empty.wav is empty"):
        load_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan, 0.5]), 16000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"nan.wav is not finite: sample 1 is nan"):
        load_audio(tmp_path / "nan.wav")


def test_without_torchaudio(tmp_path, monkeypatch):
    """It is asked for only by files of another rate, and the error says what to install."""
    module._resampler.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    soundfile.write(tmp_path / "right.wav", tone(16000), 16000)
    soundfile.write(tmp_path / "other.wav", tone(8000), 8000)
    assert load_audio(tmp_path / "right.wav").shape == (16000,)
    version = torch.__version__.split("+")[0]
    with pytest.raises(ImportError, match=rf"pip install torch=={version} torchaudio=={version}"):
        load_audio(tmp_path / "other.wav")


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "w64", "rf64"])
def test_cut_off(tmp_path, speech, suffix):
    """libsndfile takes what is left of such a file for all of it."""
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    soundfile.write(whole, speech, 16000, format=suffix)
    assert len(load_audio(whole)) == len(speech)
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match=rf"cut\.{suffix} cannot be decoded: it is cut off, \d+ bytes"):
        load_audio(cut)


def lossy(kind: str, samples: np.ndarray, rate: int = 16000) -> bytes:
    """A file of one of the formats of which libsndfile does not tell that they are cut off."""
    options = {
        "vorbis": {"format": "OGG", "subtype": "VORBIS"},
        "opus": {"format": "OGG", "subtype": "OPUS"},
        "mp3": {"format": "MP3"},
        "sphere": {"format": "NIST", "subtype": "PCM_16"},
    }
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **options[kind])
    return file.getvalue()


def openings(content: bytes, path: Path) -> list[bytes | Path | BinaryIO]:
    path.write_bytes(content)
    return [content, path, io.BytesIO(content)]


@pytest.mark.parametrize("kind", ["vorbis", "opus", "mp3", "sphere"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.93])
def test_cut_off_without_a_word_of_libsndfile(tmp_path, speech, kind, share):
    content = lossy(kind, speech)
    whole = [load_audio(file) for file in openings(content, tmp_path / "whole")]
    assert all(len(waveform) == len(speech) for waveform in whole)
    for file in openings(content[: int(share * len(content))], tmp_path / "cut"):
        with pytest.raises(AudioError, match="cannot be decoded: it is cut off"):
            load_audio(file)


@pytest.mark.parametrize("left", [1, 10, 26, 27, 30, 60, 200])
def test_last_page_of_ogg_is_cut_anywhere(speech, left):
    content = lossy("vorbis", speech)
    with pytest.raises(AudioError, match="its last page is not whole"):
        load_audio(content[: content.rindex(b"OggS") + 4 + left])


def test_whole_ogg_files_that_are_odd(speech):
    content = lossy("vorbis", speech)
    last = content.rindex(b"OggS")
    unmarked = bytearray(content[last:])
    assert unmarked[5] & 4  # the mark of the stream's end, which one in thirty whole files lacks
    unmarked[5] &= ~4
    unmarked[22:26] = bytes(4)
    unmarked[22:26] = ogg_checksum(unmarked).to_bytes(4, "little")
    for odd in (content[:last] + unmarked, content + content, content + b"TAG".ljust(128), content + bytes(70_000)):
        assert len(load_audio(odd)) >= len(speech)


def ogg_checksum(page: bytes) -> int:
    """CRC-32 of the polynomial 0x04C11DB7, not reflected, from 0."""
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x104C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
    return value


def test_mp3_with_and_without_a_count_of_frames(speech):
    """Behind tags, and of another rate; without the count nobody knows what is missing."""
    content = lossy("mp3", np.tile(speech, 3), 44100)
    tag = b"ID3\x03\0\0\0\0\x10\0" + bytes(2048)
    assert len(load_audio(tag + content + b"TAG".ljust(128))) == -(-3 * len(speech) * 160 // 441)
    with pytest.raises(AudioError, match=r"cut off or damaged, \d\.\d\d s of it are missing"):
        load_audio((tag + content)[: len(content) // 2])
    counted = content.index(b"Info") if b"Info" in content else content.index(b"Xing")
    uncounted = content[:counted] + bytes(8) + content[counted + 8 :]
    assert 0 < len(load_audio(uncounted[: len(content) // 2])) < len(load_audio(uncounted))


def test_windows_of_a_cut_mp3(tmp_path, speech):
    """What is there can be read; the end cannot, however often it is tried."""
    content = lossy("mp3", np.tile(speech, 6))
    with AudioReader(content[: len(content) // 2], name="a.mp3") as reader:
        assert len(reader.read(0, 16000)) == 16000
        for _ in range(2):
            with pytest.raises(AudioError, match=r"a\.mp3 cannot be decoded: it is cut off or damaged"):
                reader.read(100_000)
        assert len(reader.read(0, 16000)) == 16000


@pytest.mark.parametrize("stated", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFF000])
def test_header_of_a_stream(tmp_path, speech, stated):
    """Whoever writes to a pipe cannot know the length."""
    path = tmp_path / "stream.wav"
    soundfile.write(path, speech, 16000)
    content = path.read_bytes()
    place = content.index(b"data") + 4
    path.write_bytes(content[:place] + stated.to_bytes(4, "little") + content[place + 4 :])
    assert len(load_audio(path)) == len(speech)
    # A few samples less than stated are the fault of who wrote the header.
    path.write_bytes(content[:place] + (2 * len(speech) + 36).to_bytes(4, "little") + content[place + 4 :])
    assert len(load_audio(path)) == len(speech)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    for function in (load_audio, audio_duration):
        with pytest.raises(AudioError, match=r"pipe\.wav cannot be decoded: it is a pipe"):
            function(tmp_path / "pipe.wav")


def test_a_damaged_mp3_is_not_called_missing(tmp_path):
    (tmp_path / "a.mp3").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(AudioError, match=r"a\.mp3 cannot be decoded: Format not recognised"):
        load_audio(tmp_path / "a.mp3")
