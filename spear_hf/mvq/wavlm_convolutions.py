# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""WavLM's convolutions through kernels of wavlm_kernels.py, in float16 and bfloat16 on a GPU.

transformers keeps channels before frames, so that every layer norm copies its input there and back, as do the
convolutions of cuDNN; and cuDNN makes a plan for every length that it has not seen. With frames before channels a
convolution is a matrix product of rows that overlap, and layer norm and GELU are done before anything is written.
Same parameters, same results but for rounding.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.models.wavlm.modeling_wavlm import (
    WavLMFeatureEncoder,
    WavLMLayerNormConvLayer,
    WavLMPositionalConvEmbedding,
)

from spear_hf.mvq.wavlm_attention import kernels_for, prepared


WIDTHS = (16, 32, 64, 128, 256, 512)  # channels that the kernels take
GROUP_WIDTHS = (16, 32, 64, 128)


def fuse_wavlm_convolutions(model: nn.Module) -> None:
    """For inference; parameters stay as they are when they are first used on a device and in a type."""
    for module in model.modules():
        if type(module) is WavLMFeatureEncoder and _is_taken(module):
            module.forward = MethodType(_features, module)  # type: ignore[method-assign]
        if type(module) is WavLMPositionalConvEmbedding and _is_gelu(module.activation):
            groups, width = module.conv.groups, module.conv.in_channels // module.conv.groups
            if width in GROUP_WIDTHS and module.conv.out_channels == groups * width:
                module.forward = MethodType(_positions, module)  # type: ignore[method-assign]


def _is_taken(module: WavLMFeatureEncoder) -> bool:
    return all(
        type(layer) is WavLMLayerNormConvLayer and _is_gelu(layer.activation) and layer.out_conv_dim in WIDTHS
        for layer in module.conv_layers
    )


def _is_gelu(activation: nn.Module) -> bool:
    """Not one of its approximations."""
    return isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu


def _features(module: WavLMFeatureEncoder, input_values: Tensor) -> Tensor:
    """(batch, samples) -> (batch, channels, frames)."""
    kernels: Any = kernels_for(input_values)
    if kernels is None:
        return type(module).forward(module, input_values)
    x = input_values.contiguous()
    for layer in module.conv_layers:
        x = kernels.convolution(x, prepared(layer, x, lambda layer: _weights(kernels, layer)))
    return x.transpose(1, 2)


def _weights(kernels: Any, layer: WavLMLayerNormConvLayer) -> Any:
    convolution, norm = layer.conv, layer.layer_norm
    weight = convolution.weight.detach()  # (channels, channels in, taps)
    return kernels.ConvolutionWeights(
        weight=weight.permute(2, 1, 0).flatten(0, 1).contiguous(),
        bias=torch.zeros_like(weight[:, 0, 0], dtype=torch.float32)
        if convolution.bias is None
        else convolution.bias.detach().float(),
        norm_weight=norm.weight.detach().float(),
        norm_bias=norm.bias.detach().float(),
        eps=norm.eps,
        taps=convolution.kernel_size[0],
        stride=convolution.stride[0],
    )


def _positions(module: WavLMPositionalConvEmbedding, hidden_states: Tensor) -> Tensor:
    """(batch, frames, dim) -> the same shape."""
    kernels: Any = kernels_for(hidden_states)
    if kernels is None:
        return type(module).forward(module, hidden_states)
    return kernels.position_convolution(
        hidden_states.contiguous(), *prepared(module, hidden_states, _position_weights)
    )


def _position_weights(module: WavLMPositionalConvEmbedding) -> tuple[Tensor, Tensor]:
    """The weight norm is undone once."""
    convolution: Any = module.conv
    weight = convolution.weight.detach().unflatten(0, (convolution.groups, -1))  # (groups, out, in, taps)
    return weight.permute(0, 3, 2, 1).contiguous(), convolution.bias.detach().float()
