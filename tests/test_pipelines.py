# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`transformers.pipeline` with our models: transcription with chunks and timestamps, classification, embeddings."""

import io
import json
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from transformers import AutoProcessor, Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2Model, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from spear_hf import (
    AudioEmbeddingPipeline,
    SpearConfig,
    SpearFeatureExtractor,
    SpearForCTC,
    SpearForSequenceClassification,
    SpearModel,
    SpearProcessor,
)
from spear_hf.evaluation.embedding import embed_waveforms, load_encoder
from spear_hf.evaluation.representations import load_representation
from spear_hf.finetuning.arguments import ModelArguments
from spear_hf.finetuning.models import load_feature_extractor
from spear_hf.mvq.teachers import load_teacher


RATE, FRAME = 16000, 320
VOCABULARY = ("<pad>", "|", "<unk>", "a", "b", "c")
TONES = {"|": 500.0, "a": 1100.0, "b": 2300.0, "c": 4700.0}
TEXT = "abc cab|b aac bc".replace(" ", "|")  # doubled letters are apart in time, so CTC keeps both
WORDS = TEXT.split("|")
# The windows of the 9 filter bank frames under an output frame, relative to its nominal start: see `num_frames`.
FIRST_SAMPLE, LAST_SAMPLE = -120, 8 * 160 + 280
CENTRE_SECONDS = 0.045  # of those windows; the nominal frame's is 0.01
SEGMENT = 3600  # samples of a tone, and as many of silence after it: no multiple of a frame


def tones(text=TEXT):
    """A waveform in which the k-th character is a tone from sample 2k * SEGMENT + SEGMENT on, for SEGMENT samples."""
    pieces = [np.zeros(SEGMENT)]
    for character in text:
        wave = np.sin(2 * np.pi * TONES[character] * np.arange(SEGMENT) / RATE)
        pieces += [0.3 * wave, np.zeros(SEGMENT)]
    return np.concatenate(pieces).astype(np.float32)


def inside(frame, begin, end):
    """Whether all that the frame sees lies in [begin, end) samples."""
    return begin <= FRAME * frame + FIRST_SAMPLE and FRAME * frame + LAST_SAMPLE <= end


