"""Surrogate derivatives that only Python can compute: evaluated at the stored membranes, before the backward scan."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import islice

import torch

from .counters import counts
from .recorder import Block
from .scans import Layer, Table, step_pointers
from .surrogate import Surrogate
from .tables import Recorded


class Derivatives:
    """The derivative at each stored site of a sequence.

    Args:
        surrogate: whose formula is ``given``.
        layer: has the thresholds.
        recorded: has the compressed membranes.
        blocks: have the others.
        reached: the number of blocks that backward goes through.

    Attributes:
        table: addresses, step by step, of what is laid out as the membranes are.
    """

    def __init__(self, surrogate: Surrogate, layer: Layer, recorded: Recorded, blocks: Iterable[Block],
                 reached: int) -> None:
        self._surrogate, self._layer = surrogate, layer
        self._threshold = layer.parameters[layer.dynamics.threshold]
        self._keep: list[torch.Tensor] = []  # what the table points into
        self.table: Table[int] = array("Q")
        for storage, places in recorded.values():
            base = self._evaluate(storage - self._threshold[0, 0]).data_ptr() if storage is not None else 0
            self.table.extend([base + place if storage is not None else 0 for place in places])
        step = 0
        for block in islice(blocks, reached):
            if block.membrane is not None:
                sites = block.membrane.view(-1, layer.rows, layer.cols)
                found = self._evaluate(sites - self._threshold)
                self.table[step : step + block.steps] = array("Q", step_pointers(found, block.steps))
            step += block.steps

    def _evaluate(self, x: torch.Tensor) -> torch.Tensor:
        """The derivative at ``x = u - threshold``; bounds of the surrogate are part of it."""
        surrogate, given = self._surrogate, self._surrogate.given
        assert given is not None
        counts["derivatives_given"] += x.numel()
        with torch.no_grad():
            found = given(x)
        if not isinstance(found, torch.Tensor) or found.shape != x.shape:
            got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise RuntimeError(f"the derivative of a registered surrogate: expected a tensor of shape "
                               f"{tuple(x.shape)}, as its argument, got {got}")
        found = found.detach().to(x)
        outside = (x <= surrogate.low) | (x >= surrogate.high)
        found = torch.where(outside, found.new_zeros(()), found).contiguous()
        self._keep.append(found)
        return found
