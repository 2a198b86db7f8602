# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Kernels of Balancer and Whiten: through Triton's interpreter, compiled for a GPU, and on one where there is one."""

import pytest
import torch

from spear_hf.pretraining import regularizers_kernels, regularizers_whiten
from spear_hf.pretraining.regularizers import install_regularizers
from spear_hf.pretraining.regularizers_balancer import balancing_line
from spear_hf.pretraining.regularizers_config import RegularizersConfig
from spear_hf.pretraining.regularizers_graph import Zeros
from spear_hf.pretraining.regularizers_kernels import columns_of, kernels_for, rows_of
from spear_hf.pretraining.regularizers_whiten import WhitenState, whiten
from spear_hf.pretraining.scaled_adam import ScaledAdam

from .test_regularizers import make_inputs, make_model
from .test_regularizers_gradients import BALANCED_CASES, channels_of_every_kind, coloured, slow_whitened_gradient


def test_kernels_compute_what_plain_operations_do():
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    from .test_wavlm_kernels import errors_on_cpu

    errors = errors_on_cpu("regularizer_kernels_on_cpu")
    assert {kind: len(cases) for kind, cases in errors.items()} == {"exact": 15, "rounded": 10}
    assert not {case: error for case, error in errors["exact"].items() if not error < 3e-6}
    assert not {case: error for case, error in errors["rounded"].items() if not error < 0.01}, "bfloat16 has 8 bits"


def test_kernels_compile_for_a_gpu_and_keep_to_its_registers():
    pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
    from spear_hf.pretraining import regularizers_triton as kernels

    from .test_wavlm_kernels import resources

    sizes = ("frames", "rows", "width", "stride", "grad_stride", "first", "last", "size", "index")
    numbers = ("count", "min_mean", "max_mean", "min_rms", "max_rms", "gradient_scale", "smallest_deviation", "limit")
    tensors = ("line", "sums", "products", "squares", "metric", "norm", "penalty_norm", "votes", "out")
    kinds = dict.fromkeys(sizes, "i32") | dict.fromkeys(numbers, "fp32") | dict.fromkeys(tensors, "*fp32")
    sums = {"WIDTH": 512, "CHANNELS": kernels.CHANNELS, "FRAMES": kernels.FRAMES}
    sums |= {"FRAMES_AT_ONCE": kernels.FRAMES_AT_ONCE}
    used = resources(kernels._column_sums, sums, kinds=kinds, num_warps=kernels.WARPS)
    assert used["STACK"] == 0
    assert used["REG"] * 32 * kernels.WARPS * 6 <= 65536, "six blocks at a time"
    tried_out = sums | {"WIDTH": 1, "stride": 1}  # first, on any GPU
    assert resources(kernels._column_sums, tried_out, kinds=kinds, num_warps=kernels.WARPS)["STACK"] == 0
    shape = {"COLUMNS": kernels.CHANNELS, "ROWS": kernels.FRAMES_AT_ONCE}
    assert resources(kernels._balance, shape, kinds=kinds, num_warps=kernels.WARPS)["STACK"] == 0
    for kernel, shape in ((kernels._balancing_line, {"CHANNELS": kernels.CHANNELS}), (kernels._whitening_scale, {})):
        assert resources(kernel, shape, kinds=kinds, num_warps=1)["STACK"] == 0
    for width, columns, centred in ((512, 512, False), (1280, 2048, False), (512, 512, True)):
        shape = {"WIDTH": width, "GROUP": 32, "COLUMNS": columns, "ROWS": kernels.COVARIANCES // columns}
        shape["CENTRED"] = centred
        for kernel, more in ((kernels._covariance_squares, {}), (kernels._whitening_matrix, {"BLOCKS": 1024})):
            assert resources(kernel, shape | more, kinds=kinds, num_warps=kernels.WARPS)["STACK"] == 0


def test_elsewhere_nothing_changes():
    assert kernels_for(torch.zeros(1, dtype=torch.bfloat16)) is None


def test_where_no_kernel_can_be_launched_a_warning_says_so():
    """As without a C compiler: a run must not end in its first backward pass. Triton launches nothing on a CPU."""
    with pytest.warns(UserWarning, match="Balancer and Whiten take the slower way"):
        assert regularizers_kernels._kernels(torch.device("cpu")) is None
    assert not regularizers_whiten._has_products(torch.device("cpu")), "of bfloat16 with sums in float32"


def test_columns_are_found_in_any_order_of_the_axes_but_never_copied():
    x = torch.randn(2, 5, 7)
    assert columns_of(x, -1).data_ptr() == x.data_ptr()
    assert torch.equal(columns_of(x.narrow(2, 3, 4), 2), x[..., 3:].flatten(0, 1))
    assert columns_of(x, 1) is None
    assert columns_of(x[:1], 1) is None
    last = torch.randn(2, 4, 5, 3).to(memory_format=torch.channels_last)  # (batch, channels, height, width)
    assert torch.equal(columns_of(last, 1), last.permute(0, 2, 3, 1).flatten(0, 2))


def test_rows_are_found_where_both_are_in_one_order():
    x, grad = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)  # channels in the middle
    of_grad, of_x = rows_of(grad, x, 2)
    assert torch.equal(of_x, x.flatten(2).flatten(0, 1))
    assert of_grad.data_ptr() == grad.data_ptr()
    assert rows_of(grad.transpose(1, 3), x, 2) is None
    last = grad.narrow(3, 2, 4), x.narrow(3, 2, 4)
    assert all(torch.equal(rows, tensor.flatten(0, 2)) for rows, tensor in zip(rows_of(*last, 3), last))


