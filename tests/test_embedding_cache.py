# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Features on disk: found by content, completed after an interruption, and the same as computed afresh."""

import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset
from safetensors.numpy import save_file
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from spear_hf.data.audio import load_audio
from spear_hf.evaluation import embedding_cache
from spear_hf.evaluation.embedding_cache import EmbeddingCache
from spear_hf.evaluation.protocols import pooled_set
from spear_hf.evaluation.representations import EncoderStates, LogMel, Mfcc, load_representation, short_name
from spear_hf.evaluation.tasks import Clip, StoredAudio, load_task

from . import evaluation_corpus
from .evaluation_corpus import write_corpus, write_model


class Counting(LogMel):
    """Counts the clips that it embeds, and fails when it is told to."""

    clips, fails_after = 0, 10**9

    def _states(self, waveforms):
        if self.clips + len(waveforms) > self.fails_after:
            raise RuntimeError("the power went")
        self.clips += len(waveforms)
        return super()._states(waveforms)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return load_task(str(write_corpus(tmp_path_factory.mktemp("corpus") / "tones", train=4, test=3))).clips


def test_pooled_features_are_statistics_of_the_frames(tmp_path, clips):
    cache, mel = EmbeddingCache(tmp_path), Counting()
    pooled = cache.pooled(mel, clips)
    cache.fill(mel, clips, "frames")
    frames = cache.frames(mel, clips[2])
    assert pooled.shape == (1, 7, 256)
    assert frames.shape == (1, cache.num_frames(mel, clips[2], "frames"), 128)
    assert np.allclose(pooled[0, 2, :128], frames[0].mean(axis=0), atol=0.02)  # frames are in half precision
    assert np.allclose(pooled[0, 2, 128:], frames[0].std(axis=0), atol=0.02)
    assert mel.clips == 14
    again = EmbeddingCache(tmp_path)
    assert np.array_equal(again.pooled(mel, clips[::-1]), pooled[:, ::-1])
    assert mel.clips == 14  # nothing was computed again


def test_features_are_found_by_what_the_file_holds(tmp_path, clips):
    cache, mel = EmbeddingCache(tmp_path / "cache"), Counting()
    first = cache.pooled(mel, clips[:1])
    copy = shutil.copyfile(clips[0].source, tmp_path / "another name.wav")
    assert np.array_equal(cache.pooled(mel, [Clip("x", copy)]), first)
    stored = StoredAudio(Dataset.from_list([{"audio": {"bytes": copy.read_bytes()}}]), 0)
    assert np.array_equal(cache.pooled(mel, [Clip("y", stored)]), first)
    assert mel.clips == 1
    shutil.copyfile(clips[1].source, copy)  # the same name, other audio
    assert not np.array_equal(EmbeddingCache(tmp_path / "cache").pooled(mel, [Clip("x", copy)]), first)


def test_an_interrupted_run_goes_on(tmp_path, clips):
    mel = Counting()
    mel.fails_after = 4
    with pytest.raises(ValueError, match="the power went"):
        EmbeddingCache(tmp_path, batch_seconds=2.0).fill(mel, clips, "pooled")
    done = mel.clips
    assert 0 < done <= 4
    assert not list(tmp_path.rglob("*.partial"))
    mel.fails_after = 10**9
    EmbeddingCache(tmp_path).fill(mel, clips, "pooled")
    assert mel.clips == 7


def test_files_that_a_crash_left_are_computed_anew(tmp_path, clips):
    """Empty, cut off, of another shape, something else: a machine that goes down may leave all of these."""
    mel, cache = Counting(), EmbeddingCache(tmp_path)
    whole = cache.pooled(mel, clips)
    cache.fill(mel, clips, "frames")
    paths = [cache.path(mel, clip, "pooled") for clip in clips]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(paths[1].read_bytes()[:-4])
    save_file({"features": np.zeros((1, 6), np.float32)}, paths[2])
    torch.save({"features": torch.zeros(1, 256)}, paths[3])
    frames = cache.path(mel, clips[4], "frames")
    content = frames.read_bytes()
    frames.write_bytes(content[:100])
    mel.clips = 0
    assert np.array_equal(EmbeddingCache(tmp_path).pooled(mel, clips), whole)
    assert mel.clips == 4
    EmbeddingCache(tmp_path).fill(mel, clips, "frames")
    assert mel.clips == 5
    assert frames.read_bytes() == content


