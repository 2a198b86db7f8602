# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Random numbers as functions of names: (seed, epoch, utterance id, purpose) always gives the same draw.

Nothing carries a random state from one utterance to the next, so neither the order of the work, nor the number of
loader workers or ranks, nor a restart in the middle of an epoch can change what is drawn.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring_ascii

import numpy as np


_CHUNK = 1 << 15  # draws made together: their arrays stay in the processor's cache


def keyed_seed(*key: int | str) -> int:
    """A 63-bit integer that depends on `key` alone: stable over processes, machines and Python versions."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A fresh numpy generator for `key`, for instance (seed, epoch, utterance id, "time mask")."""
    return np.random.Generator(np.random.PCG64(keyed_seed(*key)))


def keyed_uniforms(seed: int, ids: Iterable[str], purpose: str) -> np.ndarray:
    """`keyed_generator(seed, id, purpose).random()` for each of many ids, float64, in a tenth of the time and less."""
    return np.concatenate([np.empty(0), *map(first_uniforms, _seed_chunks((seed,), ids, (purpose,)))])


def keyed_seeds(before: Sequence[int | str], ids: Iterable[str], after: Sequence[int | str] = ()) -> np.ndarray:
    """`keyed_seed(*before, id, *after)` for each of many ids, uint64."""
    return np.concatenate([np.empty(0, np.uint64), *_seed_chunks(before, ids, after)])


def _seed_chunks(before: Sequence[int | str], ids: Iterable[str], after: Sequence[int | str]) -> Iterator[np.ndarray]:
    opening, closing = json.dumps([*before, ""])[:-3], json.dumps(["", *after])[3:]
    remaining = iter(ids)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        keys = [f"{opening}{name}{closing}".encode() for name in map(encode_basestring_ascii, chunk)]
        digests = b"".join([hashlib.blake2b(key, digest_size=8).digest() for key in keys])
        yield np.frombuffer(digests, "<u8") >> np.uint64(1)


# ---------------------------------------------------------------------------------------------------------------------
# The first draw of numpy's PCG64, for many seeds at a time. Its algorithms are those of O'Neill: the seed sequence of
# "Developing a seed_seq alternative" (2015) and the generator of HMC-CS-2014-0905; numpy keeps both for good.
# ---------------------------------------------------------------------------------------------------------------------

_POOL = 4  # words of 32 bits
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645  # of the 128-bit congruential generator


def first_uniforms(seeds: np.ndarray) -> np.ndarray:
    """`Generator(PCG64(seed)).random()` for each of the seeds, uint64."""
    words = _seeded_words(seeds)
    state, sequence = (words[0], words[1]), (words[2], words[3])  # (high, low)
    increment = (sequence[0] << _u64(1)) | (sequence[1] >> _u64(63)), (sequence[1] << _u64(1)) | _u64(1)
    state = _add(_times_multiplier(_add(increment, state)), increment)  # as it is seeded
    high, low = _add(_times_multiplier(state), increment)
    mixed, turn = high ^ low, high >> _u64(58)
    drawn = (mixed >> turn) | (mixed << ((_u64(64) - turn) & _u64(63)))
    return (drawn >> _u64(11)) * 2.0**-53


def _seeded_words(seeds: np.ndarray) -> list[np.ndarray]:
    """`SeedSequence(seed).generate_state(4, np.uint64)` for each of the seeds: four arrays of uint64."""
    constant = 0x43B0D7E5

    def hashed(values: np.ndarray) -> np.ndarray:
        nonlocal constant
        values = values ^ np.uint32(constant)
        constant = constant * 0x931E8875 & 0xFFFFFFFF
        return _folded(values * np.uint32(constant))

    low, high = (seeds & _u64(0xFFFFFFFF)).astype(np.uint32), (seeds >> _u64(32)).astype(np.uint32)
    pool = [hashed(word) for word in (low, high, *(np.zeros_like(low) for _ in range(_POOL - 2)))]
    for source, target in itertools.permutations(range(_POOL), 2):
        mixed = np.uint32(0xCA01F9DD) * pool[target] - np.uint32(0x4973F715) * hashed(pool[source])
        pool[target] = _folded(mixed)
    constant = 0x8B51F9DD
    words = []
    for place in range(2 * _POOL):
        values = pool[place % _POOL] ^ np.uint32(constant)
        constant = constant * 0x58F38DED & 0xFFFFFFFF
        words.append(_folded(values * np.uint32(constant)).astype(np.uint64))
    return [first | (second << _u64(32)) for first, second in zip(words[::2], words[1::2])]


def _folded(values: np.ndarray) -> np.ndarray:
    return values ^ (values >> np.uint32(16))


def _add(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of 128-bit numbers, each (high, low)."""
    low = one[1] + other[1]
    return one[0] + other[0] + (low < one[1]), low


def _times_multiplier(number: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    high, low = number
    by_high, by_low = _u64(_MULTIPLIER >> 64), _u64(_MULTIPLIER & (1 << 64) - 1)
    mask, half = _u64(0xFFFFFFFF), _u64(32)
    a, b, c, d = low >> half, low & mask, by_low >> half, by_low & mask
    middle = a * d + ((b * d) >> half)
    carried = (middle & mask) + b * c
    return a * c + (middle >> half) + (carried >> half) + high * by_low + low * by_high, low * by_low


def _u64(value: int) -> np.uint64:
    return np.uint64(value)
