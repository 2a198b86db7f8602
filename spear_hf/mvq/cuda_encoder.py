# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Encoding on an NVIDIA GPU: two matrix products on the tensor cores, and the kernels of encoding.cu around them.

Both products, of frames with the classifier and of what the classifier's codes leave of the frames with the centres,
are of float16 numbers with float32 sums: every factor is split into two float16 numbers of 22 bits together, so three
products make up one. The errors of the sums, as in plain float32, are larger than those of the splits.
"""

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spear_hf.mvq.cuda_source import CudaModule, CudaUnavailable, compile_source


SOURCE = Path(__file__).with_name("encoding.cu")
ROWS = 2048  # of every matrix product, as the order of summation may depend on the shape; the last ones are filled up
WARPS = 4  # of a block
BLOCKS = 6  # of `refine` on a multiprocessor, at least: limits its registers
CELLS = 3072  # numbers that a merge looks up at a time
CODEBOOKS = (2, 4, 8, 16)


def is_supported(num_codebooks: int, codebook_size: int, feature_size: int) -> bool:
    """Shapes that the kernels take: rows of the splits, 6 * feature_size bytes, begin where tensor cores can read."""
    return num_codebooks in CODEBOOKS and codebook_size == 256 and feature_size % 8 == 0


class Kernels:
    """encoding.cu on the current device."""

    def __init__(self, num_codebooks: int) -> None:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            raise CudaUnavailable(f"compute capability 8.0 is needed, this is {capability[0]}.{capability[1]}.")
        definitions = {"CODEBOOKS": num_codebooks, "WARPS": WARPS, "BLOCKS": BLOCKS, "CELLS": CELLS}
        self._module = CudaModule(compile_source(SOURCE.read_text(), SOURCE.name, capability, definitions))

    def __call__(self, name: str, blocks: int, *arguments: Any) -> None:
        self._module.launch(name, blocks, 32 * WARPS, *arguments)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """float16 (rows, width), (columns, width) -> float32 (rows, columns)."""
        return torch.mm(left, right.T, out_dtype=torch.float32)


class CudaEncoder:
    """Encodes float32 frames; `weight`, `bias` and `centers` as in quantizer._Encoder, the centres less their means."""

    passes_at_once = 1  # in the kernel; before the next ones, costs are made anew by a product, in place of lookups

    def __init__(
        self, weight: Tensor, bias: Tensor, centers: Tensor, offset: Tensor, num_codebooks: int, kernels: Any
    ) -> None:
        self.kernels, self.num_codebooks = kernels, num_codebooks
        self.bias, self.offset = bias.contiguous(), offset.contiguous()
        self.centers = centers.contiguous()  # (codebooks * size, dim)
        self.half_norms = self.centers.square().sum(dim=1) / 2
        self.gram = self.centers @ self.centers.T
        self.weight_split, self.weight_unit = _split(weight)
        self.center_split, self.center_unit = _split(self.centers)

    def encode(self, frames: Tensor, mean: Tensor, deviation: Tensor, passes: int) -> Tensor | None:
        """(frames, dim), (dim,), (dim,) -> uint8 codes (frames, codebooks); None if some number is not finite."""
        count, dim = frames.shape
        device = frames.device
        codes = torch.empty(count, self.num_codebooks, dtype=torch.uint8, device=device)
        standardised, residual = torch.empty(2, ROWS, dim, device=device)
        split = torch.empty(ROWS, 3 * dim, dtype=torch.float16, device=device)
        units, settled = torch.empty(ROWS, device=device), torch.empty(ROWS, dtype=torch.int32, device=device)
        bad = torch.zeros(1, dtype=torch.int32, device=device)
        for start in range(0, count, ROWS):
            rows, part = min(ROWS, count - start), codes[start : start + ROWS]
            tile = frames[start : start + rows].to(torch.float32).contiguous()
            self.kernels("standardise", ROWS, tile, rows, dim, mean, deviation, standardised, split, units, bad)
            logits = self.kernels.product(split, self.weight_split)
            given, left = (standardised, dim, self.offset, self.centers), (part, settled, residual, split, units)
            self.kernels("classify", rows, logits, self.weight_unit, self.bias, *given, *left)
            for done in range(0, passes, self.passes_at_once):
                if done:
                    self.kernels("subtract", rows, *given, *left)
                products = self.kernels.product(split, self.center_split)
                more = (self.center_unit, self.half_norms, self.gram, part, settled)
                self.kernels("refine", rows, products, units, *more, min(self.passes_at_once, passes - done))
        return None if bad.item() else codes


def _split(numbers: Tensor) -> tuple[Tensor, float]:
    """(rows, dim) -> float16 (rows, 3 * dim): the nearest, again, and what is left; in units of a power of two."""
    unit = 2.0 ** (math.frexp(numbers.abs().max().item() or 1.0)[1] - 14)
    high = (numbers / unit).half()
    return torch.cat([high, high, (numbers / unit - high.float()).half()], dim=1), unit


@functools.lru_cache(maxsize=16)
def kernels_for(num_codebooks: int, device: torch.device) -> Kernels | None:
    """None, with a warning, where they cannot be had."""
    try:
        with torch.cuda.device(device):
            return Kernels(num_codebooks)
    except CudaUnavailable as error:
        warnings.warn(f"Encoding takes the slower way through torch's operations: {error}", stacklevel=2)
        return None
