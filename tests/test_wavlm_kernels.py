# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""WavLM's kernels: through Triton's interpreter here, and on a GPU against the plain way where there is one."""

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import WavLMConfig, WavLMModel

from spear_hf.mvq.wavlm_attention import HEAD_DIMS, SHARED_MEMORY, fuse_wavlm_attention, kernels_for
from spear_hf.mvq.wavlm_convolutions import GROUP_WIDTHS, fuse_wavlm_convolutions


triton = pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from spear_hf.mvq import wavlm_kernels as kernels  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent


def errors_on_cpu(module: str) -> dict[str, float]:
    """What a module of the tests prints of kernels that it runs through Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"tests.{module}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_kernels_compute_what_plain_operations_do():
    errors = errors_on_cpu("wavlm_kernels_on_cpu")
    assert len(errors) == 32
    assert not {case: error for case, error in errors.items() if not error < 3e-3}, "float16 has 11 bits"


NUMBERS = {"length", "frames", "in_frames", "samples", "blocks", "table_head", "table_row", "origin"}
ALIGNED = ("table_head", "table_row", "origin")


def resources(kernel, constants, capability=90, kinds=None, **options) -> dict[str, int]:
    """Registers, bytes of the stack and shared bytes of a kernel compiled for a GPU, which is not needed."""
    kinds = kinds or {"eps": "fp32", "scale": "fp32", "lengths": "*i32"}
    signature = {name: kinds.get(name, "i32" if name in NUMBERS else "*bf16") for name in kernel.arg_names}
    signature |= {name: "*fp32" for name in signature if name.startswith(("gate", "norm")) or name == "bias"}
    signature |= dict.fromkeys(constants, "constexpr")
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or name in ALIGNED]
    places = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        {(places(name),): value for name, value in constants.items()},
        {(places(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(re.search(rf"{name}:(\d+)", printed).group(1)) for name in ("REG", "STACK")}
    return used | {"shared": compiled.metadata.shared}


def attention_of(head_dim, capability=90):
    shape = {"HEADS": 16, "HEAD_DIM": head_dim, "QUERIES": kernels.QUERIES, "KEYS": kernels.KEYS}
    return resources(kernels._attention, shape, capability, **kernels.attention_options(head_dim))


def convolution_of(stages, capability=90):
    shape = {"IN": 512, "OUT": 512, "TAPS": 3, "STRIDE": 2}
    shape |= {"FRAMES": kernels.CONVOLVED_FRAMES, "DEPTH": kernels.CONVOLVED_DEPTH}
    options = {"num_warps": kernels.CONVOLVED_WARPS, "num_stages": stages}
    return resources(kernels._convolution, shape, capability, **options)


def positions_of(width, capability=90):
    shape = {"GROUPS": 16, "WIDTH": width, "TAPS": 128, "FRAMES": kernels.POSITION_FRAMES}
    return resources(kernels._position_convolution, shape, capability, **kernels.position_options(width))


def test_kernels_compile_for_a_gpu_and_keep_to_its_registers():
    """The interpreter does not see what the compiler refuses. Shapes are those of WavLM Large."""
    used = attention_of(64)
    assert used["STACK"] == 0
    assert 2 * used["REG"] * 32 * kernels.WARPS <= 65536, "two blocks at a time"
    assert 2 * used["shared"] <= 226 * 1024
    first = {"OUT": 512, "TAPS": 10, "STRIDE": 5, "FRAMES": kernels.FIRST_FRAMES}
    assert resources(kernels._first_convolution, first, num_warps=8)["STACK"] == 0
    used = convolution_of(kernels.CONVOLVED_STAGES)
    assert used["STACK"] < 128, "all but a few numbers"
    assert used["shared"] <= kernels.LARGE_SHARED_MEMORY
    assert positions_of(64)["STACK"] == 0


def test_the_widest_kernels_find_room_on_every_gpu_that_takes_them():
    """From the A100 on, a block of which has 163 KB."""
    room = SHARED_MEMORY
    assert attention_of(max(HEAD_DIMS), 80)["shared"] <= room
    assert convolution_of(2, 80)["shared"] <= room
    for capability in (80, 90):
        used = positions_of(max(GROUP_WIDTHS), capability)
        assert used["shared"] <= room
        assert used["STACK"] == 0


def test_elsewhere_nothing_changes():
    assert kernels_for(torch.zeros(1, dtype=torch.bfloat16)) is None


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("dtype", "groups"), [(torch.bfloat16, 4), (torch.float16, 2)])
@torch.no_grad()
def test_hidden_states_on_a_gpu(dtype, groups):
    """Groups of 64 channels, and of 128, the widest that a kernel takes."""
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        num_conv_pos_embedding_groups=groups,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )
    model = WavLMModel(config).eval().cuda()
    for name, parameter in model.named_parameters():
        if "rel_attn_embed" in name or "gru_rel_pos" in name:
            parameter.normal_()
    fused = copy.deepcopy(model).to(dtype)
    fuse_wavlm_attention(fused)
    fuse_wavlm_convolutions(fused)
    assert kernels_for(torch.zeros(1, dtype=dtype, device="cuda")) is not None
    for longest in (400, 700, 16000, 50001, 200000):
        lengths = torch.tensor([longest, max(400, longest // 2), 400], device="cuda")
        waveforms = torch.randn(3, longest, device="cuda")
        mask = (torch.arange(longest, device="cuda") < lengths[:, None]).long()
        expected = model(waveforms, attention_mask=mask, output_hidden_states=True).hidden_states
        found = fused(waveforms.to(dtype), attention_mask=mask, output_hidden_states=True).hidden_states
        plain = model.to(dtype)(waveforms.to(dtype), attention_mask=mask, output_hidden_states=True).hidden_states
        model.float()
        for row, frames in enumerate(model._get_feat_extract_output_lengths(lengths).tolist()):
            for one, other, usual in zip(expected, found, plain):
                error, rounding = ((other, usual)[i][row, :frames].float() - one[row, :frames] for i in range(2))
                assert error.norm() < 1.5 * rounding.norm() + 1e-3 * one[row, :frames].norm(), (longest, row)


def end_of_convolutions(samples, length, device):
    """The last frames of two convolutions, and those of the last `length` samples alone."""
    torch.manual_seed(0)

    def weights(channels_in, taps, stride):
        weight = torch.randn(taps * channels_in, 512, dtype=torch.float16, device=device)
        numbers = torch.randn(3, 512, device=device)
        return kernels.ConvolutionWeights(weight / (taps * channels_in) ** 0.5, *numbers, 1e-5, taps, stride)

    waveforms = torch.randn(1, samples, dtype=torch.float16, device=device)
    layers = weights(1, 10, 5), weights(512, 3, 2)
    outputs = []
    for x in (waveforms, waveforms[:, -length:].contiguous()):
        for layer in layers:
            x = kernels.convolution(x, layer)
        outputs.append(x[:, -(length // 10) + 2 :].clone())
    return outputs


@pytest.mark.gpu
@torch.no_grad()
def test_more_than_32_bits_of_numbers_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 8e9:
        pytest.skip("needs 8 GB of a GPU's memory")
    found, alone = end_of_convolutions(21_600_000, 10_000, "cuda")  # 22 minutes: 4.3 million frames of 512 numbers
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-2)
