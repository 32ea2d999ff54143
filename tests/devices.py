"""Which kernels the tests run: the CPU's, CUDA's on a GPU, or CUDA's compiled for the CPU (see cuda_host/)."""

from __future__ import annotations

from typing import Any

import torch

from snn_sparse_backend import native

device = torch.device("cpu")  # conftest.py changes it


def cuda_kernels() -> bool:
    """Whether CUDA's kernels run, wherever that is."""
    return native.event_parallel(device)


def wait() -> None:
    """Waits until the device has done all it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def up(tensor: Any) -> Any:
    """A copy of a tensor, of each tensor of a list, or None, where the kernels run."""
    if isinstance(tensor, (list, tuple)):
        return [up(t) for t in tensor]
    return tensor.to(device) if tensor is not None else None


def down(tensor: Any) -> Any:
    """The same on the CPU; waits until it is computed."""
    if isinstance(tensor, (list, tuple)):
        return [down(t) for t in tensor]
    return tensor.cpu() if tensor is not None else None
