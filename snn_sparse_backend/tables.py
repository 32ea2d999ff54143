"""The pointer tables of the backward scan: of what the steps recorded, and of the gradients that arrive.

A sequence may have thousands of steps, so nothing here is done step by step in backward unless it has to be.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import torch

from .build import load_node
from .inhibition import winners_of
from .native import event_parallel
from .raster import RasterStack
from .recorder import Result
from .scans import ForwardScan, Table, step_pointers
from .tapes import Delivery

if TYPE_CHECKING:
    from .lanes import NeuronRun
    from .neuron_tape import NeuronTape


_SOMEWHERE: Table[int] = array("Q", [0])


class Recorded:
    """Addresses of what a sequence recorded, noted while it is recorded.

    Attributes:
        firsts: first step of each block.
        steps: number of steps.
        active_counts: CPU: active sites of each step.
        active: the active sites of all blocks; None if some have none.
    """

    def __init__(self) -> None:
        self.firsts: list[int] = []
        self.steps = 0
        self.active_counts: list[int] = []
        self.active: RasterStack | None = RasterStack()
        # Steps of each block and what its scan was given; steps of each run of a lane and its tables.
        self._pointers: list[tuple[int, list[int] | dict[str, Table[int]]]] = []
        # Runs of steps whose compressed membranes are in one storage, which may move when it shrinks.
        self._values: list[tuple[torch.Tensor | None, list[int]]] = []
        self._storage: torch.Tensor | None = None  # of the last run

    def add(self, result: Result) -> None:
        """Notes one more block."""
        block, steps = result.block, result.block.steps
        self.firsts.append(self.steps)
        self.steps += steps
        self.active_counts += block.active_counts
        if block.active is not None and self.active is not None:
            self.active.add(block.active)
        else:
            self.active = None
        self._add_values(block.values, steps)
        self._pointers.append((steps, result.pointers))
        block.values = block.active_counts = ()  # noted here

    def add_run(self, run: NeuronRun) -> None:
        """Notes the steps that a lane recorded."""
        self.firsts.extend(range(self.steps, self.steps + run.steps))
        self.steps += run.steps
        self.active_counts += run.active_counts
        rasters = run.active_rasters()
        if rasters is not None and self.active is not None:
            for raster in rasters:
                self.active.add(raster)
        else:
            self.active = None
        self._add_values(run.values, run.steps)
        self._pointers.append((run.steps, run.tables))

    def _add_values(self, values: Sequence[tuple[torch.Tensor, Sequence[int]]], steps: int) -> None:
        """Where the compressed membranes of so many steps are; from some step on there may be none."""
        rest = steps - sum(len(places) for _, places in values)
        for storage, places in (*values, *([(None, (0,) * rest)] if rest else [])):
            if storage is not self._storage or not self._values:
                self._storage = storage
                self._values.append((storage, []))
            self._values[-1][1].extend(places)

    def steps_of(self, block: int) -> int:
        """Number of steps of one block."""
        return (self.firsts[block + 1] if block + 1 < len(self.firsts) else self.steps) - self.firsts[block]

    def tables(self, resets_follow_spikes: bool) -> dict[str, Table[int]]:
        """The tables by their names in ``SnnNeuronBackward``.

        Args:
            resets_follow_spikes: who fired in a step is reset in the next, so only the first step recorded resets.
        """
        values = array("Q")
        for storage, places in self._values:
            base = storage.data_ptr() if storage is not None else 0
            values.extend([base + place for place in places])
        tables = {**self._noted(), "values": values}
        if resets_follow_spikes:
            tables["reset"] = tables["reset"][:1] + tables["raster"][:-1]
        return tables

    def values(self) -> Iterator[tuple[torch.Tensor | None, list[int]]]:
        """Runs of steps whose compressed membranes are in one storage ``[sites]``, with their places in bytes."""
        for storage, places in self._values:
            whole = None
            if storage is not None:  # its tensor is as large as it was before it shrank
                kept = storage.untyped_storage()
                whole = storage.new_empty(0).set_(kept, 0, (kept.nbytes() // storage.element_size(),), (1,))
            yield whole, places

    def _noted(self) -> dict[str, Table[int]]:
        """Table by table, what was noted block by block."""
        found: dict[str, Table[int]] = {name: array("Q") for name in ForwardScan.TABLES}
        for kind, group in groupby(self._pointers, key=lambda part: "run" if isinstance(part[1], dict) else part[0]):
            parts: list[Any] = [pointers for _, pointers in group]
            if kind == 1:  # one step a block
                for name, column in zip(found, zip(*parts, strict=True), strict=False):
                    found[name].extend(column)
                continue
            for part in parts:
                for i, name in enumerate(found):
                    if kind != "run":
                        found[name].extend(part[i * kind : (i + 1) * kind])
                    elif name in part:
                        found[name].extend(part[name])
        return {name: table for name, table in found.items() if name not in ("input", "output")}


class Incoming:
    """The gradients that arrive at a tape, through autograd and from the synapses its spikes feed, step by step.

    Attributes:
        last_output, last_states: last step at which a gradient arrived for the output, for each state; -1: none.
        steps: steps that backward has to go through.
    """

    def __init__(self, tape: NeuronTape, grads: Sequence[torch.Tensor | None]) -> None:
        self._tape, self.task = tape, load_node().task_id()
        self._keep: list[torch.Tensor] = []  # what the addresses point into
        self._copies: dict[Any, torch.Tensor] = {}
        empty = array("Q", bytes(8 * tape.recorded.steps))
        self._output, self._active = empty[:], empty[:]
        dynamics = tape.plan.dynamics
        self._states = [empty[:] for _ in dynamics.carried]
        ends: list[tuple[int, torch.Tensor]] = []  # for the last spikes of a sequence of a recurrent layer
        dense: dict[int, torch.Tensor] = {}
        at_active: dict[int, torch.Tensor] = {}
        dtype = tape.layer.dtype
        # On CUDA the scan itself takes dense gradients at active sites only.
        self._from_winners = tape.plan.inhibition and not event_parallel(tape.layer.device)
        for output, grad in enumerate(grads):
            if grad is None:
                continue
            kind, index = tape.outputs[output]
            if grad.dtype is not dtype:
                grad = grad.to(dtype)
            if kind == 0 and self._from_winners:
                at_active[index] = self._of_winners([index], grad)
            elif kind == 0:
                dense[index] = grad
            elif kind > len(self._states):
                ends.append((index, grad))
            else:
                self._set_state(kind - 1, index, grad)
        deliveries = tape.accept_deliveries(self.task)
        if self._from_winners:
            deliveries = [self._delivered_to_winners(delivery) for delivery in deliveries]
        for index, grad in ends:
            dense[index] = self._with_end(dense.get(index), index, grad)
        if len(deliveries) != 1 or dense or at_active or not self._set_all(deliveries[0]):
            for delivery in deliveries:
                self._unpack(delivery, dense, at_active)
        for found, table in ((dense, self._output), (at_active, self._active)):
            for index, grad in found.items():
                self._set(table, index, grad)
        self.last_output = max(_last(self._output), _last(self._active))
        self.last_states = [_last(table) for table in self._states]
        self.last_states += [self.last_output] * (len(dynamics.states) - len(self._states))
        self.steps = max(self.last_output, *self.last_states) + 1

    def _of_winners(self, blocks: Sequence[int], grad: torch.Tensor) -> torch.Tensor:
        """The gradient at the active sites of some blocks of a layer with inhibition: of its winners."""
        winners = torch.cat(winners_of(map(self._tape.blocks.__getitem__, blocks)))
        return grad.reshape(-1, self._tape.layer.cols).gather(1, winners).view(-1)

    def _delivered_to_winners(self, delivery: Delivery) -> Delivery:
        if delivery.dense is None:
            return delivery
        return Delivery(delivery.task, delivery.blocks, active=self._of_winners(delivery.blocks, delivery.dense))

    def _with_end(self, grad: torch.Tensor | None, index: int, end: torch.Tensor) -> torch.Tensor:
        """The gradient of a block's outputs ``[T, B, ...]``, and that of its last one added."""
        steps = self._tape.recorded.steps_of(index)
        total = end.new_zeros((steps, *end.shape)) if grad is None else grad.clone().view(steps, *end.shape)
        total[-1] += end
        return total

    def _set_all(self, delivery: Delivery) -> bool:
        """The usual case: one synapse after another step by step, and nothing else. False if it is another one."""
        blocks, recorded = delivery.blocks, self._tape.recorded
        first = recorded.firsts[blocks[0]]
        if blocks != list(range(blocks[0], blocks[0] + len(blocks))):
            return False
        steps = recorded.firsts[blocks[-1]] + recorded.steps_of(blocks[-1]) - first
        grad = delivery.dense if delivery.dense is not None else delivery.active
        assert grad is not None
        grad = grad.contiguous()
        self._keep.append(grad)
        self._point(self._output if delivery.dense is not None else self._active, first, steps, grad)
        return True

    def _unpack(self, delivery: Delivery, dense: dict[int, torch.Tensor], at_active: dict[int, torch.Tensor]) -> None:
        first, layer = 0, self._tape.layer
        for index in delivery.blocks:
            block = self._tape.blocks[index]
            if delivery.dense is not None:
                found, total = dense, delivery.dense.view(-1, layer.cols)
                size = block.steps * layer.rows
            else:
                assert delivery.active is not None
                found, total = at_active, delivery.active
                size = block.active_sites if total.dim() == 1 else block.steps * layer.rows
            grad = total[first : first + size]
            first += size
            if index in found:
                grad = grad + found[index].reshape(grad.shape)
            found[index] = grad

    def _contiguous(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient, contiguous; one copy for all steps where a sum hands the same number to all of them."""
        if grad.is_contiguous():
            self._keep.append(grad)
            return grad
        key = (grad.data_ptr(), grad.shape, grad.stride())
        if key not in self._copies:
            self._keep.append(grad)  # so that no other gradient gets its address
            self._copies[key] = grad.contiguous()
        return self._copies[key]

    def _set(self, table: Table[int], index: int, grad: torch.Tensor) -> None:
        recorded = self._tape.recorded
        self._point(table, recorded.firsts[index], recorded.steps_of(index), self._contiguous(grad))

    def _point(self, table: Table[int], first: int, steps: int, grad: torch.Tensor) -> None:
        """Lets so many steps point to their parts of a contiguous gradient."""
        if steps == 1:
            table[first] = _address(grad)
        elif table is self._active and grad.dim() == 1:  # active sites only, as many as each step has
            places = accumulate(self._tape.recorded.active_counts[first : first + steps - 1], initial=0)
            start, size = _address(grad), grad.element_size()
            table[first : first + steps] = array("Q", [start + place * size for place in places])
        else:
            table[first : first + steps] = array("Q", step_pointers(grad, steps))

    def _set_state(self, state: int, index: int, grad: torch.Tensor) -> None:
        recorded = self._tape.recorded
        if grad.shape != self._tape.layer.shape:  # recorded states: one gradient a step
            return self._set(self._states[state], index, grad)
        self._states[state][recorded.firsts[index] + recorded.steps_of(index) - 1] = self._contiguous(grad).data_ptr()

    def tables(self) -> dict[str, Any]:
        """The tables by their names in ``SnnNeuronBackward``."""
        return {"grad_output": self._output, "grad_active": self._active, "grad_states": self._states}


def _address(grad: torch.Tensor) -> int:
    """Where a gradient is; never 0, which would mean that none arrived: there may be no active site at all."""
    return grad.data_ptr() or _SOMEWHERE.buffer_info()[0]


def _last(table: Table[int]) -> int:
    """The last step that has an entry, or -1."""
    return next((step for step in range(len(table) - 1, -1, -1) if table[step]), -1)

