"""The products of a convolution, for many steps at once: dense by torch, event by event by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels
from .abi import STRUCTS
from .native import DTYPES, call, event_parallel, threads_for
from .pooling import MaxPool, Window
from .raster import Raster

# Bytes of images and gradients together that go through a dense product at once. On the CPU they stay in the cache:
# larger pieces are slower (measured).
_CPU_BYTES, _CUDA_BYTES = 8 << 20, 256 << 20
_VECTOR_BYTES = 64
CHANNELS_TOGETHER = 16  # as oneDNN sums them


@dataclass(frozen=True)
class Convolution:
    """What an ``nn.Conv2d`` does, but for its weight and bias."""

    window: Window
    groups: int

    def serves(self, device: torch.device) -> bool:
        """Whether there are kernels that go event by event."""
        return self.groups == 1 and not event_parallel(device)


@dataclass
class ImageGradient:
    """Gradients of the currents ``[rows, O, H, W]`` of a convolution; of pooled ones before they are spread.

    Args:
        grad: contiguous ``[rows, cols]``, each row of this shape:
        shape: ``[O, H, W]``, or the pooled ``[O, h, w]``.
        image: ``[O, H, W]``.
        pool: how they were pooled, or None.
        places: of the maxima ``[rows, *shape]``.
    """

    grad: torch.Tensor
    shape: torch.Size
    image: torch.Size
    pool: MaxPool | None = None
    places: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return self.grad.shape[0]

    def part(self, first: int, end: int) -> torch.Tensor:
        """Some rows, spread ``[end - first, O, H, W]``."""
        grad = self.grad[first:end].view(-1, *self.shape)
        if self.pool is None:
            return grad
        assert self.places is not None
        return self.pool.backward(grad, self.image, self.places[first:end])

    def bias(self) -> torch.Tensor:
        """Gradient of the bias ``[O]``: spreading changes no sum."""
        return self.grad.sum(0).view(self.shape[0], -1).sum(1)  # rows first: they lie together


def dense_gradients(convolution: Convolution, grad: ImageGradient, weight: torch.Tensor,
                    images: Callable[[int, int], torch.Tensor] | None, shape: torch.Size,
                    total: torch.Tensor | None) -> torch.Tensor | None:
    """Gradients of the weight and of the inputs of a convolution, by torch, some rows at a time.

    Args:
        convolution: which.
        grad: gradients of the currents.
        weight: detached.
        images: gives some rows ``[rows, C, H, W]`` of the input; None if no gradient of the weight is wanted.
        shape: ``[C, H, W]`` of the input.
        total: where the gradients of the inputs go, ``[rows, C * H * W]``; None if none are wanted.

    Returns:
        The gradient of the weight, or None.
    """
    window, found = convolution.window, None
    bound = _CPU_BYTES if weight.device.type == "cpu" else _CUDA_BYTES
    step = max(1, bound // (weight.element_size() * (grad.image.numel() + shape.numel())))
    for first in range(0, grad.rows, step):
        end = min(first + step, grad.rows)
        part = grad.part(first, end)
        # Without a gradient of the weight only the shape of the input matters.
        x = images(first, end) if images is not None else part.new_empty((end - first, *shape))
        inputs, weights, _ = torch.ops.aten.convolution_backward(
            part, x, weight, [weight.shape[0]], window.stride, window.padding, window.dilation, False, (0, 0),
            convolution.groups, [total is not None, images is not None, False])
        if total is not None:
            total[first:end] = inputs.view(end - first, -1)
        if images is not None:
            found = weights if found is None else found.add_(weights)
    return found


# ------------------------------------------------------------------------------------------------ event by event


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """Weight ``[O, C, kH, kW]`` as ``[C * kH * kW, padded outputs]``, as the kernels read it."""
    outputs = weight.shape[0]
    packed = weight.new_zeros((weight[0].numel(), _padded(outputs, weight.dtype)))
    packed[:, :outputs] = weight.detach().view(outputs, -1).t()
    return packed


def _padded(outputs: int, dtype: torch.dtype) -> int:
    lanes = _VECTOR_BYTES // dtype.itemsize
    return -(-outputs // lanes) * lanes


def _struct(convolution: Convolution, rows: int, shape: torch.Size, image: torch.Size, dtype: torch.dtype,
            **gradient: Any) -> Any:
    return STRUCTS["SnnConvolution"](
        window=convolution.window.struct(shape, image), rows=rows, channels=shape[0], outputs=image[0],
        padded=_padded(image[0], dtype), dtype=DTYPES[dtype], threads=threads_for(rows * image.numel()), **gradient)


def _gradient_struct(convolution: Convolution, grad: ImageGradient, shape: torch.Size) -> Any:
    found: dict[str, Any] = {"grad": grad.grad.data_ptr()}
    if grad.pool is not None and grad.places is not None:
        found |= {"places": grad.places.data_ptr(), "pool": grad.pool.window.struct(grad.image, grad.shape)}
    return _struct(convolution, grad.rows, shape, grad.image, grad.grad.dtype, **found)


def events_serve(grad: ImageGradient) -> bool:
    """Whether the kernels can read these gradients: pooled ones need places of one byte."""
    return grad.places is None or grad.places.dtype is torch.uint8


def event_forward(convolution: Convolution, raster: Raster, packed: torch.Tensor, bias: torch.Tensor | None,
                  shape: torch.Size, image: torch.Size, together: int = CHANNELS_TOGETHER) -> torch.Tensor:
    """Currents ``[rows, O, H', W']`` of spikes.

    Args:
        convolution: which, without groups.
        raster: input spikes ``[rows, C * H * W]``.
        packed: the weight, see :func:`pack_weight`.
        bias: ``[O]``, detached, or None.
        shape, image: ``[C, H, W]`` of the input, ``[O, H', W']`` of the currents.
        together: channels that are summed apart from the others, see ``SnnConvForward``.
    """
    current = packed.new_empty((raster.rows, *image))
    call("conv_forward", "SnnConvForward", packed.device, raster=raster.words, weight=packed, current=current,
         bias=bias.contiguous() if bias is not None else None, together=together,
         convolution=_struct(convolution, raster.rows, shape, image, packed.dtype))
    return current


def event_weight_gradient(convolution: Convolution, grad: ImageGradient, raster: Raster,
                          shape: torch.Size) -> torch.Tensor:
    """Gradient of the weight ``[O, C, kH, kW]``.

    Args:
        convolution: which, without groups.
        grad: gradients of the currents.
        raster: input spikes ``[rows, C * H * W]``.
        shape: ``[C, H, W]`` of the input.
    """
    found = grad.grad.new_empty((grad.image[0], shape[0], *convolution.window.kernel))
    call("conv_weight_gradient", "SnnConvWeightGradient", found.device, raster=raster.words, grad_weight=found,
         convolution=_gradient_struct(convolution, grad, shape))
    return found


def event_input_gradient(convolution: Convolution, grad: ImageGradient, active: Raster, packed: torch.Tensor,
                         shape: torch.Size) -> torch.Tensor:
    """Gradients of the inputs at the active sites only, ``[active sites]`` in row-major order.

    Args:
        convolution: which, without groups.
        grad: gradients of the currents.
        active: the active sites ``[rows, C * H * W]``.
        packed: the weight, see :func:`pack_weight`.
        shape: ``[C, H, W]`` of the input.
    """
    found = grad.grad.new_empty(kernels.count(active))
    call("conv_input_gradient", "SnnConvInputGradient", found.device, active=active.words, weight=packed,
         grad_active=found, convolution=_gradient_struct(convolution, grad, shape))
    return found
