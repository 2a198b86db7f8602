# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""MvqTokenizer: teacher and quantiser in one object, and never the wrong teacher."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from spear_hf.mvq.quantize import FrameSample, train_on_sample
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import Teacher, load_teacher
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata
from spear_hf.mvq.training import QuantizerTrainingConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small run faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(int(seconds * 16000))).astype(np.float32)


def make_quantizer(teacher: Teacher, codebook_size: int = 16) -> MultiCodebookQuantizer:
    """Centres drawn at random, features standardised by those of noise."""
    torch.manual_seed(0)
    quantizer = MultiCodebookQuantizer(
        teacher.feature_size, codebook_size, 4, normalize=True, **quantizer_metadata(teacher)
    )
    features = teacher([noise(2.0)])[0]
    quantizer.feature_mean.copy_(features.mean(dim=0))
    quantizer.feature_std.copy_(features.std(dim=0))
    torch.nn.init.normal_(quantizer.centers, std=0.5)
    return quantizer


def save_teacher(folder) -> str:
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=8,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    torch.manual_seed(1)
    WavLMModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def mfcc_folder(tmp_path):
    make_quantizer(load_teacher("kaldi-mfcc")).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_codes_are_those_of_the_teachers_features(mfcc_folder):
    tokenizer = MvqTokenizer.from_pretrained(mfcc_folder)
    codes = tokenizer(noise(1.0))
    assert codes.shape == (49, 4)
    assert codes.dtype == np.uint8
    features = load_teacher("kaldi-mfcc")([noise(1.0)])[0]
    quantizer = MultiCodebookQuantizer.from_pretrained(mfcc_folder)
    assert np.array_equal(codes, quantizer.encode(features).numpy())
    assert (tokenizer.frame_rate, tokenizer.num_codebooks, tokenizer.codebook_size) == (50.0, 4, 16)


def test_decode_comes_near_the_features(mfcc_folder):
    tokenizer = MvqTokenizer.from_pretrained(mfcc_folder)
    features = tokenizer.teacher([noise(1.0)])[0]
    decoded = tokenizer.decode(tokenizer(noise(1.0)))
    assert decoded.shape == features.shape
    assert decoded.dtype == torch.float32
    # Random centres: far from good, yet better than the mean.
    std = tokenizer.quantizer.feature_std
    assert ((decoded - features) / std).square().mean() < 0.9 * (features / std).var(dim=0).mean()


def test_list_of_any_lengths(mfcc_folder):
    tokenizer = MvqTokenizer.from_pretrained(mfcc_folder)
    waveforms = [noise(0.5), noise(2.0, 1), noise(0.03, 2)]
    codes = tokenizer(waveforms)
    assert isinstance(codes, list)
    for waveform, one in zip(waveforms, codes):
        assert np.array_equal(one, tokenizer(waveform))
    assert np.array_equal(tokenizer([torch.from_numpy(w) for w in waveforms])[1], codes[1])


def test_long_audio_is_tokenised_in_windows(tmp_path):
    make_quantizer(load_teacher("kaldi-mfcc", window_seconds=4.0)).save_pretrained(tmp_path / "windowed")
    make_quantizer(load_teacher("kaldi-mfcc")).save_pretrained(tmp_path / "whole")
    windowed = MvqTokenizer.from_pretrained(tmp_path / "windowed")
    whole = MvqTokenizer.from_pretrained(tmp_path / "whole")
    assert windowed.teacher.window_seconds == 4.0, "the rule travels with the quantiser"
    assert (windowed(noise(13.0)) != whole(noise(13.0))).mean() < 0.005


def test_bad_audio_is_named(mfcc_folder):
    tokenizer = MvqTokenizer.from_pretrained(mfcc_folder)
    with pytest.raises(ValueError, match="sampling_rate=44100"):
        tokenizer(noise(1.0), sampling_rate=44100)
    with pytest.raises(ValueError, match=r"b\.wav: 10 samples are too short"):
        tokenizer([noise(1.0), noise(1.0)[:10]], ids=["a.wav", "b.wav"])
    with pytest.raises(ValueError, match="mono"):
        tokenizer(np.zeros((2, 16000), np.float32))


def test_save_and_load_again(mfcc_folder, tmp_path):
    tokenizer = MvqTokenizer.from_pretrained(mfcc_folder)
    tokenizer.save_pretrained(tmp_path / "copy")
    again = MvqTokenizer.from_pretrained(tmp_path / "copy")
    assert again.store_info() == tokenizer.store_info()
    assert np.array_equal(again(noise(1.0)), tokenizer(noise(1.0)))


def test_store_info_says_what_the_tokens_are(mfcc_folder):
    info = MvqTokenizer.from_pretrained(mfcc_folder, refine_iters=2).store_info()
    assert (info.num_codebooks, info.codebook_size, info.frame_rate) == (4, 16, 50.0)
    assert (info.teacher, info.layer) == ("kaldi-mfcc", None)
    assert info.quantizer_id == MultiCodebookQuantizer.from_pretrained(mfcc_folder).quantizer_id
    assert info.extraction["refine_iters"] == 2
    assert info.extraction["teacher"]["window_seconds"] == 30.0


def test_teacher_layer_and_dtype_come_from_the_config(tmp_path):
    spec = save_teacher(tmp_path / "teacher")
    make_quantizer(load_teacher(spec, layer=2, dtype="bfloat16")).save_pretrained(tmp_path / "tokenizer")
    tokenizer = MvqTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (tokenizer.teacher.layer, tokenizer.teacher.dtype) == (2, torch.bfloat16)
    assert MvqTokenizer.from_pretrained(tmp_path / "tokenizer", dtype="float32").teacher.dtype == torch.float32


