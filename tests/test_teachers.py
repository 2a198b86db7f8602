# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Teachers: features as the models give them, whatever batch or window an utterance is computed in."""

import shutil
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    HubertConfig,
    HubertModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel
from spear_hf.mvq.hub_teacher import _hop
from spear_hf.mvq.teachers import Teacher, load_teacher, plan_windows


WAVEFORM_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 16,
}


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


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far enough from zero that layers and positions matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def save_waveform_model(folder, model_class, config_class, norm: str):
    """A model as the large ones ("layer": normalised input, attention mask) or the base ones ("group": neither)."""
    large = norm == "layer"
    model = randomise(model_class(config_class(**WAVEFORM_MODEL, feat_extract_norm=norm, do_stable_layer_norm=large)))
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=large, do_normalize=large).save_pretrained(folder)
    return model


def save_whisper(folder, encoder_only: bool):
    """A Whisper with a window of 2 s."""
    config = WhisperConfig(
        d_model=32,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        vocab_size=60,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        num_mel_bins=80,
        max_source_positions=100,
    )
    model = randomise(WhisperForConditionalGeneration(config))
    (model.model.encoder if encoder_only else model).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return model.model.encoder


def assert_batch_does_not_matter(teacher: Teacher, tolerance: float = 1e-4) -> None:
    waveforms = [noise(seconds, seed) for seed, seconds in enumerate((1.0, 0.31, 1.7, 1.0, 0.2))]
    together = teacher(waveforms)
    reverse = teacher(waveforms[::-1])[::-1]
    for waveform, one, other in zip(waveforms, together, reverse):
        alone = teacher([waveform])[0]
        assert alone.shape == one.shape == other.shape
        assert (alone - one).abs().max() < tolerance
        assert (alone - other).abs().max() < tolerance


# Windows


@pytest.mark.parametrize("hop", [Fraction(320), Fraction(256), Fraction(1280), Fraction(16000, 30)])
def test_windows_take_every_frame_once(hop):
    for num_samples in (1, 15999, 16000, 16001, 100000, 163840, 164000, 300001):
        windows = plan_windows(num_samples, window_frames=48, context_frames=6, hop=hop)
        frames = []
        for window in windows:
            offset = window.start / hop
            assert offset.denominator == 1, "a window starts with a frame"
            count = int((window.stop - window.start) / hop)  # of a teacher that rounds down
            last = count if window.last is None else window.last
            assert window.last is None or window.last <= count
            frames += [int(offset) + frame for frame in range(window.first, last)]
            assert window.start == 0 or window.first == 6
            assert window.stop == num_samples or count - window.last >= 5
        assert frames == list(range(int(num_samples / hop)))
        assert windows[-1].stop == num_samples


def test_windows_need_room_between_their_contexts():
    with pytest.raises(ValueError, match="nothing between"):
        plan_windows(10**6, window_frames=10, context_frames=5, hop=Fraction(320))


# kaldi-mfcc


def test_kaldi_mfcc():
    teacher = load_teacher("kaldi-mfcc")
    assert (teacher.id, teacher.frame_rate, teacher.feature_size, teacher.layer) == ("kaldi-mfcc", 50.0, 39, None)
    assert teacher([noise(1.0)])[0].shape == (49, 39)
    assert_batch_does_not_matter(teacher)


def test_windowed_features_equal_the_whole():
    """MFCC see 110 ms on either side at most, so that windows with more context than that change nothing."""
    waveform = noise(9.37)
    whole = load_teacher("kaldi-mfcc")([waveform])[0]
    windowed = load_teacher("kaldi-mfcc", window_seconds=2.0)([waveform])[0]
    assert whole.shape == windowed.shape
    assert torch.allclose(whole, windowed, atol=1e-4)


def test_transform_is_applied_to_frames():
    teacher = load_teacher("kaldi-mfcc", window_seconds=2.0)
    waveforms = [noise(5.0), noise(1.0, seed=1)]
    doubled = teacher.extract(waveforms, transform=lambda frames: 2 * frames[:, :3])
    for features, result in zip(teacher(waveforms), doubled):
        assert torch.equal(result, 2 * features[:, :3])


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros(0, np.float32), "clip.wav: 0 samples are too short"),
        (
            np.zeros(399, np.float32),
            "clip.wav: 399 samples are too short for one frame of kaldi-mfcc, which needs 400",
        ),
        (np.array([0.0] * 500 + [np.nan], np.float32), "clip.wav: 1 samples are NaN"),
        (np.full(500, np.inf, np.float32), "clip.wav: 500 samples are NaN or infinite"),
        (np.zeros((2, 500), np.float32), r"clip.wav: a mono waveform .* not shape \(2, 500\)"),
        (np.zeros(500, np.int16), "clip.wav: samples are int16"),
    ],
)
def test_bad_audio_is_named(waveform, message):
    with pytest.raises(ValueError, match=message):
        load_teacher("kaldi-mfcc")([noise(1.0), waveform], ids=["good.wav", "clip.wav"])


