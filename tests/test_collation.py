# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of real clips with real tokens: shapes, alignment, masks, domains, crops, ranks, and what is refused."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearForPreTraining
from spear_hf.data.audio import load_audio
from spear_hf.data.bucketing import BucketingSampler
from spear_hf.data.collation import (
    PreTrainingDataset,
    StepDataset,
    check_tokens,
    count_items,
    encoder_frames,
    loader_arguments,
)
from spear_hf.data.manifest import Utterance
from spear_hf.data.masking import MaskingConfig
from spear_hf.mvq.store import StoreInfo, TokenStore, TokenStoreWriter
from spear_hf.pretraining.config import load_config
from spear_hf.pretraining.corpus import Corpus, load_corpus
from spear_hf.pretraining.setup import cropped

from .pretraining_corpus import small_config, write_manifest


TARGETS = {
    "speech": {"num_codebooks": 2, "codebook_size": 16, "weight": 1.0},
    "audio": {"num_codebooks": 4, "codebook_size": 8, "weight": 0.1},
}


@dataclass
class Prepared:
    corpus: Corpus
    stores: dict[str, TokenStore]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """Clips, with token stores whose codes tell where they are: the place of the frame, modulo the codebook."""
    folder = tmp_path_factory.mktemp("collation")
    corpus = load_corpus(small_config(write_manifest(folder)).data, 0)
    stores = {}
    for name, rate in (("speech", 50.0), ("audio", 25.0)):
        target = TARGETS[name]
        info = StoreInfo(target["num_codebooks"], target["codebook_size"], rate, "counting", None, "none")
        with TokenStoreWriter(folder / name, info) as writer:
            for utterance in corpus.training:
                samples = len(load_audio(utterance.path))
                places = np.arange(int(samples * rate / 16000)) % target["codebook_size"]
                codes = np.repeat(places[:, None], target["num_codebooks"], axis=1).astype(np.uint8)
                writer.add(utterance.id, codes, samples)
        stores[name] = TokenStore.open(folder / name)
    return Prepared(corpus, stores)


def make_dataset(prepared: Prepared, names=("speech", "audio"), factor: int = 1, **arguments) -> PreTrainingDataset:
    targets = {name: dict(TARGETS[name]) for name in names}
    if "speech" in targets:
        targets["speech"]["num_codebooks"] *= factor  # tokens of 50 Hz: two in a frame of 25 Hz
    config = SpearConfig(
        hidden_size=32,
        intermediate_size=32,
        stem_channels=[2, 4, 4],
        num_layers_per_stack=[1],
        downsampling_factors=[1],
        conv_kernel_sizes=[7],
        output_downsampling_factor=factor,
        pretraining_targets=targets,
    )
    settings = {"masking": MaskingConfig(), "max_seconds": 1.2, **arguments}
    return PreTrainingDataset(
        prepared.corpus.training,
        {name: prepared.stores[name] for name in names},
        config,
        SpearFeatureExtractor(),
        **settings,
    )


@pytest.mark.parametrize("factor", [1, 2])
def test_a_batch_is_what_the_model_takes(prepared, factor):
    dataset = make_dataset(prepared, factor=factor)
    batch = dataset.micro_batch(range(len(dataset)), epoch=0)
    model = SpearForPreTraining(dataset.config)
    output = model(**batch.inputs)
    assert torch.isfinite(output.loss)
    assert output.statistics[0, :, 2].sum() == batch.num_items == count_items(batch.inputs)
    assert batch.ids == [utterance.id for utterance in prepared.corpus.training]
    frames = batch.inputs["input_features"].shape[1]
    assert encoder_frames(frames, dataset.config) == model._get_feat_extract_output_lengths(frames)
    assert batch.num_samples < batch.num_padded_samples == len(dataset) * 19200


