"""Lanes, see ``csrc/torch/lanes.h``: what is said about them, and the runs of steps that they recorded."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from .build import load_node
from .raster import Raster
from .recorder import Block
from .scans import TRACES, ForwardScan

# The fused computation goes on from a state; from an end it will, once a step follows.
ROLES = {"plain": 0, "state": 1, "end": 2}

Item = TypeVar("Item")
ItemOfRun = TypeVar("ItemOfRun", covariant=True)


class Run(Protocol[ItemOfRun]):
    """Steps that a lane recorded, whose descriptions are made when they are asked for."""

    steps: int

    def at(self, index: int) -> ItemOfRun: ...


class Chain(Generic[Item]):
    """What was recorded call by call: single items, and whole runs."""

    def __init__(self) -> None:
        self.parts: list[list[Item] | Run[Item]] = []
        self._firsts: list[int] = []
        self._count = 0

    def append(self, item: Item) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(last, list):
            last.append(item)
        else:
            self._add([item])
        self._count += 1

    def extend(self, run: Run[Item]) -> None:
        self._add(run)
        self._count += run.steps

    def _add(self, part: list[Item] | Run[Item]) -> None:
        self.parts.append(part)
        self._firsts.append(self._count)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        if index < 0:
            index += self._count
        if not 0 <= index < self._count:
            raise IndexError(index)
        place = bisect_right(self._firsts, index) - 1
        part = self.parts[place]
        within = index - self._firsts[place]
        return part[within] if isinstance(part, list) else part.at(within)

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(self._count))


def integers(taken: bytes) -> array[int]:
    """Signed 64-bit integers from a lane."""
    return array("q", taken)


def addresses(taken: bytes) -> array[int]:
    """Addresses from a lane, 0 where there is nothing."""
    return array("Q", taken)


def rasters_at(table: Sequence[int], storages: Sequence[torch.Tensor], rows: int, cols: int) -> list[Raster]:
    """Rasters at given addresses, ``rows`` rows a step, neighbours in one.

    Args:
        table: address of each step, in the order in which the storages were filled.
        storages: where they lie; each holds whole steps.
    """
    found: list[Raster] = []
    words = -(-cols // 64)
    stride = 8 * rows * words
    step, count, place = 0, len(table), 0
    while step < count:
        address = table[step]
        while not _holds(storages[place], address):
            place = (place + 1) % len(storages)
        storage = storages[place]
        end = storage.data_ptr() + storage.nbytes
        first = step
        while step < count and table[step] == address and address < end:
            step += 1
            address += stride
        start = (table[first] - storage.data_ptr()) // (8 * words)
        found.append(Raster(storage.view(-1, words), cols, None, None, start, (step - first) * rows))
    return found


def _holds(storage: torch.Tensor, address: int) -> bool:
    return storage.data_ptr() <= address < storage.data_ptr() + storage.nbytes


def dense_at(address: int, storages: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """The step ``[B, ...]`` at an address inside one of the storages."""
    storage = next(s for s in storages if _holds(s, address))
    first = (address - storage.data_ptr()) // storage.element_size()
    return storage.view(-1)[first : first + shape.numel()].view(shape)


class NeuronRun:
    """Time steps of a neuron layer.

    Args:
        taken: what the lane gave.
        shape: of one time step ``[B, ...]``.
        rows, cols: the same as a matrix.
    """

    def __init__(self, taken: dict[str, Any], shape: torch.Size, rows: int, cols: int) -> None:
        self.steps: int = taken["steps"]
        self._shape, self._rows, self._cols = shape, rows, cols
        self.tables = {name: addresses(taken[name]) if name in taken else array("Q", bytes(8 * self.steps))
                       for name in ForwardScan.TABLES if name not in ("input", "output")}
        self.active_counts, self._spike_counts = integers(taken["active_counts"]), integers(taken["spike_counts"])
        self.sources = integers(taken["sources"]).tolist() if taken["fed"] else None
        self.values = [(storage, integers(places).tolist()) for storage, places in taken["values"]]
        self.raster, self.active, self.reset = taken["rasters"], taken["actives"], taken["resets"]
        self.membrane, self.traces = taken["membranes"], taken["traces"]

    def active_rasters(self) -> list[Raster] | None:
        """The active sites of all steps; None if they were not recorded."""
        if not self.active:
            return None
        found = rasters_at(self.tables["active"], self.active, self._rows, self._cols)
        step = 0
        for raster in found:
            steps = raster.rows // self._rows
            raster.ones = sum(self.active_counts[step : step + steps])
            step += steps
        return found

    def at(self, index: int) -> Block:
        """The block of one step."""
        def raster(name: str, storages: list[torch.Tensor], ones: int | None) -> Raster | None:
            address = self.tables[name][index]
            if not address:
                return None
            (found,) = rasters_at([address], storages, self._rows, self._cols)
            found.ones = ones
            return found

        def dense(name: str, storages: list[torch.Tensor]) -> torch.Tensor | None:
            address = self.tables[name][index]
            return dense_at(address, storages, self._shape) if address else None

        return Block(1, self._shape, raster("raster", self.raster, self._spike_counts[index]),
                     raster("active", self.active, self.active_counts[index]),
                     membrane=dense("membrane", self.membrane),
                     traces=tuple(dense(name, kept) for name, kept in zip(TRACES, self.traces, strict=False)),
                     reset=raster("reset", self.reset, None))


def take(handle: Any) -> dict[str, Any] | None:
    """What a node's lane recorded since it was asked last; None if nothing."""
    taken: dict[str, Any] | None = load_node().take(handle)
    return taken if taken is not None and taken["steps"] else None


def _the_long_way(*_: Any) -> None:
    """No lane, as long as nothing is compiled."""


class Steps:
    """One more step by a lane: the functions of the compiled module, once there is something they could go on from.

    Attributes:
        neuron: ``(module, options, input, *states) -> (output, *states) | None``.
        synapse: ``(module, input) -> current | None``; None: the step has to go the long way.
    """

    def __init__(self) -> None:
        self.neuron: Callable[..., Any] = _the_long_way
        self.synapse: Callable[..., Any] = _the_long_way

    @property
    def prepared(self) -> bool:
        """Whether anything was recorded yet that a lane may go on from."""
        return self.neuron is not _the_long_way

    def prepare(self) -> None:
        """To be called where a step that a lane may go on from is recorded."""
        if self.neuron is _the_long_way:
            self.neuron, self.synapse = load_node().neuron_step, load_node().synapse_step


steps = Steps()