def test_a_teacher_that_moved_and_one_that_changed(tmp_path):
    spec = save_teacher(tmp_path / "teacher")
    make_quantizer(load_teacher(spec, layer=2)).save_pretrained(tmp_path / "tokenizer")
    codes = MvqTokenizer.from_pretrained(tmp_path / "tokenizer")(noise(1.0))
    shutil.move(spec, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"no such folder .*teacher=\.\.\."):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer")
    moved = MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=str(tmp_path / "moved"))
    assert np.array_equal(moved(noise(1.0)), codes)
    loaded = load_teacher(str(tmp_path / "moved"), layer=2)
    assert np.array_equal(MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=loaded)(noise(1.0)), codes)

    model = WavLMModel.from_pretrained(tmp_path / "moved")
    torch.nn.init.normal_(model.encoder.layers[0].attention.q_proj.weight)
    model.save_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match="with fingerprint of the parameters"):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=str(tmp_path / "moved"))


def quantize(teacher: Teacher, folder) -> None:
    frames = [torch.cat(teacher([noise(2.0, seed) for seed in seeds])) for seeds in (range(16), range(16, 20))]
    settings = QuantizerTrainingConfig(4, codebook_size=16, steps=2)
    train_on_sample(teacher, FrameSample(*frames, {}, []), folder, settings, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("setting", ["hidden_act", "feat_extract_activation"])
def test_the_same_parameters_do_not_make_the_same_teacher(tmp_path, setting, dtype):
    spec = save_teacher(tmp_path / "teacher")
    model = WavLMModel.from_pretrained(spec)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(spec)
    quantize(load_teacher(spec, layer=2, dtype=dtype), tmp_path / "quantizer")
    for other in ("float32", "bfloat16"):  # rounding is no change
        MvqTokenizer.from_pretrained(tmp_path / "quantizer", dtype=other)
    config = tmp_path / "teacher" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {setting: "relu"}))
    with pytest.raises(ValueError, match="gives other features than when the quantiser was trained"):
        MvqTokenizer.from_pretrained(tmp_path / "quantizer")


def test_the_code_of_a_factory_is_part_of_the_teacher(tmp_path, monkeypatch):
    code = """
import torch

class Energy:
    frame_rate, feature_size = 50, 4

    def __call__(self, waveforms):
        frames = [torch.from_numpy(w)[: len(w) // 320 * 320].view(-1, 4, 80) for w in waveforms]
        return [part.square().mean(dim=2) for part in frames]
"""
    (tmp_path / "probed_teacher.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    quantize(load_teacher("probed_teacher:Energy"), tmp_path / "quantizer")
    assert MvqTokenizer.from_pretrained(tmp_path / "quantizer")(noise(1.0)).shape == (50, 4)
    monkeypatch.delitem(sys.modules, "probed_teacher")
    (tmp_path / "probed_teacher.py").write_text(code.replace("square()", "abs()") + "# changed\n")
    with pytest.raises(ValueError, match="its code has changed"):
        MvqTokenizer.from_pretrained(tmp_path / "quantizer")
    monkeypatch.delitem(sys.modules, "probed_teacher")


def test_teacher_beside_the_quantizer(tmp_path, monkeypatch):
    """A relative folder counts from the working folder or from the quantiser's own."""
    save_teacher(tmp_path / "work" / "teacher")
    monkeypatch.chdir(tmp_path / "work")
    make_quantizer(load_teacher("./teacher")).save_pretrained(tmp_path / "tokenizer")
    MvqTokenizer.from_pretrained(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "work" / "teacher", tmp_path / "tokenizer" / "teacher")
    assert MvqTokenizer.from_pretrained(tmp_path / "tokenizer")(noise(0.5)).shape == (24, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 1}, "with layer 2, but teacher .* has 1"),
        ({"layer": 2, "window_seconds": 10}, "with window_seconds 30.0, but .* has 10.0"),
    ],
)
def test_other_features_are_refused(tmp_path, settings, message):
    spec = save_teacher(tmp_path / "teacher")
    make_quantizer(load_teacher(spec, layer=2)).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=message):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=load_teacher(spec, **settings))
    with pytest.raises(ValueError, match="with feature_size 16, but teacher kaldi-mfcc has 39"):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=load_teacher("kaldi-mfcc"))


def test_quantizer_without_a_teacher(tmp_path):
    MultiCodebookQuantizer(39, 16, 4, frame_rate=50.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no teacher"):
        MvqTokenizer.from_pretrained(tmp_path)
    assert MvqTokenizer.from_pretrained(tmp_path, teacher="kaldi-mfcc")(noise(0.1)).shape == (4, 4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("provenance", [], r"provenance must be an object, not \[\]"),
        ("provenance.teacher", "mfcc", "provenance.teacher must be an object, not 'mfcc'"),
        ("provenance.teacher.window_seconds", "10", "provenance.teacher.window_seconds cannot be '10'"),
        ("provenance.teacher.options", ["gain"], "provenance.teacher.options cannot be"),
        ("provenance.teacher.dtype", 16, "provenance.teacher.dtype cannot be 16"),
        ("provenance.probe", {"x": 1}, "provenance.probe must be 32 numbers"),
        ("provenance.probe", [0.5] * 31, "provenance.probe must be 32 numbers"),
        ("teacher", 5, "teacher must be a name, not 5"),
        ("teacher_layer", "21", "teacher_layer must be a whole number, not '21'"),
    ],
)
def test_a_damaged_record_is_a_clear_error(mfcc_folder, key, value, message):
    path = mfcc_folder / "config.json"
    config = json.loads(path.read_text())
    *parents, name = key.split(".")
    place = config
    for parent in parents:
        place = place.setdefault(parent, {})
    place[name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        MvqTokenizer.from_pretrained(mfcc_folder)
