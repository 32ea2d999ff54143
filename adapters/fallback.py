"""When the host library's own code has to run, and the one warning that says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..build import BuildError, load_core, load_cuda, load_node
from ..compat.torch_modes import host_only, plain_tensor
from ..counters import counts


class SparseFallbackWarning(UserWarning):
    """The host library's own code runs for a layer; the message names the layer and the reason."""


# Ordinary ways of working, not limits of this package: the host's code runs without a word.
_EXPECTED = ("torch.compile", "torch.jit", "inference mode", "saved-tensor hooks", "a torch.func transform",
             "forward-mode", "the input is empty")
_warned: set[tuple[str, str]] = set()
_problems: dict[str, str | None] = {}


def _load_problem(what: str, *loads: Callable[[], Any]) -> str | None:
    """Why a compiled library cannot be used, or None; it is compiled at the first call."""
    if what not in _problems:
        try:
            for load in loads:
                load()
            _problems[what] = None
        except (BuildError, OSError, ImportError) as error:
            _problems[what] = f"{what} not available: {error}"
    return _problems[what]


def core_problem() -> str | None:
    """Why the compiled core cannot be used, or None."""
    return _load_problem("the compiled core is", load_core, load_node)


def tensor_problem(x: torch.Tensor, *others: torch.Tensor) -> str | None:
    """Why tensors cannot go through the kernels together, or None. The others may be scalars on the CPU."""
    for tensor in (x, *others):  # the common case first: this is asked several times a step
        if not (tensor.is_cpu and plain_tensor(tensor) and tensor.layout is torch.strided) or tensor.is_inference():
            return _tensor_problem(x, others)
    return None


def _tensor_problem(x: torch.Tensor, others: tuple[torch.Tensor, ...]) -> str | None:
    for tensor in (x, *others):
        if not plain_tensor(tensor):
            return f"tensors of type {type(tensor).__name__} are not supported"
        if tensor.layout is not torch.strided:
            return f"tensors of layout {tensor.layout} are not supported"
        if tensor.is_inference():
            return "tensors made in inference mode are not supported"
        if tensor.device != x.device and (tensor.dim() or not tensor.is_cpu):
            return f"its tensors are on {x.device} and {tensor.device}"
    return kernels_problem(x.device)


def kernels_problem(device: torch.device) -> str | None:
    """Why there are no kernels for a device, or None."""
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return _load_problem("the CUDA kernels are", load_cuda)
    return f"tensors on {device.type} are not supported, only those on the CPU and on CUDA"


def mode_problem(device: torch.device) -> str | None:
    """Why a fused step may not run right now, or None."""
    return host_only(device.type) or core_problem()


def report(module: Any, reason: str) -> None:
    """Counts a host step and warns once per kind of layer and reason."""
    counts["host_steps"] += 1
    warn(module, reason, stacklevel=5)


def warn(module: Any, reason: str, stacklevel: int = 4) -> None:
    """Warns that the host's code runs, once per kind of layer and reason."""
    kind = type(module).__name__
    if reason.startswith(_EXPECTED) or (kind, reason) in _warned:
        return
    _warned.add((kind, reason))
    message = f"{kind}: running the host library's own code, because {reason}"
    warnings.warn(message, SparseFallbackWarning, stacklevel=stacklevel)


def forget_warnings() -> None:
    """Lets every warning appear once more."""
    _warned.clear()
