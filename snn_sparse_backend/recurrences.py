"""The ways in which the spikes of a step drive the next one. Shapes: spikes and currents of a step are ``[B, ...]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Recurrence:
    """From all neurons to all: ``spikes @ weight.T + bias``.

    Args:
        weight: as autograd knows it; ``[N, N]``.
        bias: ``[N]`` or None.

    Attributes:
        dense: each neuron drives every other: only then it pays to walk the events.
    """

    dense: ClassVar[bool] = True
    weight: Tensor
    bias: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Weight and bias, if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def current(self, spikes: Tensor) -> Tensor:
        """What spikes drive the next step with, in the host's own operation."""
        return F.linear(spikes, self.weight, self.bias)

    def through(self, grad: Tensor) -> Tensor:
        """The gradient at the spikes, from that at the current they made."""
        return grad @ self.weight

    def gradients(self, grad: Tensor, spikes: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """Those of weight and bias, summed over rows ``[rows, ...]``, where they are wanted."""
        of_weight, of_bias = wanted
        return grad.t() @ spikes if of_weight else None, grad.sum(0) if of_bias else None


@dataclass(frozen=True, eq=False)
class OneToOne(Recurrence):
    """From each neuron to itself: ``spikes * weight``, the weight broadcast over ``[B, ...]``."""

    dense = False

    def current(self, spikes: Tensor) -> Tensor:
        return spikes * self.weight

    def through(self, grad: Tensor) -> Tensor:
        return grad * self.weight

    def gradients(self, grad: Tensor, spikes: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        return (grad * spikes).sum_to_size(self.weight.shape).to(self.weight.dtype) if wanted[0] else None, None


@dataclass(frozen=True, eq=False)
class ConvRecurrence(Recurrence):
    """A convolution of spike maps ``[B, C, H, W]``.

    Args:
        stride, padding, dilation, groups: of the ``nn.Conv2d``.
    """

    dense = False
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def current(self, spikes: Tensor) -> Tensor:
        return F.conv2d(spikes, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def through(self, grad: Tensor) -> Tensor:
        return self._backward(grad, grad, (True, False, False))[0]  # whose place the spikes' values do not matter for

    def gradients(self, grad: Tensor, spikes: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        _, of_weight, of_bias = self._backward(grad, spikes, (False, *wanted))
        return of_weight, of_bias

    def _backward(self, grad: Tensor, spikes: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad, spikes, self.weight, [len(self.weight)], self.stride, self.padding, self.dilation, False, [0, 0],
            self.groups, wanted)
        return found
