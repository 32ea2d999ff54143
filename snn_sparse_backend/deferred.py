"""Currents of a sequence that are never all there: the neuron that takes them asks for some steps at a time."""

from __future__ import annotations

import torch

from .counters import counts
from .kernels import SynapseForward
from .raster import Raster
from .tapes import TAG, Tag, placeholder

# Rows whose currents are computed at once: enough that a tile of weights is read from a cache by most of them.
ROWS_AT_ONCE = 1024


class DeferredCurrents(Tag):
    """Rides on the tensor that stands in the graph for currents ``[T, B, N]`` of a synapse.

    Args:
        product: computes currents from spikes.
        spikes: the synapse's input ``[T * B, inputs]``.
        shape: ``[T, B, N]``.
    """

    __slots__ = ("_product", "_spikes", "_shape", "_at_once", "_memory")

    def __init__(self, product: SynapseForward, spikes: Raster, shape: torch.Size) -> None:
        self._product, self._spikes, self._shape = product, spikes, shape
        self._at_once = min(shape[0], max(1, ROWS_AT_ONCE // max(shape[1], 1)))
        self._memory: torch.Tensor | None = None

    def stand_in(self) -> torch.Tensor:
        """The tensor that carries this, of the shape and dtype of the currents but without their memory."""
        tensor = placeholder(self._shape, self._product.tiles)
        setattr(tensor, TAG, self)
        return tensor

    def addresses(self) -> list[int]:
        """Where the current of each step will be, once :meth:`compute` was called for it."""
        steps, rows, cols = self._shape
        self._memory = self._product.tiles.new_empty((self._at_once * rows, cols))
        start, stride = self._memory.data_ptr(), rows * cols * self._memory.element_size()
        return [start + step % self._at_once * stride for step in range(steps)]

    def compute(self, first: int) -> int:
        """Computes the currents of some steps, those before are lost.

        Args:
            first: the step to begin with: 0, then what was returned last.

        Returns:
            The end of these steps.
        """
        steps, rows, _ = self._shape
        end = min(first + self._at_once, steps)
        assert self._memory is not None
        self._product(self._spikes.part(first * rows, end * rows), out=self._memory[: (end - first) * rows])
        return end

    def finish(self) -> None:
        """Gives the memory back."""
        counts["forward_deferred"] += 1
        self._memory = None

    def settle(self, tensor: torch.Tensor) -> None:
        """Computes all currents after all: the tensor that carries this becomes an ordinary one."""
        tensor.data = self._product(self._spikes).view(self._shape)
        delattr(tensor, TAG)


def deferred_of(tensor: torch.Tensor) -> DeferredCurrents | None:
    """What a tensor stands for, if its values are not there."""
    tag = getattr(tensor, TAG, None)
    return tag if isinstance(tag, DeferredCurrents) else None


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, with its values."""
    deferred = deferred_of(tensor)
    if deferred is not None:
        deferred.settle(tensor)
    return tensor
