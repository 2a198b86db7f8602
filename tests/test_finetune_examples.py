# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""examples/finetune_*.py: each with --smoke and on data of one's own, resumed, and CTC learns by heart."""

import importlib.util
import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoProcessor,
    pipeline,
)

from spear_hf.data.audio import load_audio
from spear_hf.evaluation.metrics import EqualErrorRate

from .conftest import ROOT
from .test_finetuning_datasets import write_wav


BUNDLED = ROOT / "examples" / "data" / "manifest.jsonl"
WITH_LOSS = ["loss.png", "train_results.json", "eval_results.json", "trainer_state.json", "README.md"]
# Sizes that learn quickly on one CPU core.
SMALL = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "stem_channels": [4, 8, 16],
    "num_attention_heads": 4,
    "query_head_dim": 16,
    "num_layers_per_stack": [1, 1],
    "downsampling_factors": [1, 2],
    "conv_kernel_sizes": [15, 15],
    "hidden_dropout": 0,
    "final_dropout": 0,
}
QUICK = ["--smoke", "--max_steps", "2", "--save_strategy", "no", "--disable_tqdm", "true"]
# With --dataset of one's own, the splits of the bundled one are not wanted.
ONE_STEP = [
    "--max_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", "--logging_steps", "1",
    "--per_device_train_batch_size", "2",
]  # fmt: skip


def script(name):
    """A script as a module: its `main` takes a command line and returns the exit code."""
    name = f"finetune_{name}"
    if name not in sys.modules:  # registered, as the training arguments are pickled
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def metrics_of(folder, name="eval"):
    return json.loads((folder / f"{name}_results.json").read_text())


def losses_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record["loss"] for record in history if "loss" in record]


def bundled_rows(**conditions):
    """Of the manifest, with absolute paths."""
    rows = [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if all(row[name] == value for name, value in conditions.items())]
    return [{**row, "path": str(BUNDLED.parent / row["path"])} for row in rows]


def write_manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def ctc_smoke(tmp_path_factory):
    """The folder of the CTC script's smoke run, with a checkpoint after 4 of its 8 steps; and its seconds."""
    folder = tmp_path_factory.mktemp("ctc") / "smoke"
    start = time.perf_counter()
    assert script("ctc").main(["--smoke", "--output_dir", str(folder), "--disable_tqdm", "true"]) == 0
    return folder, time.perf_counter() - start


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps({**SMALL, "tdnn_dim": [16] * 5, "xvector_output_dim": 8, "initializer_range": 0.3}))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# CTC
# ---------------------------------------------------------------------------------------------------------------------


def test_ctc_smoke(ctc_smoke):
    folder, seconds = ctc_smoke
    assert seconds < 60
    assert all((folder / name).is_file() for name in WITH_LOSS)
    assert set(metrics_of(folder)) >= {"eval_wer", "eval_cer", "eval_loss", "eval_samples"}
    assert len(losses_of(folder)) == 8
    model, processor = AutoModelForCTC.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.vocab_size == len(processor.tokenizer)
    assert model.config.pad_token_id == processor.tokenizer.pad_token_id == 0
    assert processor.tokenizer.decode(processor(text="the number").input_ids, group_tokens=False) == "the number"