def test_a_domain_is_cropped_to_its_own_seconds(prepared):
    dataset = make_dataset(prepared, domain_max_seconds={"audio": 1.0})
    config = load_config("tiny", ["data.max_seconds=1.2", "data.domain_max_seconds.audio=1.0"])
    lengths = cropped(prepared.corpus.training, prepared.corpus.training_lengths, config)
    examples = [dataset.example(index, epoch=3) for index in range(len(dataset))]
    assert [len(example.waveform) for example in examples] == lengths.tolist()
    assert {example.domain: len(example.waveform) for example in examples} == {"speech": 19200, "audio": 16000}
    for index in (0, len(dataset) - 1):  # the same crop, and its labels, as where all have that limit
        same = make_dataset(prepared, max_seconds=len(examples[index].waveform) / 16000).example(index, epoch=3)
        assert np.array_equal(examples[index].waveform, same.waveform)
        assert all(np.array_equal(examples[index].labels[name], same.labels[name]) for name in same.labels)


def test_rows_equal_what_they_are_alone(prepared):
    dataset = make_dataset(prepared)
    together = dataset.micro_batch([3, 0, 9], epoch=1).inputs
    for row, index in enumerate((3, 0, 9)):
        alone = dataset.micro_batch([index], epoch=1).inputs
        for name, tensor in alone.items():
            assert torch.equal(together[name][row, : tensor.shape[1]], tensor[0]), name
        padding = together["attention_mask"][row, alone["attention_mask"].shape[1] :]
        assert padding.sum() == 0
        assert not together["mask_time_indices"][row, alone["attention_mask"].shape[1] :].any()


def test_only_audio_has_audio_labels_and_all_have_speech_labels(prepared):
    dataset = make_dataset(prepared)
    inputs = dataset.micro_batch(range(len(dataset)), epoch=0).inputs
    for row, utterance in enumerate(prepared.corpus.training):
        assert (inputs["speech_labels"][row] != -100).any()
        assert (inputs["audio_labels"][row] != -100).any() == (utterance.domain == "audio")


def test_without_a_domain_an_utterance_counts_as_speech(prepared):
    unknown = Prepared(
        replace(prepared.corpus, training=[replace(utt, domain=None) for utt in prepared.corpus.training]),
        prepared.stores,
    )
    inputs = make_dataset(unknown).micro_batch([0, 8], epoch=0).inputs
    assert (inputs["audio_labels"] == -100).all()


