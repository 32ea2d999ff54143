"""Runs the steps of a neuron layer and records what their backward needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from . import kernels
from .config import Options
from .counters import counts
from .dynamics import Dynamics
from .kernels import TILE, ForwardScan, Layer, step_pointers
from .raster import Raster
from .surrogate import Surrogate

if TYPE_CHECKING:
    from .synapse_tape import SynapseTape

# From this density of active sites on, the dense membrane is stored instead of compressed values.
STORE_DENSE_ABOVE = 0.3


@dataclass(frozen=True, eq=False)
class Plan:
    """How one neuron module is run; a new plan means that something about the module changed.

    Args:
        dynamics, surrogate, options: see their classes; the cutoff is already part of the surrogate.
        parameters: the module's own parameter tensors.
        derive: computes the parameters of the dynamics from them, in their order, as autograd knows them; once a
            sequence, so that autograd takes care of what lies between (a clamp, a factor, a cast).
        differentiable_output: False if the output carries no gradient (a Heaviside without surrogate).
        unit_spikes: spikes are exactly 0 and 1, so that a synapse may use their raster.
    """

    dynamics: Dynamics
    surrogate: Surrogate
    options: Options
    parameters: tuple[torch.Tensor, ...]
    derive: Callable[[], tuple[torch.Tensor, ...]]
    differentiable_output: bool = True
    unit_spikes: bool = True


@dataclass(slots=True)
class Block:
    """What one call recorded: one time step, or a whole sequence."""

    steps: int
    shape: torch.Size  # of the input
    raster: Raster | None = None
    active: Raster | None = None
    values: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # per step: storage and offset
    active_counts: list[int] = field(default_factory=list)  # per step
    membrane: torch.Tensor | None = None
    current: torch.Tensor | None = None
    reset: Raster | None = None
    source: tuple[weakref.ref[SynapseTape], int] | None = None  # the synapse step that made the input

    @property
    def active_sites(self) -> int:
        return sum(self.active_counts)


@dataclass(slots=True)
class Result:
    """What one call computed, not yet part of a graph.

    Args:
        output: spikes, or the membrane of an integrator; ``[B, ...]``, or ``[T, B, ...]`` of a sequence.
        finals: the states after the last step.
        recorded: the states after every step ``[T, B, ...]``, if they were asked for.
    """

    block: Block
    output: torch.Tensor
    finals: list[torch.Tensor]
    recorded: list[torch.Tensor]


class Recorder:
    """Runs the forward scan of one sequence of one layer.

    Args:
        plan: how to run it.
        layer: the layer bound to its parameter values.
        learned: indices of the parameters whose gradient is wanted.
    """

    def __init__(self, plan: Plan, layer: Layer, learned: set[int]) -> None:
        self.dynamics, self.layer = plan.dynamics, layer
        self._scan = ForwardScan(layer)
        differentiable = plan.dynamics.spikes and plan.surrogate.kind != "ZeroDerivative"
        self._keep_active = differentiable and plan.surrogate.bounded
        learns = bool(learned & set(plan.dynamics.needs_membrane))
        self._keep_membrane = learns or (differentiable and not self._keep_active)
        self._keep_current = bool(learned & set(plan.dynamics.needs_current))
        self._words = torch.empty((layer.rows, layer.words), dtype=torch.int64)
        self._need = layer.rows * layer.words * TILE
        self._arena: torch.Tensor | None = None
        self._used = 0

    def run(self, x: torch.Tensor, states: Sequence[torch.Tensor], steps: int | None, record: bool,
            first: bool) -> Result:
        """Runs one time step (``steps`` None) or a sequence ``[T, B, ...]``, outside autograd.

        Args:
            first: whether the sequence begins here, so that who is reset in this step has to be recorded.
        """
        layer, dynamics = self.layer, self.dynamics
        count = steps or 1
        shape = layer.shape if steps is None else torch.Size((count, *layer.shape))
        block = Block(count, x.shape)
        data, before = self._ready(x, shape), [self._ready(s, layer.shape) for s in states]
        finals = [torch.empty_like(before[0]) for _ in dynamics.states]
        recorded = [torch.empty_like(data) for _ in dynamics.states] if record else []
        if dynamics.spikes or steps is not None:
            output = torch.empty_like(data)
        else:
            output = finals[0]  # an integrator returns its state itself
        if dynamics.spikes:
            block.raster = self._raster(count)
            if self._keep_active:
                block.active = self._raster(count)
            if dynamics.late_reset or (first and dynamics.reset_is_recorded):
                block.reset = self._raster(count)
        if self._keep_membrane:
            block.membrane = torch.empty_like(data)
        if self._keep_current:
            block.current = torch.empty_like(data)
        tables: tuple[torch.Tensor | None, ...] = (
            data, output if output is not finals[0] else None, _words(block.raster), _words(block.reset),
            _words(block.active), block.membrane, block.current,
        )
        tables += tuple(recorded) if record else (None,) * len(finals)
        if count == 1:
            pointers = [t.data_ptr() if t is not None else None for t in tables]
        else:
            pointers = [address for t in tables for address in step_pointers(t, count)]
        self._scan_steps(block, pointers, before, finals)
        if block.raster is not None:
            block.raster.ones = sum(self._scan.spike_counts)
        if block.active is not None and block.active_sites > STORE_DENSE_ABOVE * layer.sites * count:
            self._keep_membrane = True
        counts["neuron_steps"] += count
        return Result(block, output, finals, recorded)

    def _scan_steps(self, block: Block, pointers: list[int | None], before: list[torch.Tensor],
                    finals: list[torch.Tensor]) -> None:
        """Calls the kernel until all steps are done; each call fills one arena of compressed membranes at most."""
        done, state_out = 0, [s.data_ptr() for s in finals]
        state_in = [s.data_ptr() for s in before]
        compress = block.active is not None and block.membrane is None
        while done < block.steps:
            if compress:
                arena, used = self._room()
                ran = self._scan.run(block.steps, pointers, state_in, state_out,
                                     arena.data_ptr() + used * arena.element_size(), arena.numel() - used, done)
            else:
                ran = self._scan.run(block.steps, pointers, state_in, state_out, first=done)
            if block.active is not None:
                for active in self._scan.active_counts[done : done + ran]:
                    block.active_counts.append(active)
                    if compress:
                        block.values.append((arena, self._used))
                        self._used += active
            state_in, done = state_out, done + ran
        if block.active is not None:
            block.active.ones = block.active_sites

    def _room(self) -> tuple[torch.Tensor, int]:
        """An arena with room for the compressed membranes of at least one more step, and how much of it is used."""
        if self._arena is None or self._arena.numel() - self._used < self._need:
            if self._arena is not None:  # full: give back the room that was only there for the worst case
                self._arena.untyped_storage().resize_(self._used * self.layer.dtype.itemsize)
            self._arena, self._used = torch.empty(2 * self._need, dtype=self.layer.dtype), 0
        return self._arena, self._used

    def _raster(self, steps: int) -> Raster:
        rows, words = self._words.shape
        like = torch.empty_like(self._words) if steps == 1 else torch.empty((steps * rows, words), dtype=torch.int64)
        return Raster(like, self.layer.cols)

    def _ready(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The tensor in the layer's dtype, of full shape and contiguous; itself where it is that already."""
        if tensor.dtype is self.layer.dtype and tensor.shape == shape and tensor.is_contiguous():
            return tensor
        return tensor.detach().to(self.layer.dtype).expand(shape).contiguous()

    def full(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of the states, of full shape."""
        return [self._ready(s.detach(), self.layer.shape).clone() for s in states]

    def resets(self, membrane: torch.Tensor) -> Raster | None:
        """Who is reset in a step that starts from this membrane."""
        threshold = self.layer.parameters[self.dynamics.threshold]
        state = self._ready(membrane.detach(), self.layer.shape).view(self.layer.rows, self.layer.cols)
        return kernels.pack(((state - threshold) > 0).to(self.layer.dtype))


def _words(raster: Raster | None) -> torch.Tensor | None:
    return raster.words if raster is not None else None
