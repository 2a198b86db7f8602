# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Orders of the training rows. Each is a function of (seed, epoch), so a resumed epoch has the order it began with."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..data.seeding import keyed_generator, keyed_seed
from .epochs import EpochCounter


def balancing_weights(labels: Sequence[Sequence[int]], num_labels: int) -> np.ndarray:
    """Weights (rows,) that make rare labels frequent: of a row, the sum over its labels of 1 / rows with the label.

    Rows without a label have the smallest weight of all others, so that they are not lost.
    """
    counts = np.bincount([label for row in labels for label in set(row)], minlength=num_labels)
    weights = np.array([sum(1.0 / counts[label] for label in set(row)) for row in labels])
    if not weights.any():
        raise ValueError(f"none of the {len(labels)} rows has a label: weighted sampling needs labels")
    return np.where(weights > 0, weights, weights[weights > 0].min())


class WeightedSampler(Sampler[int]):
    """Draws as many rows as there are, with replacement, with the probabilities of the weights (rows,)."""

    def __init__(self, weights: np.ndarray, seed: int, epochs: EpochCounter) -> None:
        self.probabilities = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.seed = seed
        self.epochs = epochs

    def __len__(self) -> int:
        return len(self.probabilities)

    def __iter__(self) -> Iterator[int]:
        generator = keyed_generator(self.seed, self.epochs.value, "weighted sampling")
        yield from generator.choice(len(self), size=len(self), p=self.probabilities).tolist()


class LengthGroupedSampler(Sampler[int]):
    """Rows of similar length lie together, in random order otherwise; the longest come first, to show memory's need.

    As that of transformers, whose order however depends on torch's generator, and so on where training was resumed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epochs: EpochCounter) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, self.epochs.value, "grouping by length"))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
