"""When the host library's own code has to run, and the one warning that says so."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..build import BuildError, load_core, load_node
from ..compat.torch_modes import host_only, plain_tensor
from ..counters import counts


class SparseFallbackWarning(UserWarning):
    """The host library's own code runs for a layer; the message names the layer and the reason."""


# Ordinary ways of working, not limits of this package: the host's code runs without a word.
_EXPECTED = ("torch.compile", "torch.jit", "inference mode", "saved-tensor hooks", "a torch.func transform",
             "forward-mode", "the input is empty")
_warned: set[tuple[str, str]] = set()
_core_problem: list[str | None] = []


def core_problem() -> str | None:
    """Why the compiled core cannot be used, or None; compiles it at the first call."""
    if not _core_problem:
        try:
            load_core()
            load_node()
            _core_problem.append(None)
        except (BuildError, OSError, ImportError) as error:
            _core_problem.append(f"the compiled core is not available: {error}")
    return _core_problem[0]


def tensor_problem(*tensors: torch.Tensor) -> str | None:
    """Why tensors cannot go through the kernels, or None."""
    for tensor in tensors:
        if tensor.is_cpu and plain_tensor(tensor) and tensor.layout is torch.strided and not tensor.is_inference():
            continue
        if not plain_tensor(tensor):
            return f"tensors of type {type(tensor).__name__} are not supported"
        if tensor.device.type != "cpu":
            return f"tensors on {tensor.device.type} are not supported yet, only the CPU has kernels"
        if tensor.layout is not torch.strided:
            return f"tensors of layout {tensor.layout} are not supported"
        return "tensors made in inference mode are not supported"
    return None


def mode_problem() -> str | None:
    """Why a fused step may not run right now, or None."""
    return host_only() or core_problem()


def report(module: Any, reason: str) -> None:
    """Counts a host step and warns once per kind of layer and reason."""
    counts["host_steps"] += 1
    kind = type(module).__name__
    if reason.startswith(_EXPECTED) or (kind, reason) in _warned:
        return
    _warned.add((kind, reason))
    message = f"{kind}: running the host library's own code, because {reason}"
    warnings.warn(message, SparseFallbackWarning, stacklevel=4)


def forget_warnings() -> None:
    """Lets every warning appear once more."""
    _warned.clear()
