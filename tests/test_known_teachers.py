# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf quantize` without settings: the paper's teachers as published; fixed windows by their recorded rule."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.known_teachers import KNOWN_TEACHERS, resolve_settings
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenizer import MvqTokenizer
from tests.test_dasheng import published_tensors


BUNDLED = Path(__file__).parent.parent / "examples" / "data"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six bundled clips of 3 s."""
    folder = tmp_path_factory.mktemp("corpus")
    clips = sorted(read_manifest(BUNDLED), key=lambda clip: (clip.num_samples or 0, clip.id))[800:806]
    for clip in clips:
        shutil.copyfile(clip.path, folder / clip.path.name)
    return folder


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def quantize(teacher, corpus, output, *extra) -> tuple[int, str]:
    where = ("--teacher", teacher, "--data", corpus, "--output", output, "--device", "cpu")
    return run("quantize", *where, "--codebook-size", 4, "--steps", 3, "--batch-size", 64, "--frames", 500, *extra)


def test_the_papers_settings():
    """arXiv 2510.25955: WavLM Large, block 21, N = 16, standardised; Dasheng 1.2B, last layer, N = 8, as it is."""
    speech = resolve_settings("microsoft/wavlm-large")
    assert (speech.layer, speech.codebooks, speech.normalize) == (21, 16, True)
    assert "layer 21, 16 codebooks, standardised (SPEAR, arXiv 2510.25955" in speech.note
    audio = resolve_settings("mispeech/dasheng-1.2B")
    assert (audio.layer, audio.codebooks, audio.normalize) == (None, 8, False)
    assert "the last layer, 8 codebooks, not standardised" in audio.note
    factory = resolve_settings("spear_hf.mvq.dasheng:dasheng")
    assert (factory.layer, factory.codebooks, factory.normalize) == (None, 8, False)
    for known in KNOWN_TEACHERS.values():
        assert known.source


def test_what_is_given_is_kept():
    given = resolve_settings("microsoft/wavlm-large", layer=0, codebooks=4, normalize=False)
    assert (given.layer, given.codebooks, given.normalize, given.note) == (0, 4, False, None)
    partly = resolve_settings("mispeech/dasheng-1.2B", codebooks=16)
    assert (partly.codebooks, partly.normalize) == (16, False)
    assert "codebooks" not in partly.note


def test_unknown_teachers():
    settings = resolve_settings("facebook/hubert-base-ls960", codebooks=8)
    assert (settings.layer, settings.codebooks, settings.normalize) == (None, 8, True)
    assert settings.note == "facebook/hubert-base-ls960: the last layer, standardised (the default)"
    assert resolve_settings("kaldi-mfcc", codebooks=8).note == "kaldi-mfcc: standardised (the default)"
    with pytest.raises(ValueError, match="how many codebooks for kaldi-mfcc"):
        resolve_settings("kaldi-mfcc")
    # Another Dasheng is another teacher: nothing was published about how to quantise it.
    with pytest.raises(ValueError, match="how many codebooks for mispeech/dasheng-base"):
        resolve_settings("spear_hf.mvq.dasheng:dasheng", options={"model": "mispeech/dasheng-base"})


def test_wavlm_large_from_its_name_alone(corpus, tmp_path, monkeypatch):
    """A model of WavLM Large's depth, tiny, where the Hub's name is looked for first: a folder of that name."""
    monkeypatch.chdir(tmp_path)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=24,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=8,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    torch.manual_seed(0)
    model = WavLMModel(config).eval()
    model.save_pretrained("microsoft/wavlm-large")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True)
    extractor.save_pretrained("microsoft/wavlm-large")
    code, printed = quantize("microsoft/wavlm-large", corpus, "tokenizer")
    assert code == 0, printed
    assert "microsoft/wavlm-large: layer 21, 16 codebooks, standardised" in printed
    quantizer = MultiCodebookQuantizer.from_pretrained("tokenizer").config
    assert (quantizer.teacher, quantizer.teacher_layer) == ("microsoft/wavlm-large", 21)
    assert (quantizer.num_codebooks, quantizer.normalize, quantizer.frame_rate) == (16, True, 50.0)
    # hidden_states[21] is what block 21 of 24 gives.
    waveform = load_audio(sorted(corpus.iterdir())[0])
    outputs = []
    model.encoder.layers[20].register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    with torch.no_grad():
        model(**extractor(waveform, sampling_rate=16000, return_tensors="pt"))
    features = load_teacher("microsoft/wavlm-large", layer=21)([waveform])[0]
    assert torch.allclose(features, outputs[0].reshape(features.shape), atol=1e-4)


def test_dasheng_from_its_name_alone(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mispeech" / "dasheng-1.2B"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(published_tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"name": "tiny", "num_heads": 2}))
    code, printed = quantize("mispeech/dasheng-1.2B", corpus, "tokenizer")
    assert code == 0, printed
    assert "the last layer, 8 codebooks, not standardised" in printed
    config = MultiCodebookQuantizer.from_pretrained("tokenizer").config
    assert (config.teacher, config.teacher_layer) == ("spear_hf.mvq.dasheng:dasheng", None)
    assert (config.num_codebooks, config.normalize, config.frame_rate) == (8, False, 25.0)
    recorded = config.provenance["teacher"]
    assert recorded["options"] == {"model": "mispeech/dasheng-1.2B"}
    assert recorded["window_seconds"] == 10.0
    tokens = MvqTokenizer.from_pretrained("tokenizer")(np.zeros(16000, np.float32))
    assert tokens.shape == (25, 8)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """An encoder alone, tiny, whose window is 6 s."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=1,
        num_mel_bins=80,
        max_source_positions=300,
    )
    WhisperEncoder(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=6).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("window", ["pad", "slice"])
def test_whisper_by_the_rule_that_is_recorded(whisper, corpus, tmp_path, window):
    code, printed = quantize(
        whisper, corpus, tmp_path / "tokenizer", "--layer", 2, "--window", window, "--codebooks", 2
    )
    assert code == 0, printed
    report = json.loads((tmp_path / "tokenizer" / "report.json").read_text())
    assert (report["teacher"]["window"], report["teacher"]["layer"]) == (window, 2)
    assert report["teacher"]["frame_rate"] == 50.0
    # Extraction follows the quantiser; the option is not even there to be set otherwise.
    code, printed = run(
        *("tokenize", "--tokenizer", tmp_path / "tokenizer", "--data", corpus),
        *("--output", tmp_path / "tokens", "--device", "cpu"),
    )
    assert code == 0, printed
    store = TokenStore.open(tmp_path / "tokens")
    assert store.info.extraction["teacher"]["window"] == window
    teacher = load_teacher(str(whisper), layer=2, window=window)
    quantizer = MultiCodebookQuantizer.from_pretrained(tmp_path / "tokenizer")
    path = sorted(corpus.iterdir())[0]
    expected = quantizer.encode(teacher([load_audio(path)])[0]).numpy()
    assert (store[path.name] == expected).mean() > 0.999, "but for rounding in another batch"
    # A teacher fed by the other rule is refused.
    other = load_teacher(str(whisper), layer=2, window="slice" if window == "pad" else "pad")
    with pytest.raises(ValueError, match=f"with window '{window}', but teacher .* has '{other.window}'"):
        MvqTokenizer.from_pretrained(tmp_path / "tokenizer", teacher=other)


def test_windows_are_for_fixed_window_teachers(corpus, tmp_path):
    code, printed = quantize("kaldi-mfcc", corpus, tmp_path / "q", "--window", "slice", "--codebooks", 2)
    assert code == 1
    assert "kaldi-mfcc takes no `window`" in printed
