"""``nn.Conv2d`` on a neuron's spikes, or feeding a neuron, and the pooling behind them go through tapes.

Pooling is recorded where it directly follows a recorded convolution or spikes; everything else is untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..build import load_node
from ..compat.torch_modes import scripts_as
from ..config import config
from ..conv_tape import ConvTape, run_convolution
from ..convolution import Convolution
from ..lanes import steps as lane_steps
from ..native import DTYPES
from ..neuron_tape import NeuronTape
from ..pool_tape import Source, run_pool
from ..pooling import AvgPool, MaxPool, Pool, Window
from ..tapes import TAG, SourceTag, tag_of
from . import synapses
from .fallback import mode_problem, tensor_problem

host_forward = nn.Conv2d.forward
host_max_pool2d, host_avg_pool2d = F.max_pool2d, F.avg_pool2d


def conv_forward(self: nn.Conv2d, input: torch.Tensor) -> torch.Tensor:
    """Replaces ``nn.Conv2d.forward`` while a library is enabled; input ``[B, C, H, W]``."""
    if torch.compiler.is_compiling() or config.suspended:
        return host_forward(self, input)
    tag = tag_of(input) if type(input) is torch.Tensor else None
    owner = tag.tape() if tag is not None else None
    options = owner.plan.options if isinstance(owner, NeuronTape) else synapses.options_of(self)
    if options is None:
        output = host_forward(self, input)
        if type(self) is nn.Conv2d and output.requires_grad and type(output) is torch.Tensor:
            setattr(output, TAG, SourceTag(self))
        return output
    convolution = _eligible(self, input)
    if convolution is None:
        return host_forward(self, input)
    lane_steps.prepare()
    return run_convolution(self, convolution, options, lambda: host_forward(self, input), input, tag)


def _eligible(module: nn.Conv2d, x: torch.Tensor) -> Convolution | None:
    """What the convolution does, if this call can be recorded."""
    if type(module) is not nn.Conv2d or "_conv_forward" in module.__dict__ or not torch.is_grad_enabled():
        return None
    weight, bias, dtype = module.weight, module.bias, x.dtype
    if not (weight.requires_grad or x.requires_grad) or x.dim() != 4 or not x.numel():
        return None
    if dtype not in DTYPES or weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        return None
    if tensor_problem(x, weight) is not None or mode_problem(x.device) is not None:
        return None
    if x.shape[1] != module.in_channels or module.padding_mode != "zeros":
        return None
    return _convolution(module.kernel_size, module.stride, module.padding, module.dilation, module.groups)


@cache
def _convolution(kernel: tuple[int, int], stride: tuple[int, int], padding: Any, dilation: tuple[int, int],
                 groups: int) -> Convolution | None:
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        both = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(p % 2 for p in both):
            return None  # more on one side than on the other
        padding = (both[0] // 2, both[1] // 2)
    return Convolution(Window(kernel, stride, padding, dilation), groups)


def max_pool2d(*args: Any, **kwargs: Any) -> Any:
    """Replaces ``F.max_pool2d``, which ``nn.MaxPool2d`` calls, while a library is enabled."""
    return _pooled(host_max_pool2d, _max_pool, *args, **kwargs)


def avg_pool2d(*args: Any, **kwargs: Any) -> Any:
    """Replaces ``F.avg_pool2d``, which ``nn.AvgPool2d`` calls, while a library is enabled."""
    return _pooled(host_avg_pool2d, _avg_pool, *args, **kwargs)


def _pooled(host: Callable[..., Any], pool_of: Callable[..., Pool | None], *args: Any, **kwargs: Any) -> Any:
    x = args[0] if args else kwargs.get("input")
    source = _source_of(x)
    pool = pool_of(*args, **kwargs) if source is not None else None
    if source is not None and pool is not None and isinstance(x, torch.Tensor):
        return run_pool(pool, x, *source)
    result, tag = host(*args, **kwargs), getattr(x, TAG, None)
    if isinstance(tag, SourceTag) and type(result) is torch.Tensor:
        setattr(result, TAG, tag)  # it comes from that convolution, too
    return result


def _max_pool(input: torch.Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
              ceil_mode: bool = False, return_indices: bool = False) -> Pool | None:
    window = _window(input, kernel_size, stride, padding, dilation, bool(ceil_mode))
    return MaxPool(window, bool(ceil_mode)) if window is not None and not return_indices else None


def _avg_pool(input: torch.Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
              count_include_pad: bool = True, divisor_override: int | None = None) -> Pool | None:
    window = _window(input, kernel_size, stride, padding, 1, bool(ceil_mode))
    if window is None:
        return None
    return AvgPool(window, bool(ceil_mode), bool(count_include_pad), divisor_override)


def _source_of(x: Any) -> tuple[Source, int] | None:
    """The convolution or the neuron that made these very images, and which of its steps it was."""
    if type(x) is not torch.Tensor or not x.requires_grad or not lane_steps.prepared or config.suspended:
        return None
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.dim() != 4 or not x.is_contiguous():
        return None
    tape = load_node().tape_of(x)
    if isinstance(tape, ConvTape):
        found: tuple[Source, int] = (tape, x.output_nr)
    elif isinstance(tape, NeuronTape):
        tag = tag_of(x)
        if tag is None or tag.tape() is not tape or not tape.plan.options.fuse_steps:
            return None
        found = (tape, tag.block)
    else:
        return None
    return None if tensor_problem(x) is not None or mode_problem(x.device) is not None else found


def _pair(value: Any) -> tuple[int, int] | None:
    """A size as F takes it, as (height, width); None for what is none, and for the host to complain about."""
    if type(value) is int:
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (1, 2) and all(type(v) is int for v in value):
        return value[0], value[-1]
    return None


def _window(x: torch.Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Window | None:
    """The window, None if the host would refuse it for these images."""
    size, step = _pair(kernel), _pair(kernel if stride is None or stride == [] else stride)
    around, apart = _pair(padding), _pair(dilation)
    if size is None or step is None or around is None or apart is None:
        return None
    if min(*size, *step, *apart) < 1 or any(not 0 <= 2 * p <= k for p, k in zip(around, size, strict=True)):
        return None
    if max(around) > 0 and max(apart) > 1:  # a window may lie outside its image altogether
        return None
    window = Window(size, step, around, apart)
    return window if min(window.stops(x.shape, ceil_mode)) > 0 else None


def switch(on: bool) -> None:
    """Puts these functions in the place of the host's, or the host's back."""
    nn.Conv2d.forward = conv_forward if on else host_forward  # type: ignore[method-assign]
    F.max_pool2d = max_pool2d if on else host_max_pool2d
    F.avg_pool2d = avg_pool2d if on else host_avg_pool2d


scripts_as(max_pool2d, host_max_pool2d)
scripts_as(avg_pool2d, host_avg_pool2d)