def test_changed_bits_are_found(tmp_path, clips):
    """Of numbers that a disk has changed the header is as it was."""
    mel, cache = Counting(), EmbeddingCache(tmp_path)
    for keep in ("pooled", "frames"):
        cache.fill(mel, clips, keep)
        path = cache.path(mel, clips[1], keep)
        content = path.read_bytes()
        mel.clips = 0
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 4]) + content[-2:])
        EmbeddingCache(tmp_path).fill(mel, clips, keep)
        assert mel.clips == 1
        assert path.read_bytes() == content
    save_file({"features": np.zeros((1, 256), np.float32)}, cache.path(mel, clips[1], "pooled"))  # without a checksum
    EmbeddingCache(tmp_path).fill(mel, clips, "pooled")
    assert mel.clips == 2


def test_a_run_looks_for_changed_bits_once(tmp_path, clips, monkeypatch):
    """All frames of a corpus are hundreds of gigabytes, and every head asks for them."""
    mel, cache, is_whole, read = Counting(), EmbeddingCache(tmp_path), embedding_cache._is_whole, []
    EmbeddingCache(tmp_path).fill(mel, clips, "frames")
    monkeypatch.setattr(embedding_cache, "_is_whole", lambda path, *size: read.append(path) or is_whole(path, *size))
    for _ in range(2):
        cache.fill(mel, clips, "frames")
    assert len(read) == mel.clips == len(clips)
    shutil.rmtree(tmp_path / "v1")
    cache.fill(mel, clips, "frames")
    assert mel.clips == 2 * len(clips)


def test_pooled_features_are_not_held_in_memory(tmp_path, clips):
    cache, mel = EmbeddingCache(tmp_path), LogMel()
    cache.fill(mel, clips, "pooled")
    many = [replace(clips[place % len(clips)], id=str(place)) for place in range(4000)]  # 4 MB
    tracemalloc.start()
    pooled = cache.pooled(mel, many)
    chosen = pooled_set(pooled, "features", "mean+std", range(1, 4000))
    rows = chosen.rows(range(10, 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert chosen.numbers == 3999 * 256
    assert np.array_equal(rows.numpy()[:, 0], pooled[0, 11:21])
    assert [path.name for path in tmp_path.iterdir()] == ["v1"]  # the file has no name


def test_encoders(tmp_path, clips):
    folder = write_model(tmp_path / "model")
    model = load_representation(str(folder), device="cpu")
    assert (model.num_layers, model.dim, model.frame_seconds) == (3, 16, 0.02)
    assert model.first_centre == pytest.approx(0.045)
    cache = EmbeddingCache(tmp_path / "cache", batch_seconds=4.0)
    cache.fill(model, clips, "frames")
    cache.fill(model, clips, "last")
    states = cache.frames(model, clips[1])
    assert states.shape[::2] == (3, 16)
    assert np.array_equal(cache.frames(model, clips[1], layer=1)[0], states[1])
    assert np.array_equal(cache.frames(model, clips[1], keep="last")[0], states[2])
    random = load_representation(f"random:{folder}", device="cpu", seed=3)
    assert random.fingerprint != model.fingerprint
    assert random.fingerprint == load_representation(f"random:{folder}", device="cpu", seed=3).fingerprint
    assert load_representation(str(folder), device="cpu").fingerprint == model.fingerprint
    assert isinstance(random, EncoderStates)


def test_baselines_and_teachers(clips):
    rng = np.random.default_rng(0)
    waveforms = [rng.standard_normal(samples).astype(np.float32) / 10 for samples in (900, 16000)]
    mel, mfcc, teacher = LogMel(), Mfcc(), load_representation("teacher:kaldi-mfcc", device="cpu")
    assert [state.shape for state in mel(waveforms)] == [(1, 10, 128), (1, 100, 128)]
    for one, other in zip(mfcc(waveforms), teacher(waveforms)):
        assert np.allclose(one, other, atol=1e-4)
    assert mfcc.centres(3) == pytest.approx([0.0125, 0.0325, 0.0525])
    loud = load_representation("teacher:tests.evaluation_corpus:energies#gain=3", device="cpu")
    (plain,) = load_representation("teacher:tests.evaluation_corpus:energies", device="cpu")(waveforms[1:])
    assert np.allclose(loud(waveforms[1:])[0], 3 * plain)
    assert (loud.num_layers, loud.dim, loud.frame_seconds) == (1, 1, 0.02)
    assert short_name("teacher:/some/where/models/whisper#layer=3") == "teacher:models/whisper#layer=3"
    with pytest.raises(ValueError, match="unknown option"):
        load_representation("teacher:kaldi-mfcc#depth=3")


def test_other_encoders(tmp_path, clips):
    """Not invariant to padding, so that no two clips share a batch; frames lie in the middle of what they see."""
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    Wav2Vec2Model(config).save_pretrained(tmp_path / "w2v2")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "w2v2")
    model = load_representation(str(tmp_path / "w2v2"), device="cpu")
    assert (model.num_layers, model.dim, model.frame_seconds) == (3, 16, 0.02)
    assert model.first_centre == pytest.approx(0.0125)  # half of 400 samples
    assert not model.batchable
    waveforms = [0.1 * np.random.default_rng(0).standard_normal(n).astype(np.float32) for n in (8000, 3200)]
    assert np.allclose(model(waveforms)[1], model(waveforms[1:])[0], atol=1e-5)
    random = load_representation(f"random:{tmp_path / 'w2v2'}", device="cpu", seed=1)
    assert random.num_layers == 3
    assert random.weights != model.weights
    # What the extractor does is of the features, too, and its rate is that of the waveforms.
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "w2v2")
    plain = load_representation(str(tmp_path / "w2v2"), device="cpu")
    assert plain.weights == model.weights
    assert plain.fingerprint != model.fingerprint
    Wav2Vec2FeatureExtractor(sampling_rate=24000).save_pretrained(tmp_path / "w2v2")
    fast = load_representation(str(tmp_path / "w2v2"), device="cpu")
    assert fast.frame_seconds == pytest.approx(320 / 24000)
    assert fast.first_centre == pytest.approx(200 / 24000)
    cache = EmbeddingCache(tmp_path / "cache")
    cache.fill(fast, clips[:1], "frames")
    (expected,) = fast([load_audio(clips[0].source, 24000)])
    assert expected.shape[1] == round(0.9 * 24000 / 320) - 1
    assert np.allclose(cache.frames(fast, clips[0]), expected, atol=1e-3)


