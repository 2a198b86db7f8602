# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The Dasheng teacher, with tiny random weights in the layout of the Hub's checkpoints, against a plain reference."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor

from spear_hf.mvq.dasheng import dasheng
from spear_hf.mvq.teachers import Teacher, load_teacher


SPEC = "spear_hf.mvq.dasheng:dasheng"
DIM, DEPTH, HEADS, MELS, PLACES = 16, 3, 2, 64, 252


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(seconds * 16000))).astype(np.float32)


def published_tensors() -> dict[str, Tensor]:
    """Names and shapes as published (their sum is what the Hub counts of the 1.2B model, see the last test)."""
    return {name: 0.3 * torch.randn(shape) for name, shape in published_shapes(DIM, DEPTH).items()} | {
        "encoder.init_bn.1.running_mean": torch.full((MELS,), -20.0),
        "encoder.init_bn.1.running_var": 100 + 50 * torch.rand(MELS),
        "encoder.init_bn.1.num_batches_tracked": torch.tensor(7),
    }


def published_shapes(dim: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"init_bn.1.{name}": (MELS,) for name in ("weight", "bias", "running_mean", "running_var")
    }
    shapes |= {"time_pos_embed": (1, dim, 1, PLACES), "freq_pos_embed": (1, dim, 1, 1)}
    shapes |= {"patch_embed.proj.weight": (dim, 1, MELS, 4), "patch_embed.proj.bias": (dim,)}
    linears = {
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (4 * dim, dim),
        "mlp.fc2": (dim, 4 * dim),
    }
    for block in range(depth):
        for name, shape in linears.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{block}.{name}.{kind}": (dim,) for kind in ("weight", "bias")}
    shapes |= {f"norm.{kind}": (dim,) for kind in ("weight", "bias")}
    return {f"encoder.{name}": shape for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dasheng")
    save_file(published_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"name": "tiny", "encoder_kwargs": {"num_heads": HEADS}}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"hop_size": 160, "n_fft": 512, "f_max": 8000}))
    return folder


def load(folder, **settings) -> Teacher:
    return load_teacher(SPEC, options={"model": str(folder)}, **settings)


