# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Hashes of ids are on disk: they stay what they are."""

import numpy as np

from spear_hf.data.ids import id_hash, id_hashes


def test_the_hash_of_an_id_stays_for_good():
    assert [id_hash("a"), id_hash("häuser/ü.flac")] == [3_405_396_810_240_292_928, 10_005_540_366_117_934_714]


def test_many_at_once():
    hashes = id_hashes(iter(("a", "b", "a")))
    assert (hashes.dtype, hashes.tolist()) == (np.uint64, [id_hash("a"), id_hash("b"), id_hash("a")])
    assert id_hashes([]).shape == (0,)
