# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf quantize` and `spear-hf tokenize` from real audio to a token store, and the sampling between."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.quantize import heldout_report, sample_frames
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenizer import MvqTokenizer


BUNDLED = Path(__file__).parent.parent / "examples" / "data"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A manifest of 12 bundled clips of 3 s in two splits, and a file that is no audio in the second."""
    folder = tmp_path_factory.mktemp("corpus")
    clips = sorted(read_manifest(BUNDLED), key=lambda clip: (clip.num_samples or 0, clip.id))[800:812]
    rows = []
    for number, clip in enumerate(clips):
        shutil.copyfile(clip.path, folder / clip.path.name)
        rows.append({"id": clip.id, "path": clip.path.name, "split": "train" if number < 8 else "rest"})
    (folder / "broken.flac").write_bytes(b"not audio")
    rows.append({"id": "broken", "path": "broken.flac", "split": "rest"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def quantize(corpus, output, *extra) -> tuple[int, str]:
    where = ("--teacher", "kaldi-mfcc", "--data", corpus, "--output", output, "--device", "cpu")
    settings = ("--codebooks", 4, "--codebook-size", 16, "--steps", 30, "--batch-size", 128, "--frames", 2000)
    return run("quantize", *where, *settings, *extra)


@pytest.fixture(scope="module")
def tokenizer_folder(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantized") / "tokenizer"
    code, printed = quantize(corpus, output, "--split", "train", "--seed", 5)
    assert code == 0, printed
    assert "held-out relative error" in printed
    return output


def test_quantizer_folder(tokenizer_folder):
    report = json.loads((tokenizer_folder / "report.json").read_text())
    assert report["teacher"]["id"] == "kaldi-mfcc"
    assert report["data"]["utterances"] == 8
    assert report["data"]["heldout_utterances"] == 1
    assert report["training"]["steps"] == 30
    assert report["training"]["normalize"] is True
    assert report["bits_per_second"] == 50 * 4 * 4
    errors = report["heldout"]["relative_error"]
    assert 0 < errors["5"] <= errors["0"]
    assert errors["5"] < 0.8, "the mean of the frames has 1"
    assert len(report["heldout"]["perplexity"]) == len(report["heldout"]["used"]) == 4
    assert all(1 <= value <= 16 for value in report["heldout"]["perplexity"])
    assert (tokenizer_folder / "quantizer.png").read_bytes().startswith(b"\x89PNG")
    metrics = [json.loads(line) for line in (tokenizer_folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics
    assert all("step" in row for row in metrics)

    config = MultiCodebookQuantizer.from_pretrained(tokenizer_folder).config
    assert (config.teacher, config.teacher_layer, config.frame_rate) == ("kaldi-mfcc", None, 50.0)
    assert config.provenance["data"]["fingerprint"] == report["data"]["fingerprint"]
    assert config.provenance["data"]["seed"] == 5


def test_same_seed_same_bytes(corpus, tokenizer_folder, tmp_path):
    assert quantize(corpus, tmp_path / "again", "--split", "train", "--seed", 5)[0] == 0
    for name in ("config.json", "model.safetensors", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_folder / name).read_bytes(), name


def test_tokenize(corpus, tokenizer_folder, tmp_path):
    output = tmp_path / "tokens"
    arguments = ("tokenize", "--tokenizer", tokenizer_folder, "--data", corpus, "--output", output, "--device", "cpu")
    code, printed = run(*arguments)
    assert code == 1, "a file was bad"
    assert "12 utterances tokenised, 0 were there already, 1 bad" in printed
    bad = json.loads((output / "quarantine.jsonl").read_text())
    assert bad["id"] == "broken"
    assert "cannot be decoded" in bad["error"]

    store = TokenStore.open(output)
    tokenizer = MvqTokenizer.from_pretrained(tokenizer_folder)
    clips = {clip.id: clip for clip in read_manifest(corpus)}
    assert store.ids == [id for id in clips if id != "broken"]
    for id in store.ids[:3]:
        assert np.array_equal(store[id], tokenizer(load_audio(clips[id].path)))
    rows = datasets.load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["id"][:] == store.ids

    code, printed = run(*arguments)
    assert code == 1
    assert "0 utterances tokenised, 13 were there already, 1 bad" in printed


def test_tokenize_of_good_audio_exits_with_0(corpus, tokenizer_folder, tmp_path):
    code, printed = run(
        *("tokenize", "--tokenizer", tokenizer_folder, "--data", corpus / "manifest.jsonl", "--split", "train"),
        *("--output", tmp_path / "tokens", "--device", "cpu", "--shard-utterances", 3, "--batch-seconds", 5),
    )
    assert code == 0, printed
    assert len(TokenStore.open(tmp_path / "tokens")) == 8
    assert len(list((tmp_path / "tokens").glob("tokens-*.parquet"))) == 3


@pytest.fixture(scope="module")
def inside(corpus, tmp_path_factory):
    """The clips of the corpus as two parquet files and two tar files; in the second is the bad one."""
    folder = tmp_path_factory.mktemp("inside")
    rows = [(clip.id, clip.path) for clip in read_manifest(corpus)]
    for name in ("parquet", "tar"):
        (folder / name).mkdir()
    for index, part in enumerate((rows[:8], rows[8:])):
        audio = [{"bytes": path.read_bytes(), "path": path.name} for _, path in part]
        table = datasets.Dataset.from_dict({"id": [id for id, _ in part], "audio": audio})
        table.cast_column("audio", datasets.Audio(decode=False)).to_parquet(folder / "parquet" / f"{index}.parquet")
        with tarfile.open(folder / "tar" / f"{index}.tar", "w") as tar:
            for place, (_, path) in enumerate(part):
                tar.add(path, f"{place}{path.suffix}")
    return folder


def test_quantize_of_a_dataset(corpus, tokenizer_folder, inside, tmp_path):
    """Read from parquet files the same clips give the same sample."""
    code, printed = quantize(inside / "parquet" / "0.parquet", tmp_path / "one", "--seed", 5)
    assert code == 0, printed
    for name in ("config.json", "model.safetensors", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tokenizer_folder / name).read_bytes(), name
    code, printed = quantize(inside / "tar", tmp_path / "all", "--max-hours", 1, "--domain", "speech")
    assert code == 0, printed
    report = json.loads((tmp_path / "all" / "report.json").read_text())
    assert report["data"]["utterances"] == 12
    assert [(bad["id"], bad["path"]) for bad in report["bad"]] == [("1.tar#4", "1.tar#4")]
    assert "1.tar#4 cannot be decoded" in printed


def test_tokenize_of_a_dataset(corpus, tokenizer_folder, inside, tmp_path):
    clips = read_manifest(corpus)
    tokenizer = MvqTokenizer.from_pretrained(tokenizer_folder)
    for name, first in (("parquet", clips[0].id), ("tar", "0.tar#0")):
        output = tmp_path / name
        code, printed = run(
            *("tokenize", "--tokenizer", tokenizer_folder, "--data", inside / name, "--output", output),
            *("--device", "cpu"),
        )
        assert code == 1, printed
        store = TokenStore.open(output)
        assert (len(store), store.ids[0]) == (12, first)
        assert np.array_equal(store[first], tokenizer(load_audio(clips[0].path)))


def test_long_audio_is_cut(corpus, tokenizer_folder, tmp_path):
    output = tmp_path / "tokens"
    where = ("tokenize", "--tokenizer", tokenizer_folder, "--data", corpus, "--split", "train", "--output", output)
    assert run(*where, "--device", "cpu", "--max-seconds", 2)[0] == 0
    store = TokenStore.open(output)
    clip = next(clip for clip in read_manifest(corpus) if f"{clip.id}@0" in store.ids[0])
    first, second = store.ids[:2]
    cut, end = store.num_samples(first), len(load_audio(clip.path))
    assert (first, second) == (f"{clip.id}@0-{cut}", f"{clip.id}@{cut}-{end}")
    assert store.num_samples(second) == end - cut
    tokenizer = MvqTokenizer.from_pretrained(tokenizer_folder)
    assert np.array_equal(store[second], tokenizer(load_audio(clip.path)[cut:]))
    code, printed = run(*where, "--cut", "anywhere")
    assert code == 1
    assert "cut='anywhere' must be one of silence, fixed, none" in printed


def test_errors_are_one_line(corpus, tokenizer_folder, tmp_path):
    for arguments, message in (
        (("--split", "train"), "holds a quantiser"),
        (("--split", "none"), "split"),
        (("--layer", 3, "--overwrite"), "takes no `layer`"),
        (("--codebooks", 3, "--overwrite"), "num_codebooks"),
        (("--teacher-option", "x", "--overwrite"), "NAME=VALUE"),
    ):
        code, printed = quantize(corpus, tokenizer_folder, *arguments)
        assert code == 1
        assert "spear-hf quantize: " in printed
        assert message in printed
    code, printed = run("tokenize", "--tokenizer", tmp_path / "no", "--data", corpus, "--output", tmp_path / "o")
    assert code == 1
    assert "spear-hf tokenize: " in printed


def test_sample_is_a_function_of_seed_and_audio(corpus):
    utterances = read_manifest(corpus, split="train")
    teacher = load_teacher("kaldi-mfcc")
    settings = {"num_frames": 300, "num_heldout": 50, "progress": False}
    first = sample_frames(teacher, utterances, seed=1, **settings)
    assert first.frames.shape == (300, 39)
    assert first.heldout.shape == (50, 39)
    again = sample_frames(teacher, utterances[::-1], seed=1, batch_seconds=3.0, **settings)
    assert first.data == again.data
    # Batches of another shape may round differently in the last bits.
    assert torch.allclose(first.frames, again.frames, atol=1e-3)
    other = sample_frames(teacher, utterances, seed=2, **settings)
    assert not torch.allclose(first.frames, other.frames, atol=1e-3)
    # Held-out frames are of utterances that training never sees.
    assert not (first.heldout[:, None] == first.frames[None]).all(dim=2).any()


def test_sample_within_hours_and_without_bad_audio(corpus):
    utterances = read_manifest(corpus)
    teacher = load_teacher("kaldi-mfcc")
    sample = sample_frames(teacher, utterances, num_frames=10**6, num_heldout=10**6, progress=False)
    assert [entry["id"] for entry in sample.bad] == ["broken"]
    assert sample.data["utterances"] == 12
    assert sample.data["frames"] + sample.data["heldout_frames"] == sample.data["frames_seen"]
    assert len(sample.frames) + len(sample.heldout) == sample.data["frames_seen"]
    half = sample.data["hours"] / 2
    part = sample_frames(teacher, utterances, 10**6, 10**6, max_hours=half, progress=False)
    assert 0.4 * sample.data["hours"] < part.data["hours"] < 0.8 * sample.data["hours"]
    with pytest.raises(ValueError, match="two at least"):
        sample_frames(teacher, utterances[:1], 10, 10, progress=False)
    with pytest.raises(ValueError, match="max_hours"):
        sample_frames(teacher, utterances, 10, 10, max_hours=0, progress=False)


def test_long_audio_is_sampled_in_pieces(corpus, monkeypatch):
    from spear_hf.mvq import quantize as module

    utterances = read_manifest(corpus, split="train")
    teacher = load_teacher("kaldi-mfcc")
    whole = sample_frames(teacher, utterances, 10**6, 10**6, progress=False)
    monkeypatch.setattr(module, "PIECE_SECONDS", 1)
    pieces = sample_frames(teacher, utterances, 10**6, 10**6, progress=False)
    # Each cut costs one frame of 25 ms, which reaches over it.
    assert 0.9 < pieces.data["frames_seen"] / whole.data["frames_seen"] < 1


def test_heldout_report_of_a_perfect_and_an_idle_quantizer():
    quantizer = MultiCodebookQuantizer(2, 4, 1)
    with torch.no_grad():
        quantizer.centers.copy_(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]))
        quantizer.to_logits.weight.zero_()
        quantizer.to_logits.bias.zero_()
    frames = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).repeat(50, 1)
    report = heldout_report(quantizer, frames)
    assert report["relative_error"]["5"] == 0
    assert report["relative_error"]["0"] == pytest.approx(2.0)  # code 0 for all: the mean is half as far
    assert report["perplexity"] == [2.0]
    assert report["used"] == [0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rate", "1e10"), "losses are not finite"),
        (("--device", "warp"), "device='warp' cannot be used"),
        (("--teacher-option", "x=[1"), "--teacher-option 'x=[1': the value is not valid YAML"),
        (("--batch-seconds", 0), "batch_seconds must be positive, not 0"),
        (("--batch-seconds", "nan"), "batch_seconds must be positive, not nan"),
        (("--max-hours", "nan"), "max_hours must be positive, not nan"),
        (("--heldout-frames", 0), "frames=2000 and heldout_frames=0 must be at least 1"),
        (("--data", ""), "the data has an empty name"),
        (("--learning-rate", "inf"), "learning_rate must be finite, not inf"),
        (("--window-seconds", "nan"), "window_seconds=nan must be a number of seconds"),
        (("--window-seconds", "inf"), "window_seconds=inf must be a number of seconds"),
        (("--codebook-size", 257), "codebook_size=257: token stores hold bytes, so 256 at most"),
        (("--heldout-frames", 1), "the 1 held-out frames are all the same"),
        (("--device", "meta"), "device='meta' cannot be used"),
    ],
)
def test_options_that_cannot_be_are_errors(corpus, tmp_path, options, message):
    code, printed = quantize(corpus, tmp_path / "new" / "quantizer", "--split", "train", *options)
    assert code == 1
    assert message in printed
    assert not list(tmp_path.iterdir()), "nothing is left of it"


def test_a_folder_that_was_there_stays_as_it_was(corpus, tmp_path):
    """After an error in the midst of training, which has begun to write."""
    (tmp_path / "metrics.jsonl").write_text("mine")
    (tmp_path / ".hidden").write_text("mine")
    code, printed = quantize(corpus, tmp_path, "--split", "train", "--learning-rate", "1e10", "--overwrite")
    assert code == 1
    assert "losses are not finite" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "metrics.jsonl"]


def test_an_output_that_is_a_file_is_refused_before_the_teacher_runs(corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, printed = quantize(corpus, tmp_path / "file")
    assert code == 1
    assert "is a file: a quantiser is a folder" in printed
    assert "features:" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--refine-iters", -1), "refine_iters must be at least 0, not -1"),
        (("--batch-seconds", -1), "batch_seconds must be positive"),
        (("--device", "warp"), "device='warp' cannot be used"),
        (("--tokenizer", "nowhere"), "there is no quantiser nowhere here, and the Hub gives none"),
    ],
)
def test_tokenizing_with_options_that_cannot_be_writes_nothing(
    corpus, tokenizer_folder, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, printed = run(
        "tokenize", "--tokenizer", tokenizer_folder, "--data", corpus, "--output", tmp_path / "tokens", *options
    )
    assert code == 1
    assert message in printed
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl"])
def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path, name):
    """A run of pre-training has metrics.jsonl, too, but not alone."""
    (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint").mkdir()
    code, printed = quantize(corpus, tmp_path)
    assert code == 1
    assert "is not empty, and no quantiser (it has checkpoint)" in printed
    assert "features:" not in printed
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_killed_run_left_is_no_obstacle(corpus, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert quantize(corpus, tmp_path, "--split", "train")[0] == 0


def test_silence_is_refused_before_training(tmp_path):
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(16000), 16000)
    code, printed = quantize(tmp_path, tmp_path / "quantizer")
    assert code == 1
    assert "sampled frames are all the same: is the audio silent?" in printed
    assert "quantiser:" not in printed


def test_full_disk_promises_nothing_that_is_not_so(corpus, tmp_path):
    """A quantiser is begun anew."""
    shell = 'ulimit -f 16; exec "$0" -m spear_hf.cli quantize "$@"'
    settings = {"teacher": "kaldi-mfcc", "codebooks": 4, "steps": 5, "data": corpus, "split": "train"}
    options = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, *options, f"--output={tmp_path / 'quantizer'}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("spear-hf quantize: ")]
    assert "cannot be written: it is too large" in message
    assert "is kept" not in message
    assert message.endswith("run the same command again")


def test_no_memory_is_an_error_of_one_line(corpus, tmp_path, monkeypatch):
    (tmp_path / "hungry.py").write_text(
        """
import torch

class Hungry:
    frame_rate, feature_size = 50, 4

    def __call__(self, waveforms):
        if max(map(len, waveforms)) > 40_000:
            torch.empty(1 << 50)
        return [torch.from_numpy(w)[: len(w) // 320 * 320].view(-1, 4, 80).mean(dim=2) for w in waveforms]
"""
    )
    monkeypatch.chdir(tmp_path)
    quantizer = MultiCodebookQuantizer(4, 16, 4, teacher="hungry:Hungry", frame_rate=50.0)
    quantizer.save_pretrained(tmp_path / "tokenizer")
    code, printed = run("tokenize", "--tokenizer", "tokenizer", "--data", corpus, "--output", "tokens")
    assert code == 1
    assert "spear-hf tokenize: there is not enough memory (" in printed
    assert "--batch-seconds" in printed
    assert not list(Path("tokens").glob("tokens-*.parquet")), "nothing is taken for done"
    settings = ("--teacher", "kaldi-mfcc", "--codebooks", 4, "--codebook-size", 16, "--batch-size", 10**13)
    code, printed = run("quantize", *settings, "--data", corpus, "--output", "quantiser")
    assert code == 1
    assert "spear-hf quantize: there is not enough memory (" in printed
