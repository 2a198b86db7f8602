# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spear-hf pretrain` does: settings in, messages and an exit code out."""

import logging
import sys

from transformers.utils import logging as transformers_logging

from .config import load_config
from .loop import NonFiniteLossError, pretrain
from .planning import plan_run


# EX_TEMPFAIL of sysexits.h: "try again later", here with --resume.
INTERRUPTED = 75


def run_pretraining(name_or_file: str, overrides: list[str], resume: bool = False, dry_run: bool = False) -> int:
    """Trains, or with `dry_run` prints the plan. Exit code 0: finished; 75: stopped by a signal; 1: error."""
    package_logger = logging.getLogger("spear_hf")
    package_logger.setLevel(logging.INFO)
    package_logger.addHandler(logging.StreamHandler())
    package_logger.propagate = False
    transformers_logging.disable_progress_bar()  # one for every checkpoint
    try:
        config = load_config(name_or_file, overrides)
        if dry_run:
            print(plan_run(config))
            return 0
        outcome = pretrain(config, resume=resume)
    except (ValueError, NonFiniteLossError, OSError) as error:
        print(f"spear-hf pretrain: {error}", file=sys.stderr)
        return 1
    if outcome.interrupted_by is not None:
        print(
            f"Stopped by {outcome.interrupted_by} after step {outcome.step}, which is saved in {config.output_dir}. "
            "The same command with --resume goes on.",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(outcome.final)
    return 0
