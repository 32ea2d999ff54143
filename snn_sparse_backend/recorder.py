"""Runs the steps of a neuron layer and records what their backward needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .config import Options
from .counters import counts
from .deferred import deferred_of, settled
from .dynamics import Dynamics
from .inhibition import Inhibition
from .kernels import nonzero, pack
from .native import event_parallel
from .raster import WORD, Raster, RasterArena
from .recurrence import RecurrentScan
from .recurrences import Recurrence
from .reports import Densities
from .scans import TRACES, ForwardScan, Layer, filled, uniform
from .stepped import Precompute, SteppedScan
from .stores import store_for
from .surrogate import Surrogate

if TYPE_CHECKING:
    from .synapse_tape import SynapseTape


_RESET, _ACTIVE, _OFFSETS = (ForwardScan.TABLES.index(name) for name in ("reset", "active", "offsets"))


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
        densities: of the module, which may have other plans as well.
        module: the module; None if its steps always go the long way.
        guard: what a lane has to see unchanged about the module, see ``Guard`` in ``csrc/torch/lanes.h``; options,
            input and states aside.
        recurrence: of a recurrent layer.
        precompute: the trace that torch computes, see ``Trace.given``, from the membrane before a step.
        inhibition: in each row of a step ``[B, N]`` only the neuron furthest above its threshold spikes; such a layer
            runs step by step, and without a late reset.
    """

    dynamics: Dynamics
    surrogate: Surrogate
    options: Options
    parameters: tuple[torch.Tensor, ...]
    derive: Callable[[], tuple[torch.Tensor, ...]]
    differentiable_output: bool = True
    unit_spikes: bool = True
    densities: Densities = field(default_factory=Densities)
    module: weakref.ref[Any] | None = None
    guard: tuple[tuple[Any, ...], ...] = ()
    recurrence: Recurrence | None = None
    precompute: Precompute | None = None
    inhibition: bool = False

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """All parameters that a step reads."""
        found = self.recurrence
        return self.parameters if found is None else (*self.parameters, *found.parameters)

    def lane_serves(self, device: torch.device) -> bool:
        """Whether a per-step loop may leave further steps to a lane."""
        return self.module is not None and self.options.fuse_steps and not event_parallel(device)


@dataclass(slots=True)
class Block:
    """What one call recorded: one time step, or a whole sequence. On CUDA nobody knows the active sites' number."""

    steps: int
    shape: torch.Size  # of the input
    raster: Raster | None = None
    active: Raster | None = None
    # Storages of compressed membranes, each with the places in bytes of the steps it holds; empty where none are kept.
    values: Sequence[tuple[torch.Tensor, Sequence[int]]] = ()
    offsets: Raster | None = None  # CUDA: words, not bits [T, blocks]: where the values of each block of sites begin
    active_counts: Sequence[int] = ()  # CPU: per step
    membrane: torch.Tensor | None = None
    traces: tuple[torch.Tensor | None, ...] = ()
    reset: Raster | None = None
    crossings: Raster | None = None  # with inhibition: who crossed the threshold, and is reset in the next step
    winners: torch.Tensor | None = None  # CPU, with inhibition: who may spike, of each row [B, 1]
    source: tuple[weakref.ref[SynapseTape], int] | None = None  # the synapse step that made the input

    @property
    def active_sites(self) -> int:
        """CPU only."""
        return self.active.ones or 0 if self.active is not None else 0


@dataclass(slots=True)
class Result:
    """What one call computed, not yet part of a graph.

    Args:
        output: spikes, or the membrane of an integrator; ``[B, ...]``, or ``[T, B, ...]`` of a sequence.
        finals: the states after the last step.
        recorded: the states after every step ``[T, B, ...]``, if they were asked for.
        pointers: what the forward scan was given, see ``ForwardScan.run``.
    """

    block: Block
    output: torch.Tensor
    finals: list[torch.Tensor]
    recorded: list[torch.Tensor]
    pointers: list[int]

    def begin_with(self, reset: Raster) -> None:
        """Makes this the beginning of a sequence, in which these sites are reset first."""
        self.block.reset = reset
        self.pointers[_RESET * self.block.steps] = reset.address