def test_float64_and_tensors_are_taken():
    teacher = load_teacher("kaldi-mfcc")
    waveform = noise(0.5)
    expected = teacher([waveform])[0]
    assert torch.equal(teacher([waveform.astype(np.float64)])[0], expected)
    assert torch.equal(teacher([torch.from_numpy(waveform)])[0], expected)


# Hugging Face models on waveforms


@pytest.mark.parametrize(
    ("model_class", "config_class", "norm"),
    [
        (WavLMModel, WavLMConfig, "layer"),
        (HubertModel, HubertConfig, "layer"),
        (Wav2Vec2Model, Wav2Vec2Config, "group"),
    ],
)
def test_waveform_models(tmp_path, model_class, config_class, norm):
    model = save_waveform_model(tmp_path, model_class, config_class, norm)
    waveform = noise(1.0)
    values = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7) if norm == "layer" else waveform
    with torch.no_grad():
        expected = model(torch.from_numpy(values)[None], output_hidden_states=True)
    for layer in (None, 0, 2, 4, -1):
        teacher = load_teacher(str(tmp_path), layer=layer)
        assert (teacher.frame_rate, teacher.feature_size, teacher.min_samples) == (50.0, 32, 400)
        wanted = expected.last_hidden_state if layer is None else expected.hidden_states[layer]
        assert torch.allclose(teacher([waveform])[0], wanted[0], atol=1e-5)
        assert teacher.layer == (4 if layer == -1 else layer)
    assert_batch_does_not_matter(teacher)
    with pytest.raises(ValueError, match=r"layer=5: .* hidden states 0 to 4"):
        load_teacher(str(tmp_path), layer=5)
    with pytest.raises(ValueError, match="`window='slice'` is for fixed-window teachers"):
        load_teacher(str(tmp_path), window="slice")


@pytest.mark.parametrize("do_normalize", [True, False])
def test_waveforms_reach_the_model_as_the_extractor_makes_them(tmp_path, do_normalize):
    """Faster than the extractor, and the same but for rounding: level, padding and mask."""
    save_waveform_model(tmp_path, WavLMModel, WavLMConfig, "layer")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=do_normalize)
    extractor.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    waveforms = [0.2 + noise(1.0), 1e-3 * noise(0.4, seed=1), np.zeros(5000, np.float32)]
    expected = extractor(waveforms, sampling_rate=16000, padding=True, return_tensors="pt")
    given = teacher.inputs(waveforms).tensors
    assert given.keys() == expected.keys()
    assert torch.equal(given["attention_mask"], expected["attention_mask"])
    assert torch.allclose(given["input_values"], expected["input_values"], atol=1e-5)
    alone = teacher.inputs(waveforms[1:2]).tensors["input_values"]
    assert torch.equal(given["input_values"][1:2, : alone.shape[1]], alone), "exact, whatever the batch"


def test_features_that_are_not_finite_are_named(tmp_path):
    save_waveform_model(tmp_path, WavLMModel, WavLMConfig, "layer")
    teacher = load_teacher(str(tmp_path))
    teacher.model.encoder.layers[0].attention.out_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"b\.wav: features of .* in torch\.float32 are NaN or infinite"):
        teacher([noise(1.0)], ids=["b.wav"])


def test_layers_above_the_one_wanted_are_not_run(tmp_path):
    save_waveform_model(tmp_path, WavLMModel, WavLMConfig, "layer")
    assert len(load_teacher(str(tmp_path), layer=1).model.encoder.layers) == 1
    assert len(load_teacher(str(tmp_path), layer=4).model.encoder.layers) == 4


def test_group_norm_would_leak_padding(tmp_path):
    """Why such models run with waveforms of one length: their own batching changes features."""
    model = save_waveform_model(tmp_path, Wav2Vec2Model, Wav2Vec2Config, "group")
    padded = torch.zeros(1, 32000)
    padded[0, :16000] = torch.from_numpy(noise(1.0))
    with torch.no_grad():
        leaked = model(padded).last_hidden_state[0, :49]
    assert (leaked - load_teacher(str(tmp_path))([noise(1.0)])[0]).abs().max() > 0.1


