# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A teacher's features of some utterances, in steps that can be done apart: prepared, launched, and taken.

While a device computes the features of one batch, a thread prepares the next one; and the next is launched before
anyone waits for the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor


if TYPE_CHECKING:
    from spear_hf.mvq.teachers import Teacher, Window


class Extraction:
    """Made by `Teacher.prepare`; `result` does what has not been done.

    With a batch of the teacher's or less, all is launched by `launch`. The batches of more audio, whose inputs or
    features should not all be held at once, are done by `result`, one after the other.
    """

    @torch.no_grad()
    def __init__(
        self, teacher: Teacher, arrays: list[np.ndarray], names: list[str], plans: Sequence[Sequence[Window]]
    ) -> None:
        self._teacher, self._arrays, self._names, self._plans = teacher, arrays, names, plans
        jobs = [(index, part, window) for index, plan in enumerate(plans) for part, window in enumerate(plan)]
        # By length, so that little is padded; the longest first, so that memory runs out at once or never.
        jobs.sort(key=lambda job: (job[2].start - job[2].stop, job[0], job[1]))
        self._batches = teacher.batches(jobs)
        self._first_inputs = self._inputs(0) if jobs else None
        self._launched: list[Tensor] | None = None
        self._done: torch.cuda.Event | None = None

    @torch.no_grad()
    def launch(self) -> None:
        """Has the device compute, without waiting for it."""
        if self._launched is None and self._batches:
            with self._on_device():
                self._launched = self._teacher.features(self._first_inputs)
                if self._teacher.device.type == "cuda":
                    self._done = torch.cuda.Event()
                    self._done.record()
            self._first_inputs = None

    @torch.no_grad()
    def result(self, transform: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """Of every utterance, float32 (frames, feature_size), or what `transform` makes of it: (frames, ...).

        ValueError for features that are not finite. If `launch` was called, and the device has been given more since,
        a transform is computed beside that; it must wait for its own result, as one that leaves the device does.
        """
        parts: dict[tuple[int, int], Tensor] = {}
        for number, batch in enumerate(self._batches):
            if number == 0 and self._launched is not None:
                with self._beside() if transform is not None else nullcontext():
                    pieces = self._taken(batch, self._launched, transform)
                self._launched = None
            else:
                inputs = self._first_inputs if number == 0 else self._inputs(number)
                self._first_inputs = None
                with self._on_device():
                    pieces = self._taken(batch, self._teacher.features(inputs), transform)
            for (index, part, _), piece in zip(batch, pieces):
                parts[index, part] = piece
        return [torch.cat([parts[index, part] for part in range(len(plan))]) for index, plan in enumerate(self._plans)]

    def _inputs(self, number: int) -> Any:
        rows = [self._arrays[index][window.start : window.stop] for index, _, window in self._batches[number]]
        with self._on_device():
            return self._teacher.inputs(rows)

    def _taken(
        self,
        batch: list[tuple[int, int, Window]],
        outputs: list[Tensor],
        transform: Callable[[Tensor], Tensor] | None,
    ) -> Sequence[Tensor]:
        """The frames wanted of each output, transformed."""
        kept = []
        for (index, _, window), output in zip(batch, outputs):
            self._teacher.check_shape(output, window.stop - window.start, self._names[index])
            kept.append(output[window.first : window.last].float())
        frames = torch.cat(kept)  # (all frames of the batch, feature_size)
        if not torch.isfinite(frames).all():  # once a batch: every look at a value waits for the device
            bad = next(job for job, rows in zip(batch, kept) if not torch.isfinite(rows).all())
            dtype = self._teacher.dtype
            helps = "see to the level of the audio" if dtype == torch.float32 else "try dtype=float32"
            raise ValueError(
                f"{self._names[bad[0]]}: features of {self._teacher.id} in {dtype} are NaN or infinite; {helps}"
            )
        rows = frames if transform is None else transform(frames)
        return rows.split([len(part) for part in kept])

    def _on_device(self) -> AbstractContextManager:
        """Threads begin with the first device, and kernels of Triton's go to the current one."""
        device = self._teacher.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _beside(self) -> AbstractContextManager:
        """Work on a stream of its own, after what was launched and before what was launched later."""
        if self._done is None:
            return nullcontext()
        stream = self._teacher.stream_beside()
        stream.wait_event(self._done)
        return torch.cuda.stream(stream)
