# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Linear layers in int8: their arithmetic, what becomes of the encoder's outputs and size, files, refusals."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from spear_hf import SpearConfig, SpearForCTC, SpearModel, quantize_linear_layers
from spear_hf.conversion.errors import ConversionError
from spear_hf.conversion.int8 import Int8Linear, SpearInt8Config
from spear_hf.conversion.onnx_export import export_onnx
from spear_hf.evaluation.embedding import load_encoder

from .test_transformers_contract import inputs, tiny_model


def linear_weights(model):
    return [module.weight for module in model.base_model.modules() if isinstance(module, nn.Linear)]


def size(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 40), (5, 40), (2, 3, 7, 40)])
def test_layer(shape):
    """Against rounded integers, multiplied exactly in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    linear.weight[3] = 0.0
    layer, x = Int8Linear.from_linear(linear), torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    row_scale = x.abs().amax(-1, keepdim=True).div(127)
    weight_scale = linear.weight.abs().amax(-1, keepdim=True).clamp(min=1e-30).div(127)
    whole = (x / row_scale).round().double() @ (linear.weight / weight_scale).round().double().t()
    expected = whole * row_scale.double() * weight_scale[:, 0].double() + linear.bias.double()
    assert torch.allclose(layer(x).double(), expected, rtol=1e-5, atol=1e-7)
    # Half a step of rounding in every input and weight, in the worst case.
    bound = 0.5 / 127 * 40 * x.abs().amax(-1, keepdim=True) * linear.weight.abs().amax(-1) * 2.1
    assert ((layer(x) - linear(x)).abs() <= bound + 1e-6).all()


@torch.no_grad()
def test_rows_without_a_scale():
    layer = Int8Linear.from_linear(nn.Linear(16, 8))
    x = torch.randn(3, 16)
    x[1], x[2, 5] = 0.0, torch.nan
    result = layer(x)
    assert torch.equal(result[1], layer.bias)
    assert result[2].isnan().all()
    assert torch.equal(result[0], layer(x[:1])[0])


@torch.no_grad()
def test_encoder_stays_close_and_shrinks():
    torch.manual_seed(0)
    model = SpearModel(SpearConfig(hidden_size=64, intermediate_size=192, num_layers_per_stack=[1] * 7)).eval()
    values = {"input_features": torch.randn(2, 300, 128), "attention_mask": torch.ones(2, 300)}
    before, expected = size(model), model(**values, output_hidden_states=True).hidden_states
    weights = linear_weights(model)
    assert quantize_linear_layers(model) is model
    assert not linear_weights(model)
    # Three bytes of four, less a scale for each output.
    assert before - size(model) == sum(3 * weight.numel() - 4 * weight.shape[0] for weight in weights)
    for state, other in zip(model(**values, output_hidden_states=True).hidden_states, expected, strict=True):
        assert 0 < (state - other).norm() < 0.02 * other.norm()


@torch.no_grad()
def test_independent_of_the_batch():
    model = quantize_linear_layers(tiny_model(SpearModel))
    values = inputs()
    values["input_features"][0] *= 100.0
    together = model(**values)
    for row, frames in enumerate(values["attention_mask"].sum(dim=1)):
        alone = model(values["input_features"][row : row + 1, :frames]).last_hidden_state[0]
        assert (together.last_hidden_state[row, : len(alone)] - alone).abs().max() <= 1e-4 * alone.abs().max()


@torch.no_grad()
def test_saved_and_loaded(tmp_path, caplog):
    model = quantize_linear_layers(tiny_model(SpearForCTC))
    assert type(model.lm_head) is nn.Linear
    model.save_pretrained(tmp_path)
    names = {name for name, tensor in load_file(tmp_path / "model.safetensors").items() if tensor.dtype == torch.int8}
    assert names == {name for name in model.state_dict() if name.endswith("weight_int8")}
    loaded, info = SpearForCTC.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.eval()(**inputs()).logits, model(**inputs()).logits)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(encoder(**inputs()).last_hidden_state, model.spear(**inputs()).last_hidden_state)
    single, _ = load_encoder(tmp_path, "cpu", "bfloat16")
    assert "float32, not in torch.bfloat16" in caplog.text
    assert torch.equal(single(**inputs()).last_hidden_state, encoder(**inputs()).last_hidden_state)
    with pytest.raises(ValueError, match=r"float32, not torch\.bfloat16"):
        single.bfloat16()(**inputs())


def test_what_is_refused(tmp_path):
    model = tiny_model(SpearModel)
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"on-the-fly|pre-quantized"):
        SpearModel.from_pretrained(tmp_path / "float", quantization_config=SpearInt8Config())
    quantize_linear_layers(model)
    with pytest.raises(ValueError, match="already"):
        quantize_linear_layers(model)
    with pytest.raises(ConversionError, match="int8"):
        export_onnx(model, tmp_path / "spear.onnx")
    broken = tiny_model(SpearModel)
    broken.stacks[0].layers[0].feed_forward1.in_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"feed_forward1\.in_proj is not finite"):
        quantize_linear_layers(broken)
    assert not any(isinstance(module, Int8Linear) for module in broken.modules())
    assert not hasattr(broken.config, "quantization_config")


@torch.no_grad()
def test_a_model_in_half_precision_is_computed_in_float32_and_autocast_is_no_error():
    model = tiny_model(SpearModel)
    expected = model(**inputs()).last_hidden_state
    model = quantize_linear_layers(model.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(**inputs()).last_hidden_state
    for states in (model(**inputs()).last_hidden_state, under_autocast):
        assert (states - expected).norm() < 0.05 * expected.norm()


def test_sizes_are_planned_without_weights():
    """On the meta device, which has no autocast and no numbers to look at."""
    with torch.device("meta"):
        model = quantize_linear_layers(tiny_model(SpearModel))
        assert model(**inputs()).last_hidden_state.is_meta
    assert size(model) == size(quantize_linear_layers(tiny_model(SpearModel)))


def test_heads_are_trained_on_a_frozen_encoder(tmp_path):
    quantize_linear_layers(tiny_model(SpearForCTC)).save_pretrained(tmp_path)
    for model in (quantize_linear_layers(tiny_model(SpearForCTC)), SpearForCTC.from_pretrained(tmp_path)):
        model.train()(**inputs()).logits.mean().backward()
        assert {name for name, param in model.named_parameters() if param.grad is not None} == {
            "lm_head.weight",
            "lm_head.bias",
        }
        model.requires_grad_(True)
        with pytest.raises(ValueError, match="no gradients"):
            model(**inputs())
