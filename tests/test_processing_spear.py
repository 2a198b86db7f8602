# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The processor, and what AutoProcessor gives where there is no tokenizer for one."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Wav2Vec2CTCTokenizer

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearForCTC, SpearProcessor


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "<unk>": 2, "a": 3, "b": 4}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    return SpearProcessor(SpearFeatureExtractor(preemphasis=0.9), tokenizer)


def saved_config(folder):
    SpearConfig(num_layers_per_stack=[1], downsampling_factors=[1], conv_kernel_sizes=[3]).save_pretrained(folder)
    return folder


def test_with_a_tokenizer(processor, tmp_path):
    folder = saved_config(tmp_path / "model")
    processor.save_pretrained(folder)
    for loaded in (AutoProcessor.from_pretrained(folder), SpearProcessor.from_pretrained(folder)):
        assert type(loaded) is SpearProcessor
        assert loaded.feature_extractor.preemphasis == 0.9
        assert loaded(text="ab b")["input_ids"] == [3, 4, 1, 4]


def test_without_a_tokenizer_auto_processor_gives_the_feature_extractor(tmp_path):
    folder = saved_config(tmp_path / "model")
    SpearFeatureExtractor(preemphasis=0.9).save_pretrained(folder)
    loaded = AutoProcessor.from_pretrained(folder)
    assert type(loaded) is SpearFeatureExtractor
    assert loaded.preemphasis == 0.9
    with pytest.raises(OSError, match="has no tokenizer, which SpearProcessor needs"):
        SpearProcessor.from_pretrained(folder)


def test_a_published_checkpoint_has_the_published_feature_extractor(golden_folder, tmp_path):
    loaded = AutoProcessor.from_pretrained(golden_folder)
    assert type(loaded) is SpearFeatureExtractor
    assert loaded.to_dict() == SpearFeatureExtractor().to_dict()
    assert AutoProcessor.from_pretrained(golden_folder, pad_short=True).pad_short
    settings = json.loads((golden_folder / "config.json").read_text())
    shutil.copytree(golden_folder, tmp_path / "narrow")
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(settings | {"num_mel_bins": 80}))
    assert AutoProcessor.from_pretrained(tmp_path / "narrow").feature_size == 80


def test_audio_and_text(processor):
    wave = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    features = processor.feature_extractor(wave, sampling_rate=16000, return_tensors="pt")
    both = processor(audio=wave, text="ab", sampling_rate=16000, return_tensors="pt")
    assert torch.equal(both["input_features"], features["input_features"])
    assert both["labels"].tolist() == [[3, 4]]
    assert set(processor(wave, sampling_rate=16000)) == {"input_features", "attention_mask"}
    assert set(processor.model_input_names) == {"input_features", "attention_mask", "labels"}
    with pytest.raises(ValueError, match="Neither"):
        processor()


def test_arguments_of_the_feature_extractor_reach_it(processor):
    """`pad_short`, which the error of a short utterance names, was left out in silence."""
    short = np.zeros(800, np.float32)
    with pytest.raises(ValueError, match="pass pad_short=True"):
        processor(short, sampling_rate=16000)
    for wanted in ({"pad_short": True}, {"audio_kwargs": {"pad_short": True}}):
        assert np.shape(processor(short, sampling_rate=16000, **wanted)["input_features"]) == (1, 9, 128)
    with pytest.raises(RuntimeError, match="nowhere"):
        processor(np.zeros(8000, np.float32), sampling_rate=16000, device="nowhere")


def test_pad_and_train(processor):
    """What a collator of a fine-tuning script for Wav2Vec2 does."""
    waves = [np.zeros(length, np.float32) for length in (8000, 6000)]
    rows = [processor(audio=wave, sampling_rate=16000) for wave in waves]
    features = [{"input_features": row["input_features"][0]} for row in rows]
    labels = [{"input_ids": processor(text=text)["input_ids"]} for text in ("ab", "b")]
    batch = processor.pad(input_features=features, labels=labels, return_tensors="pt")
    assert batch["input_features"].shape == (2, 50, 128)
    assert batch["attention_mask"].sum(dim=1).tolist() == [50, 38]
    assert batch["labels"].tolist() == [[3, 4], [4, 0]]
    assert processor.pad(labels=labels)["input_ids"] == [[3, 4], [4, 0]]
    config = SpearConfig(
        hidden_size=16, num_layers_per_stack=[1], downsampling_factors=[1], conv_kernel_sizes=[3], vocab_size=5
    )
    loss = SpearForCTC(config)(**batch).loss
    loss.backward()
    assert loss.isfinite()
