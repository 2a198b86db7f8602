# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf embed` and `embed_files` on real files, good and bad, with the golden model."""

import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model
from typer.testing import CliRunner

from spear_hf import SpearFeatureExtractor
from spear_hf.cli import app
from spear_hf.data.manifest import Utterance
from spear_hf.evaluation import embedding, embedding_files
from spear_hf.evaluation.embedding import _batches, collect_utterances, embed_files, load_encoder
from spear_hf.evaluation.embedding_files import check_room, embedding_writer
from spear_hf.evaluation.windows import encode_in_windows


GOOD = {"long.flac", "second.wav", "deep/stereo.wav", "deep/opus.ogg"}
BAD = {"deep/garbage.wav", "nan.wav", "short.wav"}


@pytest.fixture(scope="module")
def audio(tmp_path_factory, golden):
    """A folder of four good files and three bad ones."""
    folder = tmp_path_factory.mktemp("audio")
    (folder / "deep").mkdir()
    waveforms = [golden[f"{i}.waveform"].numpy() for i in range(5)]
    soundfile.write(folder / "long.flac", waveforms[0], 16000, subtype="PCM_24")
    soundfile.write(folder / "second.wav", waveforms[1], 16000, subtype="FLOAT")
    seconds = np.arange(44100) / 44100
    soundfile.write(folder / "deep" / "stereo.wav", 0.1 * np.sin([[880.0, 5000.0]] * seconds[:, None]), 44100)
    soundfile.write(folder / "deep" / "opus.ogg", waveforms[2], 16000, format="OGG", subtype="OPUS")
    (folder / "deep" / "garbage.wav").write_bytes(b"RIFF and then nothing of use")
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", waveforms[4][:1000], 16000)
    (folder / "notes.txt").write_text("not audio")
    return folder


@pytest.fixture(scope="module")
def encoder(golden_folder):
    return load_encoder(golden_folder, device="cpu")


def embed(*arguments):
    return CliRunner().invoke(app, ["embed", "--device", "cpu", *map(str, arguments)])


def test_load_encoder_without_a_preprocessor_config(encoder):
    model, feature_extractor = encoder
    assert type(feature_extractor) is SpearFeatureExtractor
    assert model.dtype == torch.float32
    assert not model.training


