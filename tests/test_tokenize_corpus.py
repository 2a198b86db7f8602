# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A corpus into a token store: shards that follow from the list alone, and bad audio set aside."""

import copy
import json
import shutil
from itertools import chain

import numpy as np
import pytest
import soundfile
import torch
from datasets import load_dataset
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

from spear_hf.data.manifest import read_manifest
from spear_hf.data.sources import ListSource
from spear_hf.mvq import tokenize_corpus as module
from spear_hf.mvq.corpus import computed, decoded_batches
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import TokenStore, waveform_checksum
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata


@pytest.fixture(scope="module")
def tokenizer():
    teacher = load_teacher("kaldi-mfcc")
    torch.manual_seed(0)
    return MvqTokenizer(teacher, MultiCodebookQuantizer(39, 16, 4, **quantizer_metadata(teacher)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """17 good files and 3 bad ones: no audio, silence of 5 ms, and one that is not a number."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for index in range(17):
        waveform = 0.1 * rng.standard_normal(int(rng.integers(4000, 16000)))
        soundfile.write(folder / f"good{index:02d}.wav", waveform, 16000)
    (folder / "bad0.wav").write_bytes(b"this is no audio")
    soundfile.write(folder / "bad1.wav", np.zeros(80), 16000)
    soundfile.write(folder / "bad2.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    return folder


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(tokenizer, corpus, output, **settings):
    source = ListSource(read_manifest(corpus), piece_utterances=6)
    return tokenize_corpus(tokenizer, source, output, progress=False, **settings)


@pytest.fixture(scope="module")
def store(tokenizer, corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("store") / "tokens"
    return output, run(tokenizer, corpus, output)


def test_every_good_file_is_there_with_its_codes(tokenizer, corpus, store):
    output, summary = store
    opened = TokenStore.open(output)
    assert (summary.utterances, summary.already_there, len(summary.bad)) == (17, 0, 3)
    assert opened.ids == [f"good{index:02d}.wav" for index in range(17)], "in the order of the list"
    assert opened.info == tokenizer.store_info()
    total = 0
    for id in opened:
        waveform, _ = soundfile.read(corpus / id, dtype="float32")
        assert np.array_equal(opened[id], tokenizer(waveform))
        assert opened.num_samples(id) == len(waveform)
        total += len(opened[id])
    assert summary.frames == total


def test_bad_files_are_set_aside_with_the_reason(store):
    output, _ = store
    rows = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["bad0.wav", "bad1.wav", "bad2.wav"]
    for row, reason in zip(rows, ("cannot be decoded", "80 samples are too short", "not finite")):
        assert reason in row["error"]
        assert row["id"] in row["error"]
        assert row["path"].endswith(row["id"])


def test_finished_store_is_left_alone(tokenizer, corpus, store):
    output, _ = store
    before = contents(output)
    again = run(tokenizer, corpus, output)
    assert (again.utterances, again.already_there, len(again.bad)) == (0, 20, 3)
    assert contents(output) == before


def test_interrupted_run_ends_with_the_same_bytes(tokenizer, corpus, store, tmp_path, monkeypatch):
    output, _ = store
    real = module.decoded_pieces

    def interrupted(*arguments):
        for number, piece in enumerate(real(*arguments)):
            if number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(module, "decoded_pieces", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tokenizer, corpus, tmp_path / "tokens")
    assert len(list((tmp_path / "tokens").glob("tokens-*.parquet"))) == 2
    summary = run(tokenizer, corpus, tmp_path / "tokens")
    assert summary.already_there == 12
    assert contents(tmp_path / "tokens") == contents(output)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])  # RuntimeError: a GPU without memory, for one
@pytest.mark.parametrize("batch", range(4))
def test_a_shard_that_lost_a_batch_is_not_written(tokenizer, corpus, store, tmp_path, monkeypatch, batch, error):
    """Stopped in the midst of a batch, the last of its shard or not: no utterance is missing after the next run."""
    output, _ = store
    real, begun = module.computed, []

    def stopped(*arguments):
        begun.append(arguments)
        for item in real(*arguments):
            if len(begun) == batch + 1:
                raise error
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(module, "computed", stopped)
        with pytest.raises(error):
            run(tokenizer, corpus, tmp_path / "tokens", batch_seconds=2.0)
    assert len(list((tmp_path / "tokens").glob("tokens-*.parquet"))) < 3
    run(tokenizer, corpus, tmp_path / "tokens", batch_seconds=2.0)
    assert contents(tmp_path / "tokens") == contents(output)


def test_grown_list_gives_the_bytes_of_a_fresh_run(tokenizer, corpus, store, tmp_path):
    output, _ = store
    utterances = read_manifest(corpus)

    def write(some):
        tokenize_corpus(tokenizer, ListSource(some, piece_utterances=6), tmp_path / "tokens", progress=False)

    write(utterances[:9])
    write(utterances)
    assert contents(tmp_path / "tokens") == contents(output)
    with pytest.raises(ValueError, match="longer list"):
        write(utterances[:12])
    with pytest.raises(ValueError, match="another list"):
        write(utterances[::-1])
    assert contents(tmp_path / "tokens") == contents(output), "what is refused leaves the store as it was"


def test_other_tokens_are_refused(tokenizer, corpus, store):
    output, _ = store
    other = MvqTokenizer(tokenizer.teacher, tokenizer.quantizer, refine_iters=1)
    with pytest.raises(ValueError, match="refine_iters"):
        run(other, corpus, output)
    with pytest.raises(ValueError, match="list of utterances is empty"):
        tokenize_corpus(tokenizer, [], output)


def test_a_refusal_of_the_teacher_costs_one_utterance(corpus):
    """Features that are not finite show only when they are computed, with a batch of others."""
    batch = next(iter(decoded_batches(read_manifest(corpus), load_teacher("kaldi-mfcc"), 1000.0)))

    def compute(waveforms, ids):
        if "good03.wav" in ids:
            raise ValueError("features are not finite")
        return [f"{id} {len(waveform)}" for waveform, id in zip(waveforms, ids)]

    results = {item.utterance.id: (item, result) for item, result in computed(batch, compute)}
    assert len(results) == 20
    assert results["good03.wav"][1] is None
    assert results["good03.wav"][0].error == "features are not finite"
    for id, (item, result) in results.items():
        if item.error is None:
            assert result == f"{id} {len(item.waveform)}"
    assert sum(item.error is not None for item, _ in results.values()) == 4


def test_features_that_are_not_finite_cost_one_utterance_of_their_batch(corpus, store, tokenizer, tmp_path):
    """Found when the next batch is under way; the others of the batch are as in a store without it."""
    teacher = load_teacher("kaldi-mfcc")
    order: list[str] = []
    features, lengths = teacher.features, {}

    def spoiled(inputs):
        order.append("launched")
        return [
            rows * float("nan") if len(audio) == lengths["bad"] else rows
            for audio, rows in zip(inputs, features(inputs))
        ]

    def encoded(*arguments, **settings):
        order.append("encoded")
        return encode(*arguments, **settings)

    utterances = [item for item in read_manifest(corpus) if item.id.startswith("good")]
    shortest = min(utterances, key=lambda item: soundfile.info(item.path).frames)
    lengths["bad"] = soundfile.info(shortest.path).frames
    teacher.features = spoiled
    quantizer = copy.deepcopy(tokenizer.quantizer)
    encode, quantizer.encode = quantizer.encode, encoded
    summary = tokenize_corpus(MvqTokenizer(teacher, quantizer), utterances, tmp_path / "tokens", 3.0, progress=False)
    assert [item.id for item in summary.bad] == [shortest.id]
    assert "are NaN or infinite" in summary.bad[0].error
    assert order[:3] == ["launched", "launched", "encoded"], "a batch is launched before the one before is waited for"
    expected, found = TokenStore.open(store[0]), TokenStore.open(tmp_path / "tokens")
    assert len(found.ids) == 16
    for id in found.ids:
        assert np.array_equal(found[id], expected[id])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_codes_are_those_of_batches_one_by_one(corpus, tmp_path, device):
    """Whatever is prepared, launched and waited for when."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "num_conv_pos_embedding_groups": 2}
    stable = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_hidden_layers": 3}
    WavLMModel(WavLMConfig(**small, **stable)).save_pretrained(tmp_path / "teacher")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(tmp_path / "teacher")
    dtype = "float32" if device == "cpu" else "bfloat16"
    teacher = load_teacher(str(tmp_path / "teacher"), layer=2, device=device, dtype=dtype)
    tokenizer = MvqTokenizer(teacher, MultiCodebookQuantizer(64, 256, 4, **quantizer_metadata(teacher)))
    utterances = read_manifest(corpus)
    summary = tokenize_corpus(tokenizer, utterances, tmp_path / "tokens", batch_seconds=2.0, progress=False)
    assert (summary.utterances, len(summary.bad)) == (17, 3)
    store = TokenStore.open(tmp_path / "tokens")
    for batch in decoded_batches(utterances, teacher, 2.0):
        good = [item for item in batch if item.waveform is not None]
        for item, codes in zip(good, tokenizer([item.waveform for item in good])):
            assert np.array_equal(store[item.utterance.id], codes)


def test_batches_are_of_like_length_and_within_their_seconds(corpus):
    utterances = read_manifest(corpus)
    teacher = load_teacher("kaldi-mfcc")
    for order in (utterances, utterances[::-1]):
        batches = list(decoded_batches(order, teacher, 3.0))
        lengths = [len(item.waveform) for batch in batches for item in batch if item.waveform is not None]
        assert lengths == sorted(lengths, reverse=True)
        for batch in batches:
            longest = max((len(item.waveform) for item in batch if item.waveform is not None), default=0)
            assert len(batch) * longest <= 3 * 16000
        ids = [[item.utterance.id for item in batch] for batch in batches]
        assert sorted(chain.from_iterable(ids)) == sorted(utterance.id for utterance in utterances)
        if order is utterances:
            first = ids
    assert ids == first


def test_audio_is_identified_by_its_samples(corpus, store):
    import pyarrow.parquet as pq

    output, _ = store
    row = pq.read_table(output / "tokens-00000.parquet").to_pylist()[0]
    waveform, _ = soundfile.read(corpus / row["id"], dtype="float32")
    assert row["audio_checksum"] == waveform_checksum(waveform)


def test_plain_datasets_reads_a_store_with_a_shard_of_bad_audio_alone(tokenizer, corpus, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("bad0.wav", "good00.wav", "good01.wav"):
        shutil.copyfile(corpus / name, folder / name)
    for with_audio in (False, True):
        output = tmp_path / f"tokens-{with_audio}"
        source = ListSource(read_manifest(folder), piece_utterances=1)
        tokenize_corpus(tokenizer, source, output, progress=False, with_audio=with_audio)
        rows = load_dataset(str(output), split="train", cache_dir=str(tmp_path / "cache"))
        assert list(rows["id"]) == TokenStore.open(output).ids == ["good00.wav", "good01.wav"]
