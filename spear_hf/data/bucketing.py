# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Batches of utterances of like length, capped by seconds of audio including padding.

The order of an epoch is a pure function of (seed, epoch), and its number of batches is the same in every epoch, so the
only state of the sampler is one integer: the number of batches already taken. A batch is global, the work of one
optimiser step over all ranks; `split_batch` deals it out to ranks and to the micro-batches of one rank, so the number
of ranks and the memory of a device never change what a step learns from.
"""

import numpy as np

from .seeding import keyed_generator


# With fewer batches than this in a bucket the same utterances would meet in every epoch.
MINIMUM_BATCHES_PER_BUCKET = 3


class BucketingSampler:
    """Cuts utterances into batches whose rows x longest row stays within `max_batch_samples`.

    Utterances are sorted by length and divided into buckets of equal total duration. An epoch shuffles each bucket,
    cuts the sequence at fixed places (a batch may straddle two neighbouring buckets, so only one batch of an epoch is
    incomplete, and it is kept), then shuffles the batches.

    Args:
        lengths: samples of each utterance, after cropping.
        max_batch_samples: cap of rows times longest row.
        num_buckets: upper bound of the number of buckets; small corpora get fewer, so that batches still vary.
        seed: of the order.
        shuffle: False gives every epoch the same order, longest first (validation).
    """

    def __init__(
        self,
        lengths: np.ndarray,
        max_batch_samples: int,
        num_buckets: int = 20,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.max_batch_samples = int(max_batch_samples)
        self.seed = seed
        self.shuffle = shuffle
        if len(self.lengths) == 0:
            raise ValueError("There are no utterances to make batches of.")
        if self.lengths.min() < 1:
            raise ValueError(f"Utterance {int(self.lengths.argmin())} has no samples; leave it out of the manifest.")
        if num_buckets < 1:
            raise ValueError(f"num_buckets must be at least 1, not {num_buckets}.")
        longest = int(self.lengths.max())
        if longest > self.max_batch_samples:
            raise ValueError(
                f"The longest utterance has {longest} samples, more than a batch may hold ({self.max_batch_samples}): "
                "raise the seconds of a batch or lower the longest crop (max_seconds)."
            )
        self._order = np.argsort(-self.lengths, kind="stable")
        self._bucket_starts = self._make_buckets(num_buckets)
        self._batch_starts = self._cut_batches()
        self._planned: tuple[int, list[np.ndarray]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """The same in every epoch."""
        return len(self._batch_starts)

    @property
    def num_buckets(self) -> int:
        """Buckets in use, at most the number asked for."""
        return len(self._bucket_starts)

    def _make_buckets(self, num_buckets: int) -> np.ndarray:
        """First place of each bucket in the sorted order; buckets hold about the same total duration."""
        ordered = self.lengths[self._order]
        total = int(ordered.sum())
        num_buckets = min(num_buckets, max(1, total // (MINIMUM_BATCHES_PER_BUCKET * self.max_batch_samples)))
        bucket_of = (np.cumsum(ordered) - ordered) * num_buckets // total
        return np.unique(bucket_of, return_index=True)[1]

    def _cut_batches(self) -> np.ndarray:
        """First place of each batch in the sorted order.

        A batch that starts in a bucket holds as many rows as fit at that bucket's longest utterance, whatever the
        shuffle puts into it; the buckets after it are shorter. Hence the number of batches never changes.
        """
        ordered = self.lengths[self._order]
        starts, position, bucket = [], 0, 0
        while position < len(ordered):
            starts.append(position)
            while bucket + 1 < len(self._bucket_starts) and self._bucket_starts[bucket + 1] <= position:
                bucket += 1
            longest = int(ordered[self._bucket_starts[bucket]])
            position += self.max_batch_samples // longest
        return np.asarray(starts)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch in their order, each an array of utterance indices."""
        if self._planned is not None and self._planned[0] == epoch:
            return self._planned[1]
        order = self._order
        if self.shuffle:
            rng = keyed_generator(self.seed, epoch, "order of utterances")
            order = np.concatenate([rng.permutation(bucket) for bucket in np.split(order, self._bucket_starts[1:])])
        batches = np.split(order, self._batch_starts[1:])
        if self.shuffle:
            rng = keyed_generator(self.seed, epoch, "order of batches")
            batches = [batches[place] for place in rng.permutation(len(batches))]
        self._planned = (epoch, batches)
        return batches

    def batch(self, position: int) -> tuple[int, np.ndarray]:
        """The batch after `position` earlier ones since the start of training: (epoch, utterance indices)."""
        if position < 0:
            raise ValueError(f"position must not be negative, not {position}.")
        epoch, place = divmod(position, self.batches_per_epoch)
        return epoch, self.plan(epoch)[place]

    def padding_share(self, epoch: int = 0) -> float:
        """Share of padding in the samples of an epoch's batches, when each batch is padded to its longest row."""
        padded = sum(len(batch) * int(self.lengths[batch].max()) for batch in self.plan(epoch))
        return 1.0 - int(self.lengths.sum()) / padded


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
