"""Whether the host's convolution adds in the order of our kernel, so that a sum over events can give the same bits.

oneDNN, which computes ``torch.nn.functional.conv2d`` in float32 on the CPU, cuts the channels into blocks of sixteen.
It sums each block from zero on, place by place of the window and in each place channel by channel, and adds these sums
to the bias one after another. On images of zeros and ones, leaving out the zeros then changes no bit.

Nobody promises that order, so it is verified for each shape, bit by bit at every output, on random operands of mixed
magnitudes. Where some other code computes the convolution, that runs itself.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from .convolution import Convolution, event_forward, pack_weight
from .kernels import pack

# Multiplications of a product. Below, it is over before an order could pay; above, verifying would take seconds.
FEWEST, MOST = 1 << 18, 1 << 32
_DENSITIES = (0.02, 0.3, 1.0)
_SUBNORMAL = 5e-324

_lock = threading.Lock()
_verified: dict[tuple[Any, ...], bool] = {}


def adds_alike(convolution: Convolution, shape: torch.Size, weight: torch.Tensor, bias: bool) -> bool:
    """Whether ``event_forward`` gives the bits of ``F.conv2d`` for inputs of zeros and ones.

    Found once in a process for each shape, presence of a bias, number of threads and precision settings; a first call
    takes about as long as ten products.

    Args:
        convolution: which, without groups.
        shape: ``[B, C, H, W]`` of a contiguous input on the CPU.
        weight: detached; not contiguous, or where a zero times it is not zero: False.
        bias: whether there is one.
    """
    stops = convolution.window.stops(shape)
    if not FEWEST <= shape[0] * stops[0] * stops[1] * weight.numel() <= MOST or weight.dtype is not torch.float32:
        return False
    if not weight.is_contiguous() or not bool(weight.sum().isfinite()):
        return False
    key = (convolution, shape, weight.shape, bias, torch.get_num_threads(), *_settings())
    with _lock:
        if key not in _verified:
            _verified[key] = _verify(convolution, shape, weight.shape, bias)
        return _verified[key]


def _settings() -> tuple[Any, ...]:
    """What chooses between the host's own implementations."""
    conv = getattr(torch.backends.mkldnn, "conv", None)
    return (torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(), getattr(conv, "fp32_precision", None),
            torch.are_deterministic_algorithms_enabled(), _SUBNORMAL > 0)


@torch.no_grad()
def _verify(convolution: Convolution, shape: torch.Size, kernel: torch.Size, bias: bool) -> bool:
    window = convolution.window
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        for offset, density in enumerate(_DENSITIES):  # a slice of a larger tensor need not lie on a cache line
            weight, b = _mixed(kernel, offset), _mixed(kernel[:1], offset) if bias else None
            x = torch.rand(shape).lt(density).float()
            x[torch.rand(shape).lt(0.05) & (x == 0)] = -0.0
            x[:1] = 0
            x = _placed(x, offset)
            raster = pack(x.flatten(1))
            host = F.conv2d(x, weight, b, window.stride, window.padding, window.dilation)
            assert raster is not None
            found = event_forward(convolution, raster, pack_weight(weight), b, shape[1:], host.shape[1:])
            if not torch.equal(_bits(host), _bits(found)):
                return False
    return True


def _mixed(shape: torch.Size, offset: int) -> torch.Tensor:
    """Numbers over sixteen binary orders of magnitude, some of them negative zeros; the first output's all negative."""
    numbers = torch.randn(shape) * torch.exp2(torch.randint(-8, 8, shape).float())
    numbers[:1] = -numbers[:1].abs()
    return _placed(numbers.masked_fill_(torch.rand(shape) < 0.01, -0.0), offset)


def _placed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, so many elements behind the start of an allocation."""
    memory = torch.empty(values.numel() + offset)
    return memory[offset:].view(values.shape).copy_(values)


_bits = partial(torch.Tensor.view, dtype=torch.int32)
