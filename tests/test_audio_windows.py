# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Windows of audio files: exactly the slices of the whole, in every kind of format, and in flat memory."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from spear_hf.data import audio as module
from spear_hf.data.audio import CHUNK, AudioError, AudioReader, load_audio, resample
from spear_hf.data.audio_encoding import encode_float_wav
from spear_hf.data.decoding import load_utterance, utterance_seconds
from spear_hf.data.manifest import Utterance, read_manifest


BUNDLED = Path(__file__).parent.parent / "examples" / "data"
# (name, rate, channels, options, whether it is entered without decoding what is before)
FORMATS = [
    ("a.wav", 16000, 1, {"subtype": "PCM_16"}, True),
    ("a.wav", 44100, 2, {"subtype": "FLOAT"}, True),
    ("adpcm.wav", 16000, 1, {"subtype": "MS_ADPCM"}, True),
    ("gsm.wav", 8000, 1, {"subtype": "GSM610"}, False),
    ("a.flac", 16000, 2, {"subtype": "PCM_16"}, True),
    ("a.flac", 48000, 1, {"subtype": "PCM_24"}, True),
    ("a.flac", 11025, 1, {"subtype": "PCM_16"}, True),
    ("vorbis.ogg", 16000, 1, {"subtype": "VORBIS"}, False),
    ("vorbis.ogg", 44100, 2, {"subtype": "VORBIS"}, False),
    ("opus.ogg", 16000, 1, {"subtype": "OPUS", "compression_level": 0.95}, False),
    ("opus.ogg", 48000, 2, {"subtype": "OPUS"}, False),
    ("a.mp3", 16000, 1, {}, False),
    ("a.mp3", 44100, 2, {"bitrate_mode": "VARIABLE"}, False),
    ("odd.wav", 44101, 1, {"subtype": "PCM_16"}, True),
]


@pytest.fixture(scope="module")
def recording():
    """12 s of real audio at 16 kHz: synthetic signals do not show the errors of seeking."""
    clips = [load_audio(clip.path) for clip in read_manifest(BUNDLED)[::70]]
    return np.concatenate(clips)[: 12 * 16000]


def write(path: Path, recording: np.ndarray, rate: int, channels: int, options: dict) -> Path:
    samples = recording if rate == 16000 else resample(recording, 16000, rate)
    if channels == 2:
        samples = np.stack([samples, np.roll(samples, 200)], axis=1)
    with soundfile.SoundFile(path, "w", rate, channels, **options) as file:
        for start in range(0, len(samples), rate):  # libsndfile's Vorbis encoder overflows the stack at long pieces
            file.write(samples[start : start + rate])
    return path


