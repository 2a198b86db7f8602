# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""CUDA C++ text to functions that take tensors, at run time; all that it needs is NVRTC, which comes with torch."""

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


PREFERRED_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent


class CudaUnavailable(RuntimeError):
    """The compiler or the driver is not there, or refused."""


def compile_source(source: str, name: str, capability: tuple[int, int], definitions: Mapping[str, int]) -> bytes:
    """Machine code for GPUs of this compute capability; needs no GPU."""
    nvrtc = _library("nvrtc", "nvrtcCreateProgram")
    options = [f"--gpu-architecture=sm_{_architecture(nvrtc, capability)}", "--std=c++17"]
    options += [f"-D{key}={value}" for key, value in definitions.items()]
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None), "NVRTC")
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            size = ctypes.c_size_t()
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaUnavailable(f"{name} does not compile for {options[0]}:\n{log.value.decode()}")
        size = ctypes.c_size_t()
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "NVRTC")
        code = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, code), "NVRTC")
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _architecture(nvrtc: ctypes.CDLL, capability: tuple[int, int]) -> int:
    """The newest that this NVRTC knows and such a GPU runs: its own, or an earlier one of its generation."""
    count = ctypes.c_int()
    _check(nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "NVRTC")
    known = (ctypes.c_int * count.value)()
    _check(nvrtc.nvrtcGetSupportedArchs(known), "NVRTC")
    own = 10 * capability[0] + capability[1]
    fitting = [architecture for architecture in known if own // 10 * 10 <= architecture <= own]
    if not fitting:
        raise CudaUnavailable(f"torch's NVRTC knows no GPU of compute capability {capability[0]}.{capability[1]}.")
    return max(fitting)


class CudaModule:
    """Functions of compiled code, on one device."""

    def __init__(self, code: bytes, device: torch.device) -> None:
        self._driver, self._device = _library("cuda", "cuLaunchKernel"), device
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes torch's context that of this thread
            _check(self._driver.cuModuleLoadData(ctypes.byref(self._module), code), "cuModuleLoadData")

    def launch(self, name: str, blocks: int, threads: int, *arguments: Tensor | int | float) -> None:
        """On the device's current stream. Integers are passed as int, floats as float, tensors by their address.

        Whatever the arguments point to must be on the device.
        """
        values = [_as_c(argument) for argument in arguments]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        with torch.cuda.device(self._device):
            function = self._function(name)
            _check(self._driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, places, None), name)

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            _check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
            # As many blocks on a multiprocessor as fit there, at the cost of its cache.
            _check(self._driver.cuFuncSetAttribute(function, PREFERRED_CARVEOUT, 100), name)
            self._functions[name] = function
        return self._functions[name]


def _as_c(argument: Tensor | int | float) -> "ctypes.c_void_p | ctypes.c_int | ctypes.c_float":
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _check(result: int, what: str) -> None:
    if result:
        raise CudaUnavailable(f"{what} failed with error {result}.")


@functools.cache
def _library(name: str, function: str) -> ctypes.CDLL:
    """`nvrtc` or `cuda`, the driver."""
    major = (torch.version.cuda or "none").split(".")[0]
    own = Path(torch.__file__).parent / "lib" / "libcaffe2_nvrtc.so"  # knows where torch's package has both
    candidates = {"nvrtc": [f"libnvrtc.so.{major}", str(own)], "cuda": ["libcuda.so.1", str(own)]}[name]
    for candidate in candidates:
        try:
            library = ctypes.CDLL(candidate)
            getattr(library, function)
            return library
        except (OSError, AttributeError):
            continue
    raise CudaUnavailable(f"no library {candidates[0]}")