@pytest.fixture(scope="module")
def tone_folder(tmp_path_factory):
    """A CTC model that hears nothing but tones: an encoder without context beyond its stem, a fitted head."""
    folder = tmp_path_factory.mktemp("tones")
    torch.manual_seed(0)
    config = SpearConfig(
        hidden_size=256,
        intermediate_size=32,
        num_attention_heads=2,
        num_layers_per_stack=[1],
        downsampling_factors=[1],
        conv_kernel_sizes=[3],
        vocab_size=len(VOCABULARY),
    )
    model = SpearForCTC(config).eval()
    model.spear.stacks[0].layers[0].bypass.bypass_scale.data.zero_()  # the layer hands on its input
    for parameter in model.spear.stem.convnext.pointwise_conv2.parameters():
        parameter.data.zero_()
    extractor = SpearFeatureExtractor()
    wave = tones()
    with torch.no_grad():
        inputs = extractor(wave, sampling_rate=RATE, return_tensors="pt")
        states = model.spear(**inputs).last_hidden_state[0]
    label = torch.zeros(len(states), dtype=torch.long)  # also of frames that hear a part of a tone
    for frame in range(len(states)):
        for index, character in enumerate(TEXT):
            if inside(frame, (2 * index + 1) * SEGMENT, (2 * index + 2) * SEGMENT):
                label[frame] = VOCABULARY.index(character)
    design = torch.cat([states, torch.ones(len(states), 1)], dim=1).double()
    targets = torch.nn.functional.one_hot(label, len(VOCABULARY)).double()
    gram = design.T @ design + 1e-4 * torch.eye(design.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, design.T @ targets).float()
    model.lm_head.weight.data, model.lm_head.bias.data = weights[:-1].T.contiguous(), weights[-1].contiguous()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[0].argmax(-1), label)

    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    model.save_pretrained(folder)
    SpearProcessor(extractor, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def transcribe(tone_folder):
    return pipeline("automatic-speech-recognition", model=tone_folder, device="cpu")


def test_transcription(transcribe):
    assert transcribe.type == "ctc"
    assert transcribe(tones())["text"] == " ".join(WORDS)


def test_character_times_are_those_of_the_tones_less_35_ms(transcribe):
    chunks = transcribe(tones(), return_timestamps="char")["chunks"]
    assert [chunk["text"] for chunk in chunks] == list(TEXT.replace("|", " "))
    for index, chunk in enumerate(chunks):
        begin, end = (2 * index + 1) * SEGMENT, (2 * index + 2) * SEGMENT
        first, stop = (round(time * RATE / FRAME) for time in chunk["timestamp"])
        assert chunk["timestamp"] == (first * FRAME / RATE, stop * FRAME / RATE)
        # No frame that hears the whole tone is missing, and none that hears nothing of it is there.
        for frame in range(first - 20, stop + 20):
            if inside(frame, begin, end):
                assert first <= frame < stop
        assert all(FRAME * frame + LAST_SAMPLE > begin for frame in range(first, stop))
        assert all(FRAME * frame + FIRST_SAMPLE < end for frame in range(first, stop))
        middle = sum(chunk["timestamp"]) / 2 + CENTRE_SECONDS - 0.01
        assert abs(middle - (begin + end) / 2 / RATE) < 0.02


def test_word_times_are_those_of_their_characters(transcribe):
    characters = transcribe(tones(), return_timestamps="char")["chunks"]
    words = transcribe(tones(), return_timestamps="word")["chunks"]
    assert [word["text"] for word in words] == WORDS
    begin = 0
    for word in words:
        last = begin + len(word["text"]) - 1
        assert word["timestamp"] == (characters[begin]["timestamp"][0], characters[last]["timestamp"][1])
        begin = last + 2  # past the delimiter


@pytest.mark.parametrize(
    ("chunk", "stride"), [(1.0, 0.2), (2.0, None), (0.7, (0.02, 0.08)), (0.333, 0.1), (60.0, None)]
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_chunks_change_nothing_where_the_context_fits_the_stride(transcribe, chunk, stride, batch_size):
    """The model sees 20 ms back and 80 ms ahead. Real models see all of a chunk, so there only the times are exact."""
    wave = tones()[: -SEGMENT // 2 + 37]  # the last chunk is no whole number of frames
    whole = transcribe(wave, return_timestamps="char")
    cut = transcribe(
        wave, return_timestamps="char", chunk_length_s=chunk, stride_length_s=stride, batch_size=batch_size
    )
    assert cut == whole
    assert whole["text"] == " ".join(WORDS)


def test_a_right_stride_under_80_ms_loses_time(transcribe):
    """A chunk has four frames less than its 20-ms steps: with a shorter stride nothing stands in for them."""
    whole = transcribe(tones(), return_timestamps="char")["chunks"]
    cut = transcribe(tones(), return_timestamps="char", chunk_length_s=3.0, stride_length_s=(0.1, 0.04))["chunks"]
    boundaries = int(len(tones()) / RATE / (3.0 - 0.14))
    drift = whole[-1]["timestamp"][1] - cut[-1]["timestamp"][1]
    assert drift == pytest.approx(0.04 * boundaries)


def test_batches_equal_single_utterances(transcribe):
    waves = [tones(text) for text in ("abc", "a|b|c|a", "c", "bab|ca")]
    single = [transcribe(wave, return_timestamps="char") for wave in waves]
    assert [result["text"] for result in single] == ["abc", "a b c a", "c", "bab ca"]
    assert transcribe(waves, return_timestamps="char", batch_size=4) == single
    chunked = {"return_timestamps": "char", "chunk_length_s": 1.0, "stride_length_s": 0.2}
    assert transcribe(waves, batch_size=4, **chunked) == single


def test_padding_decodes_to_blanks(tone_folder):
    """Also with noise in the padding, and in half precision, where the logits must stay finite."""
    model = SpearForCTC.from_pretrained(tone_folder)
    inputs = SpearFeatureExtractor()([tones("abc"), tones("a")], sampling_rate=RATE, return_tensors="pt")
    inputs["input_features"] += torch.randn(inputs["input_features"].shape) * (1 - inputs["attention_mask"][..., None])
    valid = model.spear(**inputs).attention_mask.bool()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = model.to(dtype)(**inputs).logits
        assert logits.isfinite().all()
        assert logits.log_softmax(-1).exp().isfinite().all()
        assert (logits.argmax(-1)[~valid] == 0).all()
        assert (logits.argmax(-1)[valid] != 0).any()
    model.config.pad_token_id = None
    assert (model(**inputs).logits[~valid].abs() < 1e4).all()


def test_classification(golden_folder, tmp_path):
    torch.manual_seed(0)
    model = SpearForSequenceClassification.from_pretrained(
        golden_folder, num_labels=3, id2label={0: "speech", 1: "music", 2: "noise"}
    ).eval()
    model.save_pretrained(tmp_path)
    extractor = SpearFeatureExtractor()
    extractor.save_pretrained(tmp_path)
    classify = pipeline("audio-classification", model=str(tmp_path), device="cpu")
    waves = [tones(text) for text in ("abc", "a", "cb")]
    single = [classify(wave) for wave in waves]
    with torch.no_grad():
        logits = model(**extractor(waves[0], sampling_rate=RATE, return_tensors="pt")).logits[0]
    expected = logits.softmax(-1).sort(descending=True)
    assert [row["label"] for row in single[0]] == [model.config.id2label[int(index)] for index in expected.indices]
    assert [row["score"] for row in single[0]] == pytest.approx(expected.values.tolist(), abs=1e-5)
    for one, other in zip(single, classify(waves, batch_size=3)):
        assert [row["label"] for row in one] == [row["label"] for row in other]
        assert [row["score"] for row in one] == pytest.approx([row["score"] for row in other], abs=1e-5)
    best = classify({"raw": waves[0], "sampling_rate": RATE}, top_k=1)
    assert best == single[0][:1]


@pytest.fixture(scope="module")
def embed(golden_folder):
    extractor = SpearFeatureExtractor()
    return pipeline("audio-feature-extraction", model=str(golden_folder), feature_extractor=extractor, device="cpu")


def close(one, other):
    return one.shape == other.shape and one.dtype == other.dtype == np.float32 and np.allclose(one, other, atol=1e-5)


def test_embeddings_are_the_models(embed, golden_folder):
    model = SpearModel.from_pretrained(golden_folder).eval()
    assert isinstance(embed, AudioEmbeddingPipeline)
    wave = tones("ab")
    with torch.no_grad():
        inputs = SpearFeatureExtractor()(wave, sampling_rate=RATE, return_tensors="pt")
        outputs = model(**inputs, output_hidden_states=True)
    last, states = outputs.last_hidden_state[0].numpy(), torch.cat(outputs.hidden_states).numpy()
    assert close(embed(wave), last)
    assert close(embed(wave, layer="all"), states)
    assert close(embed(wave, layer="mean"), states.mean(axis=0))
    for layer in (0, 3, model.config.num_hidden_layers):
        assert close(embed(wave, layer=layer), states[layer])
    assert close(embed(wave, pool="mean"), last.mean(axis=0))
    spread = np.concatenate([states.mean(axis=1), states.std(axis=1)], axis=1)
    assert close(embed(wave, layer="all", pool="mean+std"), spread)


def test_embeddings_at_25_hz(golden_ds2_folder):
    embed = pipeline(
        "audio-feature-extraction", str(golden_ds2_folder), feature_extractor=SpearFeatureExtractor(), device="cpu"
    )
    waves = [tones("ab"), tones("a")]
    for batch_size in (1, 2):
        for wave, last, every in zip(
            waves, embed(waves, batch_size=batch_size), embed(waves, layer="all", batch_size=batch_size)
        ):
            frames = ((len(wave) + 80) // 160 - 7) // 2
            assert len(last) == (frames + 1) // 2
            assert every.shape[1] == frames


def test_embeddings_of_a_model_that_returns_tuples(embed, monkeypatch):
    wave = tones("ab").astype(np.float32)
    expected = embed(wave, layer="all")
    monkeypatch.setattr(embed.model.config, "return_dict", False)
    assert close(embed(wave, layer="all"), expected)
    for window in (None, 1e3, 0.5):
        found, _ = embed_waveforms([wave], embed.model, embed.feature_extractor, "all", "none", window)
        assert close(found[0], expected) or window == 0.5


def test_published_folders_get_the_default_feature_extractor(golden_folder, tmp_path):
    assert not (golden_folder / "preprocessor_config.json").exists()
    default = pipeline("audio-feature-extraction", model=str(golden_folder), device="cpu")
    assert default.feature_extractor.to_dict() == SpearFeatureExtractor().to_dict()
    SpearFeatureExtractor(preemphasis=0.5).save_pretrained(tmp_path)
    given = pipeline("audio-feature-extraction", str(golden_folder), feature_extractor=str(tmp_path), device="cpu")
    assert given.feature_extractor.preemphasis == 0.5
    default.save_pretrained(tmp_path / "saved")
    SpearFeatureExtractor(preemphasis=0.25).save_pretrained(tmp_path / "saved")
    assert pipeline("audio-feature-extraction", str(tmp_path / "saved")).feature_extractor.preemphasis == 0.25


def test_damaged_settings_of_a_feature_extractor_are_not_replaced_by_the_default(golden_folder, tmp_path):
    """By no one who loads one: its features may be others than the model was trained on."""
    shutil.copytree(golden_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text('{"preemphasis": 0.5,')
    config = SpearConfig.from_pretrained(tmp_path)
    for load in (
        lambda: pipeline("audio-feature-extraction", model=str(tmp_path), device="cpu"),
        lambda: load_encoder(tmp_path),
        lambda: load_feature_extractor(ModelArguments(model=str(tmp_path)), config),
        lambda: load_teacher(str(tmp_path)),
        lambda: load_representation(f"random:{tmp_path}"),
        lambda: AutoProcessor.from_pretrained(tmp_path),
    ):
        with pytest.raises(OSError, match=r"preprocessor_config.json"):
            load()


@pytest.mark.parametrize("settings", [{}, {"layer": "all"}, {"layer": "mean", "pool": "mean"}, {"pool": "mean+std"}])
def test_embeddings_in_batches(embed, settings):
    waves = [tones(text) for text in ("abc", "a", "cb", "b|c", "ac")]
    single = [embed(wave, **settings) for wave in waves]
    assert all(close(one, other) for one, other in zip(single, embed(waves, batch_size=3, **settings), strict=True))
    generated = embed((wave for wave in waves), batch_size=2, **settings)
    assert all(close(one, other) for one, other in zip(single, generated, strict=True))


def test_embeddings_of_audio_in_any_form(embed, tmp_path):
    wave = np.round(tones("ab") * 2**15).astype(np.int16)
    floats = (wave / 2**15).astype(np.float32)
    expected = embed(floats)
    path = tmp_path / "ab.wav"
    soundfile.write(path, wave, RATE, subtype="PCM_16")
    data = path.read_bytes()
    rows = Dataset.from_dict({"audio": [str(path)] * 2}).cast_column("audio", Audio(decode=False))
    forms = [
        path,
        str(path),
        data,
        wave,
        torch.from_numpy(floats),
        floats.tolist(),
        {"raw": floats, "sampling_rate": RATE},
        {"array": floats.tolist(), "sampling_rate": RATE, "path": "gone.wav"},
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(path)},
        {"audio": {"array": floats, "sampling_rate": RATE}, "label": 3},
    ]
    for form in forms:
        assert close(embed(form), expected), form
    assert all(close(result, expected) for result in embed(forms, batch_size=4))
    results = list(embed(rows, batch_size=2))
    assert len(results) == 2
    assert all(close(result, expected) for result in results)
    compressed = io.BytesIO()
    soundfile.write(compressed, wave, RATE, format="FLAC")
    assert close(embed(compressed.getvalue()), expected)


class Decoder:
    """What a decoder of torchcodec is asked for; torchcodec itself needs FFmpeg, which tests do without."""

    def __init__(self, channels, sample_rate):
        self.samples = SimpleNamespace(data=torch.as_tensor(channels), sample_rate=sample_rate)

    def get_all_samples(self):
        return self.samples


class DatasetsDecoder(Decoder):
    """That of `datasets`, which can be subscripted as one of its rows can."""

    __module__ = "datasets.features"

    def __getitem__(self, key):
        raise AssertionError("a decoder was read as a dataset")


@pytest.mark.parametrize("kind", [Decoder, DatasetsDecoder])
def test_embeddings_of_decoders(embed, kind):
    wave = tones("ab")
    stereo = np.stack([1.5 * wave, 0.5 * wave])
    expected = embed(wave)
    decoder = kind(stereo, RATE)
    assert close(embed(decoder), expected)
    assert all(close(result, expected) for result in embed([decoder, {"audio": decoder, "label": 3}], batch_size=2))


def test_embeddings_of_another_rate_are_resampled(embed):
    pytest.importorskip("torchaudio")
    seconds = np.arange(8000) / 8000
    slow = np.sin(2 * np.pi * 440 * seconds).astype(np.float32)
    fast = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    resampled = embed({"raw": slow, "sampling_rate": 8000}, pool="mean")
    direct = embed(fast, pool="mean")
    mistaken = embed(slow, pool="mean")
    assert np.abs(resampled - direct).max() < 0.3 * np.abs(mistaken - direct).max()
    assert close(embed(Decoder(slow[None], 8000), pool="mean"), resampled)
    for integers in (np.int16(slow * 2.0**14), torch.from_numpy(np.int32(slow * 2.0**30))):
        floats = np.asarray(integers) / (2.0**15 if np.asarray(integers).itemsize == 2 else 2.0**31)
        scaled, expected = (embed({"raw": raw, "sampling_rate": 8000}, pool="mean") for raw in (integers, floats))
        assert np.abs(scaled - expected).max() < 1e-5
    with pytest.raises(ValueError, match="samples of type int64"):
        embed({"raw": np.int64(slow * 32767), "sampling_rate": 8000})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layer": 99}, "layer=99 must be -1"),
        ({"layer": -2}, "layer=-2 must be -1"),
        ({"layer": "last"}, "layer='last' must be"),
        ({"layer": True}, "layer=True must be"),
        ({"pool": "max"}, "pool='max' must be one of None, 'mean'"),
        ({"pooling": "mean"}, "unknown arguments"),
    ],
)
def test_wrong_settings_of_embeddings(embed, settings, words):
    with pytest.raises(ValueError, match=words):
        embed(tones("a"), **settings)


def test_audio_that_cannot_be_embedded(embed, tmp_path):
    for audio, words in (
        (np.zeros((2, 8000), np.float32), "not mono"),
        ({"raw": np.zeros(8000)}, "needs its rate.*not None"),
        ({"raw": np.zeros(8000), "sampling_rate": 0}, "needs its rate.*not 0"),
        ({"raw": np.zeros(8000), "sampling_rate": "8k"}, "needs its rate.*not '8k'"),
        ({"raw": np.zeros(0), "sampling_rate": 8000}, "is empty"),
        ({"sampling_rate": RATE}, 'needs "raw"'),
        (b"RIFF, but not really", "cannot be decoded"),
        (tmp_path / "none.wav", "no such file"),
        (np.zeros(100, np.float32), "too short"),
        (3.5, "a float is no audio"),
    ):
        with pytest.raises(ValueError, match=words):
            embed(audio)


def test_only_spear_models_are_embedded():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    stem = {"conv_dim": [8], "conv_kernel": [9], "conv_stride": [4]}
    config = Wav2Vec2Config(**sizes, **stem, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    with pytest.raises(ValueError, match="for SPEAR models, and Wav2Vec2Model is none"):
        AudioEmbeddingPipeline(Wav2Vec2Model(config), feature_extractor=SpearFeatureExtractor(), device="cpu")


def test_a_saved_pipeline_is_a_plain_model_folder(embed, tmp_path):
    embed.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    again = pipeline("audio-feature-extraction", model=str(tmp_path), layer=2, pool="mean", device="cpu")
    assert close(again(tones("a")), embed(tones("a"), layer=2, pool="mean"))


def test_a_model_with_a_head_gives_the_encoders_embeddings(tone_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from_folder = pipeline("audio-feature-extraction", model=tone_folder, device="cpu")
    head = SpearForCTC.from_pretrained(tone_folder)
    direct = AudioEmbeddingPipeline(head, feature_extractor=SpearFeatureExtractor(), device="cpu")
    assert close(from_folder(tones("ab")), direct(tones("ab")))


def test_registration_is_quiet_and_cheap():
    """In seconds of processor time: the machine may be busy."""
    code = (
        "import time, torch\nfrom transformers import AutoModel, PreTrainedModel\nbegin = time.process_time()\n"
        "import spear_hf\nprint(time.process_time() - begin)\nfrom transformers.pipelines import PIPELINE_REGISTRY\n"
        "assert 'audio-feature-extraction' in PIPELINE_REGISTRY.get_supported_tasks()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not result.stderr
    assert float(result.stdout) < 1.0  # measured: 0.3, of which 0.01 for the pipeline
    assert PIPELINE_REGISTRY.check_task("audio-feature-extraction")[1]["impl"] is AudioEmbeddingPipeline