def test_labels_of_a_crop_are_the_tokens_of_its_place(prepared):
    dataset = make_dataset(prepared)
    audio = [index for index, utterance in enumerate(prepared.corpus.training) if utterance.domain == "audio"]
    longest = max(audio, key=lambda index: prepared.corpus.training_lengths[index])
    utterance = prepared.corpus.training[longest]
    waveform = load_audio(utterance.path)
    starts = set()
    for epoch in range(6):
        example = dataset.example(longest, epoch)
        assert len(example.waveform) == 19200
        places = range(0, len(waveform) - 19199, 640)
        start = next(p for p in places if np.array_equal(waveform[p : p + 19200], example.waveform))
        starts.add(start)
        frames = np.arange(encoder_frames(120, dataset.config))
        assert np.array_equal(example.labels["speech"][:, 0], (start // 320 + frames) % 16)
        assert np.array_equal(example.labels["audio"][:, 3], (start // 640 + frames // 2) % 8)
    assert len(starts) > 1


@pytest.mark.parametrize("seconds", [1.2, 30.0])
def test_an_offset_takes_later_tokens(prepared, seconds):
    now, later = (
        make_dataset(prepared, max_seconds=seconds),
        make_dataset(prepared, max_seconds=seconds, offsets={"speech": 2}),
    )
    for index in range(len(now)):
        plain, shifted = (dataset.example(index, epoch=1).labels for dataset in (now, later))
        known = (plain["speech"][2:] != -100) & (shifted["speech"][:-2] != -100)
        assert known.mean() > 0.9
        assert np.array_equal(shifted["speech"][:-2][known], plain["speech"][2:][known])
        assert plain.get("audio") is None or np.array_equal(plain["audio"], shifted["audio"])


def test_masks_and_crops_change_with_the_epoch_only(prepared):
    one, other = make_dataset(prepared, cache_audio=True), make_dataset(prepared, cache_audio=True)
    first = one.micro_batch([5, 1], epoch=4)
    other.micro_batch([2, 3], epoch=9)  # what came before does not matter
    second = other.micro_batch([5, 1], epoch=4)
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)
    third = other.micro_batch([5, 1], epoch=5)
    assert not torch.equal(first.inputs["mask_time_indices"], third.inputs["mask_time_indices"])
    plain = make_dataset(prepared, masking=None).micro_batch([5, 1], epoch=0).inputs
    assert not plain["mask_time_indices"].any()
    assert not plain["mask_feature_indices"].any()


def test_missing_utterances_are_listed(prepared):
    stranger = Utterance(id="stranger", path=Path("nowhere.wav"), domain="audio")
    config = make_dataset(prepared).config
    utterances = [*prepared.corpus.training, stranger]
    with pytest.raises(ValueError, match=r"1 of 17 utterances have no speech tokens in the store: stranger\."):
        check_tokens(utterances, prepared.stores, config)
    speech_only = make_dataset(prepared, ["speech"]).config
    with pytest.raises(ValueError, match=r"\['audio', 'speech'\] do not match the config's targets \['speech'\]"):
        check_tokens(prepared.corpus.training, prepared.stores, speech_only)


@pytest.mark.parametrize(("key", "value"), [("num_codebooks", 4), ("codebook_size", 32)])
def test_tokens_that_do_not_fit_the_config_are_refused(prepared, key, value):
    config = SpearConfig(pretraining_targets={**TARGETS, "speech": {**TARGETS["speech"], key: value}})
    with pytest.raises(ValueError, match="The speech tokens have 2 codebooks of 16 entries"):
        check_tokens(prepared.corpus.training, prepared.stores, config)


def test_tokens_of_other_audio_are_refused_by_name(prepared, tmp_path):
    info = replace(prepared.stores["speech"].info)
    with TokenStoreWriter(tmp_path / "short", info) as writer:
        for utterance in prepared.corpus.training:
            writer.add(utterance.id, np.zeros((20, 2), np.uint8), 6400)
    wrong = Prepared(prepared.corpus, {"speech": TokenStore.open(tmp_path / "short")})
    with pytest.raises(ValueError, match=f"speech tokens of utterance {prepared.corpus.training[2].id}: "):
        make_dataset(wrong, ["speech"]).example(2, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_out_the_same_steps(prepared, workers):
    dataset = make_dataset(prepared, cache_audio=True)
    lengths = np.minimum(prepared.corpus.training_lengths, 19200)
    sampler = BucketingSampler(lengths, 6 * 16000)
    whole = StepDataset(dataset, sampler)
    for rank in range(2):
        part = StepDataset(dataset, sampler, rank, num_ranks=2, max_part_seconds=2.4)
        loader = torch.utils.data.DataLoader(part, sampler=range(2, 5), **loader_arguments(workers))
        for step, micro_batches in zip(range(2, 5), loader, strict=True):
            (everything,) = whole[step]
            rows = {id: row for row, id in enumerate(everything.ids)}
            for micro_batch in micro_batches:
                assert micro_batch.num_padded_samples <= 2.4 * 16000
                for row, id in enumerate(micro_batch.ids):
                    mask = micro_batch.inputs["mask_time_indices"][row]
                    assert torch.equal(everything.inputs["mask_time_indices"][rows[id], : len(mask)], mask)
    counts = [sum(b.num_items for b in StepDataset(dataset, sampler, rank, 2)[3]) for rank in range(2)]
    assert sum(counts) == whole[3][0].num_items


def test_a_rank_without_utterances_gets_one_that_does_not_count(prepared):
    dataset = make_dataset(prepared)
    sampler = BucketingSampler(np.minimum(prepared.corpus.training_lengths, 19200), 19200)
    assert len(sampler.batch(0)[1]) == 1
    (batch,) = StepDataset(dataset, sampler, rank=1, num_ranks=2)[0]
    assert (batch.num_items, batch.num_samples, batch.ids) == (0, 0, [])
    model = SpearForPreTraining(dataset.config)
    model(**batch.inputs, num_items_in_batch=7).loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())
