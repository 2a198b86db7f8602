# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Many draws at once are those of a generator for each."""

import numpy as np
import pytest

from spear_hf.data.seeding import first_uniforms, keyed_generator, keyed_seed, keyed_seeds, keyed_uniforms


IDS = [
    "",
    "a",
    "speech/0001.flac",
    'quoted "é" \\ \n\t\x7f',
    "日本語",
    "😀",
    "x" * 300,
    *(f"id-{n}" for n in range(40_000)),
]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40])
def test_uniforms_are_the_first_draws_of_the_generators(seed):
    drawn = keyed_uniforms(seed, iter(IDS), "held out")
    some = [*range(10), 32_767, 32_768, 32_775, *range(100, len(IDS), 997)]  # on both sides of a chunk's end
    assert drawn[some].tolist() == [keyed_generator(seed, IDS[place], "held out").random() for place in some]
    assert drawn.dtype == np.float64
    assert len(drawn) == len(IDS)
    assert len(keyed_uniforms(seed, [], "held out")) == 0


def test_the_seeds_of_numpy_are_taken_whole():
    """Seeds of one and of two words of 32 bits, as they are short in one key of four billion only."""
    seeds = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**62 + 12345], dtype=np.uint64)
    expected = [np.random.Generator(np.random.PCG64(int(seed))).random() for seed in seeds]
    assert first_uniforms(seeds).tolist() == expected


def test_many_seeds_at_a_time():
    assert keyed_seeds((3, "subset"), iter(IDS)).tolist() == [keyed_seed(3, "subset", id) for id in IDS]
    assert keyed_seeds((), IDS, ("é", 7)).tolist() == [keyed_seed(id, "é", 7) for id in IDS]
    assert keyed_seeds((3,), []).dtype == np.uint64
