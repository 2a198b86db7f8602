# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Epochs that go through the shards of a store window by window, so that few of them need be at hand at a time.

A window is a set of shards, drawn at random once for the whole run. An epoch takes the windows in an order of its own
and hears each to its end before the next; within a window, batches are those of `BucketingSampler`. Everything that
an utterance meets is of its window: the others of its batch, and what is mixed into it. The order is a function of
(seed, epoch) and of the windows, whatever holds the shards.
"""

from typing import NamedTuple

import numpy as np

from .bucketing import BucketingSampler, GlobalBatches
from .seeding import keyed_generator, keyed_seed


def draw_windows(shards: np.ndarray, window_shards: int, seed: int) -> np.ndarray:
    """The window of each utterance, int64, from its shard: the fewest windows of at most `window_shards` shards."""
    present = np.flatnonzero(np.bincount(shards))
    order = keyed_generator(seed, "windows of shards").permutation(len(present))
    window_of_shard = np.empty(present.max(initial=0) + 1, dtype=np.int64)
    for window, members in enumerate(np.array_split(order, -(-len(present) // window_shards))):
        window_of_shard[present[members]] = window
    return window_of_shard[shards]


def members(windows: np.ndarray) -> list[np.ndarray]:
    """The utterances of each window, in ascending order."""
    counts = np.bincount(windows)
    small = windows.astype(np.min_scalar_type(len(counts)))  # numpy sorts 16 bits by their digits
    return np.split(np.argsort(small, kind="stable"), np.cumsum(counts)[:-1])


class Turn(NamedTuple):
    """One hearing of a window: the steps from `start` up to `stop`."""

    window: int
    start: int
    stop: int


class WindowedSampler(GlobalBatches):
    """Batches of one window after another; `windows` has that of each utterance, the rest is as in BucketingSampler.

    Every window has the same number of batches in every epoch, the last of them incomplete.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_batch_samples: int,
        windows: np.ndarray,
        jitter: float = 0.05,
        seed: int = 0,
        rates: np.ndarray | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.seed = seed
        self._members = members(windows)
        self._parts = [
            BucketingSampler(
                self.lengths[part],
                max_batch_samples,
                jitter=jitter,
                seed=keyed_seed(seed, "window", window),
                rates=None if rates is None else rates[part],
            )
            for window, part in enumerate(self._members)
        ]
        self._counts = np.array([part.batches_per_epoch for part in self._parts])

    @property
    def batches_per_epoch(self) -> int:
        """The same in every epoch."""
        return int(self._counts.sum())

    def heard(self, epoch: int) -> np.ndarray:
        """The utterances of an epoch, in ascending order."""
        return np.sort(np.concatenate([ids[part.heard(epoch)] for ids, part in zip(self._members, self._parts)]))

    def plan(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch in their order, each an array of utterance indices."""
        return [
            self._members[window][batch] for window in self._order(epoch) for batch in self._parts[window].plan(epoch)
        ]

    def batch(self, position: int) -> tuple[int, np.ndarray]:
        """As of `GlobalBatches`; only the window that it lies in is planned."""
        turn = self.turn(position)
        epoch = position // self.batches_per_epoch
        return epoch, self._members[turn.window][self._parts[turn.window].planned(epoch, position - turn.start)]

    def turn(self, position: int) -> Turn:
        """The one that the batch at `position` belongs to."""
        epoch, place = self._divided(position)
        order = self._order(epoch)
        ends = np.cumsum(self._counts[order])
        slot = int(np.searchsorted(ends, place, side="right"))
        stop = epoch * self.batches_per_epoch + int(ends[slot])
        return Turn(int(order[slot]), stop - int(self._counts[order[slot]]), stop)

    def at_hand(self, position: int) -> np.ndarray:
        """Those of the window that the batch at `position` is of, ascending."""
        return self._members[self.turn(position).window]

    def upcoming(self, position: int, last: int) -> list[int]:
        """The windows that the steps from `position` up to `last` hear, in the order in which they do so first."""
        windows: dict[int, None] = {}
        while position < last and len(windows) < len(self._parts):
            turn = self.turn(position)
            windows[turn.window] = None
            position = turn.stop
        return list(windows)

    def _order(self, epoch: int) -> np.ndarray:
        return keyed_generator(self.seed, epoch, "order of windows").permutation(len(self._parts))