def test_a_model_that_ignores_its_mask_is_found_out(tmp_path):
    """A group norm that the config does not declare: the probe at loading sees the features change."""
    save_waveform_model(tmp_path, Wav2Vec2Model, Wav2Vec2Config, "group")
    Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True).save_pretrained(tmp_path)
    from spear_hf.mvq import hub_teacher

    load_encoder = hub_teacher._load_encoder

    def load_undeclared(*arguments):
        config, model = load_encoder(*arguments)
        config.feat_extract_norm = "layer"
        return config, model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_teacher, "_load_encoder", load_undeclared)
        teacher = load_teacher(str(tmp_path))
    assert teacher._equal_lengths
    assert_batch_does_not_matter(teacher)


def test_checkpoint_of_a_head_is_read(tmp_path):
    model = randomise(Wav2Vec2ForCTC(Wav2Vec2Config(**WAVEFORM_MODEL, feat_extract_norm="group", vocab_size=8)))
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=False, do_normalize=False).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.wav2vec2(torch.from_numpy(noise(0.5))[None]).last_hidden_state[0]
    assert torch.allclose(load_teacher(str(tmp_path))([noise(0.5)])[0], expected, atol=1e-5)


def test_long_audio_is_computed_in_windows(tmp_path):
    save_waveform_model(tmp_path, Wav2Vec2Model, Wav2Vec2Config, "group")
    teacher = load_teacher(str(tmp_path), layer=2, window_seconds=4.0)  # contexts of 0.5 s
    waveform = noise(9.0)
    features = teacher([waveform])[0]
    assert features.shape == (449, 32)
    # Windows start every 3 s; the frames of the second are those it keeps.
    second = teacher([waveform[48000 : 48000 + 64000]])[0]
    assert torch.allclose(features[150 + 25 : 150 + 175], second[25:175], atol=1e-5)
    assert torch.allclose(features[:175], teacher([waveform[:64000]])[0][:175], atol=1e-5)


