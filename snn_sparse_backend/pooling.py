"""Pooling of images ``[B, C, H, W]`` and its backward, for many steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .abi import STRUCTS
from .native import DTYPES, call, event_parallel, threads_for

_MOST_SITES = 256  # of a window whose sites are numbered by bytes


@dataclass(frozen=True)
class Window:
    """A window that slides over images; pairs are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)

    def stops(self, image: Sequence[int], ceil_mode: bool = False) -> tuple[int, int]:
        """Where it stops on images ``[..., H, W]``: so often downwards and to the right, as torch counts."""
        found = []
        for size, k, s, p, d in zip(image[-2:], self.kernel, self.stride, self.padding, self.dilation, strict=True):
            reach = size + 2 * p - d * (k - 1) - 1
            stops = (reach + (s - 1 if ceil_mode else 0)) // s + 1
            found.append(stops - (ceil_mode and (stops - 1) * s >= size + p))  # the last begins before the end
        return found[0], found[1]

    def struct(self, image: Sequence[int], stops: Sequence[int]) -> Any:
        """The C struct, for images ``[..., H, W]``."""
        (kernel_h, kernel_w), (stride_h, stride_w) = self.kernel, self.stride
        (pad_h, pad_w), (dilation_h, dilation_w) = self.padding, self.dilation
        return STRUCTS["SnnWindow"](height=image[-2], width=image[-1], out_height=stops[-2], out_width=stops[-1],
                                    kernel_h=kernel_h, kernel_w=kernel_w, stride_h=stride_h, stride_w=stride_w,
                                    pad_h=pad_h, pad_w=pad_w, dilation_h=dilation_h, dilation_w=dilation_w)


@dataclass(frozen=True)
class MaxPool:
    """``F.max_pool2d``: of equal values the first counts, row by row."""

    window: Window
    ceil_mode: bool = False

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled images, and the places of the maxima.

        Args:
            x: contiguous images ``[B, C, H, W]``.

        Returns:
            ``[B, C, h, w]``, and places of the same shape: uint8 numbers of sites in the window, or, where no kernel
            serves, torch's int64 numbers of sites in the image.
        """
        w = self.window
        if event_parallel(x.device) or w.kernel[0] * w.kernel[1] > _MOST_SITES:
            pooled, places = torch.ops.aten.max_pool2d_with_indices(x, w.kernel, w.stride, w.padding, w.dilation,
                                                                    self.ceil_mode)
            return pooled, places
        planes, stops = x.shape[:2], w.stops(x.shape, self.ceil_mode)
        pooled, places = x.new_empty((*planes, *stops)), x.new_empty((*planes, *stops), dtype=torch.uint8)
        call("max_pool", "SnnMaxPool", x.device, window=w.struct(x.shape, stops), planes=planes.numel(), images=x,
             pooled=pooled, places=places, dtype=DTYPES[x.dtype], threads=threads_for(x.numel()))
        return pooled, places

    def backward(self, grad: torch.Tensor, image: torch.Size, places: torch.Tensor | None) -> torch.Tensor:
        """Gradients of the images ``[rows, *image]`` from those of the pooled ones ``[rows, C, h, w]``."""
        assert places is not None
        w, found = self.window, grad.new_empty((grad.shape[0], *image))
        if places.dtype is not torch.uint8:
            result: torch.Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
                grad, found, w.kernel, w.stride, w.padding, w.dilation, self.ceil_mode, places)
            return result
        call("max_pool_backward", "SnnMaxPoolBackward", grad.device, window=w.struct(image, grad.shape),
             planes=grad.shape[:2].numel(), grad=grad.contiguous(), places=places.contiguous(), grad_images=found,
             dtype=DTYPES[grad.dtype], threads=threads_for(found.numel()))
        return found


@dataclass(frozen=True)
class AvgPool:
    """``F.avg_pool2d``."""

    window: Window
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The pooled images; nothing of them has to be kept."""
        w = self.window
        pooled: torch.Tensor = torch.ops.aten.avg_pool2d(x, w.kernel, w.stride, w.padding, self.ceil_mode,
                                                         self.count_include_pad, self.divisor_override)
        return pooled, None

    def backward(self, grad: torch.Tensor, image: torch.Size, places: torch.Tensor | None) -> torch.Tensor:
        """Gradients of the images ``[rows, *image]`` from those of the pooled ones ``[rows, C, h, w]``."""
        w, like = self.window, grad.new_empty((grad.shape[0], *image))
        found: torch.Tensor = torch.ops.aten.avg_pool2d_backward(
            grad, like, w.kernel, w.stride, w.padding, self.ceil_mode, self.count_include_pad, self.divisor_override)
        return found


Pool = MaxPool | AvgPool