def reference(tensors: dict[str, Tensor], waveform: np.ndarray) -> list[Tensor]:
    """Hidden states of one utterance, step by step with torchaudio's front end: [(patches, dim), ...]."""
    w = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    mel = torchaudio.transforms.MelSpectrogram(16000, 512, 512, 160, 0.0, 8000.0, n_mels=MELS)(
        torch.from_numpy(waveform)[None]
    )
    x = torchaudio.transforms.AmplitudeToDB(top_db=120)(mel)  # (1, mels, frames)
    statistics = (w["init_bn.1.running_mean"], w["init_bn.1.running_var"])
    x = F.batch_norm(x, *statistics, w["init_bn.1.weight"], w["init_bn.1.bias"])
    x = F.conv2d(x[:, None], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=(MELS, 4))
    x = (x + w["time_pos_embed"][..., : x.shape[-1]] + w["freq_pos_embed"])[0, :, 0].T  # (patches, dim)
    states = [x]
    for block in range(DEPTH):
        part = {
            name.removeprefix(f"blocks.{block}."): value for name, value in w.items() if f"blocks.{block}." in name
        }
        y = F.layer_norm(x, (DIM,), part["norm1.weight"], part["norm1.bias"], eps=1e-6)
        query, key, value = F.linear(y, part["attn.qkv.weight"], part["attn.qkv.bias"]).split(DIM, dim=1)
        mixed = []
        for rows in torch.arange(DIM).view(HEADS, -1):
            scores = query[:, rows] @ key[:, rows].T / len(rows) ** 0.5
            mixed.append(scores.softmax(dim=1) @ value[:, rows])
        x = x + F.linear(torch.cat(mixed, dim=1), part["attn.proj.weight"], part["attn.proj.bias"])
        y = F.layer_norm(x, (DIM,), part["norm2.weight"], part["norm2.bias"], eps=1e-6)
        y = F.gelu(F.linear(y, part["mlp.fc1.weight"], part["mlp.fc1.bias"]))
        x = x + F.linear(y, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
        states.append(x)
    states[-1] = F.layer_norm(x, (DIM,), w["norm.weight"], w["norm.bias"], eps=1e-6)
    return states


def test_equals_the_reference_at_every_layer(folder):
    tensors = load_file(folder / "model.safetensors")
    waveform = noise(1.73)
    expected = reference(tensors, waveform)
    for layer in (None, 0, 1, 2, 3, -1):
        features = load(folder, layer=layer)([waveform])[0]
        assert features.shape == (43, DIM)
        assert torch.allclose(features, expected[-1 if layer is None else layer], atol=2e-4), layer


def test_silence_before_loud_sound_is_limited_as_published(folder):
    waveform = np.concatenate([np.zeros(8000, np.float32), 9.0 * noise(0.5)])  # over 20 dB at its loudest
    expected = reference(load_file(folder / "model.safetensors"), waveform)[-1]
    assert torch.allclose(load(folder)([waveform])[0], expected, atol=2e-4)


def test_rate_and_what_is_recorded(folder):
    teacher = load(folder)
    assert (teacher.frame_rate, teacher.feature_size) == (25.0, DIM)
    recorded = teacher.provenance()
    assert (recorded["window_seconds"], recorded["context_seconds"]) == (10.0, 1.24)
    assert recorded["fingerprint"]
    assert recorded["options"] == {"model": str(folder)}
    for num_samples in (480, 481, 1119, 1120, 16000, 159999, 160000):
        waveform = noise(10.0)[:num_samples]
        assert len(teacher([waveform])[0]) == (1 + num_samples // 160) // 4
    with pytest.raises(ValueError, match="too short for one frame"):
        teacher([noise(1.0)[:479]])


def test_batch_does_not_matter(folder):
    teacher = load(folder)
    waveforms = [noise(seconds, seed) * 10**-seed for seed, seconds in enumerate((0.4, 3.1, 1.0, 1.01))]
    for waveform, features in zip(waveforms, teacher(waveforms)):
        assert torch.allclose(features, teacher([waveform])[0], atol=1e-4)


def test_long_audio_in_windows(folder):
    teacher = load(folder)
    waveform = noise(25.0)
    features = teacher([waveform])[0]
    assert features.shape == (625, DIM)
    window = teacher([waveform[:160000]])[0]
    assert torch.allclose(features[:200], window[:200], atol=1e-4)
    with pytest.raises(ValueError, match=r"places for 10\.08 s only"):
        load(folder, window_seconds=12.0)([noise(11.0)])


def test_bfloat16(folder):
    exact, rounded = load(folder)([noise(2.0)])[0], load(folder, dtype="bfloat16")([noise(2.0)])[0]
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


def test_shards_and_a_classifier_on_top_make_no_difference(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:20]}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {name: tensors[name] for name in names[20:]} | {"outputlayer.1.weight": torch.zeros(5, DIM)}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": HEADS}))
    one, other = load(folder), load(tmp_path)
    assert one.fingerprint == other.fingerprint
    assert torch.equal(one([noise(1.0)])[0], other([noise(1.0)])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("encoder.blocks.1.attn.qkv.bias"),
            r"missing tensors \['blocks.1.attn.qkv.bias'\]",
        ),
        (lambda tensors: tensors.update({"encoder.blocks.0.ls1.gamma": torch.ones(DIM)}), "unexpected tensors .*ls1"),
        (
            lambda tensors: tensors.update({"encoder.cls_token": torch.ones(1, 1, DIM)}),
            "unexpected tensors .*cls_token",
        ),
        (lambda tensors: tensors.update({"encoder.norm.bias": torch.ones(3)}), r"norm.bias is \(3,\), not \(16,\)"),
        (lambda tensors: tensors.pop("encoder.time_pos_embed"), "no Dasheng checkpoint"),
    ],
)
def test_other_checkpoints_are_refused(folder, tmp_path, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        dasheng(str(tmp_path))


def test_unusable_folders(folder, tmp_path):
    with pytest.raises(ValueError, match="no safetensors"):
        dasheng(str(tmp_path))
    with pytest.raises(ValueError, match="layer=4: this Dasheng has hidden states 0 to 3"):
        dasheng(str(folder), layer=4)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="neither num_heads nor one of the names dasheng-base"):
        dasheng(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"hop_size": 320}))
    with pytest.raises(ValueError, match="hop_size=320; Dasheng's has 160"):
        dasheng(str(tmp_path))
    with pytest.raises(ValueError, match="could not be had from the Hub"):
        dasheng("nobody/no-such-dasheng")


def test_the_layout_is_that_of_the_published_model():
    """1,134,047,488 numbers are what the Hub counts of mispeech/dasheng-1.2B: 40 blocks of width 1536, 252 places."""
    assert sum(int(np.prod(shape)) for shape in published_shapes(1536, 40).values()) == 1_134_047_488
