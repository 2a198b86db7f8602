# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of utterances of like length, capped by seconds of audio including padding.

The order of an epoch is a pure function of (seed, epoch), and its number of batches is the same in every epoch, so the
only state of the sampler is one integer: the number of batches already taken. A batch is global, the work of one
optimiser step over all ranks; `split_batch` deals it out to ranks and to the micro-batches of one rank, so the number
of ranks and the memory of a device never change what a step learns from, and all ranks work on utterances of like
length at a time without asking each other.

There are no fixed buckets (the paper has 20): utterances are cut into batches along their sorted lengths, so a batch
is a bucket of its own, and the padding is what `jitter` adds on purpose, where a fixed bucket pads by half its width.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from .seeding import keyed_generator
from .utterances import Column


class GlobalBatches(ABC):
    """The batches of a run, each the work of one optimiser step: a pure function of (seed, epoch)."""

    lengths: np.ndarray
    """Samples of each utterance, after cropping."""

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """The same in every epoch."""

    @abstractmethod
    def heard(self, epoch: int) -> np.ndarray:
        """The utterances of an epoch, in ascending order."""

    @abstractmethod
    def plan(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch in their order, each an array of utterance indices."""

    def batch(self, position: int) -> tuple[int, np.ndarray]:
        """The batch after `position` earlier ones since the start of training: (epoch, utterance indices)."""
        epoch, place = self._divided(position)
        return epoch, self.plan(epoch)[place]

    def _divided(self, position: int) -> tuple[int, int]:
        """Epoch, and place therein, of a position."""
        if position < 0:
            raise ValueError(f"position must not be negative, not {position}.")
        return divmod(position, self.batches_per_epoch)

    def at_hand(self, position: int) -> np.ndarray:
        """The utterances whose shards are there while the batch at `position` is made: here all, ascending."""
        return np.arange(len(self.lengths))

    def digest(self, position: int) -> str:
        """Eight hexadecimal digits for the utterances of a batch and their order, to compare runs with."""
        return hashlib.blake2b(self.batch(position)[1].astype("<i8").tobytes(), digest_size=4).hexdigest()

    def padding_share(self, epoch: int = 0) -> float:
        """Share of padding in the samples of an epoch's batches, when each batch is padded to its longest row."""
        padded = sum(len(batch) * int(self.lengths[batch].max()) for batch in self.plan(epoch))
        return 1.0 - int(self.lengths[self.heard(epoch)].sum()) / padded


class BucketingSampler(GlobalBatches):
    """Cuts utterances into batches whose rows x longest row stays within `max_batch_samples`.

    Every epoch sorts the utterances by their length times a random factor from 1 - jitter to 1 + jitter, cuts the
    sequence at fixed places (so only one batch of an epoch is incomplete, and it is kept), then shuffles the batches.
    Each utterance thus meets others of its length, different ones in each epoch.

    Args:
        lengths: samples of each utterance, after cropping.
        max_batch_samples: cap of rows times longest row.
        jitter: more of it mixes the batches better and costs padding of about the same share.
        seed: of the order.
        shuffle: False gives every epoch the same order, longest first (validation).
        rates: share of the epochs in which each utterance is heard, in (0, 1], alike for many utterances; None: all.
            See `visiting_rates`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_batch_samples: int,
        jitter: float = 0.05,
        seed: int = 0,
        shuffle: bool = True,
        rates: np.ndarray | None = None,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.max_batch_samples = int(max_batch_samples)
        self.jitter = jitter if shuffle else 0.0
        self.seed = seed
        self.shuffle = shuffle
        if len(self.lengths) == 0:
            raise ValueError("There are no utterances to make batches of.")
        if self.lengths.min() < 1:
            raise ValueError(f"Utterance {int(self.lengths.argmin())} has no samples; leave it out of the manifest.")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), not {jitter}.")
        longest = int(self.lengths.max())
        if longest > self.max_batch_samples:
            raise ValueError(
                f"The longest utterance has {longest} samples, more than a batch may hold ({self.max_batch_samples}): "
                "raise the seconds of a batch or lower the longest crop (max_seconds)."
            )
        self._groups = self._group_by_rate(rates)
        self._batch_starts = self._cut_batches()
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None  # as of `_order`

    @property
    def batches_per_epoch(self) -> int:
        """The same in every epoch."""
        return len(self._batch_starts)

    def _group_by_rate(self, rates: np.ndarray | None) -> list[tuple[np.ndarray, int]]:
        """Utterances of one rate, longest first, and how many of them an epoch hears; at least one."""
        rates = np.ones(len(self.lengths)) if rates is None else np.asarray(rates, dtype=np.float64)
        if rates.shape != self.lengths.shape or not ((rates > 0) & (rates <= 1)).all():
            raise ValueError("rates must hold a number in (0, 1] for every utterance.")
        groups = []
        for rate in np.unique(rates):
            members = np.flatnonzero(rates == rate)
            members = members[np.argsort(-self.lengths[members], kind="stable")]
            groups.append((members, max(1, round(rate * len(members)))))
        return groups

    def heard(self, epoch: int) -> np.ndarray:
        """The utterances of an epoch, in ascending order: of a group of n, m evenly spaced along the lengths.

        The place i of the group is heard when (i + epoch) * m / n passes a whole number: exactly m an epoch, each of
        them in every n/m-th epoch (rounded down or up), and none twice in one.
        """
        heard = np.zeros(len(self.lengths), dtype=bool)
        for members, count in self._groups:
            places = (np.arange(len(members)) + epoch) % len(members)
            heard[members[(places + 1) * count // len(members) > places * count // len(members)]] = True
        return np.flatnonzero(heard)

    def _cut_batches(self) -> np.ndarray:
        """First place of each batch in an epoch's sorted sequence, the same for any draw of the random factors.

        The j-th utterance that an epoch hears of a group of n with m to hear is at best the one at place j * n / m
        (rounded down): so no epoch's lengths, sorted, exceed the bound's. At place p the sorted products are at most
        (p-th length of the bound) x (1 + jitter), so no utterance from there on is longer than that over (1 - jitter),
        nor longer than the longest: that many rows always fit.
        """
        longest = [self.lengths[members[np.arange(count) * len(members) // count]] for members, count in self._groups]
        ordered = np.sort(np.concatenate(longest))[::-1]
        bound = np.minimum(ordered * ((1 + self.jitter) / (1 - self.jitter)), ordered[0])
        starts, place = [], 0
        while place < len(ordered):
            starts.append(place)
            place += int(self.max_batch_samples // bound[place])
        return np.asarray(starts)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch in their order, each an array of utterance indices."""
        return [self.planned(epoch, place) for place in range(self.batches_per_epoch)]

    def batch(self, position: int) -> tuple[int, np.ndarray]:
        """As of `GlobalBatches`, made from what is held of the epoch's order."""
        epoch, place = self._divided(position)
        return epoch, self.planned(epoch, place)

    def planned(self, epoch: int, place: int) -> np.ndarray:
        """The batch at a place of an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = None  # its memory is for the next one
            self._planned = (epoch, *self._order(epoch))
        _, utterances, order = self._planned
        number = int(order[place])
        start, *stop = self._batch_starts[number : number + 2]
        return utterances[slice(start, *stop or [None])].astype(np.int64)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The utterances of an epoch from long to short, 4 bytes each where that is enough, and its batches' order."""
        heard = self.heard(epoch)
        keys = -self.lengths[heard].astype(np.float64)
        order = np.arange(self.batches_per_epoch)
        if self.shuffle:
            rng = keyed_generator(self.seed, epoch, "order of utterances")
            factors = rng.uniform(-1, 1, len(keys))
            factors *= self.jitter
            factors += 1
            keys *= factors
            order = keyed_generator(self.seed, epoch, "order of batches").permutation(len(order))
        heard = heard.astype(np.min_scalar_type(len(self.lengths)))
        return heard[stable_order(keys)], order


def stable_order(keys: np.ndarray) -> np.ndarray:
    """`np.argsort(keys, kind="stable")`, by numpy's faster sort where few are equal."""
    order = np.argsort(keys)
    same = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])  # to the next one
    if len(same) > len(keys) // 100:
        return np.argsort(keys, kind="stable")
    for run in np.split(same, np.flatnonzero(np.diff(same) > 1) + 1):
        if len(run):
            order[run[0] : run[-1] + 2].sort()
    return order


