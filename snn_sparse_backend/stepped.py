"""Forward scans that have something to do before each time step, so that they run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .scans import ForwardScan, Layer

Precompute = Callable[[torch.Tensor], torch.Tensor]


class SteppedScan(ForwardScan):
    """The forward scan of a layer that takes a trace from torch, whose bits are then the host library's.

    Args:
        precompute: that trace from the membrane before a step; None if the layer has no such trace.
    """

    def __init__(self, layer: Layer, precompute: Precompute | None) -> None:
        super().__init__(layer)
        self._precompute = precompute
        self._before: torch.Tensor | None = None
        self._after: torch.Tensor | None = None
        self._given: torch.Tensor | None = None

    def enter(self, before: torch.Tensor, after: torch.Tensor, given: torch.Tensor | None) -> None:
        """To be called before a block is run.

        Args:
            before: membrane before the first step, of the shape that the host would see.
            after: where each step leaves its membrane ``[B, ...]``.
            given: where the precomputed trace goes ``[T, B, ...]`` or ``[B, ...]``.
        """
        self._before, self._after, self._given = before, after, given

    def finish(self) -> None:
        """Lets go of what :meth:`enter` was given, once the block has run."""
        self._before = self._after = self._given = None

    def prepare(self, step: int) -> None:
        """What has to be there before a step runs."""
        if self._precompute is None or self._given is None:
            return
        source = self._before if step == 0 else self._after
        assert source is not None
        with torch.no_grad():
            self._given.view(-1, *self._layer.shape)[step].copy_(self._precompute(source.detach()))

    def run(self, steps: int, pointers: Iterable[int | None], state_in: Sequence[int], state_out: Sequence[int],
            values: int | None = None, values_capacity: int = 0, first: int = 0, end: int | None = None,
            report: Any = None) -> int:
        last, size = steps if end is None else end, self._layer.dtype.itemsize
        done = used = 0
        for step in range(first, last):
            self.prepare(step)
            place = values + used * size if values is not None else None
            ran = super().run(steps, pointers, state_in, state_out, place, values_capacity - used, step, step + 1,
                              report)
            if not ran:
                break
            if values is not None and report is None:
                used += self.active_counts[step]
            state_in, done = state_out, done + 1
        return done
