# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The running average against the mean of all samples, on resuming, and between two checkpoints."""

import io
import re
from fractions import Fraction

import pytest
import torch
from torch import nn

from spear_hf.pretraining.averaging import RunningAverage


class Drifting(nn.Module):
    """Weights that are a function of the step, with buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 3))
        self.register_buffer("scale", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def at(self, step: int) -> torch.Tensor:
        return torch.randn(5, 3, generator=torch.Generator().manual_seed(step)) + 100.0

    def move(self, step: int) -> None:
        with torch.no_grad():
            self.weight.copy_(self.at(step))
            self.scale.fill_(float(step))
            self.count.fill_(step)


def run(average: RunningAverage, steps: range, model: Drifting) -> None:
    for step in steps:
        model.move(step)
        average.update(step, model.state_dict())


def mean(model: Drifting, steps: range) -> torch.Tensor:
    """Exact, rounded once."""
    columns = zip(*(model.at(step).flatten().tolist() for step in steps))
    return torch.tensor([float(sum(map(Fraction, column)) / len(steps)) for column in columns]).view(5, 3)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_is_the_mean_of_the_samples_after_the_start():
    model = Drifting()
    average = RunningAverage(every=7, start=50)
    run(average, range(1, 501), model)
    state = average.averaged_state(model.state_dict())
    assert average.samples == len(range(56, 501, 7))
    assert torch.equal(state["weight"], mean(model, range(56, 501, 7)))
    assert state["scale"] == sum(range(56, 501, 7)) / average.samples
    assert state["count"] == 500  # not of floating point: the latest
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.float32, "scale": torch.float32, "count": torch.int64,
    }  # fmt: skip
    model.load_state_dict(state)


def test_between_two_checkpoints_it_is_the_mean_of_what_lies_between():
    model = Drifting()
    average = RunningAverage(every=10)
    checkpoints = {}
    for end in (0, 300, 800):
        run(average, range(average._last_step + 1, end + 1), model)
        checkpoints[end] = through_a_file(average.state_dict())
    assert torch.equal(
        average.averaged_state(model.state_dict(), checkpoints[300])["weight"], mean(model, range(310, 801, 10))
    )
    assert torch.equal(
        average.averaged_state(model.state_dict(), checkpoints[0])["weight"],
        average.averaged_state(model.state_dict())["weight"],
    )
    with pytest.raises(ValueError, match="a checkpoint of 80 samples"):
        average.averaged_state(model.state_dict(), checkpoints[800])
    checkpoints[300]["start"] = 5
    with pytest.raises(ValueError, match=re.escape("(every 10 steps after step 5) does not follow")):
        average.averaged_state(model.state_dict(), checkpoints[300])


@pytest.mark.parametrize("half", [3, 40, 45])
def test_resumes_bit_for_bit(half):
    model = Drifting()
    whole = RunningAverage(every=5, start=8)
    run(whole, range(1, 101), model)
    first = RunningAverage(every=5, start=8)
    run(first, range(1, half + 1), model)
    second = RunningAverage(every=5, start=8)
    second.load_state_dict(through_a_file(first.state_dict()))
    run(second, range(half + 1, 101), model)
    assert second.samples == whole.samples
    for name, total in whole.state_dict()["sums"].items():
        assert torch.equal(second.state_dict()["sums"][name], total)


def test_a_prolonged_run_drops_what_lies_wholly_before_its_window():
    model = Drifting()
    shorter = RunningAverage(every=5, start=60)
    run(shorter, range(1, 81), model)
    longer = RunningAverage(every=5, start=90)
    longer.load_state_dict(shorter.state_dict())
    run(longer, range(81, 121), model)
    assert torch.equal(longer.averaged_state(model.state_dict())["weight"], mean(model, range(95, 121, 5)))
    a_little = RunningAverage(every=5, start=70)
    a_little.load_state_dict(shorter.state_dict())
    run(a_little, range(81, 101), model)
    assert torch.equal(a_little.averaged_state(model.state_dict())["weight"], mean(model, range(65, 101, 5)))


def test_of_few_samples_it_is_the_model_as_it_is():
    model = Drifting()
    average = RunningAverage(every=20)
    run(average, range(1, 20), model)
    assert torch.equal(average.averaged_state(model.state_dict())["weight"], model.at(19))
    assert average.state_dict()["sums"] == {}
    run(average, range(20, 100), model)
    assert average.samples == 4
    assert torch.equal(average.averaged_state(model.state_dict())["weight"], model.at(99))
    run(average, range(100, 103), model)
    assert torch.equal(average.averaged_state(model.state_dict())["weight"], mean(model, range(20, 101, 20)))


def test_mistakes_are_named():
    model = Drifting()
    with pytest.raises(ValueError, match="every=0 must be at least 1 step"):
        RunningAverage(every=0)
    average = RunningAverage(every=10)
    run(average, range(1, 11), model)
    with pytest.raises(ValueError, match=re.escape("taken every 10 steps, now it would be 20")):
        RunningAverage(every=20).load_state_dict(average.state_dict())
    with pytest.raises(ValueError, match="format version 9"):
        average.load_state_dict({**average.state_dict(), "format_version": 9})
