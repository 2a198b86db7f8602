# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Teachers in TorchScript files: batches of equal lengths, and frames brought to 20 ms by time."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from spear_hf.evaluation.representations import load_representation
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata


SPEC = "spear_hf.mvq.torchscript:torchscript"


class Tagger(torch.nn.Module):
    """62.5 Hz: frame t is centred on sample 256 t, and holds its time in seconds, its level and the level of all."""

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(waveform, (128, 128))
        frames = padded.unfold(1, 256, 256)[:, : 1 + waveform.shape[1] // 256]
        times = torch.arange(frames.shape[1]) * 256 / 16000
        whole = waveform.abs().mean(dim=1, keepdim=True).expand(-1, frames.shape[1])
        return torch.stack([times.expand(len(waveform), -1), frames.abs().mean(dim=2), whole], dim=2)


class Louder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tagger = Tagger()

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        return 2 * self.tagger(waveform)


class Flat(torch.nn.Module):
    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        return waveform.mean(dim=1)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tagger") / "tagger.pt"
    torch.jit.script(Tagger()).save(str(path))
    return str(path)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def load(file, **options):
    return load_teacher(SPEC, options={"file": file, "frame_rate": 62.5, **options})


def test_features_as_the_file_gives_them(file):
    teacher = load(file)
    assert (teacher.frame_rate, teacher.feature_size) == (62.5, 3)
    waveform = noise(16000)
    expected = Tagger()(torch.from_numpy(waveform)[None])[0]
    assert torch.allclose(teacher([waveform])[0], expected, atol=1e-6)


def test_padding_cannot_leak(file):
    """The last channel is the mean of the whole row: with a padded batch it would be wrong for the shorter ones."""
    teacher = load(file, resample_to=50)
    waveforms = [noise(length, seed) for seed, length in enumerate((16000, 9000, 16000, 4321))]
    for waveform, features in zip(waveforms, teacher(waveforms)):
        assert torch.equal(features, teacher([waveform])[0])


@pytest.mark.parametrize("rate", [50, 25])
def test_resampled_frames_are_at_their_times(file, rate):
    """The first channel is the time that a frame is centred on: what comes out is the middle of its stretch."""
    teacher = load(file, resample_to=rate)
    assert teacher.frame_rate == rate
    for num_samples in (16000 // rate, 640, 16000, 16319, 16320, 40001):
        times = teacher([noise(num_samples)])[0][:, 0]
        assert len(times) == num_samples * rate // 16000
        last = 256 / 16000 * (num_samples // 256)  # the file's last frame: held beyond its centre
        expected = ((torch.arange(len(times)) + 0.5) / rate).clamp(max=last)
        assert torch.allclose(times, expected, atol=1e-6)


def test_centres_of_frames_that_start_at_their_time(file):
    shifted = load(file, resample_to=50, first_centre=0.008)([noise(16000)])[0][:, 0]
    centred = load(file, resample_to=50)([noise(16000)])[0][:, 0]
    assert torch.allclose(shifted[1:], centred[1:] - 0.008, atol=1e-6)


def test_the_bytes_are_the_identity(file, tmp_path):
    teacher = load(file)
    recorded = teacher.provenance()
    assert recorded["options"] == {"file": file, "frame_rate": 62.5}
    assert len(recorded["fingerprint"]) == 16
    torch.jit.script(Flat()).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match=r"must return features \(batch, frames, dim\), gave \(1,\)"):
        load(str(tmp_path / "other.pt"))


def test_a_file_that_moved(file, tmp_path):
    teacher = load(file, resample_to=50)
    quantizer = MultiCodebookQuantizer(3, 4, 2, **quantizer_metadata(teacher))
    quantizer.save_pretrained(tmp_path / "tokenizer")
    shutil.copyfile(file, tmp_path / "moved.pt")
    here = MvqTokenizer.from_pretrained(tmp_path / "tokenizer")
    there = MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=str(tmp_path / "moved.pt"))
    assert there.teacher.options == {**here.teacher.options, "file": str(tmp_path / "moved.pt")}
    assert np.array_equal(here(noise(16000)), there(noise(16000)))
    with pytest.raises(ValueError, match="there is no such TorchScript file"):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=str(tmp_path / "nowhere.pt"))
    torch.jit.script(Louder()).save(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="with fingerprint of the parameters"):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=str(tmp_path / "other.pt"))


class Exploit:
    """What a pickle can do, and TorchScript files cannot: any call, when it is loaded."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_not_unpickled(tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Exploit(tmp_path / "pwned")))
    torch.save(Exploit(tmp_path / "pwned"), tmp_path / "zipped.pt")
    for name in ("evil.pt", "zipped.pt"):
        with pytest.raises(ValueError, match="is no TorchScript file"):
            load(str(tmp_path / name))
    assert not (tmp_path / "pwned").exists()


def test_unusable_settings(file, tmp_path):
    with pytest.raises(ValueError, match="there is no such TorchScript file"):
        load(str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="frame_rate=0 must be a positive number"):
        load(file, frame_rate=0)
    with pytest.raises(ValueError, match="resample_to='50' must be a positive number"):
        load(file, resample_to="50")
    with pytest.raises(ValueError, match="runs in float32, not bfloat16"):
        load_teacher(SPEC, options={"file": file, "frame_rate": 62.5}, dtype="bfloat16")
    with pytest.raises(ValueError, match="missing a required argument: 'file'"):
        load_teacher(SPEC, options={"frame_rate": 62.5})  # never found by itself
    with pytest.raises(ValueError, match=r"at 50\.0 Hz"):
        load(file, frame_rate=50.0)  # not what the file gives


def test_as_a_representation(file):
    """The options of a word of `spear-hf evaluate` are numbers where they look like it."""
    spec = f"teacher:{SPEC}#file={file},frame_rate=62.5,resample_to=50"
    found = load_representation(spec, device="cpu").teacher
    assert found.frame_rate == 50
    assert torch.equal(found([noise(16000)])[0], load(file, resample_to=50)([noise(16000)])[0])