def test_bfloat16_features_are_float32(tmp_path):
    save_waveform_model(tmp_path, WavLMModel, WavLMConfig, "layer")
    exact = load_teacher(str(tmp_path))([noise(1.0)])[0]
    rounded = load_teacher(str(tmp_path), dtype="bfloat16")([noise(1.0)])[0]
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()
    assert load_teacher(str(tmp_path), dtype="bfloat16").provenance()["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="dtype 'int8'"):
        load_teacher(str(tmp_path), dtype="int8")


def test_fingerprint_is_of_the_parameters(tmp_path):
    model = save_waveform_model(tmp_path / "a", WavLMModel, WavLMConfig, "layer")
    fingerprint = load_teacher(str(tmp_path / "a")).fingerprint
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert load_teacher(str(tmp_path / "moved"), layer=1, dtype="bfloat16").fingerprint == fingerprint
    with torch.no_grad():
        model.encoder.layers[0].attention.k_proj.weight[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "moved")
    assert load_teacher(str(tmp_path / "moved")).fingerprint != fingerprint


def test_checkpoint_without_all_parameters_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_waveform_model(tmp_path, WavLMModel, WavLMConfig, "layer")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layers.1.feed_forward.output_dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 parameters of WavLMModel .* encoder\.layers\.1\.feed_forward"):
        load_teacher(str(tmp_path))


# Whisper


@pytest.mark.parametrize("encoder_only", [True, False])
def test_whisper_padded_to_its_window(tmp_path, encoder_only):
    encoder = save_whisper(tmp_path, encoder_only)
    extractor = WhisperFeatureExtractor.from_pretrained(tmp_path)
    waveform = noise(1.23)
    with torch.no_grad():
        mel = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features
        expected = encoder(mel, output_hidden_states=True)
    for layer in (None, 0, 2, 3):
        teacher = load_teacher(str(tmp_path), layer=layer)
        wanted = expected.last_hidden_state if layer is None else expected.hidden_states[layer]
        assert torch.allclose(teacher([waveform])[0], wanted[0, : len(waveform) // 320], atol=1e-5)
    assert isinstance(teacher.model, WhisperEncoder)
    assert (teacher.frame_rate, teacher.feature_size, teacher.min_samples) == (50.0, 32, 320)
    assert teacher.provenance()["window"] == "pad"
    assert teacher.provenance()["window_seconds"] == 2.0
    assert_batch_does_not_matter(teacher)
    teacher.batch_seconds = 4.0  # two windows at a time
    waveforms = [noise(0.5, seed) for seed in range(5)]
    for waveform, features in zip(waveforms, teacher(waveforms)):
        assert torch.allclose(features, teacher([waveform])[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"layer=4: .* 0 to 3"):
        load_teacher(str(tmp_path), layer=4)


def test_whisper_with_a_sliced_table(tmp_path):
    """Slicing keeps the positions of the frames used; padded to the whole window it is the model itself."""
    save_whisper(tmp_path, encoder_only=True)
    padded, sliced = load_teacher(str(tmp_path)), load_teacher(str(tmp_path), window="slice")
    assert sliced.provenance()["window"] == "slice"
    assert_batch_does_not_matter(sliced)
    # 2 s of silence fill the tiny window, so that both rules are one; a real window shows the difference.
    assert torch.allclose(sliced([noise(1.0)])[0], padded([noise(1.0)])[0], atol=1e-5)
    big = tmp_path / "big"
    config = WhisperConfig.from_pretrained(tmp_path)
    config.max_source_positions = 300
    encoder = randomise(WhisperEncoder(config))
    encoder.save_pretrained(big)
    WhisperFeatureExtractor(chunk_length=6).save_pretrained(big)
    padded, sliced = load_teacher(str(big)), load_teacher(str(big), window="slice")
    one, other = padded([noise(1.0)])[0], sliced([noise(1.0)])[0]
    assert one.shape == other.shape == (50, 32)
    assert 1e-3 < (one - other).abs().max() < 1.0 * one.abs().max()
    assert torch.allclose(padded([noise(5.0)])[0], sliced([noise(5.0)])[0], atol=1e-5)


def test_whisper_takes_longer_audio_in_windows(tmp_path):
    save_whisper(tmp_path, encoder_only=True)
    teacher = load_teacher(str(tmp_path))
    waveform = noise(7.0)
    features = teacher([waveform])[0]
    assert features.shape == (350, 32)
    assert torch.allclose(features[:88], teacher([waveform[:32000]])[0][:88], atol=1e-5)
    with pytest.raises(ValueError, match=r"the window of .* is 2 s"):
        load_teacher(str(tmp_path), window_seconds=30)
    with pytest.raises(ValueError, match="window='crop'"):
        load_teacher(str(tmp_path), window="crop")


# Models on features of their own extractor


def save_spear(folder, output_downsampling_factor: int = 1) -> SpearModel:
    config = SpearConfig(
        hidden_size=32,
        intermediate_size=32,
        num_layers_per_stack=[1, 1],
        downsampling_factors=[1, 2],
        conv_kernel_sizes=[7, 7],
        num_attention_heads=2,
        query_head_dim=8,
        value_head_dim=4,
        output_downsampling_factor=output_downsampling_factor,
    )
    torch.manual_seed(0)
    model = SpearModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("factor", [1, 2])
def test_spear_is_a_teacher_too(tmp_path, factor):
    model = save_spear(tmp_path, factor)  # as published: without a preprocessor_config.json
    waveform = noise(1.0)
    inputs = SpearFeatureExtractor()(waveform, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
    for layer, rate in ((None, 50 / factor), (1, 50.0)):
        teacher = load_teacher(str(tmp_path), layer=layer)
        assert teacher.frame_rate == rate
        wanted = expected.last_hidden_state if layer is None else expected.hidden_states[layer]
        assert torch.allclose(teacher([waveform])[0], wanted[0], atol=1e-5)
        assert_batch_does_not_matter(teacher)
    with pytest.raises(ValueError, match="needs 1360"):
        teacher([waveform[:1359]])
    assert teacher([waveform[:1360]])[0].shape == (1, 32)


def test_mel_models_with_their_own_extractor(tmp_path):
    config = Wav2Vec2BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_depthwise_kernel_size=7,
        position_embeddings_type="relative_key",
    )
    model = randomise(Wav2Vec2BertModel(config))
    model.save_pretrained(tmp_path)
    extractor = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=2, padding_value=1)
    extractor.save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), layer=1)
    assert (teacher.frame_rate, teacher.feature_size) == (50.0, 32)
    inputs = extractor(noise(1.0), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[1][0]
    frames = int(inputs["attention_mask"].sum())
    assert torch.allclose(teacher([noise(1.0)])[0], expected[:frames], atol=1e-5)
    assert_batch_does_not_matter(teacher)


def test_models_without_a_time_axis_are_refused(tmp_path):
    config = ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=128
    )
    ASTModel(config).save_pretrained(tmp_path)
    ASTFeatureExtractor(max_length=128).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not follow time; wrap it in a module:factory"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("hop", [160, 256, 320, 384, 400, 480, 512, 640, 800, 1280])
def test_hop_is_told_from_frame_counts(hop):
    for surplus in range(-3 * hop, 2 * hop, 7):  # whatever a first frame needs
        more = (48000 + surplus) // hop - (16000 + surplus) // hop
        assert _hop(more, 32000, None) == hop
    assert _hop(32000 // hop, 32000, hop) == hop


def test_unusable_specifications(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_teacher(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=f"is not kaldi-mfcc and not module:factory, and .*{tmp_path.name}"):
        load_teacher(str(tmp_path))
    with pytest.raises(ValueError, match="kaldi-mfcc takes no `layer`"):
        load_teacher("kaldi-mfcc", layer=3)
    with pytest.raises(ValueError, match="takes no `options`"):
        load_teacher("some/model", options={"a": 1})
    Wav2Vec2Model(Wav2Vec2Config(**WAVEFORM_MODEL)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no feature extractor"):
        load_teacher(str(tmp_path / "bare"))


# module:factory

ADAPTER = """
import numpy as np

class Level:
    frame_rate = 100
    feature_size = 2
    revision = "v7"

    def __init__(self, gain):
        self.gain = gain

    def __call__(self, waveforms):
        rows = []
        for waveform in waveforms:
            frames = waveform[: len(waveform) // 160 * 160].reshape(-1, 160)
            rows.append(self.gain * np.stack([frames.mean(1), frames.std(1)], axis=1))
        return rows

def build(gain=1.0, layer=None):
    return Level(gain if layer is None else layer)

def without_layer(gain=1.0):
    return Level(gain)

def broken(**changes):
    level = Level(1.0)
    level.__dict__.update(changes)
    return level

class Leaking(Level):
    def __call__(self, waveforms):
        longest = max(len(waveform) for waveform in waveforms)
        return [rows + longest for rows in super().__call__(waveforms)]

def leaking():
    return Leaking(1.0)

class Wrong(Level):
    def __call__(self, waveforms):
        return super().__call__(waveforms)[0]

def wrong():
    return Wrong(1.0)
"""


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """A module in the working folder."""
    (tmp_path / "level_adapter.py").write_text(ADAPTER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield "level_adapter"
    sys.modules.pop("level_adapter", None)


def test_callable_teacher(adapter):
    teacher = load_teacher(f"{adapter}:build", options={"gain": 3.0})
    assert (teacher.id, teacher.revision, teacher.frame_rate) == ("level_adapter:build", "v7", 100.0)
    features = teacher([np.full(1600, 0.5, np.float32)])[0]
    assert features.shape == (10, 2)
    assert torch.allclose(features, torch.tensor([1.5, 0.0]))
    assert teacher.provenance()["options"] == {"gain": 3.0}
    assert_batch_does_not_matter(teacher)
    assert load_teacher(f"{adapter}:build", layer=5).layer == 5


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("level_adapter:missing", {}, "cannot be imported: .*missing"),
        ("no_such_adapter:build", {}, "cannot be imported: No module named 'no_such_adapter'"),
        ("level_adapter:without_layer", {"layer": 2}, "takes no `layer`"),
        ("level_adapter:broken", {"options": {"frame_rate": 0}}, "`frame_rate` must be a positive number, not 0"),
        ("level_adapter:broken", {"options": {"feature_size": "2"}}, "`feature_size` must be a positive number"),
        ("level_adapter:broken", {"options": {"feature_size": 3}}, r"gave features \(100, 2\), not \(frames, 3\)"),
        ("level_adapter:broken", {"options": {"frame_rate": 50}}, "gave 100 frames for 16000 samples; at 50.0 Hz"),
        ("level_adapter:broken", {"options": {"sampling_rate": 44100}}, "takes 44100 Hz"),
        ("level_adapter:leaking", {}, "change with the other utterances"),
        ("level_adapter:wrong", {}, "must return a list of 1 feature arrays, gave ndarray"),
        ("level_adapter:build", {"revision": "main"}, "takes no `revision`"),
        ("", {}, "the teacher has an empty name"),
        (".", {"revision": "main"}, r"\. is a folder: it has no revision 'main'"),
    ],
)
def test_unusable_callables(adapter, spec, settings, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(spec, **settings)


@pytest.mark.gpu
def test_teacher_on_the_gpu(tmp_path):
    save_waveform_model(tmp_path, WavLMModel, WavLMConfig, "layer")
    waveforms = [noise(1.0), noise(0.4, seed=1)]
    for there, here in zip(
        load_teacher(str(tmp_path), device="cuda")(waveforms), load_teacher(str(tmp_path))(waveforms)
    ):
        assert there.device.type == "cuda"
        assert torch.allclose(there.cpu(), here, atol=2e-2)
