# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""WavLM's attention through torch's fused one.

WavLM adds a bias to its scores: one of the distance of two frames, the same for all utterances and layers, times a
gate that each frame computes for each head (arXiv 2110.13900, section 3.2). transformers repeats the former for every
utterance, writes scores and weights to memory, and averages weights that nobody asked for; on a GPU, utterances of
30 s spend most of their time there. Here the gated bias is the one thing written. Same parameters, same results but
for rounding.
"""

from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.wavlm.modeling_wavlm import WavLMAttention


ALIGNMENT = 16  # of the rows of a bias, in elements: this kernel copies others, and cuDNN's copies all
ON_GPU = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fuse_wavlm_attention(model: nn.Module) -> None:
    """For inference: attention weights are not returned, and there is no dropout of them."""
    for module in model.modules():
        if type(module) is WavLMAttention:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(
    module: WavLMAttention,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None, Tensor]:
    """hidden_states (batch, frames, dim), attention_mask (batch, frames), 1 for frames of the utterance -> the same
    shape, no weights, and the bias (1, heads, frames, frames) for the layers that come after."""
    frames = hidden_states.shape[1]
    if position_bias is None:
        position_bias = module.compute_bias(frames, frames)[None]
    bias = _gated(position_bias, _gate(module, hidden_states), attention_mask)
    query, key, value = (
        projection(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    with sdpa_kernel(ON_GPU) if query.is_cuda else nullcontext():
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return module.out_proj(attended.transpose(1, 2).flatten(-2)), None, position_bias


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
