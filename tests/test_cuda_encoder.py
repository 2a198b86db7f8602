# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The CUDA kernels of the quantiser's encoder: run by a CPU, compiled for GPUs, and run by one where there is one."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from spear_hf.mvq import cuda_encoder as cuda_encoder_module
from spear_hf.mvq.cuda_encoder import SOURCE, CudaEncoder
from spear_hf.mvq.cuda_source import CudaUnavailable, compile_source
from spear_hf.mvq.quantizer import MultiCodebookQuantizer

from .conftest import ROOT
from .test_quantizer import golden_values, random_frames, random_quantizer, reference_state  # noqa: F401


class CpuKernels:
    """encoding.cu, its threads taking turns on a CPU (cuda_on_cpu.h) in an order drawn by `seed`."""

    def __init__(self, library, seed=0):
        self.library, self.seed = library, seed

    def __call__(self, name, blocks, *arguments):
        kinds = {torch.Tensor: lambda tensor: ctypes.c_void_p(tensor.data_ptr()), int: ctypes.c_int}
        values = [kinds.get(type(argument), ctypes.c_float)(argument) for argument in arguments]
        getattr(self.library, f"run_{name}")(blocks, ctypes.c_uint(self.seed), *values)

    def product(self, left, right, out):
        torch.mm(left.float(), right.float().T, out=out)


@pytest.fixture(scope="module")
def library_of(tmp_path_factory):
    """(codebooks, warps, cells) -> the kernels as a library."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, and there is no c++ on the path")
    folder, made = tmp_path_factory.mktemp("kernels"), {}

    def make(num_codebooks, warps=cuda_encoder_module.WARPS, cells=cuda_encoder_module.CELLS):
        key = (num_codebooks, warps, cells)
        if key not in made:
            target = folder / f"{num_codebooks}-{warps}-{cells}.so"
            definitions = {"CODEBOOKS": num_codebooks, "WARPS": warps, "BLOCKS": 1, "CELLS": cells, "UNROLL": 1}
            options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
            options += [f"-D{name}={value}" for name, value in definitions.items()]
            subprocess.run([compiler, *options, ROOT / "tests" / "encoding_on_cpu.cpp", "-o", target], check=True)
            made[key] = ctypes.CDLL(str(target))
        return made[key]

    return make


@pytest.fixture(autouse=True)
def few_rows(monkeypatch, request):
    """Little padding, where the CPU has to do it, and several chunks."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(cuda_encoder_module, "ROWS", 32)
        monkeypatch.setattr(cuda_encoder_module, "TILES", 3)
        monkeypatch.setattr(cuda_encoder_module, "TILES_AT_ONCE", 2)


@torch.no_grad()
def on_cpu(quantizer, kernels):
    """(frames, passes) -> codes by the kernels, or None."""
    encoder = quantizer._current_encoder()
    fused = CudaEncoder(encoder.weight, encoder.bias, encoder.search, kernels)
    return lambda frames, passes=5: fused.encode(frames, quantizer.feature_mean, quantizer.feature_std, passes)


def test_golden_codes(golden_values, library_of):  # noqa: F811
    values = golden_values["b"]
    quantizer = MultiCodebookQuantizer.from_multi_quantization(reference_state(values))
    encode = on_cpu(quantizer, CpuKernels(library_of(4)))
    for passes in (0, 1, 2, 5):
        assert torch.equal(encode(values["x"], passes).long(), values[f"idx{passes}"])


@pytest.mark.parametrize("num_codebooks", [2, 8, 16])
def test_codes_are_those_of_torchs_operations(library_of, num_codebooks):
    quantizer = random_quantizer(24, 256, num_codebooks, normalize=True)
    quantizer.feature_mean.copy_(torch.linspace(-3, 3, 24))
    quantizer.feature_std.copy_(torch.linspace(0.5, 4, 24))
    frames = random_frames(quantizer, 40)
    encode = on_cpu(quantizer, CpuKernels(library_of(num_codebooks)))
    for passes in (0, 1, 5):
        assert torch.equal(encode(frames, passes), quantizer.encode(frames, refine_iters=passes))


