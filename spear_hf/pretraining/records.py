# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Where the metrics of a run go: JSON lines in its folder, and accelerate's trackers."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator

from .metrics import JsonLines, numbers
from .run_folder import RunFolder


class Records:
    """Takes what the first rank has to record; of other ranks nothing.

    Args:
        files: by the kind of their records.
    """

    def __init__(self, accelerator: Accelerator, files: Mapping[str, JsonLines]) -> None:
        self._accelerator = accelerator
        self._files = dict(files)

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """A record, which has its step."""
        if self._files:
            self._files[kind].write(record)
            self._accelerator.log(numbers(record, kind), step=record["step"])

    def sync(self) -> None:
        """Flushes to the disk, before a checkpoint that goes with it."""
        for file in self._files.values():
            file.sync()


@contextlib.contextmanager
def open_records(accelerator: Accelerator, folder: RunFolder, step: int) -> Iterator[Records]:
    """Of a run that goes on after `step`; records of later steps are removed."""
    with contextlib.ExitStack() as stack:
        files = {}
        if accelerator.is_main_process:
            kinds = {"training": folder.metrics, "evaluation": folder.evaluation, "probe": folder.probes}
            for kind, path in kinds.items():
                files[kind] = stack.enter_context(JsonLines(path, step))
            files["averaged"] = stack.enter_context(JsonLines(folder.averaged))  # of the end, which is still to come
            accelerator.init_trackers("spear-hf", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        yield Records(accelerator, files)
