# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The running average of the weights, which is what is published of a run (paper: sampled every 200 steps).

    average = RunningAverage(every=200, start=300_000)
    for step in ...:                    # 1, 2, ...
        ...                             # an update of the model
        average.update(step, model.state_dict())
    model.load_state_dict(average.averaged_state(model.state_dict()))

The arithmetic mean of the weights after steps `every`, 2 `every`, ... that come after `start`, all of equal weight.
What is kept is their sum, so the mean between two checkpoints of a run follows from both: `averaged_state(earlier)`.

Sums are float64, on the CPU: float32 weights are added without an error that float32 could show (2^-53 of the sum for
each of some thousand samples), and the difference of two sums is as exact. They take 8 bytes a weight of host memory,
nothing on the accelerator, and nothing before the first sample; see `model_cards/benchmarks/optimizers.csv` for the
time of a sample. Weights are equal on all ranks of data-parallel training, so one rank need keep the average.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


FORMAT_VERSION = 1

# A mean of fewer is rather an older state of the model than an average: of a short run, the last weights are better.
FEWEST_SAMPLES = 5


class RunningAverage:
    """See the module.

    Args:
        every: steps between two samples.
        start: samples are taken after this step. Where it differs from that of a state that is loaded, as in a run
            that is prolonged, the samples of that state stay if any of them is of after `start`, else are dropped.
    """

    def __init__(self, every: int = 200, start: int = 0) -> None:
        if every < 1 or start < 0:
            raise ValueError(f"every={every} must be at least 1 step, and start={start} not negative.")
        self.every = every
        self.start = start
        self.samples = 0
        self._last_step = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Takes a sample of a model's `state` after `step` (the first is 1), where one is due.

        Its parameters and buffers of floating point are sampled, as whole tensors.
        """
        if step <= self.start or step % self.every:
            return
        for name, tensor in state.items():
            if tensor.is_floating_point():
                if name not in self._sums:
                    self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                self._sums[name].add_(tensor.cpu())
        self.samples += 1
        self._last_step = step

    @property
    def is_published(self) -> bool:
        """Whether the mean is better than the last weights."""
        return self.samples >= FEWEST_SAMPLES

    def averaged_state(
        self, latest: Mapping[str, Tensor], earlier: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """State of the model with averaged weights, in their own data types, on the CPU.

        Args:
            latest: the state of the model as it is now, of which what is not averaged is taken.
            earlier: the `state_dict()` of an earlier checkpoint of the same run: only samples since then count.

        ValueError if no samples would remain or if `earlier` is not of the same sequence of samples. Without
        `earlier`, and with less than `FEWEST_SAMPLES` samples, it is `latest`.
        """
        samples, sums = self.samples, self._sums
        if earlier is not None:
            samples -= earlier["samples"]
            same = earlier["every"] == self.every and earlier["start"] == self.start
            if samples < 1 or (earlier["samples"] and not same):
                raise ValueError(
                    f"The mean since a checkpoint of {earlier['samples']} samples (every {earlier['every']} steps "
                    f"after step {earlier['start']}) does not follow from {self.samples} (every {self.every} after "
                    f"step {self.start}): give the state of an earlier checkpoint of the same run."
                )
            if earlier["samples"]:
                sums = {name: total - earlier["sums"][name] for name, total in sums.items()}
        state = {name: tensor.detach().cpu() for name, tensor in latest.items()}
        if earlier is not None or self.is_published:
            state |= {name: (total / samples).to(state[name].dtype) for name, total in sums.items()}
        return state

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, which alias the sums: save it before the next update."""
        return {
            "format_version": FORMAT_VERSION,
            "every": self.every,
            "start": self.start,
            "samples": self.samples,
            "last_step": self._last_step,
            "sums": self._sums,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was saved. ValueError if its samples are of other steps."""
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"The running average has format version {state['format_version']}, not {FORMAT_VERSION}."
            )
        if state["last_step"] <= self.start:
            self.samples, self._last_step, self._sums = 0, 0, {}
            return
        if state["every"] != self.every:
            raise ValueError(
                f"The running average was taken every {state['every']} steps, now it would be {self.every}: restore "
                "the configuration."
            )
        self.start = state["start"]
        self.samples, self._last_step = state["samples"], state["last_step"]
        self._sums = {name: total.to("cpu", torch.float64, copy=True) for name, total in state["sums"].items()}
