# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Which utterances are trained and validated on."""

from collections import Counter

import pytest

from spear_hf.pretraining.config import DataConfig
from spear_hf.pretraining.corpus import load_corpus


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
