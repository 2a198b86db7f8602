# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""WavLM's attention through fused ones.

WavLM adds a bias to its scores: one of the distance of two frames, the same for all utterances and layers, times a
gate that each frame computes for each head (arXiv 2110.13900, section 3.2). transformers repeats the former for every
utterance, writes scores and weights to memory, and averages weights that nobody asked for; on a GPU, utterances of
30 s spend most of their time there. In float16 and bfloat16 a kernel of wavlm_kernels.py computes biases, scores and
weights where they are used; elsewhere the gated bias is written for torch's attention. Same parameters, same results
but for rounding.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType, ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention


ALIGNMENT = 16  # of the rows of a bias, in elements: this kernel copies others, and cuDNN's copies all
ON_GPU = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HEAD_DIMS = (16, 32, 64, 128)  # that the kernel takes
SHARED_MEMORY = 160 * 1024  # bytes that the kernels need: data-centre GPUs from the A100 on have them
Result = TypeVar("Result")


class SharedBias(NamedTuple):
    """What the first layer hands to all others, for the kernel."""

    table: Tensor  # bias by distance, as `wavlm_kernels.skewed` makes it
    lengths: Tensor  # int32 (batch,), in frames


def fuse_wavlm_attention(model: nn.Module) -> None:
    """For inference: attention weights are not returned, there is no dropout of them, and parameters stay as they are
    when they are first used on a device and in a type."""
    for module in model.modules():
        if type(module) is WavLMAttention:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def kernels_for(x: Tensor) -> ModuleType | None:
    """wavlm_kernels.py, where it computes such tensors."""
    return _kernels(x.device) if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) else None


def prepared(module: nn.Module, x: Tensor, make: Callable[[Any], Result]) -> Result:
    """make(module), once for the type and device of x."""
    key = (x.device, x.dtype)
    if getattr(module, "_prepared_for", None) != key:
        module._prepared, module._prepared_for = make(module), key  # type: ignore[assignment]
    return module._prepared  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)
def _kernels(device: torch.device) -> ModuleType | None:
    if torch.version.hip:
        return None
    try:
        from spear_hf.mvq import wavlm_kernels

        if not wavlm_kernels.has_shared_memory(device, SHARED_MEMORY):
            return None
        x = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
        table = wavlm_kernels.skewed(x.new_zeros(1, 2 * wavlm_kernels.padded(1) - 1))
        weight, scale = torch.zeros(2, 64, device=device), torch.zeros(1, device=device)
        lengths = torch.ones(1, dtype=torch.int32, device=device)
        wavlm_kernels.attention(x, x, x, x, table, weight, weight[:, 0].contiguous(), scale, lengths)
    except Exception as error:  # no Triton, no C compiler, a driver that is too old: each in a way of its own
        warnings.warn(f"WavLM takes the slower way through torch's operations: {error}", stacklevel=2)
        return None
    return wavlm_kernels


def _forward(
    module: WavLMAttention,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | SharedBias | None = None,
    **_: Any,
) -> tuple[Tensor, None, Tensor | SharedBias]:
    """hidden_states (batch, frames, dim), attention_mask (batch, frames), 1 for frames of the utterance -> the same
    shape, no weights, and the bias for the layers that come after."""
    kernels = kernels_for(hidden_states) if module.head_dim in HEAD_DIMS else None
    if kernels is not None:
        shared = position_bias if isinstance(position_bias, SharedBias) else None
        return _through_kernel(kernels, module, hidden_states, attention_mask, shared)
    frames = hidden_states.shape[1]
    if not isinstance(position_bias, Tensor):
        position_bias = module.compute_bias(frames, frames)[None]  # (1, heads, frames, frames)
    bias = _gated(position_bias, _gate(module, hidden_states), attention_mask)
    query, key, value = (
        projection(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    with sdpa_kernel(ON_GPU) if query.is_cuda else nullcontext():
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return module.out_proj(attended.transpose(1, 2).flatten(-2)), None, position_bias


def _through_kernel(
    kernels: Any,
    module: WavLMAttention,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    shared: SharedBias | None,
) -> tuple[Tensor, None, SharedBias]:
    hidden_states = hidden_states.contiguous()
    if shared is None:
        shared = _shared_bias(kernels, module, hidden_states, attention_mask)
    query, key, value = (projection(hidden_states) for projection in (module.q_proj, module.k_proj, module.v_proj))
    gate = prepared(module, hidden_states, _gate_weights)
    attended = kernels.attention(query, key, value, hidden_states, shared.table, *gate, shared.lengths)
    return module.out_proj(attended), None, shared


def _shared_bias(kernels: Any, module: WavLMAttention, hidden_states: Tensor, mask: Tensor | None) -> SharedBias:
    batch, frames, _ = hidden_states.shape
    farthest = kernels.padded(frames) - 1
    distances = torch.arange(-farthest, farthest + 1, device=hidden_states.device)
    by_distance = module.rel_attn_embed(module._relative_positions_bucket(distances)).T  # (heads, distances)
    if mask is None:
        lengths = torch.full((batch,), frames, dtype=torch.int32, device=hidden_states.device)
    else:
        lengths = (mask == 1).sum(dim=1, dtype=torch.int32)
    return SharedBias(kernels.skewed(by_distance.to(hidden_states.dtype)), lengths)


def _gate_weights(module: WavLMAttention) -> tuple[Tensor, Tensor, Tensor]:
    """As the kernel takes them: of the eight outputs, the first four are added up, and the others."""
    linear = module.gru_rel_pos_linear
    weight, bias = linear.weight.detach().float(), linear.bias.detach().float()
    scale = module.gru_rel_pos_const.detach().float().flatten()
    return weight.unflatten(0, (2, 4)).sum(dim=1), bias.unflatten(0, (2, 4)).sum(dim=1), scale


def _gate(module: WavLMAttention, hidden_states: Tensor) -> Tensor:
    """(batch, heads, frames, 1)."""
    by_head = hidden_states.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    update, reset = module.gru_rel_pos_linear(by_head).unflatten(-1, (2, 4)).sum(dim=-1).sigmoid().split(1, dim=-1)
    return update * (reset * module.gru_rel_pos_const - 1.0) + 2.0


def _gated(position_bias: Tensor, gate: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(batch, heads, frames, frames): the bias times the gate of its query, and minus infinity for padding."""
    batch, heads, frames, _ = gate.shape
    padding = gate.new_zeros(batch, 1, 1, frames)
    if attention_mask is not None:
        padding.masked_fill_(attention_mask[:, None, None, :] != 1, -torch.inf)
    width = -(-frames // ALIGNMENT) * ALIGNMENT
    bias = gate.new_empty(batch, heads, frames, width)[..., :frames]
    return torch.addcmul(padding, gate, position_bias.to(gate.dtype), out=bias)
