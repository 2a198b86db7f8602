# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The contract of HEAR 2021, with the checks of its validator written anew from the text of the contract."""

import importlib

import numpy as np
import pytest
import torch

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
from spear_hf.data.segments import FrameGrid
from spear_hf.evaluation.framing import framed, mirrored
from spear_hf.evaluation.options import split_options


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_layers_per_stack": [1, 1],
    "conv_kernel_sizes": [7, 7],
    "downsampling_factors": [1, 2],
}
LENGTHS = (800, 1360, 1600, 4000, 15999, 16000, 17120, 31680)


@pytest.fixture(scope="module")
def hear():
    return importlib.import_module("spear_hf.evaluation.hear")  # as the official runner does


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for factor in (1, 2):
        torch.manual_seed(factor)
        folders[factor] = tmp_path_factory.mktemp(f"factor{factor}")
        SpearModel(SpearConfig(**SIZES, output_downsampling_factor=factor)).save_pretrained(folders[factor])
        SpearFeatureExtractor().save_pretrained(folders[factor])
    return folders


def noise(sounds, samples, seed=0):
    return 2 * torch.rand(sounds, samples, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("options", ["", "#layers=all", "#layers=1,scene=mean+std"])
@pytest.mark.parametrize("factor", [1, 2])
def test_validator(hear, folders, factor, options):
    model = hear.load_model(f"{folders[factor]}{options}")
    assert isinstance(model, torch.nn.Module)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.sample_rate == 16000
    assert isinstance(model.scene_embedding_size, int)
    assert isinstance(model.timestamp_embedding_size, int)
    model.to("cpu")
    for samples in LENGTHS:
        audio = noise(2, samples)
        embeddings, timestamps = hear.get_timestamp_embeddings(audio, model)
        assert embeddings.dtype == timestamps.dtype == torch.float32
        assert embeddings.device == timestamps.device == audio.device
        assert embeddings.shape == (2, *timestamps.shape[1:], model.timestamp_embedding_size)
        assert timestamps.shape == embeddings.shape[:2]
        assert torch.isfinite(embeddings).all()
        end = 1000 * samples / 16000
        for times in timestamps.numpy():
            spacing = np.diff(times)
            assert len(spacing) == 0 or np.abs(spacing - spacing.mean()).max() <= 1
            assert len(spacing) == 0 or spacing.max() <= 50
            assert times[0] >= 0
            assert end - 50 <= times[-1] <= end
        scene = hear.get_scene_embeddings(audio, model)
        assert scene.dtype == torch.float32
        assert scene.shape == (2, model.scene_embedding_size)
        size = model.timestamp_embedding_size
        assert torch.allclose(scene[:, :size], embeddings.mean(dim=1), atol=1e-5)


def test_timestamps_do_not_drift(hear, folders, monkeypatch):
    model = hear.load_model(str(folders[1]))
    monkeypatch.setattr(model, "forward", lambda part: torch.zeros(len(part), part.shape[1] // 320 + 1, 16))
    _, timestamps = hear.get_timestamp_embeddings(torch.zeros(1, 3600 * 16000 + 100), model)
    assert timestamps[0, -1] == 3600 * 1000
    assert (timestamps[0].double().diff() == 20).all()


def test_embeddings_do_not_depend_on_the_batch(hear, folders, monkeypatch):
    model = hear.load_model(f"{folders[1]}#layers=all")
    audio = noise(3, 9000)
    together, _ = hear.get_timestamp_embeddings(audio, model)
    monkeypatch.setattr(hear, "_BATCH_SECONDS", 0.1)  # each alone
    alone, _ = hear.get_timestamp_embeddings(audio, model)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(hear.get_scene_embeddings(audio, model), together.mean(dim=1), atol=1e-5)


@pytest.mark.parametrize("factor", [1, 2])
def test_frames_lie_where_the_timestamps_say(hear, folders, factor):
    """Silence with a click: the frames that change are centred around the click's time."""
    model = hear.load_model(str(folders[factor]))
    centres = FrameGrid(factor).centres(20)
    quiet = torch.zeros(1, 16000)
    extended = framed(torch.arange(16000.0), 51, 0)  # the sample number, so that places can be read off
    assert extended[720] == 0  # frame 0 lies at 720 of the extended audio, sample 0 of the file
    assert extended[720 + 320 * 50 - 1] == 15999
    plain, _ = hear.get_timestamp_embeddings(quiet, model)
    click = quiet.clone()
    click[0, 8000:8040] = 0.9  # at 501 ms
    changed, times = hear.get_timestamp_embeddings(click, model)
    change = (changed - plain).norm(dim=-1)[0]
    assert abs(float(times[0, change.argmax()]) - 501) <= 20 * factor + 40
    assert centres[1] - centres[0] == pytest.approx(float(times[0, 1]) / 1000)


def test_wrong_arguments(hear, folders):
    with pytest.raises(ValueError, match="no model is named"):
        hear.load_model()
    with pytest.raises(ValueError, match="layer='9'"):
        hear.load_model(f"{folders[1]}#layers=9")
    with pytest.raises(ValueError, match="scene='max'"):
        hear.load_model(f"{folders[1]}#scene=max")
    with pytest.raises(ValueError, match=r"layer=1\.5"):  # which is not 1
        hear.load_model(folders[1], layers=1.5)
    model = hear.load_model(folders[1])
    with pytest.raises(ValueError, match="audio is a ndarray"):
        hear.get_scene_embeddings(torch.zeros(1, 16000).numpy(), model)
    for audio in (torch.zeros(16000), torch.zeros(2, 0), torch.zeros(2, 9000, dtype=torch.int16)):
        with pytest.raises(ValueError, match="floats in"):
            hear.get_scene_embeddings(audio, model)


def test_mirrored():
    assert mirrored(torch.tensor([1.0, 2.0, 3.0]), 2, 9).tolist() == [2, 1, 1, 2, 3, 3, 2, 1, 1]
    assert mirrored(torch.tensor([[5.0]]), 3, 5).tolist() == [[5] * 5]
    with pytest.raises(ValueError, match="empty"):
        mirrored(torch.zeros(0), 1, 2)


def test_options():
    assert split_options("a/b#x=1,y=2", ("x", "y")) == ("a/b", {"x": "1", "y": "2"})
    assert split_options("a/b", ("x",)) == ("a/b", {})
    assert split_options(r"a#x=\d{1,2}-(.),y=b,c", ("x", "y"))[1] == {"x": r"\d{1,2}-(.)", "y": "b,c"}
    for text, message in (("a#z=1", "unknown option 'z'"), ("a#x", "KEY=VALUE"), ("a#x=1,x=2", "twice")):
        with pytest.raises(ValueError, match=message):
            split_options(text, ("x", "y"))
