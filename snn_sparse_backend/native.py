"""Calls into the compiled libraries: CPU tensors go to one, CUDA tensors to the other, both with the same structs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .abi import CONSTANTS, STRUCTS
from .build import load_core, load_cuda
from .compat.cuda import current_stream

DTYPES = {torch.float32: CONSTANTS["kFloat32"], torch.float64: CONSTANTS["kFloat64"]}
# Below this many sites a thread of the CPU would cost more than it does.
SITES_PER_THREAD = 16384
# Set by tests: the CUDA kernels compiled for the CPU, which then serve CPU tensors in place of the CPU's kernels.
cuda_on_host: ctypes.CDLL | None = None

Kernel = Callable[[int], int]


def event_parallel(device: torch.device) -> bool:
    """Whether the CUDA kernels serve tensors on this device. They return nothing to the host, not even a count."""
    return device.type == "cuda" or cuda_on_host is not None


@cache
def _cpu_function(name: str) -> Any:
    """A kernel of the CPU by name; the library is compiled on the first call of any of them."""
    function = getattr(load_core(), f"snn_{name}")
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    function.errcheck = _checked
    return function


def _checked(result: int, function: Any, arguments: Any) -> int:
    if result == CONSTANTS["kOutOfMemory"]:
        raise MemoryError(f"{function.__name__} cannot allocate its working memory")
    return result


@cache
def _cuda_function(name: str, library: ctypes.CDLL | None) -> Any:
    function = getattr(library or load_cuda(), f"snn_cuda_{name}")
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    function.errcheck = _cuda_checked
    return function


def _cuda_checked(result: int, function: Any, arguments: Any) -> int:
    if result < 0:
        explain = (cuda_on_host or load_cuda()).snn_cuda_error
        explain.restype, explain.argtypes = ctypes.c_char_p, [ctypes.c_int64]
        raise RuntimeError(f"{function.__name__}: CUDA error: {explain(result).decode()}")
    return result


def kernel(name: str, device: torch.device) -> Kernel:
    """A kernel that serves a device: takes the address of its struct; on CUDA it runs on the current stream."""
    if not event_parallel(device):
        return _cpu_function(name)
    function, index = _cuda_function(name, cuda_on_host), device.index or 0
    return lambda address: function(address, index, current_stream(device))


def address_of(name: str) -> int:
    """Address of a kernel of the CPU, for callers in C++."""
    return ctypes.cast(_cpu_function(name), ctypes.c_void_p).value or 0


def call(name: str, struct: str, device: torch.device, **fields: Any) -> int:
    """Fills a struct (tensors by their addresses, structs as they are) and calls a kernel with it."""
    arguments = STRUCTS[struct](**{k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
    return kernel(name, device)(ctypes.addressof(arguments))


def threads_for(sites: int) -> int:
    """CPU threads worth using for so many sites; never more than torch may use."""
    return max(1, min(torch.get_num_threads(), sites // SITES_PER_THREAD))


def instruction_set(limit: int = -1) -> str:
    """Name of the CPU's instruction set in force; ``limit`` 0, 1, 2 restricts it to baseline, AVX2, AVX-512."""
    function = load_core().snn_instruction_set
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_int]
    return function(limit).decode()
