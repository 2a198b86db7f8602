# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Which utterances are trained and validated on."""

from collections import Counter

import pytest

from spear_hf.pretraining.config import DataConfig, load_config
from spear_hf.pretraining.corpus import load_corpus
from spear_hf.pretraining.setup import build_sampler


def test_several_splits_are_trained_on():
    settings = {"manifest": "bundled", "validation_split": "heldout", "min_seconds": 0.3}
    corpus = load_corpus(DataConfig(split="pretrain+probe_train", **settings), seed=0)
    splits = Counter(utterance.split for utterance in corpus.training)
    assert set(splits) == {"pretrain", "probe_train"}
    one = load_corpus(DataConfig(split="pretrain", **settings), seed=0)
    assert len(one.training) == splits["pretrain"]
    assert {utterance.split for utterance in corpus.validation} == {"heldout"}
    assert list(corpus.validation) == list(one.validation)


def test_an_unknown_split_among_several_is_named():
    with pytest.raises(ValueError, match=r"data.split=probe is not in .*, which has heldout, pretrain, probe_test"):
        load_corpus(DataConfig(manifest="bundled", split="pretrain+probe"), seed=0)


# Settings, numbers of utterances, and what the first runs had: the fingerprint of a checkpoint, digests of batches.
RECORDED = [
    ((), (1038, 12), "e0065a882506f57cdfeba7dedd9c60c4", ["62af727c", "f66fffe3", "44616ed0"]),
    (
        ("data.split=pretrain", "data.validation_split=heldout"),
        (312, 35),
        "d5daf638f3f7d0380c8071fd27a69d5a",
        ["6b84beb3", "dd18dadc", "330b2f9e"],
    ),
    (
        ("data.validation_fraction=0.1", "seed=5"),
        (957, 93),
        "5690a82c08f58b51180bef378a418396",
        ["667cc02c", "7b9a24cf", "e956b6cd"],
    ),
]


@pytest.mark.parametrize(("settings", "sizes", "fingerprint", "batches"), RECORDED)
def test_the_corpus_and_the_order_of_a_seed_stay_for_good(settings, sizes, fingerprint, batches):
    all_splits = ("data.split=null", "data.validation_split=null")
    config = load_config("tiny", ["data.manifest=bundled", *all_splits, *settings])
    corpus = load_corpus(config.data, config.seed)
    assert (len(corpus.training), len(corpus.validation)) == sizes
    assert corpus.fingerprint == fingerprint
    sampler = build_sampler(config, corpus)
    assert [sampler.digest(position) for position in (0, 7, 1000)] == batches
