"""Comparisons of the kernels of convolutions and of pooling with torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from snn_sparse_backend import kernels
from snn_sparse_backend.convolution import (
    Convolution,
    ImageGradient,
    event_forward,
    event_input_gradient,
    event_weight_gradient,
    pack_weight,
)
from snn_sparse_backend.pooling import MaxPool, Window

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@dataclass
class Case:
    """A convolution of random spikes, and gradients of its currents."""

    rows: int
    shape: tuple[int, int, int]
    outputs: int
    window: Window
    density: float
    pooled: bool
    dtype: torch.dtype
    seed: int

    def make(self) -> bool:
        """Draws everything; False if the window is larger than the images."""
        torch.manual_seed(self.seed)
        self.convolution = Convolution(self.window, 1)
        self.x = torch.rand(self.rows, *self.shape).lt(self.density).to(self.dtype)
        self.raster = kernels.pack(self.x.flatten(1))
        self.weight = torch.randn(self.outputs, self.shape[0], *self.window.kernel, dtype=self.dtype)
        self.bias = torch.randn(self.outputs, dtype=self.dtype)
        stops = self.window.stops(self.shape)
        if min(stops) < 1 or (self.pooled and min(stops) < 2):
            return False
        self.image = torch.Size((self.outputs, *stops))
        if self.pooled:
            pool = MaxPool(Window((2, 2), (1, 2), (0, 0)))
            pooled, places = pool(torch.randn(self.rows, *self.image, dtype=self.dtype))
            self.grad = ImageGradient(torch.randn_like(pooled).flatten(1), pooled.shape[1:], self.image, pool, places)
        else:
            grad = torch.randn(self.rows, self.image.numel(), dtype=self.dtype)
            self.grad = ImageGradient(grad, self.image, self.image)
        return True

    def products(self) -> list[Tensor]:
        """By our kernels: forward, gradient of the weight, gradients of the inputs where they spike, of the bias."""
        packed, shape = pack_weight(self.weight), torch.Size(self.shape)
        return [event_forward(self.convolution, self.raster, packed, self.bias, shape, self.image),
                event_weight_gradient(self.convolution, self.grad, self.raster, shape),
                event_input_gradient(self.convolution, self.grad, self.raster, packed, shape), self.grad.bias()]

    def expected(self) -> list[Tensor]:
        """The same by torch."""
        w = self.window
        x, weight, bias = (t.clone().requires_grad_() for t in (self.x, self.weight, self.bias))
        out = F.conv2d(x, weight, bias, w.stride, w.padding, w.dilation)
        out.backward(self.grad.part(0, self.rows))
        return [out.detach(), weight.grad, x.grad[self.x > 0], bias.grad]


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).norm()) <= TOLERANCE[found.dtype] * max(float(expected.norm()), 1e-3)


def compare_products(case: Case) -> None:
    """All products of a case."""
    if not case.make():
        return
    for name, found, expected in zip(("forward", "weight", "input", "bias"), case.products(), case.expected(),
                                     strict=True):
        assert close(found, expected), name


def compare_max_pool(shape: tuple[int, int, int, int], window: Window, ceil_mode: bool, values: str,
                     dtype: torch.dtype, seed: int) -> None:
    """Max pooling of random images, or of spikes, or of special numbers: values, places and gradients."""
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=dtype)
    if values == "spikes":
        x = (x > 0.8).to(dtype)
    elif values == "special":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)
        x = special[torch.randint(0, 5, shape)]
    (most_h, most_w), (down, right), (every_h, every_w) = window.kernel, window.stride, window.dilation
    top, left = min(window.padding[0], most_h // 2), min(window.padding[1], most_w // 2)
    if max(every_h, every_w) > 1:  # a window may lie outside its image altogether, which is not supported
        top = left = 0
    window = replace(window, padding=(top, left))
    geometry = window.kernel, window.stride, window.padding, window.dilation, ceil_mode
    try:
        expected, index = F.max_pool2d(x, *geometry, return_indices=True)
    except RuntimeError:
        assert min(window.stops(shape, ceil_mode)) < 1
        return
    pool = MaxPool(window, ceil_mode)
    pooled, places = pool(x)
    assert pooled.shape == expected.shape and places.dtype is torch.uint8
    bits = torch.int32 if dtype is torch.float32 else torch.int64
    assert torch.equal(pooled.view(bits), expected.view(bits))
    y = torch.arange(pooled.shape[2]).view(-1, 1) * down - top + places.long() // window.kernel[1] * every_h
    x_at = torch.arange(pooled.shape[3]) * right - left + places.long() % window.kernel[1] * every_w
    assert torch.equal(y * shape[3] + x_at, index)
    grad = torch.randn_like(pooled)
    spread = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *geometry, index)
    assert close(pool.backward(grad, torch.Size(shape[1:]), places), spread)
