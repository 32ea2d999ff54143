"""Memory for the gradients of whole sequences, used again from layer to layer and from step to step.

A matrix of ``[T * B, N]`` is so large that an allocator asks the system for it each time, and a first touch of fresh
pages costs as much as the arithmetic on them.
"""

from __future__ import annotations

import threading

import torch

from .build import load_node

_SMALLEST = 1 << 20  # bytes; what is smaller an allocator has at hand
_KEPT = 2  # the gradients that arrive at a layer, and those that leave it


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []


_buffers = _Buffers()


def take(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised matrix ``[rows, cols]``.

    On the CPU its memory may be that of an earlier one which nobody refers to any more; this thread keeps the last two.
    """
    count = rows * cols
    if device.type != "cpu" or count * dtype.itemsize < _SMALLEST:
        return torch.empty((rows, cols), dtype=dtype, device=device)
    kept = _buffers.kept
    for buffer in kept:
        if buffer.dtype is dtype and count <= buffer.numel() <= 2 * count and load_node().sole_owner(buffer):
            return buffer[:count].view(rows, cols)
    fresh = torch.empty(count, dtype=dtype)
    kept.append(fresh)
    if len(kept) > _KEPT:
        del kept[0]
    return fresh.view(rows, cols)


def clear() -> None:
    """Gives up what this thread keeps."""
    _buffers.kept.clear()