def test_any_order_of_threads_block_size_and_room_gives_the_same(library_of):
    """A missing barrier would show in the first; 136 numbers at a time are the fewest a merge can do with."""
    quantizer = random_quantizer(24, 256, 16)
    with torch.no_grad():
        quantizer.centers *= torch.linspace(2, 0.1, 256)[None, :, None]  # many options in use
    frames = random_frames(quantizer, 33)
    expected = on_cpu(quantizer, CpuKernels(library_of(16)))(frames, 2)
    assert torch.equal(on_cpu(quantizer, CpuKernels(library_of(16), seed=1))(frames, 2), expected)
    assert torch.equal(on_cpu(quantizer, CpuKernels(library_of(16, warps=8, cells=136)))(frames, 2), expected)
    assert torch.equal(expected, quantizer.encode(frames, refine_iters=2))


def test_frames_do_not_depend_on_each_other(library_of):
    quantizer = random_quantizer(16, 256, 4)
    frames = random_frames(quantizer, 70)
    encode = on_cpu(quantizer, CpuKernels(library_of(4)))
    expected = encode(frames)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encode(frames[order]), expected[order])
    assert torch.equal(encode(frames[31:34]), expected[31:34])
    assert encode(frames[:0]).shape == (0, 4)


@pytest.mark.parametrize("num_codebooks", [4, 16])
def test_ties_are_settled(library_of, num_codebooks):
    """Every centre twice, and frames and centres of zeros: any of the equal codes, but never a worse one."""
    quantizer = random_quantizer(16, 256, num_codebooks)
    with torch.no_grad():
        quantizer.centers[:, 128:] = quantizer.centers[:, :128]
        quantizer.centers[3:] = 0
    frames = random_frames(quantizer, 32)
    frames[5] = 0
    codes = on_cpu(quantizer, CpuKernels(library_of(num_codebooks)))(frames)
    errors = [(quantizer.decode(found) - frames).square().sum(dim=1) for found in (codes, quantizer.encode(frames))]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=1e-5)


def test_large_offsets_and_units_cost_no_precision(library_of):
    """A channel 500 times as large as the others, everything in units from 1e-12 to 1e12."""
    quantizer = random_quantizer(16, 256, 4)
    frames = random_frames(quantizer, 32)
    with torch.no_grad():
        quantizer.centers[:, :, 0] += 500 / 4 / (10 * quantizer.centers_scale).exp()
        quantizer.to_logits.bias.zero_()
        frames[:, 0] += 500
        expected = quantizer.encode(frames)
        for power in (-40, 0, 40):
            scaled = random_quantizer(16, 256, 4)
            scaled.load_state_dict(quantizer.state_dict())
            scaled.centers.copy_(quantizer.centers * 2.0**power)
            found = on_cpu(scaled, CpuKernels(library_of(4)))(frames * 2.0**power)
            assert (found == expected).float().mean() > 0.99


@pytest.mark.parametrize("number", [float("nan"), float("-inf"), 1e16])
def test_what_the_kernels_cannot_take_is_told(library_of, number):
    quantizer = random_quantizer(16, 256, 4)
    frames = random_frames(quantizer, 40)
    encode = on_cpu(quantizer, CpuKernels(library_of(4)))
    assert encode(frames) is not None
    frames[33, 7] = number
    assert encode(frames) is None


@pytest.mark.parametrize("num_codebooks", [2, 4, 8, 16])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_the_source_compiles_for_gpus(capability, num_codebooks):
    source, definitions = SOURCE.read_text(), cuda_encoder_module.definitions(num_codebooks)
    try:
        code = compile_source(source, SOURCE.name, capability, definitions)
    except CudaUnavailable as error:
        if "no library" in str(error):
            pytest.skip(f"needs NVRTC, which comes with torch for CUDA: {error}")
        raise
    assert code[:4] == b"\x7fELF"
    del definitions["CODEBOOKS"]
    with pytest.raises(CudaUnavailable, match="does not compile"):
        compile_source(source, SOURCE.name, capability, definitions)


