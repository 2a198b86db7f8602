# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The batches of a run, made ahead by worker processes that end with it, however it ends."""

import contextlib
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..data.collation import MicroBatch, StepDataset, loader_arguments
from .signals import ignore_stop_signals


class _StepsOrErrors(Dataset):
    """Gives the error in place of a step: raised in a worker, its message would be a traceback.

    As a ValueError, since not every error survives the way from one process to another.
    """

    def __init__(self, steps: StepDataset) -> None:
        self.steps = steps

    def __getitem__(self, step: int) -> list[MicroBatch] | ValueError:
        try:
            return self.steps[step]
        except (ValueError, OSError) as error:
            return ValueError(str(error))


@contextlib.contextmanager
def loaded_steps(
    steps: StepDataset, numbers: range, num_workers: int, pin_memory: bool
) -> Iterator[Iterator[list[MicroBatch]]]:
    """The micro-batches of the steps `numbers`, one after the other.

    ChildProcessError, wherever the process is, when a worker is killed.
    """
    loader: DataLoader = DataLoader(
        _StepsOrErrors(steps),
        sampler=numbers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        **loader_arguments(num_workers),
    )
    made = iter(loader)
    workers = getattr(made, "_workers", [])
    try:
        yield map(_step, made)
    except (RuntimeError, OSError, EOFError) as error:
        if (code := _exit_code(workers)) is None:
            raise
        raise ChildProcessError(
            f"A process that prepares batches has died (exit code {code}: {str(error).strip(' .')}). Where memory has "
            "run out, lower execution.num_workers, or set execution.cache_audio=false. --resume continues from the "
            "last checkpoint."
        ) from error
    finally:
        _end(made, workers)


def _step(made: list[MicroBatch] | ValueError) -> list[MicroBatch]:
    if isinstance(made, ValueError):
        raise made
    return made


def _exit_code(workers: list[BaseProcess]) -> int | None:
    """Of one that has died; of a death the main process may hear otherwise before, as of a connection that is lost."""
    with contextlib.suppress(RuntimeError):  # which torch raises wherever the process is
        for worker in workers:
            worker.join(0.1)
    return next((worker.exitcode for worker in workers if worker.exitcode), None)


def _end(made: Any, workers: list[BaseProcess]) -> None:
    """Now, as an error would keep `made` until the exit of Python, which sends SIGTERM and waits: they ignore it."""
    if workers:
        with contextlib.suppress(RuntimeError):
            made._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
