# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The ranks of a run: how they find each other, and how they part."""

import contextlib
import datetime
import os
import time
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

from .config import PreTrainingConfig
from .run_folder import RunFolder
from .setup import uses_bf16


def make_accelerator(config: PreTrainingConfig, folder: RunFolder) -> Accelerator:
    """Devices, ranks, precision and trackers. ValueError if the ranks that were launched do not find each other."""
    check_trackers(config.logging.trackers)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Where there is no accelerator, accelerate must be told so, or each of several ranks believes to be alone.
        cpu=launched > 1 and not torch.accelerator.is_available(),
        mixed_precision="bf16" if uses_bf16(config.execution) else "no",
        log_with=list(config.logging.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(folder.path), logging_dir=str(folder.trackers)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=config.execution.timeout_minutes))],
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}: configure it for plain multi-GPU, "
            "and have the model sharded with --set execution.sharding=fsdp."
        )
    if accelerator.gradient_accumulation_steps != 1:  # accelerate would divide the gradients by it
        raise ValueError(
            f"accelerate is told to accumulate the gradients of {accelerator.gradient_accumulation_steps} steps: "
            "unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS. A step is data.batch_seconds, of which a device takes "
            "execution.batch_seconds_per_device at a time."
        )
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate makes {accelerator.num_processes} of them: check its "
            "configuration (`accelerate env`), or start one process."
        )
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """ValueError if accelerate cannot use one of them here."""
    if missing := set(names) - {str(tracker) for tracker in get_available_trackers()} - {"all"}:
        raise ValueError(
            f"logging.trackers: {', '.join(sorted(missing))} cannot be used: install it, or leave it out with --set "
            "logging.trackers=[tensorboard]."
        )


def leave(accelerator: Accelerator) -> None:
    """Ends the trackers and the process group."""
    if accelerator.num_processes > 1:
        # gloo's threads free the tensors of the last messages, for which they need Python's lock. Where the group is
        # freed before, by DDP and under that lock, each waits for the other (seen with torch 2.11).
        time.sleep(0.1)
    with contextlib.suppress(AttributeError):  # a tracker whose start was cut short lacks what it would end
        accelerator.end_training()
