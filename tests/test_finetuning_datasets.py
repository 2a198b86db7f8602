# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows for fine-tuning from folders and manifests, the model's labels, and what bad input says."""

import json
import wave

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForAudioClassification

from spear_hf import SpearConfig, SpearModel
from spear_hf.data.audio import load_audio
from spear_hf.finetuning.arguments import DataArguments, ModelArguments
from spear_hf.finetuning.datasets import (
    decode_row,
    load_rows,
    single_texts,
    train_and_eval_rows,
    without_long_rows,
)
from spear_hf.finetuning.models import class_ids, load_config, load_feature_extractor, load_model, set_labels
from spear_hf.finetuning.transcripts import ctc_tokenizer


def write_wav(path, samples, seed=0, rate=16000, period=0):
    """Noise, or pulses of a period of so many samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(-8000, 8000, samples).astype("<i2")
    if period:
        noise = (8000 * (np.arange(samples) % period < 4)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(noise.tobytes())
    return path


@pytest.fixture
def folder(tmp_path):
    """dog/0.wav, dog/1.wav, cat/2.wav, with transcripts beside them."""
    for index, label in enumerate(["dog", "dog", "cat"]):
        path = write_wav(tmp_path / "sounds" / label / f"{index}.wav", 4000 * (index + 1), seed=index)
        path.with_suffix(".txt").write_text(f"text {index}\n")
    return tmp_path / "sounds"


def test_folder(folder):
    rows = load_rows(str(folder), ["label", "speaker", "transcript"])
    assert rows.column_names == ["id", "audio", "length", "label", "speaker", "transcript"]
    assert rows["id"][:] == ["cat/2.wav", "dog/0.wav", "dog/1.wav"]
    assert rows["label"][:] == rows["speaker"][:] == [["cat"], ["dog"], ["dog"]]
    assert single_texts(rows, "transcript") == ["text 2", "text 0", "text 1"]
    assert rows["length"][:] == [12000, 4000, 8000]
    assert np.array_equal(decode_row(rows[1]), load_audio(folder / "dog" / "0.wav"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_manifest(folder, suffix):
    rows = [
        {"path": "dog/0.wav", "transcript": "one", "split": "train", "language": "en"},
        {"path": "dog/1.wav", "transcript": "two", "split": "train", "language": "fr"},
        {"path": "cat/2.wav", "transcript": "three", "split": "test", "language": "en"},
    ]
    manifest = folder / f"list{suffix}"
    if suffix == ".jsonl":
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        manifest.write_text("".join(",".join(line) + "\n" for line in lines))
    found = load_rows(str(manifest), ["transcript"], "train", DataArguments(where=["language=en"]))
    assert found["id"][:] == ["dog/0.wav"]
    assert single_texts(found, "transcript") == ["one"]
    train, evaluation = train_and_eval_rows(
        DataArguments(dataset=str(manifest), train_split="train", eval_split="test"), ["transcript"], seed=0
    )
    assert (len(train), evaluation["id"][:]) == (2, ["cat/2.wav"])


def test_splits_of_a_manifest_are_kept_apart(folder, caplog):
    """Rows of other splits are not trained on because no split was named."""
    rows = [("dog/0.wav", "train"), ("dog/1.wav", "train"), ("cat/2.wav", "validation")]
    manifest = folder / "list.csv"
    manifest.write_text("path,split\n" + "".join(f"{path},{split}\n" for path, split in rows))
    arguments = DataArguments(dataset=str(manifest), eval_share=0.5)
    train, evaluation = train_and_eval_rows(arguments, [], seed=0)
    assert (train["id"][:], evaluation["id"][:]) == (["dog/0.wav", "dog/1.wav"], ["cat/2.wav"])
    manifest.write_text(manifest.read_text().replace("validation", "dev"))
    assert train_and_eval_rows(arguments, [], seed=0)[1]["id"][:] == ["cat/2.wav"]
    assert not caplog.messages
    manifest.write_text(manifest.read_text().replace("dev", "test"))
    assert "cat/2.wav" not in {id for part in train_and_eval_rows(arguments, [], seed=0) for id in part["id"]}
    assert "50% of train is held out for the evaluation, and test is left alone" in caplog.text
    manifest.write_text(manifest.read_text().replace("train", "fold1"))
    with pytest.raises(ValueError, match=r"has the splits fold1, test: name one with --train_split"):
        train_and_eval_rows(arguments, [], seed=0)


def test_several_labels(folder):
    manifest = folder / "list.jsonl"
    rows = [{"path": "dog/0.wav", "label": ["a", "b"]}, {"path": "dog/1.wav"}, {"path": "cat/2.wav", "label": "c"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows(str(manifest), ["label"])
    assert found["label"][:] == [["a", "b"], [], ["c"]]
    with pytest.raises(ValueError, match=r"2 of 3 rows have no single label, the first being dog/0\.wav"):
        single_texts(found, "label")


def test_unreachable_hub():
    with pytest.raises(ValueError, match=r"someone/nothing is neither a folder or manifest here nor a dataset"):
        load_rows("someone/nothing", [])


def test_bad_files_are_named(folder):
    (folder / "dog" / "9.wav").write_text("no audio")
    with pytest.raises(ValueError, match=r"1 of 4 files cannot be used(.|\n)*9\.wav cannot be read"):
        load_rows(str(folder), [])
    manifest = folder / "list.jsonl"
    manifest.write_text('{"path": "dog/7.wav", "num_samples": 5}\n')
    with pytest.raises(ValueError, match=r"1 of 1 files cannot be used(.|\n)*7\.wav: there is no such file"):
        load_rows(str(manifest), [])


def test_wrong_names(folder):
    with pytest.raises(ValueError, match=r"has no column 'words'; it has: .*transcript"):
        load_rows(str(folder), ["words"])
    with pytest.raises(ValueError, match=r"where label=cow: no row .* its label holds dog \(2\), cat \(1\)"):
        load_rows(str(folder), [], None, DataArguments(where=["label=cow"]))
    with pytest.raises(ValueError, match=r"nowhere\.csv does not exist"):
        load_rows("nowhere.csv", [])
    with pytest.raises(ValueError, match="dataset is not set"):
        train_and_eval_rows(DataArguments(), [], seed=0)
    for wrong, message in (
        ({"where": ["label"]}, "where='label' must read COLUMN=VALUE"),
        ({"eval_share": 1.0}, "eval_share=1.0 must lie between"),
        ({"max_seconds": 0}, "max_seconds=0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DataArguments(**wrong)


def test_held_out_rows():
    arguments = DataArguments(dataset="bundled", train_split="pretrain", where=["language=en"], eval_share=0.25)
    train, evaluation = train_and_eval_rows(arguments, [], seed=1)
    assert (len(train), len(evaluation)) == (52, 17)
    assert not set(train["id"]) & set(evaluation["id"])
    assert evaluation["length"][:] == sorted(evaluation["length"])
    again, other = (train_and_eval_rows(arguments, [], seed=seed)[1]["id"][:] for seed in (1, 2))
    assert again == evaluation["id"][:] != other
    some = DataArguments(dataset="bundled", train_split="pretrain", eval_split="heldout", max_train_samples=30)
    train, evaluation = train_and_eval_rows(some, ["domain"], seed=1)
    assert (len(train), len(evaluation)) == (30, 35)
    assert {domain for (domain,) in train["domain"]} == {"speech", "audio"}


def test_long_rows(folder, caplog):
    rows = load_rows(str(folder), [])
    assert without_long_rows(rows, 0.5)["length"][:] == [4000, 8000]
    with pytest.raises(ValueError, match=r"max_seconds=0\.1: all 3 rows are longer"):
        without_long_rows(rows, 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_layers_per_stack": [1], "downsampling_factors": [1]}
SIZES |= {"conv_kernel_sizes": [5], "stem_channels": [2, 2, 2]}


def test_model_of_a_checkpoint(tmp_path):
    pretrained = SpearModel(SpearConfig(**SIZES))
    pretrained.save_pretrained(tmp_path)
    arguments = ModelArguments(model=str(tmp_path), model_config='{"use_weighted_layer_sum": true}')
    config = load_config(arguments)
    assert set_labels(config, ["b", "a", "b"]) == {"a": 0, "b": 1}
    model = load_model(AutoModelForAudioClassification, arguments, config)
    assert model.layer_weights is not None
    assert model.config.id2label == {0: "a", 1: "b"}
    expected = pretrained.state_dict()
    assert all(value.equal(expected[name]) for name, value in model.spear.state_dict().items())
    assert load_feature_extractor(arguments, config).feature_size == 128
    # Fine-tuned further: the labels stay, in their order, unless there are others.
    model.config.id2label, model.config.label2id = {0: "b", 1: "a"}, {"b": 0, "a": 1}
    model.save_pretrained(tmp_path / "tuned")
    again = load_config(ModelArguments(model=str(tmp_path / "tuned")))
    assert set_labels(again, ["a", "b"]) == {"b": 0, "a": 1}
    assert set_labels(again, ["a", "z"]) == {"a": 0, "z": 1}
    assert set_labels(again, ["a"], classes=1) == {"a": 0, "z": 1}  # of several labels at a time, one is a task
    again.label2id = None  # as in a configuration that was made with `id2label` alone
    assert set_labels(again, ["z"], classes=1) == {"a": 0, "z": 1} == again.label2id
    with pytest.raises(ValueError, match="all training rows have the label 'a': 2 classes"):
        set_labels(again, ["a", "a"])


def test_an_encoder_is_whole_and_in_full_precision(tmp_path):
    """Updates of 1e-4 of a weight are lost in bfloat16; a random part of an encoder is worth a warning to no one."""
    SpearModel(SpearConfig(**SIZES)).bfloat16().save_pretrained(tmp_path)
    arguments = ModelArguments(model=str(tmp_path))
    model = load_model(AutoModelForAudioClassification, arguments, load_config(arguments))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    arguments.model_config = '{"intermediate_size": 32}'
    with pytest.raises(ValueError, match=r"9 weights of the encoder are not in .* sizes of it alone"):
        load_model(AutoModelForAudioClassification, arguments, load_config(arguments))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["stem.conv1.bias"], weights["masked_spec_embed"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    arguments.model_config = None
    with pytest.raises(ValueError, match=r"1 weights of the encoder .* such as spear\.stem\.conv1\.bias"):
        load_model(AutoModelForAudioClassification, arguments, load_config(arguments))


def test_wrong_models(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    (tmp_path / "list.json").write_text("[]")
    for arguments, message in (
        ({}, "model is not set"),
        ({"model_config": "{"}, "neither JSON nor"),
        ({"model_config": str(tmp_path / "list.json")}, "must be a JSON object"),
        ({"model_config": "missing.json"}, r"missing\.json cannot be read"),
        ({"model_config": '{"hidden_sizes": 4}'}, "SpearConfig has no hidden_sizes"),
        ({"model": str(tmp_path)}, "is of the kind 'wav2vec2'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(ModelArguments(**arguments))


def test_class_ids():
    assert class_ids(["b", "a", "b"], {"a": 0, "b": 1}, "x") == [0, 1]
    with pytest.raises(ValueError, match="x has the label 'c', which is not among the 2 of the training rows: a, b"):
        class_ids(["c"], {"a": 0, "b": 1}, "x")
    with pytest.raises(ValueError, match="no labels"):
        set_labels(SpearConfig(**SIZES), [])


def test_a_model_keeps_its_tokenizer(tmp_path):
    ctc_tokenizer(None, ["abc"]).save_pretrained(tmp_path)
    assert ctc_tokenizer(str(tmp_path), ["xyz"]).get_vocab() == ctc_tokenizer(None, ["abc"]).get_vocab()
    (tmp_path / "empty").mkdir()
    assert "x" in ctc_tokenizer(str(tmp_path / "empty"), ["xyz"]).get_vocab()