def test_gpus_newer_than_the_compiler_get_the_code_of_their_generation():
    source, definitions = 'extern "C" __global__ void nothing() {}', {}
    try:
        assert compile_source(source, "nothing.cu", (9, 0), definitions)[:4] == b"\x7fELF"
    except CudaUnavailable as error:
        pytest.skip(f"needs NVRTC, which comes with torch for CUDA: {error}")
    assert compile_source(source, "nothing.cu", (9, 9), definitions)[:4] == b"\x7fELF"
    with pytest.raises(CudaUnavailable, match=r"knows no GPU of compute capability 99\.0"):
        compile_source(source, "nothing.cu", (99, 0), definitions)


def settled(encode, frames, codes):
    """(frames,): whether rounding cannot change a frame's codes.

    Moving the frame by 1e-5 of its size, ten times the errors of costs, must not, whether there or back: where two
    options cost the same, one of these takes the other.
    """
    generator = torch.Generator().manual_seed(0)
    result = torch.ones(len(frames), dtype=torch.bool)
    for _ in range(4):
        step = 1e-5 * frames.square().mean().sqrt() * torch.randn(frames.shape, generator=generator)
        for moved in (frames + step, frames - step):
            result &= (encode(moved) == codes).all(dim=1)
    return result


@pytest.mark.gpu
@pytest.mark.parametrize("num_codebooks", [2, 4, 8, 16])
def test_gpu_codes_are_those_of_torchs_operations(num_codebooks):
    quantizer = random_quantizer(64, 256, num_codebooks, normalize=True)
    frames = random_frames(quantizer, 3000)
    expected = quantizer.encode(frames)
    quantizer.cuda()
    found = quantizer.encode(frames.cuda()).cpu()
    encoder = quantizer._current_encoder()
    assert encoder.fused is not None
    encoder.fused = None
    plain = quantizer.encode(frames.cuda()).cpu()
    certain = settled(lambda moved: quantizer.encode(moved.cuda()).cpu(), frames, plain)
    print(f"{num_codebooks} codebooks: codes of {(~certain).sum()} of 3000 frames hang on rounding")
    assert certain.float().mean() > 0.95
    errors = [(quantizer.decode(codes).cpu() - frames).square().sum() for codes in (found, expected, plain)]
    for codes, error in zip((expected, plain), errors[1:]):
        different = (found != codes).any(dim=1)
        print(f"{different.sum()} differ")
        assert not (different & certain).any()
        torch.testing.assert_close(errors[0], error, rtol=1e-3, atol=0)


@pytest.mark.gpu
def test_gpu_golden_codes(golden_values):  # noqa: F811
    values = golden_values["b"]
    quantizer = MultiCodebookQuantizer.from_multi_quantization(reference_state(values)).cuda()
    for passes in (0, 1, 2, 5):
        found = quantizer.encode(values["x"].cuda(), refine_iters=passes)
        assert torch.equal(found.long().cpu(), values[f"idx{passes}"])
    assert quantizer._current_encoder().fused is not None


@pytest.mark.gpu
def test_gpu_frames_do_not_depend_on_each_other():
    quantizer = random_quantizer(1024, 256, 16).cuda()
    frames = random_frames(quantizer.cpu(), 5000).cuda()
    quantizer.cuda()
    expected = quantizer.encode(frames)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).cuda()
    assert torch.equal(quantizer.encode(frames[order]), expected[order])
    for first, last in ((0, 1), (2047, 2049), (17, 3000), (4999, 5000)):
        assert torch.equal(quantizer.encode(frames[first:last]), expected[first:last])
    assert torch.equal(quantizer.encode(frames.cpu()), expected.cpu())


@pytest.mark.gpu
def test_gpu_numbers_that_are_not_finite_are_refused():
    quantizer = random_quantizer(32, 256, 8).cuda()
    frames = torch.randn(2100, 32, device="cuda")
    frames[2077, 3] = float("inf")
    with pytest.raises(ValueError, match="inf in channel 3 of frame 2077"):
        quantizer.encode(frames)