class Recorder:
    """Runs the forward scan of one sequence of one layer.

    Args:
        plan: how to run it.
        layer: the layer bound to its parameter values.
        learned: indices of the parameters whose gradient is wanted.
    """

    def __init__(self, plan: Plan, layer: Layer, learned: set[int]) -> None:
        self.dynamics, self.layer = plan.dynamics, layer
        self.scan = self._scan(plan, layer)
        self.store = store_for(layer, plan.densities, self.scan)
        differentiable = plan.dynamics.spikes and plan.surrogate.differentiable
        compress = differentiable and not self._needs_places(plan) and (plan.surrogate.bounded or plan.inhibition)
        self.keep_active = compress and not plan.inhibition  # which has active sites of its own
        self.scan.needs_scratch &= self.keep_active
        learns = bool(learned & set(plan.dynamics.needs_membrane))
        self.keep_membrane = learns or bool(plan.dynamics.refractory) or (differentiable and not compress)
        keep_values = compress and not self.keep_membrane
        self.inhibition = Inhibition(layer, keep_values) if plan.inhibition else None
        self.keep_traces = [trace.always or bool(learned & set(trace.parameters)) for trace in plan.dynamics.traces]
        # A lane takes over after the first step, with memory of its own.
        first_steps = 1 if plan.lane_serves(layer.device) else RasterArena.FIRST_STEPS
        self._rasters, self._active, self._resets = (
            RasterArena(layer.rows, layer.cols, layer.device, first_steps) for _ in range(3)
        )
        self._offsets = RasterArena(1, WORD * layer.blocks, layer.device) if event_parallel(layer.device) else None

    @staticmethod
    def _scan(plan: Plan, layer: Layer) -> ForwardScan:
        if plan.recurrence is not None:
            return RecurrentScan(layer, plan.recurrence, plan.options, plan.unit_spikes, plan.precompute)
        return ForwardScan(layer) if plan.precompute is None else SteppedScan(layer, plan.precompute)

    def _needs_places(self, plan: Plan) -> bool:
        """Whether a derivative that Python evaluates depends on where a membrane belongs, not only on the membrane."""
        return plan.surrogate.given is not None and not uniform(self.layer.parameters[self.dynamics.threshold])

    def run(self, x: torch.Tensor, states: Sequence[torch.Tensor], steps: int | None, record: bool,
            first: bool, spikes: Raster | None = None) -> Result:
        """Runs one time step (``steps`` None) or a sequence ``[T, B, ...]``, outside autograd.

        Args:
            first: whether the sequence begins here, so that who is reset in this step has to be recorded.
            spikes: those of the step before, where they are known and the layer is recurrent.
        """
        assert steps is None or self.inhibition is None
        layer, dynamics = self.layer, self.dynamics
        count = steps or 1
        shape = layer.shape if steps is None else torch.Size((count, *layer.shape))
        block = Block(count, x.shape)
        inputs = deferred_of(x) if x.dtype is layer.dtype else None
        data = self._ready(settled(x), shape) if inputs is None else None
        before = [self._ready(s, layer.shape) for s in states[: len(dynamics.carried)]]
        new = partial(torch.empty, shape, dtype=layer.dtype, device=layer.device)
        finals = [torch.empty_like(before[0]) for _ in dynamics.carried]
        recorded = [new() for _ in dynamics.carried] if record else []
        if dynamics.spikes or steps is not None:
            output = new()
        else:
            output = finals[0]  # an integrator returns its state itself
        raster = active = reset = offsets = 0
        if dynamics.spikes:
            if self.inhibition is not None:  # what the scan and backward take for spikes decides about resets only
                raster = self.inhibition.begin(block)
            else:
                block.raster, raster = self._rasters.take(count)
            if self.keep_active:
                block.active, active = self._active.take(count)
            if dynamics.late_reset:
                block.reset, reset = self._resets.take(count)
        if self.keep_membrane or (self.keep_active and self.store.dense):
            block.membrane = new()
        elif self.keep_active and self._offsets is not None:
            block.offsets, offsets = self._offsets.take(count)
        block.traces = tuple(new() if keep else None for keep in self.keep_traces)
        # In the order of ForwardScan.TABLES.
        starts = [_start(data), output.data_ptr() if output is not finals[0] else 0, raster, reset, active,
                  _start(block.membrane), offsets,
                  *[_start(trace) for trace in block.traces], *[0] * (len(TRACES) - len(block.traces))]
        starts += [s.data_ptr() for s in recorded] if record else [0] * len(finals)
        if count == 1:
            pointers = starts
        else:
            dense, bits = layer.sites * layer.dtype.itemsize, self._rasters.stride
            strides = [dense, dense, bits, bits, bits, dense, 8 * layer.blocks, *[dense] * (len(TRACES) + len(finals))]
            pointers = [start + i * stride if start else 0
                        for start, stride in zip(starts, strides, strict=True) for i in range(count)]
        if first and dynamics.reset_is_recorded and not dynamics.late_reset:
            block.reset = layer.raster()  # of the first step only: afterwards, who fired is reset
            pointers[_RESET * count] = block.reset.address
        if inputs is not None:
            pointers[:count] = inputs.addresses()
        if isinstance(self.scan, SteppedScan):
            given = [trace for trace, kind in zip(block.traces, dynamics.traces, strict=True) if kind.given]
            self.scan.enter(states[0], finals[0], given[0] if given else None)
        if isinstance(self.scan, RecurrentScan):
            self.scan.begin(self._ready(states[-1], layer.shape), spikes, output if steps is not None else None)
        state_in, state_out = [s.data_ptr() for s in before], [s.data_ptr() for s in finals]
        if self.inhibition is None:
            self.store.run(block, pointers, state_in, state_out, inputs)
        else:
            self.scan.run(1, pointers, state_in, state_out)
            pointers[_ACTIVE], pointers[_OFFSETS] = self.inhibition.suppress(block, finals[0], output)
        if isinstance(self.scan, SteppedScan):
            self.scan.finish()
        if inputs is not None:
            inputs.finish()
        counts["neuron_steps"] += count
        if self.inhibition is not None:
            counts["inhibited_steps"] += count
        if dynamics.recurrent:
            finals.append(output if steps is None else output[-1].clone())
        return Result(block, output, finals, recorded, pointers)

    def _ready(self, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The tensor in the layer's dtype, of full shape and contiguous; itself where it is that already."""
        if tensor.device != self.layer.device:
            return filled(tensor, shape, self.layer.dtype, self.layer.device)
        if tensor.dtype is self.layer.dtype and tensor.shape == shape and tensor.is_contiguous():
            return tensor
        return tensor.detach().to(self.layer.dtype).expand(shape).contiguous()

    def full(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of states, of full shape."""
        return [self._ready(s.detach(), self.layer.shape).clone() for s in states]

    def resets(self, membrane: torch.Tensor) -> Raster:
        """Who is reset in a step that starts from this membrane."""
        threshold = self.layer.parameters[self.dynamics.threshold]
        state = self._ready(membrane.detach(), self.layer.shape).view(self.layer.rows, self.layer.cols)
        fires = ((state - threshold) > 0).to(self.layer.dtype)
        raster = nonzero(fires) if event_parallel(fires.device) else pack(fires)
        assert raster is not None
        return raster


def _start(tensor: torch.Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0
