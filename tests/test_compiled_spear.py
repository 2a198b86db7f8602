# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What compiled layers compute in their own way, against the plain way."""

import importlib.util
import sys

import pytest
import torch

from spear_hf import compiled_spear
from spear_hf.compiled_spear import DepthwiseConv2d, RelativeScores, depthwise_weight_gradient, scores_by_offset
from spear_hf.modeling_spear import SpearDepthwiseConv, SpearDepthwiseConv2d, relative_scores


def gradients(function, *inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output))
    return output.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_relative_scores(length):
    scores = torch.randn(2, 3, length, 2 * length)
    expected, found = gradients(relative_scores, scores), gradients(RelativeScores.apply, scores)
    for one, other in zip(expected, found):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 6, 1, 11), (2, 6, 9, 5), (1, 6, 1, 1)])
def test_depthwise_convolution(shape, dtype):
    """Weights stay in their own dtype, as under autocast."""
    torch.manual_seed(0)
    row = shape[2] == 1
    module = SpearDepthwiseConv(6, 7) if row else SpearDepthwiseConv2d(6, 3)
    x, weight = torch.randn(shape, dtype=dtype), module.weight.unsqueeze(2) if row else module.weight

    def plain(x, weight, bias):
        padding = [taps // 2 for taps in weight.shape[2:]]
        return torch.nn.functional.conv2d(x, weight.to(dtype), bias.to(dtype), padding=padding, groups=6)

    parameters = weight.to(torch.promote_types(dtype, torch.float32)), module.bias.to(weight.dtype)
    expected = gradients(plain, x, *parameters)
    found = gradients(DepthwiseConv2d.apply, x, *parameters)
    tolerance = {"rtol": 2e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for one, other in zip(expected, found):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


def test_modules_take_it_where_a_compiler_trains_them(monkeypatch):
    """Plain and compiled modules agree, and the second take the functions of this file."""
    torch.manual_seed(0)
    seen = []

    def watched(graph, inputs):
        seen.append(graph.print_readable(print_output=False))
        return graph.forward

    for module, x in ((SpearDepthwiseConv(6, 7), (2, 6, 11)), (SpearDepthwiseConv2d(6, 3), (2, 6, 9, 5))):
        x = torch.randn(x)
        compiled = torch.compile(module, backend=watched)
        for one, other in zip(gradients(module, x), gradients(compiled, x)):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), module(x))
    assert ["autograd_function_apply" in graph for graph in seen] == [True, False] * 2


def test_operations_are_what_they_say_to_the_compiler():
    """Shapes, strides and types, for which a compiled graph asks."""
    torch.library.opcheck(scores_by_offset, (torch.randn(2, 3, 5, 5),))
    torch.library.opcheck(depthwise_weight_gradient, (*torch.randn(2, 2, 4, 9).mT.mT.unbind(), 3))
    torch.library.opcheck(depthwise_weight_gradient, (*torch.randn(2, 2, 9, 4).bfloat16().mT.unbind(), 3))


def test_copies_of_the_file_have_operations_of_their_own(monkeypatch):
    """Models with code on the Hub bring a copy each. Of two operations of a name, torch frees the first; what then
    happened to the model that came first was a matter of luck.
    """
    copies = [compiled_spear]
    for name in ("of_one_model", "of_another"):
        spec = importlib.util.spec_from_file_location(name, compiled_spear.__file__)
        copies.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, name, copies[-1])
        spec.loader.exec_module(copies[-1])
    for name in ("scores_by_offset", "depthwise_weight_gradient"):
        assert len({repr(getattr(copy, name)) for copy in copies}) == len(copies)
    scores = torch.randn(2, 5, 10)
    expected = gradients(compiled_spear.scores_by_key, scores)
    for copy in copies:
        compiled = torch.compile(copy.RelativeScores.apply, backend="aot_eager")
        for one, other in zip(expected, gradients(compiled, scores)):
            assert torch.equal(one, other)


def test_kernels_compute_what_plain_operations_do():
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    from .test_wavlm_kernels import errors_on_cpu

    errors = errors_on_cpu("triton_spear_on_cpu")
    assert len(errors) == 11
    assert not {case: error for case, error in errors.items() if not error < 1e-6}


def test_where_no_kernel_can_be_launched_a_warning_says_so():
    """As without a C compiler. Triton launches nothing on a CPU."""
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    with pytest.warns(UserWarning, match="Compiled layers take the slower way"):
        assert compiled_spear.kernels(torch.device("cpu")) is None


def test_kernels_compile_for_a_gpu_and_keep_to_its_registers():
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    from spear_hf import triton_spear as kernels

    from .test_wavlm_kernels import resources

    for columns in (2, kernels.COLUMNS):  # 2: what is tried out first, on any GPU
        assert resources(kernels._scores_by_offset, {"COLUMNS": columns})["STACK"] == 0
    shape = {"WIDTH": 512, "TAPS": 31, "ROWS": 32, "CHANNELS": kernels.CHANNELS}
    shape |= {"FRAMES": kernels.FRAMES, "FRAMES_AT_ONCE": kernels.FRAMES_AT_ONCE}
    used = resources(kernels._depthwise_weight_gradient, shape, num_warps=kernels.WARPS)
    assert used["STACK"] == 0
    assert used["REG"] * 32 * kernels.WARPS * 8 <= 65536, "eight blocks at a time"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_on_a_gpu(dtype):
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    assert compiled_spear.kernels(device) is not None, "torch's operations would be compared with themselves"
    for length in (1, 7, 100, 513, 600):
        scores = torch.randn(2, 3, length, length, dtype=dtype)
        assert torch.equal(scores_by_offset(scores.cuda()).cpu(), scores_by_offset(scores))
    for batch, frames, channels, taps in ((1, 1, 64, 3), (3, 130, 512, 31), (2, 700, 100, 15)):
        grad, x = torch.randn(2, batch, channels, frames, dtype=dtype)
        expected = depthwise_weight_gradient(grad, x, taps)
        found = depthwise_weight_gradient(grad.cuda(), x.cuda(), taps)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)
