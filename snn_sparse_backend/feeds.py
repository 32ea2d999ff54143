"""What the tapes of convolutions and of pooling share: layers of images ``[B, C, H, W]`` between neurons."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .build import load_node
from .pooling import MaxPool
from .tapes import Delivery, Tape


@dataclass
class PooledDelivery(Delivery):
    """Gradients of max-pooled images ``[rows, C * h * w]``, for the convolution that made the images.

    Args:
        pool: how they were pooled.
        image: shape of the pooled images ``[C, h, w]``.
        places: of the maxima, one tensor a step; the very same one where the images were the same.
    """

    pool: MaxPool | None = None
    image: torch.Size = torch.Size()
    places: Sequence[torch.Tensor] = ()


class FeedTape(Tape):
    """Base of tapes of which each step has one output, that of the node with the same number.

    Attributes:
        rows: of each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    @property
    def owner(self) -> weakref.ref[Any] | None:
        """The neuron tape whose spikes it goes back to; None if it belongs to the neuron that consumes its outputs."""
        raise NotImplementedError

    @property
    def sink(self) -> weakref.ref[Any] | None:
        """The neuron tape that consumes its outputs, once it is known."""
        raise NotImplementedError

    @sink.setter
    def sink(self, neuron: weakref.ref[Any] | None) -> None:
        raise NotImplementedError

    @property
    def claimed(self) -> int:
        """The last step whose output a neuron consumed, -1 if none. A neuron's lane tells the node by itself."""
        claimed: int = load_node().claimed(self.handle)
        return claimed

    @claimed.setter
    def claimed(self, step: int) -> None:
        load_node().claimed(self.handle, step)

    def move(self, index: int, output: torch.Tensor) -> FeedTape | None:
        """Moves the output of one step to a fresh tape; the old node keeps one that nobody uses."""
        raise NotImplementedError

    def received(self, grads: Sequence[torch.Tensor | None],
                 deliveries: Sequence[Delivery]) -> tuple[list[int], torch.Tensor | None]:
        """Steps that received a gradient, and their gradients ``[rows of these steps, cols]``."""
        if len(deliveries) == 1 and all(g is None for g in grads):
            blocks = deliveries[0].blocks
            if len(set(blocks)) == len(blocks):
                return blocks, self._dense(deliveries[0])
        found: dict[int, torch.Tensor] = {}
        for index, grad in self._parts(grads, deliveries):
            grad = grad.reshape(self.rows[index], -1)
            found[index] = found[index] + grad if index in found else grad
        chosen = sorted(found)
        return chosen, torch.cat([found[i] for i in chosen]) if chosen else None

    def _parts(self, grads: Sequence[torch.Tensor | None],
               deliveries: Sequence[Delivery]) -> Iterator[tuple[int, torch.Tensor]]:
        yield from ((index, grad) for index, grad in enumerate(grads) if grad is not None)
        for delivery in deliveries:
            dense, first = self._dense(delivery), 0
            for index in delivery.blocks:
                yield index, dense[first : first + self.rows[index]]
                first += self.rows[index]

    def _dense(self, delivery: Delivery) -> torch.Tensor:
        """What was delivered, as a matrix ``[rows, cols]``."""
        assert delivery.dense is not None
        return delivery.dense.reshape(self.rows_of(delivery.blocks), -1)

    def rows_of(self, steps: Sequence[int]) -> int:
        """Rows of some steps together."""
        return sum(self.rows[i] for i in steps)
