# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding on an NVIDIA GPU: matrix products on the tensor cores, and the kernels of encoding.cu around them.

The products are those of frames with the classifier and, before every pass, of what the codes leave of the frames with
the centres. They are of float16 numbers with float32 sums: every factor is split into two float16 numbers of 22 bits
together, so three products make up one. The errors of the sums, as in plain float32, are larger than those of the
splits. A frame's codes are those of refinement.py but for ties within these errors.
"""

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear_hf.mvq.cuda_source import CudaModule, CudaUnavailable, compile_source
from spear_hf.mvq.refinement import CodeSearch


SOURCE = Path(__file__).with_name("encoding.cu")
ROWS = 2048  # of every matrix product, as the order of summation may depend on the shape; the last ones are filled up
TILES = 16  # of ROWS frames, in work at a time
TILES_AT_ONCE = 4  # of these in a launch of a kernel, which ends with few blocks for the many multiprocessors
WARPS = 4  # of a block; `refine` has one
BLOCKS = 24  # of `refine` on a multiprocessor, at least: limits its registers
CELLS = 512  # numbers that a merge looks up at a time
UNROLL = 1  # of the kernel's inner loops: more work at a time, but more code to fetch
CODEBOOKS = (2, 4, 8, 16)
LARGE = 1e15


def definitions(num_codebooks: int) -> dict[str, int]:
    """What encoding.cu is compiled with."""
    return {"CODEBOOKS": num_codebooks, "WARPS": WARPS, "BLOCKS": BLOCKS, "CELLS": CELLS, "UNROLL": UNROLL}


class Kernels:
    """encoding.cu on a device."""

    def __init__(self, num_codebooks: int, device: torch.device) -> None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise CudaUnavailable(f"compute capability 8.0 is needed, this is {capability[0]}.{capability[1]}.")
        source = SOURCE.read_text(encoding="utf-8")
        code = compile_source(source, SOURCE.name, capability, definitions(num_codebooks))
        self._module = CudaModule(code, device)
        sample = torch.ones(8, 8, dtype=torch.float16, device=device)
        try:
            self.product(sample, sample, torch.empty(8, 8, device=device))
        except (TypeError, RuntimeError) as error:
            raise CudaUnavailable(f"products of float16 with sums in float32 need torch 2.8: {error}") from error

    def __call__(self, name: str, blocks: int, *arguments: Any) -> None:
        self._module.launch(name, blocks, 32 * (1 if name == "refine" else WARPS), *arguments)

    def product(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """float16 (rows, width), (columns, width) -> float32 `out` (rows, columns)."""
        torch.mm(left, right.T, out_dtype=torch.float32, out=out)


class CudaEncoder:
    """What encoding needs of the parameters, computed once for their present values."""

    def __init__(self, weight: Tensor, bias: Tensor, search: CodeSearch, kernels: Any) -> None:
        self.kernels, self.num_codebooks = kernels, search.num_codebooks
        self.bias, self.offset = bias.contiguous(), search.offset.contiguous()
        self.centers = search.flat_centers.contiguous()  # (codebooks * size, dim)
        self.half_norms = search.half_norms
        self.gram = self.centers @ self.centers.T
        self.weight_split, self.weight_unit = _split(weight)
        self.center_split, self.center_unit = _split(self.centers)

    def encode(self, frames: Tensor, mean: Tensor, deviation: Tensor, passes: int) -> Tensor | None:
        """Frames (frames, dim), mean and standard deviation (dim,) -> uint8 codes (frames, codebooks).

        None if some number is not finite, or beyond 1e15 once standardised.
        """
        count, dim = frames.shape
        device = self.bias.device
        codes = torch.empty(count, self.num_codebooks, dtype=torch.uint8, device=device)
        standardised = torch.empty(min(count, TILES * ROWS), dim, device=device)
        work = _Work(min(TILES_AT_ONCE, math.ceil(count / ROWS)) * ROWS, self.centers)
        bad = torch.zeros(1, dtype=torch.int32, device=device)
        for start in range(0, count, TILES * ROWS):
            chunk, found = frames[start : start + TILES * ROWS], codes[start : start + TILES * ROWS]
            for first in range(0, len(chunk), work.rows):
                given = chunk[first : first + work.rows].to(device, torch.float32).contiguous()
                target = (standardised[first:], work.split, work.units, bad)
                self.kernels("standardise", len(given), given, dim, mean, deviation, *target)
                logits = self._product(work, len(given), self.weight_split)
                self.kernels("classify", len(given), logits, work.units, self.weight_unit, self.bias, found[first:])
            self._refine(standardised, found, work, passes)
        return None if bad.item() else codes

    def _refine(self, standardised: Tensor, codes: Tensor, work: "_Work", passes: int) -> None:
        """`passes` passes over codes (frames, codebooks), in place.

        Frames that a pass has left as they are would be left so by all others: the later ones go without them.
        """
        active = torch.arange(len(codes), dtype=torch.int32, device=codes.device)
        for _ in range(passes):
            again = torch.empty(len(active), dtype=torch.bool, device=codes.device)
            for first in range(0, len(active), work.rows):
                part = active[first : first + work.rows]
                given = (standardised, standardised.shape[1], self.offset, self.centers, codes, part)
                self.kernels("subtract", len(part), *given, work.residual, work.split, work.units)
                products = self._product(work, len(part), self.center_split)
                costs = (products, work.units, self.center_unit, self.half_norms, self.gram)
                self.kernels("refine", len(part), *costs, part, codes, again[first:])
            active = active[again]
            if not len(active):
                break

    def _product(self, work: "_Work", rows: int, right: Tensor) -> Tensor:
        """Of `rows` rows of the splits, ROWS at a time; those beyond hold what frames before have left there."""
        for first in range(0, rows, ROWS):
            self.kernels.product(work.split[first : first + ROWS], right, work.products[first : first + ROWS])
        return work.products


class _Work:
    """Memory for as many frames as a kernel takes at a time."""

    def __init__(self, rows: int, centers: Tensor) -> None:
        width, dim = centers.shape
        self.rows = rows
        self.residual = centers.new_empty(rows, dim)
        self.split = centers.new_zeros(rows, 3 * dim, dtype=torch.float16)
        self.units = centers.new_empty(rows)
        self.products = centers.new_empty(rows, width)


def _split(numbers: Tensor) -> tuple[Tensor, float]:
    """(rows, dim) -> float16 (rows, 3 * dim): the nearest, again, and what is left; in units of a power of two."""
    unit = 2.0 ** (math.frexp(numbers.abs().max().item() or 1.0)[1] - 14)
    high = (numbers / unit).half()
    return torch.cat([high, high, (numbers / unit - high.float()).half()], dim=1), unit


def cuda_encoder(weight: Tensor, bias: Tensor, search: CodeSearch) -> CudaEncoder | None:
    """None for what the kernels do not take, and, with a warning, where they cannot be had."""
    # Rows of the splits, 6 * dim bytes, begin where tensor cores can read.
    taken = search.num_codebooks in CODEBOOKS and search.codebook_size == 256 and weight.shape[1] % 8 == 0
    taken = taken and weight.dtype == torch.float32
    if not (weight.is_cuda and torch.version.cuda and taken and _is_moderate(weight, bias, search.flat_centers)):
        return None
    kernels = _kernels(search.num_codebooks, weight.device)
    return CudaEncoder(weight, bias, search, kernels) if kernels else None


def _is_moderate(*tensors: Tensor) -> bool:
    """No number is so large that a sum of squares might be infinite."""
    return all(bool((tensor.abs() < LARGE).all()) for tensor in tensors)


@functools.lru_cache(maxsize=16)
def _kernels(num_codebooks: int, device: torch.device) -> Kernels | None:
    try:
        return Kernels(num_codebooks, device)
    except CudaUnavailable as error:
        warnings.warn(f"Encoding takes the slower way through torch's operations: {error}", stacklevel=2)
        return None
