# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spear-hf pretrain` and `spear-hf report` do: settings in, messages and an exit code out."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.distributed import DistError
from transformers.utils import logging as transformers_logging

from ..memory_errors import lack_of_memory
from .config import load_config
from .loop import NonFiniteLossError, pretrain
from .planning import plan_run
from .report import write_report
from .signals import Stopped, stop_signals_raise


# EX_TEMPFAIL of sysexits.h: "try again later", here with --resume.
INTERRUPTED = 75


def run_pretraining(name_or_file: str, overrides: list[str], resume: bool = False, dry_run: bool = False) -> int:
    """Trains, or with `dry_run` prints the plan. Exit code 0: finished; 75: stopped by a signal; 1: error.

    Of the ranks of a launcher the first one says what all would.
    """
    transformers_logging.disable_progress_bar()  # one for every checkpoint
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        with messages_shown(), stop_signals_raise():
            config = load_config(name_or_file, overrides)
            if dry_run:
                if speaks:
                    print(plan_run(config))
                return 0
            outcome = pretrain(config, resume=resume)
    except (ValueError, NonFiniteLossError, OSError) as error:
        print(f"spear-hf pretrain: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if (message := explained(error)) is None:
            raise
        print(f"spear-hf pretrain: {message}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(
            f"Stopped by {stop.received.name} with no step under way, so there was nothing to save. The same command "
            "goes on, with --resume if its output_dir holds a run.",
            file=sys.stderr,
        )
        return INTERRUPTED
    if outcome.interrupted_by is not None:
        if speaks:
            print(
                f"Stopped by {outcome.interrupted_by} after step {outcome.step}, which is saved in "
                f"{config.output_dir}. The same command with --resume goes on.",
                file=sys.stderr,
            )
        return INTERRUPTED
    if speaks:
        print(outcome.final)
    return 0


def explained(error: Exception) -> str | None:
    """What to do about an error that is no fault of the program; None of any other."""
    if lacking := lack_of_memory(error):
        return (
            f"there is not enough memory ({lacking}): lower execution.batch_seconds_per_device, which leaves every "
            "step its batch, and go on with --resume; in a new run, take a smaller model."
        )
    if isinstance(error, DistError) or "gloo/transport" in str(error):
        first = str(error).splitlines()[0]
        return f"another rank has ended, or cannot be reached, and its own messages say why ({first})."
    return None


def run_report(runs: Sequence[Path], output: Path | None) -> int:
    """Writes the report of one or more runs and prints its path. Exit code 0, or 1 after an error."""
    try:
        if output is None and len(runs) > 1:
            raise ValueError("several runs are compared in a folder of its own: name it with --output.")
        print(write_report(runs, output or runs[0] / "report"))
    except (ValueError, OSError) as error:
        print(f"spear-hf report: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def messages_shown() -> Iterator[None]:
    """Shows the package's messages on stderr, as they are."""
    package_logger = logging.getLogger("spear_hf")
    handler = logging.StreamHandler()
    level, propagate = package_logger.level, package_logger.propagate
    package_logger.addHandler(handler)
    package_logger.setLevel(logging.INFO)
    package_logger.propagate = False
    try:
        yield
    finally:
        package_logger.removeHandler(handler)
        package_logger.setLevel(level)
        package_logger.propagate = propagate
