# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Signals that ask a run to save at the next step and leave."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


# SIGUSR1 is what schedulers send before the time is up (`sbatch --signal=USR1@300`).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore_stop_signals(worker: int) -> None:
    """For the loader's workers: launchers and schedulers signal all processes, and the step to come needs its data.

    A worker still ends with the process that started it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(BaseException):
    """A stop signal came while no step was under way; like KeyboardInterrupt, it passes what catches errors."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received


@contextlib.contextmanager
def stop_signals_raise() -> Iterator[None]:
    """While entered, a stop signal raises `Stopped`, but where `StopRequest` notes it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals nowhere else
        yield
        return
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """While entered, notes the stop signals instead of dying of them. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
