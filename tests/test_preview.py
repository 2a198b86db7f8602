# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf tokenize --preview`: one picture of a file's tokens, in time with its spectrogram."""

import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.preview import draw_preview, frame_errors, token_colours
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata


BUNDLED = Path(__file__).parent.parent / "examples" / "data"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A bundled clip of 3 s or so."""
    clips = sorted(read_manifest(BUNDLED), key=lambda clip: (clip.num_samples or 0, clip.id))
    path = tmp_path_factory.mktemp("audio") / "clip.flac"
    shutil.copyfile(clips[800].path, path)
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    torch.manual_seed(0)
    teacher = load_teacher("kaldi-mfcc")
    quantizer = MultiCodebookQuantizer(teacher.feature_size, 16, 4, **quantizer_metadata(teacher))
    torch.nn.init.normal_(quantizer.centers)
    folder = tmp_path_factory.mktemp("tokenizer")
    quantizer.save_pretrained(folder)
    return folder


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_picture_and_no_store(tokenizer_folder, clip, tmp_path):
    output = tmp_path / "pictures" / "clip.png"
    code, printed = run(
        *("tokenize", "--tokenizer", tokenizer_folder, "--preview", clip, "--output", output, "--device", "cpu"),
        *("--preview-start", 0.5, "--preview-seconds", 1.5, "--preview-audio"),
    )
    assert code == 0, printed
    assert "no vocoder" in printed
    assert sorted(path.name for path in output.parent.iterdir()) == ["clip.png", "clip.wav"]
    image = imread(output)
    assert image.shape[0] > 300
    assert image.shape[1] > 1000
    with wave.open(str(output.with_suffix(".wav"))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        excerpt = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    # What is played is the input, of the stretch that is shown.
    assert np.abs(excerpt - load_audio(clip)[8000:32000]).max() < 1e-4


def test_tokens_are_drawn_in_time(tokenizer_folder, clip):
    tokenizer = MvqTokenizer.from_pretrained(tokenizer_folder)
    waveform = load_audio(clip)
    codes = tokenizer(waveform)
    figure = draw_preview(tokenizer, waveform, 0.0, 2.0, "clip", marks=[(0.25, "h"), (1.0, "e"), (9.0, "outside")])
    spectrogram, tokens, error = figure.axes
    (image,) = tokens.images
    assert image.get_extent() == [0, len(codes) / 50, 4.5, 0.5]
    colours = token_colours(tokenizer.quantizer.centers.detach())
    drawn = np.asarray(image.get_array())
    assert drawn.shape == (4, len(codes), 3)
    for codebook in range(4):
        assert np.allclose(drawn[codebook], colours[codebook, codes[:, codebook]])
    # Both pictures have one axis of seconds.
    assert spectrogram.get_xlim() == tokens.get_xlim() == error.get_xlim() == (0.0, 2.0)
    assert spectrogram.images[0].get_extent()[1] == pytest.approx(len(waveform) / 16000, abs=0.02)
    assert [text.get_text() for text in spectrogram.texts] == ["h", "e"]
    assert "4 codebooks of 16 at 50 Hz = 0.8 kbit/s" in spectrogram.get_title(loc="right")


def test_like_centres_have_like_colours():
    """Centres on a circle, in any order: neighbours on it are nearer in colour than opposite ones."""
    angles = 2 * np.pi * np.random.default_rng(0).permutation(32) / 32
    centers = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1))[None].float()
    colours = token_colours(centers)
    assert colours.shape == (1, 32, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    ordered = colours[0, np.argsort(angles)]
    near = np.linalg.norm(ordered - np.roll(ordered, 1, axis=0), axis=1)
    far = np.linalg.norm(ordered - np.roll(ordered, 16, axis=0), axis=1)
    assert np.median(near) < 0.5 * np.median(far)


def test_error_of_frames():
    features = torch.randn(50, 8)
    assert np.allclose(frame_errors(features, features, torch.ones(8)), 0)
    means = features.mean(dim=0).expand_as(features)
    assert frame_errors(features, means, torch.ones(8)).mean() == pytest.approx(1, rel=1e-5)


def test_errors_are_one_line(tokenizer_folder, clip, tmp_path):
    where = ("tokenize", "--tokenizer", tokenizer_folder, "--device", "cpu")
    for arguments, message in (
        (("--preview", clip, "--output", tmp_path / "x.jpg"), "ends in .png"),
        (("--preview", clip, "--output", tmp_path / "x.png", "--preview-start", 60), "it has nothing at 60.0 s"),
        (("--preview", tmp_path / "none.wav", "--output", tmp_path / "x.png"), "no such file"),
    ):
        code, printed = run(*where, *arguments)
        assert code == 1
        assert message in printed
    for arguments in (("--output", tmp_path / "x"), ("--output", tmp_path / "x", "--data", clip, "--preview", clip)):
        code, printed = run(*where, *arguments)
        assert code == 2
        assert "say --data" in printed
    assert not list(tmp_path.iterdir())


def test_the_excerpt_never_replaces_its_file(tokenizer_folder, clip, tmp_path):
    """The name that suggests itself: speech.wav to speech.png."""
    speech = tmp_path / "speech.wav"
    soundfile.write(speech, load_audio(clip), 16000)
    before = speech.read_bytes()
    where = ("tokenize", "--tokenizer", tokenizer_folder, "--device", "cpu", "--preview", speech)
    code, printed = run(*where, "--output", tmp_path / "speech.png", "--preview-audio", "--preview-seconds", 1)
    assert code == 1
    assert "would replace the file that it is of" in printed
    assert speech.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["speech.wav"]


def test_very_short_audio_and_the_very_end(tokenizer_folder, clip, tmp_path):
    waveform = load_audio(clip)[8000:24000]
    for samples, options in ((480, ()), (800, ()), (16000, ("--preview-start", 0.995))):
        soundfile.write(tmp_path / "short.wav", waveform[:samples], 16000)
        where = ("--preview", tmp_path / "short.wav", "--output", tmp_path / "short.png", "--device", "cpu")
        code, printed = run("tokenize", "--tokenizer", tokenizer_folder, *where, *options)
        assert code == 0, printed
        assert imread(tmp_path / "short.png").shape[0] > 300
    soundfile.write(tmp_path / "short.wav", waveform[:300], 16000)
    code, printed = run("tokenize", "--tokenizer", tokenizer_folder, *where)
    assert code == 1
    assert "short.wav: 300 samples are too short" in printed
