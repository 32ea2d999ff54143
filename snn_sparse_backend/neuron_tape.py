"""The tape of a neuron layer: runs its steps, records what backward needs, and computes all gradients at once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from .build import load_node
from .compat.cuda import current_stream
from .config import Options
from .counters import counts
from .native import event_parallel
from .raster import Raster
from .recorder import Block, Plan, Recorder, Result
from .scans import Layer, neuron_backward, pointer_table, step_pointers
from .synapse_tape import SynapseTape, claim_current
from .tapes import TAG, TOPOLOGICAL_SLACK, Delivery, SpikeTag, Tape, part


class NeuronTape(Tape):
    """Records one sequence of one neuron layer.

    Args:
        plan: how to run it.
        shape: shape of one time step ``[B, ...]``.
        dtype: float32 or float64.
        device: where all its tensors are, but for scalar parameters.
        states: the states before the first step; their gradients are returned.
    """

    def __init__(self, plan: Plan, shape: torch.Size, dtype: torch.dtype, device: torch.device,
                 states: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.stream = current_stream(device)
        self.plan = plan
        self.parameters = plan.derive()
        self.layer = Layer(plan.dynamics, plan.surrogate, [p.detach() for p in self.parameters], shape, dtype,
                           device)
        self.state_shapes = [s.shape for s in states]
        learned = {i for i, p in enumerate(self.parameters) if p.requires_grad}
        self.recorder = Recorder(plan, self.layer, learned)
        self.state_in = self.recorder.full(states) if learned else []
        # The gradient of the graded spikes factor needs the gradient of every spike, active or not.
        self.needs_all_spike_gradients = "graded_spikes_factor" in {plan.dynamics.parameters[i] for i in learned}
        self.blocks: list[Block] = []
        self.outputs: list[tuple[int, int]] = []  # per node output: (0 = output or 1 + state, block)
        self.synapses: dict[int, weakref.ref[SynapseTape]] = {}  # fed by these spikes, by id of their module
        self.last: list[tuple[weakref.ref[torch.Tensor], int, bool]] = []

    def continues(self, plan: Plan, shape: torch.Size, dtype: torch.dtype, device: torch.device,
                  states: Sequence[torch.Tensor]) -> bool:
        """Whether these are the very states that the last step returned, and nothing else changed."""
        if self.plan is not plan or self.released or not plan.options.fuse_steps:
            return False
        if self.layer.shape != shape or self.layer.dtype != dtype or self.layer.device != device:
            return False
        if self.stream != current_stream(device):
            return False
        for state, (last, version, attached) in zip(states, self.last, strict=True):
            if last() is not state or state._version != version or state.requires_grad != attached:
                return False
            if state._backward_hooks or state.retains_grad:
                return False
        return True

    def commit(self, result: Result, x: torch.Tensor, states: Sequence[torch.Tensor]) -> bool:
        """Makes the result part of the graph; False if the order of the graph forbids it (nothing changed then)."""
        node, plan, index = load_node(), self.plan, len(self.blocks)
        attached = [True, *(s.requires_grad or x.requires_grad or self.parameters[1].requires_grad
                            for s in states[1:])]
        finals = [(1 + i, s) for i, s in enumerate(result.finals) if attached[i]]
        plain = [(0, result.output)] if plan.differentiable_output else []
        states_inside: list[tuple[int, torch.Tensor]] = []  # their gradient is always only a part
        if result.recorded:  # stacks of the states: only the outside looks at them
            plain, finals = plain + [(1 + i, s) for i, s in enumerate(result.recorded) if attached[i]], []
        elif result.output is result.finals[0]:  # an integrator's output is its state
            plain, finals[0] = [], (0, result.output)
        elif plan.dynamics.fires_from_state:
            states_inside, finals = finals, []
        elif not plan.dynamics.spikes:  # the last membrane is part of the sequence [T, B, ...], too
            states_inside, finals = finals[:1], finals[1:]
        elif plan.dynamics.attached_reset and result.block.shape == self.layer.shape:
            plain, states_inside = [], plain
        if not plan.options.fuse_steps:
            plain, states_inside, finals = plain + states_inside + finals, [], []
        tensors = [[t for _, t in group] for group in (plain, states_inside, finals)]
        if self.handle is None:
            self.handle = node.create(self, [*states, *self.parameters, x], *tensors,
                                      name=f"Sparse{plan.dynamics.name}Backward", slack=TOPOLOGICAL_SLACK)
            counts["neuron_nodes"] += 1
        elif not node.extend(self.handle, [x], *tensors):
            return False
        self.blocks.append(result.block)
        self.outputs += [(kind, index) for kind, _ in plain + states_inside + finals]
        self.last = [(weakref.ref(t), t._version, t.requires_grad) for t in result.finals]
        if result.block.raster is not None and plan.unit_spikes:
            setattr(result.output, TAG, SpikeTag(result.block.raster, self, index, result.output._version))
        return True

    def active_set(self, blocks: Sequence[int], options: Options) -> Raster | None:
        """The active sites of some blocks, if gradients are wanted only there and the sites are few."""
        chosen = [self.blocks[i] for i in blocks]
        rasters = [b.active for b in chosen if b.active is not None]
        sites = sum(b.steps for b in chosen) * self.layer.sites
        if self.needs_all_spike_gradients or len(rasters) < len(chosen):
            return None
        if event_parallel(self.layer.device):
            share = self.plan.densities.look().active
        else:
            share = sum(b.active_sites for b in chosen) / sites
        if share is not None and share > options.crossover_on(self.layer.device):
            return None
        return Raster.concatenate(rasters)

    # ------------------------------------------------------------------------------------------------ backward

    def __call__(self, grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
        layer, dynamics = self.layer, self.plan.dynamics
        first_input = len(dynamics.states) + len(dynamics.parameters)
        result: list[torch.Tensor | None] = [None] * (first_input + len(self.blocks))
        incoming = Incoming(self, grads)
        steps = incoming.steps
        if not steps:
            return result
        reached_parameters, reached_states = dynamics.reached(incoming.last_output, incoming.last_states)
        if self.plan.surrogate.kind == "ZeroDerivative" and dynamics.spikes:
            reached_parameters[dynamics.threshold] = False
        rows = layer.rows
        blocks = [b for b, first in zip(self.blocks, incoming.firsts, strict=True) if first < steps]
        grad_input = None
        if any(needs[first_input:]):
            total = sum(b.steps for b in blocks)
            grad_input = torch.empty((total * rows, layer.cols), dtype=layer.dtype, device=layer.device)
            grad_input[steps * rows :] = 0
        sums = [layer.empty().zero_() if needs[len(dynamics.states) + i] and reached else None
                for i, reached in enumerate(reached_parameters)]
        initial = [layer.empty() if needs[i] and reached else None for i, reached in enumerate(reached_states)]
        tables = self._recorded(blocks)
        neuron_backward(layer, steps, grad_input=grad_input, grad_state_in=initial, grad_parameters=sums,
                        state_in=self.state_in, **tables, **incoming.tables())
        for i, grad in enumerate(initial):
            if grad is not None:
                result[i] = grad.sum_to_size(self.state_shapes[i])
        for i, grad in enumerate(sums, len(dynamics.states)):
            if grad is not None:
                parameter = self.parameters[i - len(dynamics.states)]
                result[i] = grad.sum_to_size(parameter.shape).to(parameter.device)
        if grad_input is not None:
            self._return_inputs(grad_input, blocks, needs[first_input:], result, first_input, incoming.task)
        return result

    def _recorded(self, blocks: list[Block]) -> dict[str, Any]:
        """Pointer tables of what the steps recorded."""
        names = ("raster", "active", "membrane", "current", "values", "offsets")
        tables: dict[str, list[int | None]] = {name: [] for name in names}
        resets: list[int | None] = []
        for block in blocks:
            for name in ("raster", "active"):
                raster = getattr(block, name)
                tables[name] += step_pointers(raster.words if raster else None, block.steps)
            for name in ("membrane", "current"):
                tables[name] += step_pointers(getattr(block, name), block.steps)
            size = self.layer.dtype.itemsize
            values: list[int | None] = [v.data_ptr() + at * size for v, at in block.values]
            tables["values"] += values or [None] * block.steps
            tables["offsets"] += step_pointers(block.offsets, block.steps)
            resets += step_pointers(block.reset.words if block.reset else None, block.steps)
        if self.plan.dynamics.reset_is_recorded and not self.plan.dynamics.late_reset:
            resets = resets[:1] + tables["raster"][:-1]  # who fired in a step is reset in the next
        return {name: pointer_table(t) for name, t in {**tables, "reset": resets}.items()}

    def _return_inputs(self, grad: torch.Tensor, blocks: list[Block], needs: Sequence[bool],
                       result: list[torch.Tensor | None], first_input: int, task: int) -> None:
        """Hands the gradients of the inputs to the synapse that made them all, or else to autograd."""
        rows = self.layer.rows
        sources = [b.source for b in blocks if b.source is not None]
        synapse = sources[0][0]() if len(sources) == len(blocks) else None
        if synapse is not None and all(s[0]() is synapse for s in sources) and all(needs[: len(blocks)]):
            if not synapse.observed():
                synapse.deliver(Delivery(task, [s[1] for s in sources], dense=grad))
                return
        first = 0
        for i, block in enumerate(blocks):
            if needs[i]:
                result[first_input + i] = part(grad, first, block.steps * rows, block.shape)
            first += block.steps * rows

    def release(self) -> None:
        super().release()
        self.blocks, self.state_in = [], []
        del self.recorder  # and its arena


class Incoming:
    """The gradients that arrive at a tape, through autograd and from the synapses its spikes feed, step by step.

    Attributes:
        firsts: first step of each block.
        last_output, last_states: last step at which a gradient arrived for the output, for each state; -1: none.
        steps: steps that backward has to go through.
    """

    def __init__(self, tape: NeuronTape, grads: Sequence[torch.Tensor | None]) -> None:
        self.tape, self.task = tape, load_node().task_id()
        total, self.firsts = 0, []
        for block in tape.blocks:
            self.firsts.append(total)
            total += block.steps
        states = len(tape.plan.dynamics.states)
        self.output: list[int | None] = [None] * total
        self.active: list[int | None] = [None] * total
        self.states: list[list[int | None]] = [[None] * total for _ in range(states)]
        self.keep: list[torch.Tensor] = []  # what the addresses point into
        dense: dict[int, torch.Tensor] = {}
        at_active: dict[int, torch.Tensor] = {}
        for (kind, index), grad in zip(tape.outputs, grads, strict=True):
            if grad is None:
                continue
            grad = grad.to(tape.layer.dtype)
            if kind == 0:
                dense[index] = grad
            else:
                self._set_state(kind - 1, index, grad)
        for delivery in tape.accept_deliveries(self.task):
            self._unpack(delivery, dense, at_active)
        for found, table in ((dense, self.output), (at_active, self.active)):
            for index, grad in found.items():
                self._set(table, index, grad)
        self.last_output = self._last(self.output, self.active)
        self.last_states = [self._last(table) for table in self.states]
        self.steps = max(self.last_output, *self.last_states) + 1

    @staticmethod
    def _last(*tables: list[int | None]) -> int:
        return max((i for table in tables for i, address in enumerate(table) if address is not None), default=-1)

    def _unpack(self, delivery: Delivery, dense: dict[int, torch.Tensor], at_active: dict[int, torch.Tensor]) -> None:
        first = 0
        for index in delivery.blocks:
            block = self.tape.blocks[index]
            if delivery.dense is not None:
                found, total = dense, delivery.dense.view(-1, self.tape.layer.cols)
                size = block.steps * self.tape.layer.rows
            else:
                assert delivery.active is not None
                found, total = at_active, delivery.active
                size = block.active_sites if total.dim() == 1 else block.steps * self.tape.layer.rows
            grad = total[first : first + size]
            first += size
            if index in found:
                grad = grad + found[index].reshape(grad.shape)
            found[index] = grad

    def _set(self, table: list[int | None], index: int, grad: torch.Tensor) -> None:
        grad = grad.contiguous()
        self.keep.append(grad)
        block, first = self.tape.blocks[index], self.firsts[index]
        if table is not self.active or grad.dim() > 1:
            table[first : first + block.steps] = step_pointers(grad, block.steps)
            return
        offset = 0
        for step, active in enumerate(block.active_counts):
            table[first + step] = grad.data_ptr() + offset * grad.element_size()
            offset += active

    def _set_state(self, state: int, index: int, grad: torch.Tensor) -> None:
        block, first = self.tape.blocks[index], self.firsts[index]
        if grad.shape != self.tape.layer.shape:  # recorded states: one gradient a step
            return self._set(self.states[state], index, grad)
        grad = grad.contiguous()
        self.keep.append(grad)
        self.states[state][first + block.steps - 1] = grad.data_ptr()

    def tables(self) -> dict[str, Any]:
        """Pointer tables, cut to the steps that backward has to go through."""
        return {
            "grad_output": pointer_table(self.output[: self.steps]),
            "grad_active": pointer_table(self.active[: self.steps]),
            "grad_states": [pointer_table(t[: self.steps]) for t in self.states],
        }


def run_neuron(plan: Plan, x: torch.Tensor, states: Sequence[torch.Tensor], steps: int | None = None,
               record: bool = False) -> Result:
    """Runs a neuron layer and records it on the tape of its sequence.

    Args:
        plan: how to run it.
        x: input current ``[B, ...]``, or ``[T, B, ...]`` when ``steps`` is given.
        states: states before the first step, broadcastable to one time step.
        steps: T of a whole-sequence call, None for a single step.
        record: also return the states after every step.
    """
    shape = x.shape if steps is None else x.shape[1:]
    dtype = computing_dtype(x, states)
    tape = load_node().tape_of(states[0])
    result = None
    if isinstance(tape, NeuronTape) and tape.continues(plan, shape, dtype, x.device, states):
        result = tape.recorder.run(x, states, steps, record, first=False)
        result.block.source = claim_current(x, tape)
        if tape.commit(result, x, states):
            return result
    tape = NeuronTape(plan, shape, dtype, x.device, states)
    if result is None:
        result = tape.recorder.run(x, states, steps, record, first=True)
    elif plan.dynamics.reset_is_recorded and result.block.reset is None:
        result.block.reset = tape.recorder.resets(states[0])
    result.block.source = claim_current(x, tape)
    tape.commit(result, x, states)
    return result


def computing_dtype(x: torch.Tensor, states: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype in which a step computes: that of the input and of the states that are not scalars."""
    dtype = x.dtype
    for state in states:
        if state.dtype is not dtype and state.dim():
            dtype = torch.promote_types(dtype, state.dtype)
    return dtype
