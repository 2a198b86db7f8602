# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The optimiser, its parameter groups, clipping, and setting its learning rate."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from .config import OptimizerConfig
from .scaled_adam import ScaledAdam


# Ways of training in which a rank sees parts of tensors only.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


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


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, distributed_type: DistributedType = DistributedType.NO
) -> torch.optim.Optimizer:
    """The optimiser of `config` over the trainable parameters of `model`. ValueError if it cannot work on shards."""
    if config.name == "scaled_adam":
        if distributed_type in SHARDED:
            raise ValueError(
                f"optimizer.name=scaled_adam needs whole tensors on every rank, but {distributed_type.value} shards "
                "them: launch with DDP (the default), or set optimizer.name=adamw."
            )
        named = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        return ScaledAdam(
            named, config.peak_rate, (config.betas[0], config.betas[1]), config.eps, **vars(config.scaled_adam)
        )
    assert config.weight_decay is not None
    return torch.optim.AdamW(
        parameter_groups(model.parameters(), config.weight_decay),
        lr=config.peak_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,  # one kernel for many tensors
    )


def clip_gradients(
    accelerator: Accelerator, parameters: Sequence[nn.Parameter], config: OptimizerConfig
) -> torch.Tensor:
    """The norm of the gradients before clipping, which is done here for AdamW; ScaledAdam clips in its own step."""
    if config.max_grad_norm is not None:
        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
    else:
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clipping_factor(optimizer: Any, config: OptimizerConfig, grad_norm: float) -> float:
    """What the gradients of the last update were multiplied by."""
    inner = getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper
    if isinstance(inner, ScaledAdam):
        return inner.clipping_factor
    assert config.max_grad_norm is not None
    return min(1.0, config.max_grad_norm / (grad_norm + 1e-6))  # as torch does it


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
