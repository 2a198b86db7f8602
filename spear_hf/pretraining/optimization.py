# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The optimiser, its parameter groups, and setting its learning rate."""

from collections.abc import Iterable

import torch
from torch import nn

from .config import OptimizerConfig


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels, which decay, and vectors and scalars, which do not.

    The latter are the biases, the norms' scales, the bypass scales, the downsampling weights and the mask embedding.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of `config` over the trainable parameters of `model`."""
    return torch.optim.AdamW(
        parameter_groups(model.parameters(), config.weight_decay),
        lr=config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
