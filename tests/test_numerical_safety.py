# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Half precision does not overflow where it need not, gradients are those of the plain formulas, and inference runs
through no Python function of autograd."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile

from spear_hf import SpearConfig, SpearForXVector, SpearModel
from spear_hf.blockwise_spear import MIN_FRAMES_FOR_GRADIENTS_IN_BLOCKS
from spear_hf.modeling_spear import (
    SpearBiasNorm,
    SpearBypass,
    SpearDownsample,
    masked_mean,
    relative_position_table,
    swoosh_l,
    swoosh_r,
)

from .test_transformers_contract import BINS, inputs, tiny_model


LARGE = 1e4
SWOOSHES = {swoosh_l: (4.0, 0.035), swoosh_r: (1.0, 0.313261687)}
HALF = (torch.float16, torch.bfloat16)
halves = pytest.mark.parametrize("dtype", HALF)


def spread(dtype):
    """Both signs, from the smallest to +-1e4, as 24 channels of 30 frames."""
    sizes = torch.logspace(-6, 4, 360)
    return (
        torch.cat([sizes, -sizes])[torch.randperm(720, generator=torch.Generator().manual_seed(0))]
        .view(1, 30, 24)
        .to(dtype)
    )


def assert_near(result, expected, dtype, steps=4):
    """Finite, and within so many of the dtype's steps at each value."""
    assert result.dtype == dtype
    assert result.isfinite().all()
    step = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal
    assert ((result.double() - expected).abs() <= steps * step + 0.5 * torch.finfo(dtype).eps).all()


def plain_swoosh(x, offset, constant):
    return torch.logaddexp(torch.zeros_like(x), x - offset) - 0.08 * x - constant


def plain_norm(x, bias, log_scale):
    return x * log_scale.exp() / (x - bias).square().mean(-1, keepdim=True).sqrt()


def random_norm(dtype):
    torch.manual_seed(0)
    norm = SpearBiasNorm(24).to(dtype)
    torch.nn.init.normal_(norm.bias, std=0.5)
    torch.nn.init.constant_(norm.log_scale, 0.7)
    return norm


@halves
@pytest.mark.parametrize("swoosh", SWOOSHES)
def test_swoosh_at_1e4(swoosh, dtype):
    x = spread(dtype).requires_grad_()
    result = swoosh(x)
    offset, constant = SWOOSHES[swoosh]
    # Two roundings of values as large as x, whatever is left of them.
    error = (result.detach().double() - plain_swoosh(x.detach().double(), offset, constant)).abs()
    assert result.isfinite().all()
    assert (error <= 2 * torch.finfo(dtype).eps * (x.detach().double().abs() + offset)).all()
    result.sum().backward()
    assert_near(x.grad, torch.sigmoid(x.detach().double() - offset) - 0.08, dtype)


@halves
def test_norm_at_1e4(dtype):
    norm, x = random_norm(dtype), spread(dtype)
    for scale in (1.0, 1e-3, 1e-6):  # the smallest: a thousandth of the bias
        expected = plain_norm((x * scale).double(), norm.bias.double(), norm.log_scale.double())
        assert_near(norm(x * scale).detach(), expected.detach(), dtype)
    large = torch.full((2, 3, 24), LARGE, dtype=dtype, requires_grad=True)
    result = norm(large * torch.tensor([1.0, -1.0], dtype=dtype)[:, None, None])
    assert result.abs().max() <= 1.01 * math.exp(0.7)
    result.square().sum().backward()
    assert all(gradient.isfinite().all() for gradient in (large.grad, norm.bias.grad, norm.log_scale.grad))


def test_norm_of_what_is_hardly_there():
    """The scale, 1e6 and more, is beyond half precision; its product with the input is not."""
    norm = random_norm(torch.float16)
    torch.nn.init.zeros_(norm.bias)
    assert (norm(torch.full((1, 1, 24), 1e-7, dtype=torch.float16)) - math.exp(0.7)).abs().max() < 0.01


@torch.no_grad()
@halves
def test_what_else_is_at_1e4(dtype):
    x = spread(dtype)
    bypass, downsample = SpearBypass(24).to(dtype), SpearDownsample(2).to(dtype)
    torch.nn.init.constant_(bypass.bypass_scale, 0.5)
    torch.nn.init.zeros_(downsample.bias)
    assert torch.allclose(bypass(x, -x), torch.zeros_like(x), atol=LARGE * torch.finfo(dtype).eps)
    assert downsample(x).isfinite().all()
    frames = torch.full((1, 3000, 24), LARGE, dtype=dtype)  # a minute
    mask = torch.ones(1, 3000, dtype=torch.bool)
    assert torch.equal(masked_mean(frames, mask), frames[:, 0])


