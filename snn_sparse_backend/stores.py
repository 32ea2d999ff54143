"""Where the membranes of the active sites are kept, compressed, between forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from .native import event_parallel
from .reports import Counter, Densities
from .scans import TILE, ForwardScan, Layer

if TYPE_CHECKING:
    from .deferred import DeferredCurrents
    from .recorder import Block

# From this density of active sites on, the dense membrane is stored instead of compressed values.
STORE_DENSE_ABOVE = 0.3
# CUDA: an arena has room for so many steps in which every site is active.
ARENA_STEPS = 4


class HostStore:
    """On the CPU: arenas that are filled one step behind the other; the kernel says how much each step took."""

    def __init__(self, layer: Layer, densities: Densities, scan: ForwardScan) -> None:
        self._layer, self.scan = layer, scan
        self._need = layer.rows * layer.words * TILE
        self._arena: torch.Tensor | None = None
        self._used = 0
        self.dense = False  # whether so many sites are active that the whole membrane had better be stored

    def run(self, block: Block, pointers: list[int], state_in: list[int], state_out: list[int],
            inputs: DeferredCurrents | None) -> None:
        """Calls the kernel until all steps are done; each call fills one arena of compressed membranes at most.

        Args:
            inputs: computes the inputs of a sequence, some steps at a time; None: they are there.
        """
        if block.steps == 1:
            self._run_one(block, pointers, state_in, state_out)
        else:
            self._run_all(block, pointers, state_in, state_out, inputs)
        if block.raster is not None:
            block.raster.ones = sum(self.scan.spike_counts)
        if block.active is not None:
            block.active.ones = active = sum(block.active_counts)
            self.dense |= active > STORE_DENSE_ABOVE * self._layer.sites * block.steps

    def close(self) -> None:
        """Gives back what only the worst case of a further step would need."""
        if self._arena is not None:
            self._arena.untyped_storage().resize_(self._used * self._layer.dtype.itemsize)
        self._arena, self._used = None, 0
        self.scan.drop_scratch()

    def _run_one(self, block: Block, pointers: list[int], state_in: list[int], state_out: list[int]) -> None:
        if block.active is None or block.membrane is not None:
            self.scan.run(1, pointers, state_in, state_out)
        else:
            arena, used = self._room()
            place = used * self._layer.dtype.itemsize
            self.scan.run(1, pointers, state_in, state_out, arena.data_ptr() + place, arena.numel() - used)
            self._used = used + self.scan.active_counts[0]
            block.values = ((arena, (place,)),)
        if block.active is not None:
            block.active_counts = (self.scan.active_counts[0],)

    def _run_all(self, block: Block, pointers: list[int], state_in: list[int], state_out: list[int],
                 inputs: DeferredCurrents | None) -> None:
        done, ready, compress = 0, 0, block.active is not None and block.membrane is None
        counts: list[int] = []
        values: list[tuple[torch.Tensor, Sequence[int]]] = []
        while done < block.steps:
            if done == ready:
                ready = inputs.compute(done) if inputs is not None else block.steps
            if compress:
                arena, used = self._room()
                ran = self.scan.run(block.steps, pointers, state_in, state_out,
                                    arena.data_ptr() + used * arena.element_size(), arena.numel() - used, done, ready)
            else:
                ran = self.scan.run(block.steps, pointers, state_in, state_out, first=done, end=ready)
            if block.active is not None:
                found = self.scan.active_counts[done : done + ran]
                counts += found
                if compress:
                    places = list(accumulate(found, initial=self._used))
                    self._used = places.pop()
                    values.append((arena, [place * arena.element_size() for place in places]))
            state_in, done = state_out, done + ran
        if block.active is not None:
            block.active_counts, block.values = counts, values

    def _room(self) -> tuple[torch.Tensor, int]:
        """An arena with room for the compressed membranes of at least one more step, and how much of it is used."""
        if self._arena is None or self._arena.numel() - self._used < self._need:
            if self._arena is not None:
                self.close()
            self._arena = torch.empty(2 * self._need, dtype=self._layer.dtype, device=self._layer.device)
        return self._arena, self._used


class DeviceStore:
    """On CUDA: how much a step took is known only some time after it ran, and nobody waits for that.

    So an arena has room for every site of the steps that have not been heard of. When their reports come in, that room
    is free for further steps; when an arena is full and all its reports are in, it shrinks to what it holds. A device
    that is far behind the host thus costs memory for a while, as does a graph that is captured, but never a wait.
    """

    def __init__(self, layer: Layer, densities: Densities, scan: ForwardScan) -> None:
        self._layer, self.scan, self._densities = layer, scan, densities
        self._counter = Counter(layer.device)
        self._arena: torch.Tensor | None = None
        self._full: list[tuple[torch.Tensor, Counter]] = []  # not yet shrunk

    @property
    def dense(self) -> bool:
        active = self._densities.look().active
        return active is not None and active > STORE_DENSE_ABOVE

    def run(self, block: Block, pointers: list[int], state_in: Sequence[int], state_out: Sequence[int],
            inputs: DeferredCurrents | None) -> None:
        """Enqueues all steps. Inputs are never deferred on CUDA."""
        assert inputs is None
        sites, address, capacity = block.steps * self._layer.sites, None, 0
        if block.active is not None and block.membrane is None:
            arena = self._room(sites)
            address, capacity = arena.data_ptr(), arena.numel()
            block.values = [(arena, [0] * block.steps)]
        self.scan.run(block.steps, pointers, state_in, state_out, address, capacity,
                       report=self._counter.launch(sites))
        self._densities.watch(self._counter)
        if block.raster is not None:
            block.raster.densities = self._densities

    def _room(self, sites: int) -> torch.Tensor:
        """An arena with room for so many more values, whatever has become of the steps before."""
        if self._arena is None or self._taken() + sites > self._arena.numel():
            self._counter.look()
        if self._full:
            self._shrink()
        if self._arena is None or self._taken() + sites > self._arena.numel():
            if self._arena is not None:
                self._full.append((self._arena, self._counter))
                self._counter = Counter(self._layer.device)
            self._arena = torch.empty(max(sites, ARENA_STEPS * self._layer.sites), dtype=self._layer.dtype,
                                      device=self._layer.device)
        return self._arena

    def _taken(self) -> int:
        """Values that the arena may hold: those known of, and all sites of the steps that were not heard of."""
        return self._counter.known[0] + self._counter.started - self._counter.done

    def _shrink(self) -> None:
        for arena, counter in self._full:
            counter.look()
            if counter.done == counter.started:
                arena.untyped_storage().resize_(counter.known[0] * arena.element_size())
        self._full = [(arena, counter) for arena, counter in self._full if counter.done < counter.started]


def store_for(layer: Layer, densities: Densities, scan: ForwardScan) -> HostStore | DeviceStore:
    return (DeviceStore if event_parallel(layer.device) else HostStore)(layer, densities, scan)
