# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The number of the current epoch, for all that draws at random: samplers in this process, collators in workers."""

import torch
from transformers import TrainerCallback


class EpochCounter(TrainerCallback):
    """Epochs begun before the current one. As a callback of the Trainer it follows the training, resumed ones too.

    The number lies in shared memory, so that loader workers that live for several epochs see it change.
    """

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def value(self) -> int:
        return int(self._value)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._value.fill_(int(state.epoch or 0))
