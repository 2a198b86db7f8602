# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The sample of frames: uniform, and a function of seed and utterances alone."""

import numpy as np
import pytest
import torch

from spear_hf.mvq.reservoir import FrameReservoir


def utterances(count: int = 60) -> dict[str, torch.Tensor]:
    """Frames that tell where they come from: (utterance, place)."""
    rng = np.random.default_rng(0)
    return {
        f"utterance {index}": torch.tensor([[index, place] for place in range(int(rng.integers(1, 400)))]).float()
        for index in range(count)
    }


def test_sample_does_not_depend_on_the_order():
    offered = utterances()
    samples = []
    for names in (sorted(offered), sorted(offered, reverse=True)):
        reservoir = FrameReservoir(500, seed=3)
        for name in names:
            reservoir.add(name, offered[name])
        samples.append(reservoir.frames())
        assert reservoir.seen == sum(len(frames) for frames in offered.values())
    assert samples[0].shape == (500, 2)
    assert torch.equal(*samples)
    assert len(torch.unique(samples[0], dim=0)) == 500, "without replacement"
    other = FrameReservoir(500, seed=4)
    for name, frames in offered.items():
        other.add(name, frames)
    assert not torch.equal(other.frames(), samples[0])


def test_sample_is_uniform_over_frames():
    offered = utterances()
    counts = torch.zeros(len(offered))
    for seed in range(40):
        reservoir = FrameReservoir(500, seed)
        for name, frames in offered.items():
            reservoir.add(name, frames)
        counts += torch.bincount(reservoir.frames()[:, 0].long(), minlength=len(offered))
    lengths = torch.tensor([len(frames) for frames in offered.values()]).float()
    expected = 40 * 500 * lengths / lengths.sum()
    # Pearson's statistic has mean 59 and standard deviation 11 here.
    assert ((counts - expected).square() / expected).sum() < 110


def test_fewer_frames_than_capacity_are_all_kept():
    reservoir = FrameReservoir(1000, seed=0)
    reservoir.add("a", torch.arange(6.0).reshape(3, 2))
    reservoir.add("b", torch.ones(1, 2))
    assert sorted(reservoir.frames().tolist()) == [[0, 1], [1, 1], [2, 3], [4, 5]]


def test_nothing_to_sample():
    with pytest.raises(ValueError, match="no frames"):
        FrameReservoir(3, seed=0).frames()
    with pytest.raises(ValueError, match="capacity"):
        FrameReservoir(0, seed=0)
