# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""FSDP2: weights, gradients and optimiser state in equal shards over the ranks (`execution.sharding: fsdp`).

torch's `fully_shard` is called here rather than by accelerate, whose FSDP plugin is for accelerators only (on the CPU
it does nothing, so no test could run it) and asks the model for token embeddings. Each layer is gathered when it is
needed and freed afterwards. Checkpoints hold whole tensors, the same files as without sharding, so a run may be
resumed with another number of ranks, or without sharding.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..modeling_spear import SpearLayer


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
    """Shards the model and its optimiser, with the state that it has, in place; the model goes to the device first.

    Parameters without a dimension (the scales of the norms), which `fully_shard` refuses, stay whole on every rank;
    `reduce_whole_gradients` must be called before every update.
    """
    if accelerator.num_processes < 2:
        raise ValueError("execution.sharding=fsdp needs two or more ranks: start it with torchrun, or set it to none.")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    check_means(accelerator.device)
    model.to(accelerator.device)
    names = {parameter: name for name, parameter in model.named_parameters()}
    whole = {parameter for parameter in names if parameter.ndim == 0}
    for module in model.modules():
        if isinstance(module, SpearLayer):
            fully_shard(module, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)

    def placed(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
        """A tensor of the optimiser's state, in shards if it is of the parameter's shape."""
        if not isinstance(value, torch.Tensor) or value.shape != old.shape or not isinstance(new, DTensor):
            return value
        return distribute_tensor(value.to(accelerator.device), new.device_mesh, new.placements)

    for group in optimizer.param_groups:
        old_parameters = group["params"]
        group["params"] = [model.get_parameter(names[old]) for old in old_parameters]
        for old, new in zip(old_parameters, group["params"]):
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[new] = {name: placed(value, old, new) for name, value in state.items()}
        if len({isinstance(parameter, DTensor) for parameter in group["params"]}) > 1:
            group["foreach"] = group["fused"] = False  # their kernels take no mixture of whole and sharded tensors


def check_means(device: torch.device) -> None:
    """ValueError where the ranks get the sum of what `fully_shard` asks them for the mean of: gloo of torch 2.7."""
    mean = torch.empty(1, device=device)
    dist.reduce_scatter_tensor(mean, torch.ones(dist.get_world_size(), device=device), op=dist.ReduceOp.AVG)
    if mean.item() != 1.0:
        raise ValueError(
            f"execution.sharding=fsdp: with torch {torch.__version__}, ranks on {device.type} add gradients up where "
            "they should average them. Install a newer torch, or set execution.sharding=none."
        )


def reduce_whole_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages the gradients that `fully_shard` was told to leave alone over the ranks, in one message."""
    gradients = [
        parameter.grad for parameter in parameters if parameter.grad is not None and not isinstance(parameter, DTensor)
    ]
    if not gradients:
        return
    flat = torch.stack([gradient.detach().reshape(()) for gradient in gradients])  # (scalars,)
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat / dist.get_world_size()):
        gradient.copy_(mean)


def parameter_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The norm of all parameters, shards of other ranks included: shape ()."""
    tensors = [parameter.detach() for parameter in parameters]
    whole = [tensor for tensor in tensors if not isinstance(tensor, DTensor)]
    local = [tensor.to_local() for tensor in tensors if isinstance(tensor, DTensor)]
    square = nn.utils.get_total_norm(whole).double() ** 2
    if local:
        shards = nn.utils.get_total_norm(local).double() ** 2
        dist.all_reduce(shards)
        square = square + shards
    return square.sqrt()


@torch.no_grad()
def load_from_main(model: nn.Module, state: Mapping[str, torch.Tensor] | None, accelerator: Accelerator) -> None:
    """Puts `state`, whole tensors that the first rank has, into the model of every rank; the others give None."""
    for name, tensor in model.state_dict().items():
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=accelerator.device)
        if state is not None:
            whole.copy_(state[name])
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(whole, tensor.device_mesh, tensor.placements))
        else:
            tensor.copy_(broadcast(whole))


def gathered(value: Any, keep: bool = True) -> Any:
    """A state dict with every sharded tensor whole and on the CPU; other values as they are.

    Ranks gather together, so all must call it; those with `keep` False get None in place of tensors.
    """
    if isinstance(value, dict):
        return {name: gathered(item, keep) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep) for item in value)
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    return value if keep or not isinstance(value, torch.Tensor) else None
