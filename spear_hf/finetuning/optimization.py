# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""How fast which parameters learn: a smaller rate for the encoder, and an encoder that is frozen at first.

The paper fine-tunes for ASR with the encoder's rate times 0.05 and the encoder frozen for 2,000 steps.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


def decayed_names(model: nn.Module) -> list[str]:
    """Parameters that weight decay applies to: matrices and kernels, not biases, norms and other vectors."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def scale_learning_rate(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], scale: float
) -> torch.optim.Optimizer:
    """Gives the parameters `scale` times the learning rate of their group, in a group of their own.

    To be called before the optimiser has taken a step and before a schedule is built on it: schedules keep the ratio.
    """
    scaled = {id(parameter) for parameter in parameters}
    groups = []
    for group in optimizer.param_groups:
        for inside in (False, True):
            members = [parameter for parameter in group["params"] if (id(parameter) in scaled) == inside]
            if members:
                groups.append({**group, "params": members, "lr": group["lr"] * scale if inside else group["lr"]})
    optimizer.param_groups[:] = groups
    return optimizer


class FreezeThenThaw(TrainerCallback):
    """Keeps the encoder as it is for the first `steps` optimiser steps (-1: for all), then lets it learn.

    Frozen parameters need no gradients, which saves time and memory; they are in the optimiser from the beginning,
    without a state. A resumed training goes on with what its step asks for.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.frozen: list[nn.Parameter] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if self.steps >= state.max_steps:
            logger.warning(
                f"freeze_encoder_steps={self.steps}, and there are only {state.max_steps} steps: the encoder will "
                "not be trained."
            )
        if self._is_early(state.global_step):
            self.frozen = [
                parameter for parameter in kwargs["model"].base_model.parameters() if parameter.requires_grad
            ]
            for parameter in self.frozen:
                parameter.requires_grad = False

    def on_step_begin(self, args, state, control, **kwargs):
        if self.frozen and not self._is_early(state.global_step):
            self._thaw()

    def on_train_end(self, args, state, control, **kwargs):
        self._thaw()

    def _is_early(self, step: int) -> bool:
        return self.steps == -1 or step < self.steps

    def _thaw(self) -> None:
        for parameter in self.frozen:
            parameter.requires_grad = True
        if self.frozen:
            torch.compiler.reset()  # graphs of the frozen encoder would go on, which torch does not notice
        self.frozen = []