def test_a_rate_that_the_configuration_does_not_tell(tmp_path):
    """12.5 Hz: of one second more there are 12 or 13 frames more, and times of a clip of 10 s were 0.4 s off."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ParakeetEncoderConfig(**sizes, subsampling_conv_channels=8)
    try:
        feature_extractor = ParakeetFeatureExtractor(feature_size=80)
    except ImportError as error:
        pytest.skip(f"features of this transformers need librosa: {error}")
    model = EncoderStates("parakeet", ParakeetEncoder(config), feature_extractor)
    assert model.frame_seconds == pytest.approx(0.08)
    assert model.timed


def test_encoders_whose_frames_have_no_times(tmp_path, clips):
    """Audio spectrogram transformers make patches of 10 s, whatever they are given: for labels of whole clips only."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ASTModel(ASTConfig(**sizes)).save_pretrained(tmp_path)
    ASTFeatureExtractor().save_pretrained(tmp_path)
    model = load_representation(str(tmp_path), device="cpu")
    assert model([np.zeros(16000, np.float32)])[0].shape == (2, 1214, 16)
    with pytest.raises(ValueError, match=r"as many frames of one second as of nine.*used for words"):
        model.check_timed("words")


def test_teachers_without_a_fingerprint_are_known_by_what_they_do(monkeypatch):
    spec = "teacher:tests.evaluation_corpus:energies"
    first = load_representation(spec, device="cpu").fingerprint
    assert load_representation(spec, device="cpu").fingerprint == first
    call = evaluation_corpus.Energies.__call__
    monkeypatch.setattr(
        evaluation_corpus.Energies, "__call__", lambda self, waves: [2 * wave for wave in call(self, waves)]
    )
    assert load_representation(spec, device="cpu").fingerprint != first


def test_errors_name_the_clip(tmp_path, clips):
    soundfile.write(tmp_path / "loud.wav", np.full(14400, 1e30), 16000, subtype="FLOAT")
    batch = [*clips, Clip("loud", tmp_path / "loud.wav")]  # in the middle of a batch of clips of one length
    with pytest.raises(ValueError, match=r"^loud: cannot be embedded by log-mel: .*infinite"):
        EmbeddingCache(tmp_path).pooled(LogMel(), batch)
    cache = EmbeddingCache(tmp_path, max_seconds=0.5)
    with pytest.raises(ValueError, match=r"train0 is 0\.9 s long, over max_seconds=0\.5"):
        cache.pooled(LogMel(), clips[:1])
    with pytest.raises(ValueError, match=r"gone.*cannot be read"):
        cache.pooled(LogMel(), [Clip("gone", tmp_path / "gone.wav")])
    (tmp_path / "noise.wav").write_bytes(b"no audio at all")
    with pytest.raises(ValueError, match=r"noise: .*cannot be"):
        cache.pooled(LogMel(), [Clip("noise", tmp_path / "noise.wav")])