def test_ctc_resumes(ctc_smoke, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(ctc_smoke[0] / "checkpoint-4", folder / "checkpoint-4")
    command = ["--smoke", "--output_dir", str(folder), "--disable_tqdm", "true"]
    with pytest.raises(SystemExit):  # the folder holds a training
        script("ctc").main(command)
    assert script("ctc").main([*command, "--resume_from_checkpoint", "last"]) == 0
    assert losses_of(folder) == losses_of(ctc_smoke[0])
    whole, resumed = (AutoModelForCTC.from_pretrained(path).state_dict() for path in (ctc_smoke[0], folder))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert metrics_of(folder)["eval_loss"] == metrics_of(ctc_smoke[0])["eval_loss"]


def test_ctc_learns_utterances_by_heart(tmp_path, config):
    wanted = ("queue-thankyou", "from-unknown-caller", "confbridge-unmuted", "confbridge-conf-end", "dir-welcome")
    rows = [row for row in bundled_rows(language="en") if row["id"].endswith(wanted)]
    assert len(rows) == 5
    manifest = write_manifest(tmp_path / "five.jsonl", rows)
    folder = tmp_path / "run"
    # fmt: off
    command = [
        "--model_config", config, "--dataset", manifest, "--eval_dataset", manifest, "--output_dir", str(folder),
        "--max_steps", "120", "--learning_rate", "3e-3", "--warmup_steps", "15", "--per_device_train_batch_size", "5",
        "--encoder_learning_rate_scale", "1", "--freeze_encoder_steps", "0", "--save_strategy", "no",
        "--logging_steps", "10", "--disable_tqdm", "true",
    ]
    # fmt: on
    assert script("ctc").main(command) == 0
    assert metrics_of(folder)["eval_wer"] < 0.05
    assert losses_of(folder)[-1] < 0.1 * losses_of(folder)[0]
    recognise = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    (row,) = [row for row in rows if row["id"].endswith("dir-welcome")]
    assert recognise(load_audio(row["path"]))["text"] == "welcome to the directory"


def test_ctc_on_a_folder_and_from_a_checkpoint(tmp_path, ctc_smoke, caplog):
    for index, text in enumerate(["one", "Two!", "the ∏ number π", "a long text for a short time"]):
        write_wav(tmp_path / "speech" / f"{index}.wav", 4000, seed=index).with_suffix(".txt").write_text(text)
    folder = tmp_path / "run"
    command = ["--model", str(ctc_smoke[0]), "--dataset", str(tmp_path / "speech"), "--eval_share", "0.25"]
    assert script("ctc").main([*command, "--output_dir", str(folder), *ONE_STEP]) == 0
    assert metrics_of(folder)["eval_samples"] == 1
    assert "1 of " in caplog.text
    assert "tokens are unknown to the tokenizer and become <unk>" in caplog.text
    # It goes on with the vocabulary and the sizes of its checkpoint.
    vocabularies = [AutoProcessor.from_pretrained(path).tokenizer.get_vocab() for path in (ctc_smoke[0], folder)]
    assert vocabularies[0] == vocabularies[1]
    # The default freezes the encoder for 2,000 steps.
    before, after = (AutoModelForCTC.from_pretrained(path) for path in (ctc_smoke[0], folder))
    assert all(torch.equal(a, b) for a, b in zip(before.spear.parameters(), after.spear.parameters()))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_ctc_without_transcripts(tmp_path, capsys):
    command = [*QUICK, "--where", "domain=audio", "--output_dir", str(tmp_path)]
    assert script("ctc").main(command) == 1
    error = capsys.readouterr().err
    assert "16 of 16 rows have no single transcript" in error
    assert "--where" in error


# ---------------------------------------------------------------------------------------------------------------------
# Audio classification
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "metric", "problem", "labels"),
    [
        ([], "eval_accuracy", "single_label_classification", {"piano", "guitar"}),
        (["--multi_label"], "eval_map", "multi_label_classification", {"speech", "audio", "en", "it"}),
    ],
)
def test_classification_smoke(tmp_path, options, metric, problem, labels):
    start = time.perf_counter()
    command = ["--smoke", "--output_dir", str(tmp_path), "--disable_tqdm", "true", *options]
    assert script("audio_classification").main(command) == 0
    assert time.perf_counter() - start < 60
    assert all((tmp_path / name).is_file() for name in WITH_LOSS)
    assert 0 <= metrics_of(tmp_path)[metric] <= 1
    assert min(losses_of(tmp_path)[-3:]) < losses_of(tmp_path)[0]
    model = AutoModelForAudioClassification.from_pretrained(tmp_path)
    assert model.config.problem_type == problem
    assert labels <= set(model.config.label2id)
    classify = pipeline("audio-classification", model=str(tmp_path), device="cpu")
    results = classify(load_audio(bundled_rows(split="heldout")[0]["path"]), top_k=2)
    assert len(results) == 2
    assert {result["label"] for result in results} <= set(model.config.label2id)


def test_classification_of_a_folder(tmp_path, config):
    for index in range(6):
        write_wav(tmp_path / "sounds" / ("dog", "cat")[index % 2] / f"{index}.wav", 4000 + 900 * index, seed=index)
    command = ["--model_config", config, "--dataset", str(tmp_path / "sounds"), "--eval_share", "0.3"]
    command += ["--train_sampling_strategy", "group_by_length", "--output_dir", str(tmp_path / "run"), *ONE_STEP]
    assert script("audio_classification").main(command) == 0
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "run")
    assert model.config.label2id == {"cat": 0, "dog": 1}
    # Evaluation alone, of the result.
    command = ["--model", str(tmp_path / "run"), "--dataset", str(tmp_path / "sounds"), "--do_eval"]
    assert script("audio_classification").main([*command, "--output_dir", str(tmp_path / "again")]) == 0
    assert not (tmp_path / "again" / "model.safetensors").exists()
    assert set(metrics_of(tmp_path / "again")) >= {"eval_accuracy"}


def test_classification_errors(tmp_path, capsys):
    main = script("audio_classification").main
    for options, message in (
        (["--mixup", "0.5"], "mixup=0.5 must be a share from 0 to 1, and needs --multi_label"),
        (["--label_column", "domain", "language"], "several columns need --multi_label"),
        (["--output_dir"], "expected one argument"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*QUICK, "--output_dir", str(tmp_path), *options])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert main([*QUICK, "--output_dir", str(tmp_path), "--eval_split", "pretrain", "--where", "domain=audio"]) == 1
    assert "which is not among the 10 of the training rows: bass, brass" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--multi_label"]])
