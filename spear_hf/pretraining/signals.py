# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Signals that ask a run to save at the next step and leave."""

import signal
import threading
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