def visiting_rates(domains: Sequence[str | None] | np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
    """The share of epochs in which each utterance is heard, so that domains are heard in proportion to `weights`.

    The domain of the largest weight is heard whole in every epoch, one of a third of that weight in every third. An
    epoch is thus one pass over the domain that is repeated most, no utterance comes twice in it, and every repetition
    has its own crop and masks, which are drawn by epoch. A domain without a weight has 1.
    """
    column = domains if isinstance(domains, Column) else Column.of(domains)
    largest = max(float(weights.get(str(domain), 1.0)) for domain in column.present)
    return column.each(lambda domain: weights.get(str(domain), 1.0) / largest, np.float64)


def split_batch(
    indices: np.ndarray, lengths: np.ndarray, num_ranks: int, max_part_samples: int | None = None
) -> list[list[np.ndarray]]:
    """Deals a global batch out: for every rank the list of its micro-batches (arrays of utterance indices).

    Every rank gets the same number of micro-batches, the smallest with which rows x longest row stays within
    `max_part_samples`. Rows are sorted by length first, so a micro-batch has little padding. A micro-batch is empty
    only where there are fewer utterances than parts.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, not {num_ranks}.")
    order = np.asarray(indices)[np.argsort(-np.asarray(lengths)[indices], kind="stable")]
    longest = int(lengths[order[0]])
    if max_part_samples is not None and longest > max_part_samples:
        raise ValueError(
            f"An utterance of {longest} samples does not fit into a micro-batch of {max_part_samples}: raise the "
            "seconds of a device's batch or lower the longest crop (max_seconds)."
        )
    rounds = 1
    while True:
        parts = np.array_split(order, rounds * num_ranks)
        if max_part_samples is None or all(
            len(part) * int(lengths[part[0]]) <= max_part_samples for part in parts if len(part)
        ):
            break
        rounds += 1
    # Neighbouring parts go to different ranks in the same round, so that the ranks have alike work at a time.
    return [parts[rank::num_ranks] for rank in range(num_ranks)]


def crop_window(
    num_samples: int, max_samples: int, grid: int, seed: int, epoch: int, utterance_id: str
) -> tuple[int, int]:
    """First and last-plus-one sample of the utterance's crop in this epoch; all of it if it is short enough.

    The start is a multiple of `grid` samples (640: 40 ms, one token of a 25 Hz teacher), so tokens stay aligned.
    """
    if num_samples <= max_samples:
        return 0, num_samples
    rng = keyed_generator(seed, epoch, utterance_id, "crop")
    start = int(rng.integers((num_samples - max_samples) // grid + 1)) * grid
    return start, start + max_samples