def test_frames_smoke(tmp_path, options):
    start = time.perf_counter()
    command = ["--smoke", "--output_dir", str(tmp_path), "--disable_tqdm", "true", *options]
    assert script("frame_classification").main(command) == 0
    assert time.perf_counter() - start < 60
    assert all((tmp_path / name).is_file() for name in WITH_LOSS)
    # Silence against sound is learnt within the few steps there are.
    assert metrics_of(tmp_path)["eval_frame_f1"] > 0.5
    model = AutoModelForAudioFrameClassification.from_pretrained(tmp_path)
    assert set(model.config.label2id) == {"speech", "audio"} | (set() if options else {"none"})
    waveform = load_audio(tmp_path / "_bundled_data" / "heldout-0.wav")
    inputs = AutoFeatureExtractor.from_pretrained(tmp_path)(waveform, sampling_rate=16000, return_tensors="pt")
    assert model(**inputs).logits.shape[2] == len(model.config.label2id)


def test_frames_of_a_folder_with_a_table(tmp_path, config, capsys):
    for index in range(4):
        write_wav(tmp_path / "sounds" / f"{index}.wav", 8000, seed=index)
    table = tmp_path / "segments.csv"
    table.write_text("id,start,end,label\n" + "".join(f"{index}.wav,0.1,0.2,beep\n" for index in range(4)))
    command = ["--model_config", config, "--dataset", str(tmp_path / "sounds"), "--eval_share", "0.3", *ONE_STEP]
    main = script("frame_classification").main
    assert main([*command, "--segments", str(table), "--output_dir", str(tmp_path / "run")]) == 0
    model = AutoModelForAudioFrameClassification.from_pretrained(tmp_path / "run")
    assert model.config.label2id == {"beep": 0, "none": 1}
    assert main([*command, "--output_dir", str(tmp_path / "no table")]) == 1
    assert "segments, a table, or segment_column" in capsys.readouterr().err
    table.write_text("id,start,end,label\nx,0,1,beep\n")
    assert main([*command, "--segments", str(table), "--output_dir", str(tmp_path / "other table")]) == 1
    assert "has none of the 3 training rows; it has ids such as 'x'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Speakers
# ---------------------------------------------------------------------------------------------------------------------


def test_speakers_smoke(tmp_path):
    start = time.perf_counter()
    command = ["--smoke", "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    assert script("speaker_verification").main(command) == 0
    assert time.perf_counter() - start < 60
    assert all((tmp_path / name).is_file() for name in WITH_LOSS)
    assert 0 < metrics_of(tmp_path)["eval_eer"] < 0.5  # better than chance, for speakers it never heard
    assert len(AutoModelForAudioXVector.from_pretrained(tmp_path).config.label2id) == 5


def test_speakers_with_trials(tmp_path, config, capsys):
    for index in range(6):
        period = 0 if index % 2 == 0 else 40 + index  # ann hisses, bob hums
        path = tmp_path / "voices" / ("ann", "bob")[index % 2] / f"{index}.wav"
        write_wav(path, 6000 + 1000 * index, seed=index, period=period)
    trials = tmp_path / "trials.txt"
    # The second is wrong, so that the error is not 0.
    trials.write_text("1 ann/4.wav ann/0.wav\n1 ann/0.wav bob/1.wav\n0 bob/5.wav ann/2.wav\n0 bob/3.wav bob/5.wav\n")
    folder = tmp_path / "run"
    command = ["--model_config", config, "--dataset", str(tmp_path / "voices"), *ONE_STEP]
    command += [
        "--eval_dataset",
        str(tmp_path / "voices"),
        "--trials",
        str(trials),
        "--max_steps",
        "8",
        "--learning_rate",
        "5e-3",
    ]
    main = script("speaker_verification").main
    assert main([*command, "--output_dir", str(folder), "--per_device_eval_batch_size", "4"]) == 0
    # The scores by hand, of the rows one by one.
    model = AutoModelForAudioXVector.from_pretrained(folder).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    embeddings = {}
    for index in range(6):
        name = f"{('ann', 'bob')[index % 2]}/{index}.wav"
        inputs = extractor(load_audio(tmp_path / "voices" / name), sampling_rate=16000, return_tensors="pt")
        with torch.no_grad():
            vector = model(**inputs).embeddings[0].double().numpy()
        embeddings[name] = vector / np.linalg.norm(vector)
    listed = [line.split() for line in trials.read_text().splitlines()]
    cosines = [embeddings[a] @ embeddings[b] for _, a, b in listed]
    assert np.diff(sorted(cosines)).min() > 1e-5  # more than what batches and rounding change
    expected = EqualErrorRate().compute(predictions=cosines, references=[int(same) for same, _, _ in listed])
    for name, value in expected.items():
        assert metrics_of(folder)[f"eval_{name}"] == pytest.approx(value, abs=1e-6)
    trials.write_text("1 ann/4.wav someone\n")
    assert main([*command, "--output_dir", str(tmp_path / "other")]) == 1
    assert "'someone' is not among the 6 evaluation rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options"),
    [("ctc", []), ("audio_classification", ["--multi_label"]), ("speaker_verification", [])],
)
def test_labels_that_cannot_be_smoothed(tmp_path, capsys, name, options):
    """transformers' smoothing takes the logits of a speaker model, say, for those of its classes."""
    arguments = [*QUICK, *options, "--label_smoothing_factor", "0.1", "--output_dir", str(tmp_path / "run")]
    assert script(name).main(arguments) == 1
    assert "label_smoothing_factor=0.1: only one class" in capsys.readouterr().err