def test_zeros_are_everybodys_own():
    like = torch.zeros(1, dtype=torch.bfloat16)
    taken = [Zeros.take(like, size) for size in (3, 5) for _ in range(2 * Zeros.MADE_AT_ONCE)]
    for place, zeros in enumerate(taken, 1):
        assert not zeros.any()
        assert zeros.dtype == torch.float32
        zeros.fill_(place)
    assert all((zeros == place).all() for place, zeros in enumerate(taken, 1))
    assert Zeros.take(like.double(), 3).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ with a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("limits", BALANCED_CASES)
def test_lines_on_a_gpu(limits):
    x = channels_of_every_kind(torch.Generator().manual_seed(0)).view(4, 60, 12)
    assert kernels_for(x.cuda()) is not None, "torch's operations would be compared with themselves"
    for features, dim in ((x, 2), (x.mT.contiguous(), 1)):
        found = balancing_line(features.cuda(), limits, dim, (0, 9)).cpu()
        torch.testing.assert_close(found, balancing_line(features, limits, dim, (0, 9)), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whiten_under_autocast_on_a_gpu(dtype):
    generator = torch.Generator().manual_seed(3)
    x = coloured(generator, frames=4000).to(dtype)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    state = WhitenState()
    leaf = x.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        output = whiten(leaf, 1.0, 0.5, state, state.add("place"), groups=2)
    output.backward(grad.cuda())
    expected = slow_whitened_gradient(x.double(), grad.double(), 1.0, 0.5, 2)
    assert (leaf.grad.cpu().double() - expected).norm() < 0.01 * (expected - grad.double()).norm()
    assert state.collect(torch.device("cuda")).tolist() == [2.0]


@pytest.mark.gpu
@pytest.mark.parametrize("in_graph", [False, True])
def test_the_host_does_not_wait_for_the_device(in_graph):
    """Besides the number of targets, which a step waits for before the encoder, and the votes at its end."""
    model = make_model().cuda()
    regularizers = install_regularizers(model, RegularizersConfig(enabled=True), in_graph)
    optimizer = ScaledAdam(model.named_parameters())
    inputs = {name: value.cuda() for name, value in make_inputs().items()}
    inputs.pop("attention_mask")
    places = model._target_places(inputs["speech_labels"])
    model._target_places = lambda labels: places
    normalizer = torch.tensor(20.0, device="cuda")
    for place in range(6):
        if place > 3:  # after the first steps and one that learns sizes
            torch.cuda.set_sync_debug_mode("error")
        try:
            regularizers.set_step(500.0 * place, normalizer)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**inputs, num_items_in_batch=normalizer).loss
            loss.backward()
            votes = regularizers.collect_votes()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        regularizers.count_votes(votes.tolist())
