# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The encoder's linear layers in int8, for CPUs: a quarter of the weights' size, and faster (measured, README.md).

    quantize_linear_layers(model)          # in place, without data
    model.save_pretrained("my-spear-int8") # safetensors of int8; from_pretrained loads it once spear_hf is imported

Weights have a scale for each output, found once; inputs one for each frame, found as they come. One for all of the
input, as in `torch.ao.quantization.quantize_dynamic`, would let an utterance's output depend on its batch, and has a
larger error. Convolutions, norms and heads stay as they were. In float32, and without gradients: a head on it can be
trained, the encoder itself is frozen.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling_spear import SpearPreTrainedModel


logger = logging.get_logger(__name__)

METHOD = "spear_int8"


class Int8Linear(nn.Module):
    """`nn.Linear` of int8 weights `(out_features, in_features)`, and inputs that are rounded to int8."""

    weight_int8: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight_int8", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, device=device))
        self.register_buffer("bias", torch.empty(out_features, device=device) if bias else None)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """The same layer in int8, a scale for every output."""
        result = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.device)
        weight = linear.weight.float()
        result.weight_scale.copy_(_scale(weight).squeeze(-1))
        result.weight_int8.copy_((weight / result.weight_scale[:, None]).round())
        if linear.bias is not None and result.bias is not None:
            result.bias.copy_(linear.bias)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`, float32."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.float()
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "int8 layers have no gradients: train the model before `quantize_linear_layers`, or its head alone, "
                "after `model.freeze_base_model()`; elsewhere use torch.no_grad()."
            )
        if x.dtype != torch.float32:
            raise ValueError(f"int8 layers take float32, not {x.dtype}: load the model with dtype=torch.float32.")
        rows = x.reshape(-1, self.in_features)
        scale = _scale(rows)  # (rows, 1)
        product = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight_int8.t())
        result = product.float().mul_(scale).mul_(self.weight_scale)
        if self.bias is not None:
            result.add_(self.bias)
        return result.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _scale(rows: Tensor) -> Tensor:
    """Of each row, `(rows, 1)`: its largest value becomes 127."""
    return rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30) / 127.0


def quantize_linear_layers(model: SpearPreTrainedModel) -> SpearPreTrainedModel:
    """Replaces the encoder's linear layers in place, and notes it in the configuration; returns the model, in float32.

    Raises:
        ValueError: the model is in int8 already, or a weight is not finite; it is then as it was.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantised already.")
    _check_weights(model)
    _replace(model.float())
    model.base_model.requires_grad_(False)
    quantizer = SpearInt8Quantizer(SpearInt8Config(), pre_quantized=True)
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    return model.eval()


def _check_weights(model: SpearPreTrainedModel) -> None:
    for name, layer in model.base_model.named_modules():
        if isinstance(layer, nn.Linear) and not layer.weight.is_meta and not layer.weight.isfinite().all():
            raise ValueError(
                f"a weight of {name} is not finite, so there is no scale for it: load an earlier checkpoint."
            )


def _replace(model: SpearPreTrainedModel) -> None:
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear.from_linear(child))


@register_quantization_config(METHOD)
class SpearInt8Config(QuantizationConfigMixin):
    """What config.json says of a model in int8."""

    def __init__(self, **kwargs: Any):
        self.quant_method = METHOD  # type: ignore[assignment]


@register_quantizer(METHOD)
class SpearInt8Quantizer(HfQuantizer):
    """How `from_pretrained` loads one: its layers are replaced before the weights come."""

    requires_calibration = True  # not on the fly: see `quantize_linear_layers`

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        _replace(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.base_model.requires_grad_(False)
        return model

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype not in (None, torch.float32):
            logger.warning("A model in int8 is computed in float32, not in %s: dtype is ignored.", dtype)
        return torch.float32

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
