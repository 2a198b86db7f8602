# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The utterances of a store with audio, made one by one when they are asked for."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from spear_hf.data.manifest import Utterance
from spear_hf.data.utterances import CHUNK, Column, UtteranceList


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
        row = int(self.rows[place])
        store = self.store
        id = store.id_at(row)
        domain, split = (store.column(name)[row] for name in ("domain", "split"))
        return Utterance(
            id,
            Path(str(store.location)) / id,
            domain=domain,
            split=split,
            num_samples=int(store.lengths[row]),
            content=partial(store.audio_content, id),
        )

    def take(self, places: np.ndarray) -> "StoreUtterances":
        return StoreUtterances(self.store, self.rows[places])

    def id_chunks(self) -> Iterator[pa.LargeStringArray]:
        for start in range(0, len(self), CHUNK):
            yield self.store.ids_at(self.rows[start : start + CHUNK])

    @property
    def ids(self) -> Iterator[str]:
        return (id for chunk in self.id_chunks() for id in chunk.to_pylist())

    @property
    def domains(self) -> Column:
        return self.store.column("domain").take(self.rows)

    @property
    def splits(self) -> Column:
        return self.store.column("split").take(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return self.store.lengths[self.rows]
