# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The utterances of a store with audio, made one by one when they are asked for."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spear_hf.data.manifest import Utterance
from spear_hf.data.utterances import UtteranceList


if TYPE_CHECKING:
    from spear_hf.mvq.store import TokenStore


class StoreUtterances(UtteranceList):
    """Those of `rows` of a store: what is held of each is its row."""

    def __init__(self, store: "TokenStore", rows: np.ndarray) -> None:
        self.store = store
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, place: int) -> Utterance:
        row = self.rows[place : place + 1]
        (id,) = self.store.ids_at(row)
        domain, split = (self.store.column_at(name, row)[0] for name in ("domain", "split"))
        return Utterance(
            id,
            Path(str(self.store.location)) / id,
            domain=domain,
            split=split,
            num_samples=int(self.store.lengths[row[0]]),
            content=partial(self.store.audio_content, id),
        )

    def take(self, places: np.ndarray) -> "StoreUtterances":
        return StoreUtterances(self.store, self.rows[places])

    @property
    def ids(self) -> Iterator[str]:
        for start in range(0, len(self), 10_000):
            yield from self.store.ids_at(self.rows[start : start + 10_000])

    @property
    def domains(self) -> np.ndarray:
        return self.store.column_at("domain", self.rows)

    @property
    def splits(self) -> np.ndarray:
        return self.store.column_at("split", self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return self.store.lengths[self.rows]
