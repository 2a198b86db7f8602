# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Random numbers as functions of names: (seed, epoch, utterance id, purpose) always gives the same draw.

Nothing carries a random state from one utterance to the next, so neither the order of the work, nor the number of
loader workers or ranks, nor a restart in the middle of an epoch can change what is drawn.
"""

import hashlib
import json

import numpy as np


def keyed_seed(*key: int | str) -> int:
    """A 63-bit integer that depends on `key` alone: stable over processes, machines and Python versions."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A fresh numpy generator for `key`, for instance (seed, epoch, utterance id, "time mask")."""
    return np.random.Generator(np.random.PCG64(keyed_seed(*key)))