@pytest.mark.parametrize(("name", "rate", "channels", "options", "seeks"), FORMATS)
def test_windows_are_slices_of_the_whole(tmp_path, recording, name, rate, channels, options, seeks):
    path = write(tmp_path / name, recording, rate, channels, options)
    whole = load_audio(path)
    assert abs(len(whole) - len(recording)) < 2500
    rng = np.random.default_rng(0)
    windows = [(int(start), int(rng.integers(1, 30000))) for start in rng.integers(0, len(whole) - 30000, 6)]
    windows += [(0, 1), (CHUNK - 1, 2), (CHUNK, CHUNK), (15999, 16002), (len(whole) - 1, 1)]
    for start, count in windows:
        assert np.array_equal(load_audio(path, start=start, num_samples=count), whole[start : start + count])
    with AudioReader(path) as reader:
        assert reader.seeks is seeks
        assert reader.num_samples == len(whole)
        for start, count in windows:  # forwards and backwards in one open file
            assert np.array_equal(reader.read(start, count), whole[start : start + count])
        forwards = [reader.read(start, 12345) for start in range(0, len(whole), 12345)]
        assert np.array_equal(np.concatenate(forwards), whole)
        assert np.array_equal(reader.read(len(whole) - 100, 1000), whole[-100:])
        assert len(reader.read(len(whole), 10)) == len(reader.read(len(whole) + 10**6, 10)) == 0
    assert np.array_equal(load_audio(path.read_bytes(), start=777, num_samples=5000), whole[777:5777])
    assert np.array_equal(load_audio(io.BytesIO(path.read_bytes())), whole)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_blocks_resample_as_the_whole_does(tmp_path, recording, rate):
    samples = resample(recording, 16000, rate)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    whole = resample(samples, rate, 16000)
    decoded = load_audio(tmp_path / "a.wav")
    assert len(decoded) == len(whole)
    np.testing.assert_allclose(decoded, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", [1, 159, 15999, 16000, 16001, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])
@pytest.mark.parametrize("rate", [16000, 48000])
def test_every_length_is_kept(tmp_path, length, rate):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, length).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, rate, subtype="FLOAT")
    decoded = load_audio(tmp_path / "a.wav")
    assert len(decoded) == -(-length * 16000 // rate)
    if rate == 16000:
        assert np.array_equal(decoded, samples)


def test_flac_that_does_not_say_how_long_it_is(tmp_path, recording):
    """As an encoder writes it into a pipe: the header has 0 samples, and libsndfile cannot find the end."""
    path = write(tmp_path / "a.flac", recording, 16000, 1, {})
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the lower 36 of the 8 bytes from byte 18 on are the number of samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.flac cannot be decoded: its header does not say how long it is"):
        load_audio(path)


def test_a_header_that_claims_too_much_takes_no_memory(tmp_path, recording):
    """2^36 - 1 samples would be 256 GiB."""
    path = write(tmp_path / "a.flac", recording, 16000, 1, {})
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(AudioError, match=r"a\.flac cannot be decoded"):
        load_audio(path)


def test_utterances(tmp_path, recording):
    path = write(tmp_path / "a.flac", recording, 16000, 1, {})
    whole = load_audio(path)
    stretch = Utterance("a", path, start=40000, num_samples=8001)
    assert np.array_equal(load_utterance(Utterance("a", path)), whole)
    assert np.array_equal(load_utterance(stretch), whole[40000:48001])
    assert utterance_seconds(stretch) == 8001 / 16000
    inside = Utterance("a", Path("rows.parquet#3"), content=path.read_bytes(), start=5, num_samples=70)
    assert np.array_equal(load_utterance(inside), whole[5:75])
    assert utterance_seconds(Utterance("a", Path("rows"), content=path.read_bytes())) == len(whole) / 16000
    # At another rate stretches tile as well.
    parts = [Utterance("a", path, start=start, num_samples=7) for start in range(0, 70, 7)]
    lengths = [len(load_utterance(part, 8000)) for part in parts]
    assert sum(lengths) == 35
    assert np.array_equal(load_audio(encode_float_wav(whole)), whole)
    with pytest.raises(ValueError, match="needs num_samples"):
        Utterance("a", path, start=0)


@pytest.mark.parametrize(
    ("utterance", "message"),
    [
        ({"path": Path("rows.parquet#3"), "content": b""}, r"rows.parquet#3 cannot be decoded: there is no audio"),
        ({"path": Path("x.tar#3"), "content": b"not audio" * 50}, r"x.tar#3 cannot be decoded: Format not recog"),
        ({"path": Path("none.wav"), "start": 3, "num_samples": 4}, r"none.wav cannot be decoded: there is no such"),
        ({"path": Path("nul\0.wav")}, r"cannot be decoded"),
    ],
)
def test_errors_name_the_utterance(utterance, message):
    with pytest.raises(AudioError, match=message):
        load_utterance(Utterance("id", **utterance))


def test_a_stretch_beyond_the_file_is_an_error(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), 16000)
    with pytest.raises(AudioError, match=r"a\.wav has no samples 1000 to 1100 \(16000 Hz\)"):
        load_audio(tmp_path / "a.wav", start=900, num_samples=200)


@pytest.mark.parametrize("rate", [1, 999, 2_000_000])
def test_absurd_rates_are_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(1000), rate)
    with pytest.raises(AudioError, match=rf"a\.wav cannot be decoded: its header says {rate} Hz"):
        load_audio(tmp_path / "a.wav")


def damaged(content: bytes, trial: int) -> bytes:
    """Truncated, in the first trials, and with flipped bits, in every other trial of the first 200 bytes."""
    rng = np.random.default_rng(trial)
    kept = bytearray(content[: int(rng.integers(1, len(content)))] if trial < 20 else content)
    for place in rng.integers(0, min(len(kept), 200 if trial % 2 else len(kept)), 8):
        kept[place] ^= 1 << int(rng.integers(8))
    return bytes(kept)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "opus.ogg", "a.mp3", "a.aiff"])
def test_damaged_files_give_audio_or_an_audio_error(tmp_path, recording, name):
    options = {"subtype": "OPUS"} if name == "opus.ogg" else {}
    path = write(tmp_path / name, recording[:32000], 16000, 1, options)
    content = path.read_bytes()
    messages = []
    for trial in range(40):
        path.write_bytes(damaged(content, trial))
        try:
            assert np.isfinite(load_audio(path)).all()
        except AudioError as error:
            messages.append(str(error))
    assert all(message.startswith(str(path)) for message in messages)


def test_resamplers_are_made_once():
    assert module._resampler(48000, 16000) is module._resampler(48000, 16000)
