# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The unigram baseline against a slow reference."""

import math

import numpy as np
import pytest
import torch

from spear_hf.mvq.store import StoreInfo, TokenStore, TokenStoreWriter
from spear_hf.pretraining.validation import Unigram


@pytest.fixture
def store(tmp_path) -> TokenStore:
    """Ten utterances of skewed random codes, two codebooks of eight."""
    rng = np.random.default_rng(0)
    with TokenStoreWriter(tmp_path, StoreInfo(2, 8, 50.0, "random", None, "none")) as writer:
        for number in range(10):
            codes = np.minimum(rng.geometric([0.3, 0.5], size=(40, 2)), 8) - 1
            writer.add(f"utterance-{number}", codes.astype(np.uint8), 12800)
    return TokenStore.open(tmp_path)


@pytest.mark.parametrize("tokens_per_frame", [1, 2])
def test_sums_are_those_of_a_slow_reference(store, tokens_per_frame):
    training, held_out = list(store.ids[:8]), store.ids[8:]
    unigram = Unigram.of_tokens(store, training)
    codes = np.concatenate([store[id] for id in training])
    labels = np.stack([store[id] for id in held_out]).astype(np.int64)
    labels = labels.reshape(2, 40 // tokens_per_frame, 2 * tokens_per_frame)
    labels[0, -3:] = -100
    labels[1, 4, -1] = -100  # a frame that is only partly covered
    chosen = np.random.default_rng(1).random(labels.shape[:2]) < 0.5
    chosen[1, 4] = True

    cost = correct = count = 0.0
    for row, frame in np.argwhere(chosen):
        known = [(column % 2, code) for column, code in enumerate(labels[row, frame]) if code != -100]
        if known:
            shares = [(1 + (codes[:, book] == code).sum()) / (8 + len(codes)) for book, code in known]
            cost += sum(-math.log(share) for share in shares) / len(known)
            correct += sum(code == np.bincount(codes[:, book]).argmax() for book, code in known) / len(known)
            count += 1
    sums = unigram.sums(torch.from_numpy(labels), torch.from_numpy(chosen))
    assert sums.tolist() == pytest.approx([cost, correct, count])
    assert correct / count > 1 / 8


def test_a_token_that_never_occurred_costs_finitely(store):
    unigram = Unigram(np.array([[5, 0, 0, 0]]))
    cost, correct, count = unigram.sums(torch.tensor([[[3]]]), torch.ones(1, 1, dtype=torch.bool)).tolist()
    assert (cost, correct, count) == (pytest.approx(math.log(9)), 0.0, 1.0)
