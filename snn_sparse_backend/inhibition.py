"""Inhibition: in each row of a step ``[B, N]`` only the neuron furthest above its threshold may spike.

The scan of a step knows nothing of it. What it takes for spikes is who crosses the threshold, and hence is reset in the
next step; here all of them but one a row are suppressed. Gradients go through the spikes of these winners alone, so
they are the active sites, whatever the surrogate is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from .native import event_parallel
from .raster import WORD, Raster, RasterArena
from .reports import Densities
from .scans import SITES_PER_BLOCK, Layer

if TYPE_CHECKING:
    from .recorder import Block

STEPS_TOGETHER = 32  # whose membranes share a tensor


class Inhibition:
    """Suppresses the spikes of one sequence of a layer, step by step.

    Args:
        layer: the layer, on inputs ``[B, N]``.
        keep_values: backward needs the membranes of the winners, and has them from nowhere else.
    """

    def __init__(self, layer: Layer, keep_values: bool) -> None:
        self._layer, self._threshold = layer, layer.parameters[layer.dynamics.threshold]
        self._crossings, self._spikes, self._active = (
            RasterArena(layer.rows, layer.cols, layer.device) for _ in range(3))
        self._one = torch.ones((), dtype=torch.int64, device=layer.device)
        self._keep_values, self._values, self._used = keep_values, layer.empty()[:0], 0
        self._at_most = Densities()
        self._at_most.active = self._at_most.spikes = 1 / layer.cols
        self._places, self._starts = None, None
        if event_parallel(layer.device):
            # Sites as the blocks of a CUDA scan count them: rows are padded to whole words.
            self._places = torch.arange(layer.rows, device=layer.device) * (layer.words * WORD)
            self._starts = torch.arange(layer.blocks, device=layer.device) * SITES_PER_BLOCK

    def begin(self, block: Block) -> int:
        """Gives a step its rasters; returns the address of that of the neurons that cross the threshold."""
        block.crossings, address = self._crossings.take(1)
        block.raster, _ = self._spikes.take(1)
        block.active, _ = self._active.take(1)
        return address

    def suppress(self, block: Block, membrane: torch.Tensor, output: torch.Tensor) -> tuple[int, int]:
        """Lets only the winners spike; returns where its active sites and, on CUDA, its offsets are.

        Args:
            block: of the step, whose scan has run.
            membrane: at the threshold comparison ``[B, N]``.
            output: the spikes ``[B, N]``, changed in place.
        """
        raster, active, crossings = block.raster, block.active, block.crossings
        assert raster is not None and active is not None and crossings is not None
        # The host's own operations: they decide between equal membranes.
        winners = torch.argmax(membrane - self._threshold, dim=1, keepdim=True)
        spikes = output.gather(1, winners)
        output.zero_().scatter_(1, winners, spikes)
        bits = torch.bitwise_left_shift(self._one, winners % WORD)
        active.words.zero_().scatter_(1, winners.div(WORD, rounding_mode="floor"), bits)
        torch.bitwise_and(active.words, crossings.words, out=raster.words)
        active.ones = self._layer.rows
        if self._keep_values:
            self._keep(block, membrane.gather(1, winners).view(-1))
        if self._places is None or self._starts is None:
            raster.ones, block.winners = int(torch.count_nonzero(spikes)), winners
            block.active_counts = (self._layer.rows,)
            return active.address, 0
        raster.densities = self._at_most
        if not self._keep_values:
            return active.address, 0
        offsets = torch.searchsorted(self._places + winners.view(-1), self._starts)
        block.offsets = Raster(offsets.view(1, -1), WORD * self._layer.blocks)
        return active.address, block.offsets.address

    def _keep(self, block: Block, membranes: torch.Tensor) -> None:
        """Keeps the membranes of the winners ``[B]``."""
        size = membranes.numel()
        if self._used + size > self._values.numel():
            self._values, self._used = membranes.new_zeros(STEPS_TOGETHER * size), 0
        self._values[self._used : self._used + size] = membranes
        block.values = ((self._values, (self._used * membranes.element_size(),)),)
        self._used += size


def winners_of(blocks: Iterable[Block]) -> list[torch.Tensor]:
    """CPU: the neurons that could spike ``[B, 1]``, step by step, of a layer with inhibition."""
    return [block.winners for block in blocks if block.winners is not None]
