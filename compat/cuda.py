"""What torch knows about CUDA streams. Uses private functions, because a training step asks at every call."""

from __future__ import annotations

from typing import Any

import torch

# The public way makes a Python object a call, at several times the cost.
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int | None:
    """Address of the current stream of a CUDA device; None for the CPU, which has one order of work only."""
    if device.type != "cuda":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    if _raw_stream is not None:
        return int(_raw_stream(index))
    return int(torch.cuda.current_stream(index).cuda_stream)


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph: then nothing runs, and nothing may be asked of the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
