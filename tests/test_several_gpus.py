# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What is on another GPU than the current one is computed there, as `pipeline(device=1)` and `model.to("cuda:1")` ask.

The first GPU stands in where there is one alone.
"""

import pytest
import torch
from torch import nn

from spear_hf.compiled_spear import depthwise_weight_gradient, kernels, scores_by_offset
from spear_hf.pretraining.regularizers_balancer import balancing_line
from spear_hf.pretraining.regularizers_kernels import kernels_for
from spear_hf.pretraining.regularizers_schedules import BALANCERS
from spear_hf.pretraining.regularizers_whiten import WhitenState, whiten
from spear_hf.pretraining.scaled_adam import ScaledAdam

from .test_quantizer import random_frames, random_quantizer


@pytest.fixture(params=["first", "second"])
def device(request):
    """With the first one as the current device."""
    number = ("first", "second").index(request.param)
    if torch.cuda.device_count() <= number:
        pytest.skip("needs two GPUs, and torch sees one")
    with torch.cuda.device(0):
        yield torch.device("cuda", number)


@pytest.mark.gpu
def test_gradients_of_compiled_layers(device):
    assert kernels(device) is not None
    scores = torch.randn(2, 3, 70, 70)
    assert torch.equal(scores_by_offset(scores.to(device)).cpu(), scores_by_offset(scores))
    grad, x = torch.randn(2, 3, 64, 130)
    found = depthwise_weight_gradient(grad.to(device), x.to(device), 7)
    torch.testing.assert_close(found.cpu(), depthwise_weight_gradient(grad, x, 7), rtol=1e-4, atol=1e-3)


@pytest.mark.gpu
def test_regularizers(device):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 300, 64)
    assert kernels_for(x.to(device)) is not None
    limits = BALANCERS["layer_output"](0)
    torch.testing.assert_close(
        balancing_line(x.to(device), limits).cpu(), balancing_line(x, limits), rtol=1e-4, atol=1e-5
    )
    gradients = []
    for place in (torch.device("cpu"), device):
        state, leaf = WhitenState(), x.bfloat16().to(place).requires_grad_()
        whiten(leaf, 0.5, 0.5, state, state.add("place")).backward(grad.bfloat16().to(place))
        gradients.append(leaf.grad.float().cpu())
        assert state.collect(place).tolist() == [2.0]
    change = gradients[0] - grad.bfloat16().float()
    assert (gradients[1] - gradients[0]).norm() < 0.02 * change.norm()


@pytest.mark.gpu
def test_codes(device):
    quantizer = random_quantizer(32, 256, 4)
    frames = random_frames(quantizer, 500)
    expected = quantizer.encode(frames)
    quantizer.to(device)
    found = quantizer.encode(frames.to(device))
    assert found.device == device
    assert (found.cpu() == expected).float().mean() > 0.99


@pytest.mark.gpu
def test_the_clipping_factor_is_that_of_the_step(device):
    """Read as soon as the step is launched."""
    torch.manual_seed(0)
    factors = []
    gradients = torch.randn(20, 256, 256) * 1.3 ** torch.arange(20)[:, None, None]
    for place in (torch.device("cpu"), device):
        weight = nn.Parameter(torch.ones(256, 256, device=place))
        optimizer = ScaledAdam([weight])
        for gradient in gradients.to(place):
            weight.grad = gradient.clone()
            optimizer.step()
            factors.append(optimizer.clipping_factor)
    assert factors[20:] == pytest.approx(factors[:20], rel=1e-4)
    assert min(factors) < 1