def test_command(tmp_path, audio, golden_folder, golden):
    output = tmp_path / "new" / "out.safetensors"
    result = embed(audio, "--model", golden_folder, "--output", output)
    assert result.exit_code == 1, result.output
    assert "3 bad files" in result.stderr
    assert all(name in result.stderr for name in ("garbage.wav", "nan.wav", "short.wav"))
    embeddings = load_file(output)
    assert set(embeddings) == GOOD
    np.testing.assert_allclose(embeddings["second.wav"], golden["1.last_hidden_state"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(embeddings["long.flac"], golden["0.last_hidden_state"], rtol=0, atol=1e-3)  # 24 bits
    assert embeddings["deep/stereo.wav"].shape == (46, 32)

    errors = [json.loads(line) for line in (tmp_path / "new" / "out.safetensors.errors.jsonl").open()]
    assert {error["id"] for error in errors} == BAD
    assert all(error["path"] == str(audio / error["id"]) and error["path"] in error["error"] for error in errors)
    with safe_open(output, "np") as file:
        metadata = file.metadata()
    assert metadata["layer"] == "last"
    assert metadata["frame_rate"] == "50.0"
    assert json.loads(metadata["errors"]) == errors
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name, f"{output.name}.errors.jsonl"]


def test_names_that_no_format_takes_are_told_before_any_work(tmp_path, audio, golden_folder):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav"))
    shutil.copyfile(audio / "second.wav", odd)
    for name in ("out.safetensors", "out.npz", "out.parquet"):
        result = embed(odd, audio / "second.wav", "--model", golden_folder, "--output", tmp_path / name)
        assert result.exit_code == 1
        assert "is not UTF-8" in result.stderr
        assert "rename it" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [odd.name]


def test_more_names_than_a_header_takes(tmp_path):
    ids = ["x" * 10_000] * 10_000
    with pytest.raises(ValueError, match=r"names of 10000 files need 101 MB.*take \.parquet or \.npz"):
        check_room(tmp_path / "out.safetensors", ids)
    check_room(tmp_path / "out.safetensors", ids[:9_000])
    check_room(tmp_path / "out.npz", ids)
    with pytest.raises(ValueError, match="no tensor can be called __metadata__"):
        check_room(tmp_path / "out.safetensors", ["a", "__metadata__"])


def test_a_list_that_says_too_little_gets_no_long_file_in(encoder, audio):
    utterance = Utterance("a", audio / "long.flac", num_samples=1600)  # 0.1 s, of a file of more than 1.5 s
    (file,) = embed_files([utterance], *encoder, max_seconds=0.2)
    assert file.embedding is None
    assert "s long, over max_seconds=0.2" in file.error


def test_errors_beyond_a_header_are_beside_it_only(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_files, "_MAX_HEADER", 500)
    for count, kept in ((1, True), (100, False)):
        errors = [{"id": str(index)} for index in range(count)]
        with embedding_writer(tmp_path / "out.safetensors") as writer:
            writer.add("a", "a.wav", np.ones(3, np.float32), None)
            writer.finish({"errors": errors})
        with safe_open(tmp_path / "out.safetensors", "np") as file:
            assert (json.loads(file.metadata()["errors"]) == errors) is kept
            assert file.get_tensor("a").tolist() == [1, 1, 1]


def test_what_a_killed_writer_left_is_removed(tmp_path):
    """And nothing else: other files' temporaries, or one that is being written now."""
    output = tmp_path / "out.npz"
    for name in (".out.npz.0123456789abcdef.tmp", ".other.npz.0123456789abcdef.tmp", ".mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with embedding_writer(output) as living:
        with embedding_writer(output) as writer:
            writer.add("a", "a.wav", np.zeros(3, np.float32), None)
            writer.finish({})
        living.add("b", "b.wav", np.ones(3, np.float32), None)
        living.finish({})
    assert np.load(output)["b"].tolist() == [1, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"out.npz", ".other.npz.0123456789abcdef.tmp", ".mine.tmp"}


def test_formats_hold_the_same(tmp_path, audio, golden_folder):
    files = [audio / "second.wav", audio / "deep"]
    (audio / "deep" / "garbage.wav").rename(tmp_path / "garbage.wav")
    try:
        for name in ("out.safetensors", "out.npz", "out.parquet"):
            (tmp_path / f"{name}.errors.jsonl").write_text("left by an earlier run")
            result = embed(*files, "--model", golden_folder, "--output", tmp_path / name, "--layer", "all")
            assert result.exit_code == 0, result.output
            assert not (tmp_path / f"{name}.errors.jsonl").exists()
    finally:
        (tmp_path / "garbage.wav").rename(audio / "deep" / "garbage.wav")
    expected = load_file(tmp_path / "out.safetensors")
    assert {name: value.shape for name, value in expected.items()} == {
        "second.wav": (9, 100, 32),
        "stereo.wav": (9, 46, 32),
        "opus.ogg": (9, 46, 32),
    }
    arrays = np.load(tmp_path / "out.npz")
    assert set(arrays.files) == set(expected)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "path", "num_frames", "frame_rate", "shape", "embedding"]
    rows = {row["id"]: row for row in table.to_pylist()}
    for name, value in expected.items():
        np.testing.assert_array_equal(arrays[name], value)
        row = rows[name]
        np.testing.assert_array_equal(np.array(row["embedding"], np.float32).reshape(row["shape"]), value)
        assert (row["num_frames"], row["frame_rate"]) == (value.shape[1], 50.0)
    settings = [
        json.loads(pq.read_metadata(tmp_path / "out.parquet").metadata[b"spear_hf"]),
        json.loads(zipfile.ZipFile(tmp_path / "out.npz").comment),
    ]
    assert settings[0] == settings[1]
    assert settings[0]["layer"] == "all"
    assert settings[0]["errors"] == []


def test_layers_and_pools(audio, encoder, golden):
    paths = [audio / "second.wav"]

    def one(**settings):
        (result,) = embed_files(paths, *encoder, **settings)
        return result

    everything = one(layer="all")
    assert everything.embedding.shape == (9, 100, 32)
    np.testing.assert_allclose(everything.embedding[0], golden["1.embed"], rtol=0, atol=1e-5)
    for layer in range(8):
        expected = golden[f"1.layer.{layer:02d}"]
        np.testing.assert_allclose(everything.embedding[layer + 1], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(one(layer="3").embedding, everything.embedding[3])
    np.testing.assert_array_equal(one().embedding, everything.embedding[8])
    mean = one(layer="mean")
    np.testing.assert_allclose(mean.embedding, everything.embedding.mean(axis=0), rtol=0, atol=1e-5)
    assert mean.frame_rate == 50.0
    pooled = one(layer="mean", pool="mean")
    np.testing.assert_allclose(pooled.embedding, mean.embedding.mean(axis=0), rtol=0, atol=1e-5)
    assert pooled.frame_rate is None
    both = one(layer="all", pool="mean+std").embedding
    frames = everything.embedding
    np.testing.assert_allclose(both, np.concatenate([frames.mean(1), frames.std(1)], axis=1), rtol=0, atol=1e-5)


def test_batches_do_not_change_embeddings(audio, encoder):
    paths = [audio / name for name in sorted(GOOD)]
    alone = {result.id: result.embedding for result in embed_files(paths, *encoder, batch_seconds=0.1)}
    together = list(embed_files(paths, *encoder, batch_seconds=1000))
    assert [result.id for result in together] == ["long.flac", "second.wav", "opus.ogg", "stereo.wav"]  # longest first
    for result in together:
        np.testing.assert_allclose(result.embedding, alone[result.id], rtol=0, atol=1e-5)


def test_batches_have_little_padding():
    utterances = [(float(seconds), Utterance(str(seconds), Path("x.wav"))) for seconds in (9, 9, 8.5, 8, 3, 2, 2, 2)]

    def lengths(batch_seconds, padded_seconds):
        return [[float(each.id) for each in batch] for batch in _batches(utterances, batch_seconds, padded_seconds)]

    assert lengths(27, math.inf) == [[9, 9, 8.5], [8, 3, 2], [2, 2]]
    assert lengths(27, 1.0) == [[9, 9, 8.5], [8], [3, 2], [2, 2]]
    assert lengths(100, 1.5) == [[9, 9, 8.5, 8], [3, 2], [2, 2]]
    assert lengths(0, 1.5) == [[9], [9], [8.5], [8], [3], [2], [2], [2]]


def test_batches_are_no_longer_than_windows(audio, encoder):
    paths = [audio / "long.flac", audio / "second.wav"]  # of 3.2 and 2 s
    long, second = embed_files(paths, *encoder, window_seconds=2.4)
    whole_long, whole_second = embed_files(paths, *encoder)
    assert long.embedding.shape == whole_long.embedding.shape
    np.testing.assert_allclose(second.embedding, whole_second.embedding, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="must be at least batch_seconds=3"):
        embed_files(paths, *encoder, window_seconds=2.4, batch_seconds=3)
    for seconds in (0.01, math.inf):  # at once, not for each file
        with pytest.raises(ValueError, match=f"window_seconds={seconds} must be a number of seconds"):
            embed_files(paths, *encoder, window_seconds=seconds)


def test_windows_keep_the_layers_asked_for(audio, encoder, monkeypatch):
    """And no others: all layers of an hour would take gigabytes."""
    paths, kept = [audio / "long.flac"], []

    def watched(*args, **kwargs):
        outputs = encode_in_windows(*args, **kwargs)
        kept.append(len(outputs.hidden_states or ()))
        return outputs

    monkeypatch.setattr(embedding, "encode_in_windows", watched)
    every, mean, third = (
        next(iter(embed_files(paths, *encoder, layer=layer, window_seconds=1.0))).embedding
        for layer in ("all", "mean", 3)
    )
    assert kept == [len(every), 1, 1]
    np.testing.assert_allclose(mean, every.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(third, every[3])


def test_output_at_25_hz(audio, golden_ds2_folder, golden_ds2):
    encoder = load_encoder(golden_ds2_folder, device="cpu")
    paths = [audio / "long.flac", audio / "second.wav"]
    _, last = embed_files(paths, *encoder)
    np.testing.assert_allclose(last.embedding, golden_ds2["1.last_hidden_state"], rtol=0, atol=1e-5)
    assert last.frame_rate == 25.0
    _, layer = embed_files(paths, *encoder, layer=3)
    np.testing.assert_allclose(layer.embedding, golden_ds2["1.layer.02"], rtol=0, atol=1e-5)
    assert layer.frame_rate == 50.0


def test_long_files_are_refused(audio, encoder):
    results = {r.id: r for r in embed_files([audio / "long.flac", audio / "second.wav"], *encoder, max_seconds=3)}
    assert "long.flac is 3.2 s long, over max_seconds=3" in results["long.flac"].error
    assert results["second.wav"].error is None


def test_half_precision(audio, golden_folder, golden):
    model, feature_extractor = load_encoder(golden_folder, device="cpu", dtype="bfloat16")
    (result,) = embed_files([audio / "second.wav"], model, feature_extractor)
    assert result.embedding.dtype == np.float32
    expected = golden["1.last_hidden_state"].numpy()
    assert np.abs(result.embedding - expected).mean() < 0.05 * np.abs(expected).mean()


def test_embeddings_that_are_not_finite_are_bad(audio, golden_folder):
    model, feature_extractor = load_encoder(golden_folder, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    (result,) = embed_files([audio / "second.wav"], model, feature_extractor)
    assert result.embedding is None
    assert "not finite in torch.float32" in result.error


def test_another_encoder(audio, tmp_path, golden_folder):
    """Any transformers encoder works; it gets one file at a time, as most are not invariant to padding."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2Model(config)
    model.save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "tiny.wav", np.zeros(100), 16000)
    output = tmp_path / "out.npz"
    files = [audio / "second.wav", audio / "long.flac", tmp_path / "tiny.wav"]
    result = embed(*files, "--model", tmp_path / "model", "--output", output, "--layer", "1")
    assert result.exit_code == 1
    assert "tiny.wav (100 samples) was refused by the encoder" in result.stderr
    arrays = np.load(output)
    assert {name: arrays[name].shape for name in arrays.files} == {"long.flac": (162, 16), "second.wav": (103, 16)}


def test_ids(tmp_path):
    for name in ("a/x.wav", "b/x.wav", "b/y.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    a, b = tmp_path / "a", tmp_path / "b"

    def ids(*paths):
        return [utterance.id for utterance in collect_utterances(paths)]

    assert ids(a, b / "y.wav") == ["x.wav", "y.wav"]
    assert ids(tmp_path) == ["a/x.wav", "b/x.wav", "b/y.wav"]
    assert ids(a, b) == [f"{a}/x.wav", f"{b}/x.wav", "y.wav"]
    assert ids(a / "x.wav", a, str(a / ".." / "a" / "x.wav")) == ["x.wav"]  # one file, named three times
    (tmp_path / "list.jsonl").write_text('{"id": "one", "path": "a/x.wav"}\n{"id": "two", "path": "a/x.wav"}\n')
    assert ids(tmp_path / "list.jsonl", Utterance("three", a / "x.wav")) == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "out.txt"], "the suffix must be one of .safetensors, .npz, .parquet"),
        (["--output", "out.npz", "--layer", "9"], "layer='9' must be last, all, mean, 0"),
        (["--output", "out.npz", "--layer", "-1"], "layer='-1' must be"),
        (["--output", "out.npz", "--pool", "max"], "pool='max' must be one of none, mean, mean+std"),
        (["--output", "out.npz", "--dtype", "int8"], "dtype='int8' must be one of float32"),
        (["--output", "out.npz", "--batch-seconds", "0"], "must be positive"),
        (["--output", "out.npz", "--device", "abacus"], "device='abacus' cannot be used"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, audio, golden_folder, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = embed(audio / "second.wav", "--model", golden_folder, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_but_bad_files(tmp_path, audio, golden_folder):
    output = tmp_path / "out.npz"
    output.write_bytes(b"of an earlier run")
    result = embed(audio / "nan.wav", tmp_path / "none.wav", "--model", golden_folder, "--output", output)
    assert result.exit_code == 1
    assert "none of the 2 files could be embedded" in result.stderr
    assert output.read_bytes() == b"of an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "out.npz.errors.jsonl"]


def test_empty_folder(tmp_path, golden_folder):
    result = embed(tmp_path, "--model", golden_folder, "--output", tmp_path / "out.npz")
    assert result.exit_code == 1
    assert "holds neither a manifest.jsonl nor a file of these kinds" in result.stderr
