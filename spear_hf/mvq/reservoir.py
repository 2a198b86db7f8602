# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A uniform sample of frames of unknown number, the same whatever order or batches they come in."""

import numpy as np
import torch
from torch import Tensor

from spear_hf.data.seeding import keyed_generator


class FrameReservoir:
    """Keeps the `capacity` frames with the smallest keys; a frame's key is a function of seed, name and place.

    So the sample is uniform without replacement, and depends neither on the order in which utterances arrive nor on
    who computes them. Memory: up to twice `capacity` frames.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 frame, not {capacity}")
        self.capacity = capacity
        self.seed = seed
        self.seen = 0
        self._keys: list[np.ndarray] = []
        self._frames: list[Tensor] = []
        self._held = 0
        self._highest = 1.0  # keys above this one cannot be among the smallest any more

    def add(self, name: str, features: Tensor) -> None:
        """Offers the frames (frames, dim) of utterance `name`, each utterance once."""
        keys = keyed_generator(self.seed, "frames", name).random(len(features))
        chosen = np.flatnonzero(keys <= self._highest)
        self.seen += len(features)
        if len(chosen) == 0:
            return
        self._keys.append(keys[chosen])
        self._frames.append(features[torch.from_numpy(chosen).to(features.device)].cpu())
        self._held += len(chosen)
        if self._held > 2 * self.capacity:
            self._compact()

    def frames(self) -> Tensor:
        """The sample (at most `capacity`, dim), in an order that says nothing of the order of arrival."""
        if not self._frames:
            raise ValueError("no frames were offered")
        self._compact()
        return self._frames[0]

    def _compact(self) -> None:
        keys = np.concatenate(self._keys)
        order = np.argsort(keys, kind="stable")[: self.capacity]
        frames = torch.cat(self._frames)[torch.from_numpy(order)]
        self._keys, self._frames, self._held = [keys[order]], [frames], len(order)
        if self._held == self.capacity:
            self._highest = float(self._keys[0][-1])