@torch.no_grad()
def test_half_precision_pools_a_recording():
    """Sums over frames are beyond half precision; means and deviations are not."""
    model = tiny_model(SpearForXVector)
    model.tdnn[-1].bias.data += 100.0
    values = {"input_features": torch.randn(1, 2000, BINS)}
    expected = model(**values).embeddings
    result = model.half()(**{name: value.half() for name, value in values.items()}).embeddings
    assert (result - expected).norm() < 0.05 * expected.norm()


def first_layer():
    """Of a new model, with the inputs of its forward pass but the first; the second of two utterances is padded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_layers_per_stack": [1]}
    layer = (
        SpearModel(SpearConfig(**sizes, downsampling_factors=[1], conv_kernel_sizes=[31])).eval().stacks[0].layers[0]
    )
    mask = torch.arange(40) < torch.tensor([40, 13])[:, None]
    return layer, relative_position_table(40, 48, torch.device("cpu"), torch.float32), mask


@torch.no_grad()
@halves
@pytest.mark.parametrize("position_scale", [1.0, 1e5])
def test_attention_at_1e4(dtype, position_scale):
    """Scores of 1e9, with positions of as much, have the weights of a softmax, and padding has none."""
    layer, table, mask = first_layer()
    module, states = layer.self_attn_weights, LARGE * (2 * torch.rand(2, 40, 64) - 1)
    module.linear_pos.weight *= position_scale
    module.in_proj.bias.zero_()
    for sign in (1.0, -1.0):  # of the scores, all beyond half precision where the frames are alike
        module.in_proj.weight[256:512] = sign * module.in_proj.weight[:256]  # keys are queries
        for values in (states, states[:1, :1].expand(2, 40, 64)):
            weights = module.to(dtype)(values.to(dtype), table.to(dtype), mask).float()
            assert weights.isfinite().all()
            assert (weights.sum(dim=-1) - 1).abs().max() < 40 * torch.finfo(dtype).eps
            assert (weights[1, :, :, 13:] == 0).all()


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 3e3), (torch.bfloat16, 1e4)])
def test_layer_at_1e4(dtype, largest):
    """Forward and backward; inside the layer float32 has values of up to 5e4 at 3e3, and beyond float16 at 1e4."""
    layer, table, mask = first_layer()
    parameters = list(layer.parameters())
    weights = 1e-4 * torch.linspace(-1.0, 1.0, 64)  # as a scaler of the loss would have them
    for size in (1.0, 30.0, 1e3, largest):
        states = size * (2 * torch.rand(2, 40, 64) - 1)
        results = []
        for each in (torch.float32, dtype):
            leaf = states.to(each).requires_grad_()
            output = layer.to(each)(leaf, table.to(each), mask)
            results.append([output, *torch.autograd.grad((output.float() * weights).sum(), [leaf, *parameters])])
        layer.float()
        assert all(actual.isfinite().all() for actual in results[1])
        # Scores of 1e4 and more are rounded to ties, which leaves the output as it is, but not its gradient.
        for actual, expected in zip(results[1][: 2 if size <= 30.0 else 1], results[0]):
            assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("swoosh", SWOOSHES)
def test_gradients_of_swoosh(swoosh):
    x = torch.linspace(-30.3, 30.3, 61, dtype=torch.float64, requires_grad=True)  # beside 20, where softplus jumps
    assert gradcheck(swoosh, x)
    (ours,) = torch.autograd.grad(swoosh(x).sum(), x)
    (plain,) = torch.autograd.grad(plain_swoosh(x, *SWOOSHES[swoosh]).sum(), x)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-8)  # it is x itself above 20


def test_gradients_of_norm():
    norm = random_norm(torch.float64)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)

    def ours(x, bias, log_scale):
        return torch.func.functional_call(norm, {"bias": bias, "log_scale": log_scale}, (x,))

    arguments = (x, norm.bias, norm.log_scale)
    assert torch.allclose(ours(*arguments), plain_norm(*arguments), rtol=1e-12)
    assert gradcheck(ours, arguments)
    weights = torch.randn_like(x)
    for one, other in zip(
        torch.autograd.grad((ours(*arguments) * weights).sum(), arguments),
        torch.autograd.grad((plain_norm(*arguments) * weights).sum(), arguments),
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def python_functions(run):
    """Names of the Python functions of autograd that run."""
    names, stack = set(), [torch.autograd.Function]
    while stack:
        stack += (found := stack.pop().__subclasses__())
        names |= {function.__name__ for function in found}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = run()
    return output, {event.name for event in profiler.events()} & names


@pytest.mark.parametrize("frames", [75, 2 * MIN_FRAMES_FOR_GRADIENTS_IN_BLOCKS + 107])
def test_no_python_function_of_autograd_in_inference(frames):
    model, values = tiny_model(SpearModel), inputs(frames=frames)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output, names = python_functions(lambda: model(**values))
        assert not names
        assert output.last_hidden_state.grad_fn is None
    if frames > 75:  # that they would be seen
        output, names = python_functions(lambda: model(**values))
        assert names == {"_RecomputedAttention"}
        assert output.last_hidden_state.grad_fn is not None
