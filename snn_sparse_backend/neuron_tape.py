"""The tape of a neuron layer: runs its steps, records what backward needs, and computes all gradients at once."""

from __future__ import annotations

import ctypes
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from . import workspace
from .build import load_node
from .claims import claim_current, give_back_current
from .compat.cuda import current_stream
from .counters import counts
from .derivatives import Derivatives
from .feeds import FeedTape
from .inhibition import winners_of
from .kernels import columns, density, pack_weights, unpack, weight_gradient
from .lanes import ROLES, Chain, NeuronRun, take
from .native import address_of, event_parallel
from .raster import Raster
from .recorder import Block, Plan, Recorder, Result
from .recurrence import RecurrentScan
from .recurrence import backward as recurrent_backward
from .recurrences import Recurrence
from .scans import BackwardScan, Layer, neuron_backward
from .stores import HostStore
from .synapse_steps import check_version
from .synapse_tape import SynapseTape
from .tables import Incoming, Recorded
from .tapes import TAG, TOPOLOGICAL_SLACK, Delivery, Links, SpikeTag, Tape, part


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
        self.state_kinds = [(s.shape, s.device) for s in states]
        learned = {i for i, p in enumerate(self.parameters) if p.requires_grad}
        self.recorder = Recorder(plan, self.layer, learned)
        carried = len(plan.dynamics.carried)
        self.state_in = self.recorder.full(states[:carried]) if learned else []
        self.spikes_in = self.recorder.full(states[carried:])  # of a recurrent layer
        self.weight_version = plan.recurrence.weight._version if plan.recurrence is not None else 0
        # The gradient of the graded spikes factor needs the gradient of every spike, active or not.
        self.needs_all_spike_gradients = "graded_spikes_factor" in {plan.dynamics.parameters[i] for i in learned}
        self._blocks: Chain[Block] = Chain()
        self.recorded = Recorded()
        self.feeder: Links[SynapseTape] = Links()  # the synapse whose steps made the inputs
        self.outputs: list[tuple[int, int]] = []  # per node output: (0 = output or 1 + state, block)
        self.synapses: dict[int, weakref.ref[Tape]] = {}  # fed by these spikes, by id of their module
        self.last: list[tuple[weakref.ref[torch.Tensor], int, bool]] = []
        self.roles: list[tuple[int, str]] = []  # kind as in `outputs`, and role, of each output of the last block
        self.lane_follows = False  # the lane knows the last step

    def continues(self, plan: Plan, shape: torch.Size, dtype: torch.dtype, device: torch.device,
                  states: Sequence[torch.Tensor]) -> bool:
        """Whether these are the very states that the last step returned, and nothing else changed."""
        if self.plan is not plan or self.released or not plan.options.fuse_steps:
            return False
        if self.layer.shape != shape or self.layer.dtype != dtype or self.layer.device != device:
            return False
        if self.stream is not None and self.stream != current_stream(device):
            return False
        if self.lane_follows:
            return bool(load_node().is_last(self.handle, states))
        for state, (last, version, attached) in zip(states, self.last, strict=True):
            if last() is not state or state._version != version or state.requires_grad != attached:
                return False
            if state._backward_hooks or state.retains_grad:
                return False
        return True

    def commit(self, result: Result, x: torch.Tensor, states: Sequence[torch.Tensor]) -> bool:
        """Makes the result part of the graph; False if the order of the graph forbids it (nothing changed then)."""
        node, plan, index = load_node(), self.plan, len(self._blocks)
        before = [*states, *self.parameters]
        if plan.recurrence is not None:
            before += [plan.recurrence.weight, plan.recurrence.bias]  # type: ignore[list-item]
        attached = plan.dynamics.attached([t is not None and t.requires_grad for t in (x, *before)],
                                          result.block.steps, differentiable=plan.surrogate.differentiable)[1:]
        attached[0] = True
        finals = [(1 + i, s) for i, s in enumerate(result.finals) if attached[i] and s is not result.output]
        plain = [(0, result.output)] if plan.differentiable_output else []
        states_inside: list[tuple[int, torch.Tensor]] = []  # their gradient is always only a part
        if result.recorded:  # stacks of the states: only the outside looks at them
            plain, finals = plain + [(1 + i, s) for i, s in enumerate(result.recorded) if attached[i]], []
        elif result.output is result.finals[0]:  # an integrator's output is its state
            plain, finals = [], [(0, result.output), *finals]
        elif plan.dynamics.fires_from_state:
            states_inside, finals = finals, []
        elif not plan.dynamics.spikes:  # the last membrane is part of the sequence [T, B, ...], too
            states_inside, finals = finals[:1], finals[1:]
        elif plan.dynamics.attached_reset and result.block.shape == self.layer.shape:
            plain, states_inside = [], plain
        if plan.dynamics.recurrent and result.block.shape == self.layer.shape:
            plain, states_inside = [], plain + states_inside  # the spikes go on inside as well
        if not plan.options.fuse_steps:
            plain, states_inside, finals = plain + states_inside + finals, [], []
        tensors = [[t for _, t in group] for group in (plain, states_inside, finals)]
        if self.handle is None:
            self.handle = node.create(self, [*before, x], *tensors,
                                      name=f"Sparse{plan.dynamics.name}Backward", slack=TOPOLOGICAL_SLACK)
            counts["neuron_nodes"] += 1
        elif not node.extend(self.handle, [x], *tensors):
            return False
        self._blocks.append(result.block)
        self.recorded.add(result)
        self.feeder.add(result.block.source)
        self.roles = [(kind, role) for role, group in zip(ROLES, (plain, states_inside, finals), strict=True)
                      for kind, _ in group]
        self.outputs += [(kind, index) for kind, _ in self.roles]
        self.lane_follows = False
        self.last = [(weakref.ref(t), t._version, t.requires_grad) for t in result.finals]
        if result.block.raster is not None and plan.unit_spikes:
            setattr(result.output, TAG, SpikeTag(result.block.raster, self, index, result.output._version))
        return True

    def source_of(self, x: torch.Tensor) -> tuple[weakref.ref[SynapseTape], int] | None:
        """The step that made an input, which from then on belongs to this sequence, if gradients may go to it directly.

        Where dtypes differ, it is autograd that converts them.
        """
        return claim_current(x, self) if x.dtype is self.layer.dtype else None

    def last_spikes(self) -> Raster | None:
        """Those of the last step of a recurrent layer."""
        raster = self.blocks[-1].raster if self.plan.recurrence is not None else None
        return raster.part(raster.rows - self.layer.rows, raster.rows) if raster is not None else None

    @property
    def blocks(self) -> Chain[Block]:
        """What was recorded call by call, also by the lane."""
        self.absorb()
        return self._blocks

    # ------------------------------------------------------------------------------------------------ lane

    def arm(self, x: torch.Tensor, result: Result) -> None:
        """Leaves the further steps of a loop to a lane, if they may be like the one just recorded."""
        plan, layer, recorder, store = self.plan, self.layer, self.recorder, self.recorder.store
        attached = all(state.requires_grad for state in result.finals)
        if not plan.lane_serves(layer.device) or result.block.shape != layer.shape or not attached:
            return
        product = recorder.scan.product if isinstance(recorder.scan, RecurrentScan) else None
        if plan.recurrence is not None and (product is None or not plan.guard):
            return
        assert isinstance(store, HostStore)
        store.close()
        dynamics = plan.dynamics
        source = result.block.source[0]() if result.block.source is not None else None
        load_node().arm_neuron(self.handle, {
            "module": plan.module, "options": plan.options, "guard": plan.guard, "counts": counts,
            "kernel": address_of("neuron_forward"), "arguments": ctypes.addressof(store.scan.arguments),
            "shape": layer.shape, "double": layer.dtype is torch.float64, "states": len(dynamics.carried),
            "recurrent": product is not None, "multiply": address_of("synapse_forward"),
            "product": ctypes.addressof(product.arguments) if product is not None else 0,
            "last_raster": result.block.raster.address if result.block.raster is not None else 0,
            "spikes": dynamics.spikes, "late_reset": dynamics.late_reset, "keep_active": recorder.keep_active,
            "keep_membrane": recorder.keep_membrane, "keep_traces": recorder.keep_traces,
            "unit_spikes": plan.unit_spikes, "outputs": [4 * kind + ROLES[role] for kind, role in self.roles],
            "input_attached": x.requires_grad, "dense": store.dense, "next_block": len(self.blocks),
            "fed": x if source is not None and (source.has_lane or isinstance(source, FeedTape)) else None,
        })
        self.has_lane = self.lane_follows = True

    def absorb(self) -> None:
        taken = take(self.handle) if self.has_lane else None
        if taken is None:
            return
        first, run = len(self._blocks), NeuronRun(taken, self.layer.shape, self.layer.rows, self.layer.cols)
        self._blocks.extend(run)
        self.recorded.add_run(run)
        self.feeder.extend(run.sources)
        kinds = [kind for kind, _ in self.roles]
        self.outputs += [(kind, index) for index in range(first, first + run.steps) for kind in kinds]
        assert isinstance(self.recorder.store, HostStore)
        self.recorder.store.dense = taken["dense"]

    def active_set(self, blocks: Sequence[int], crossover: Callable[[Raster], float]) -> Raster | None:
        """The active sites of some blocks, if gradients are wanted only there and the sites are few.

        Args:
            crossover: the density up to which gradients only there pay.
        """
        self.absorb()
        stack = self.recorded.active
        if self.needs_all_spike_gradients or stack is None:
            return None
        if blocks == list(range(len(self.blocks))):
            active = stack.whole()
        else:
            rasters = [self.blocks[i].active for i in blocks]
            active = Raster.concatenate(raster for raster in rasters if raster is not None)
        if active.ones is None:
            share = self.plan.densities.for_choice().active
        else:
            share = active.ones / active.sites
        return active if share is None or share <= crossover(active) else None

    # ------------------------------------------------------------------------------------------------ backward

    def __call__(self, grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
        result = self._gradients(grads, needs)
        if self.plan.recurrence is not None:
            weight, place = self.plan.recurrence.weight, len(self.plan.dynamics.inputs_of_node) - 2
            if result[place] is None and needs[place] and weight._backward_hooks:
                # Nothing reaches it, but its hooks (Norse's against autapses) are called all the same.
                result[place] = torch.zeros_like(weight)
        return result

    def _gradients(self, grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
        self.absorb()
        layer, dynamics = self.layer, self.plan.dynamics
        first_input = len(dynamics.inputs_of_node)
        result: list[torch.Tensor | None] = [None] * (first_input + len(self.blocks))
        incoming = Incoming(self, grads)
        steps = incoming.steps
        if not steps:
            return result
        found, inputs = dynamics.reached(incoming.last_output, incoming.last_states,
                                         self.plan.surrogate.differentiable)
        wanted = [bool(need) and name in found for need, name in zip(needs, dynamics.inputs_of_node, strict=False)]
        carried, first_parameter = len(dynamics.carried), len(dynamics.states)
        rows = layer.rows
        reached = bisect_left(self.recorded.firsts, steps)  # blocks
        grad_input = None
        if any(needs[first_input:]) or dynamics.recurrent:
            last = self.blocks[reached - 1]
            total = self.recorded.firsts[reached - 1] + last.steps
            grad_input = workspace.take(total * rows, layer.cols, layer.dtype, layer.device)
            grad_input[steps * rows :] = 0
        sums = [layer.empty().zero_() if want else None
                for want in wanted[first_parameter : first_parameter + len(dynamics.parameters)]]
        initial = [layer.empty() if want else None for want in wanted[:carried]]
        tables = self.recorded.tables(dynamics.reset_is_recorded and not dynamics.late_reset)
        if self.plan.surrogate.given is not None:
            evaluated = Derivatives(self.plan.surrogate, self.layer, self.recorded, self._blocks, reached)
            tables["derivative"] = evaluated.table
        described = {"grad_input": grad_input, "grad_state_in": initial, "grad_parameters": sums,
                     "state_in": self.state_in, **tables, **incoming.tables()}
        if self.plan.recurrence is None:
            neuron_backward(layer, steps, **described)
        else:
            assert grad_input is not None
            scan = BackwardScan(layer, steps, **described)
            self._backward_through_spikes(scan, self.plan.recurrence, grad_input, initial, wanted, result)
        for i, grad in enumerate(initial):
            if grad is not None:
                shape, device = self.state_kinds[i]
                result[i] = grad.sum_to_size(shape).to(device)
        for i, grad in enumerate(sums, first_parameter):
            if grad is not None:
                parameter = self.parameters[i - first_parameter]
                result[i] = grad.sum_to_size(parameter.shape).to(parameter.device)
        if grad_input is not None and any(needs[first_input:]):
            reached = bisect_left(self.recorded.firsts, inputs)
            self._return_inputs(grad_input, reached, needs[first_input:], result, first_input, incoming.task)
        return result

    def _backward_through_spikes(self, scan: BackwardScan, recurrence: Recurrence, grad: torch.Tensor,
                                 initial: Sequence[torch.Tensor | None], wanted: Sequence[bool],
                                 result: list[torch.Tensor | None]) -> None:
        """The backward scan of a recurrent layer; fills in the gradients of the spikes before it, weight and bias."""
        layer, dynamics = self.layer, self.plan.dynamics
        check_version(recurrence.weight, self.weight_version)
        # On the CPU the scan looks at the active sites only where no membrane of the others is kept.
        masked = self.plan.inhibition and self.recorder.keep_membrane and not event_parallel(layer.device)
        winners = winners_of(self.blocks) if masked else None
        sparse = recurrence.dense and winners is None and not event_parallel(layer.device)
        tiles = self._tiles_of(recurrence) if sparse else None
        carry = [layer.empty() if tensor is None else tensor for tensor in initial]
        recurrent_backward(scan, recurrence, tiles, grad, carry, winners)
        rows = layer.rows
        grad = grad[: rows * scan.steps].view(layer.rows_shape)
        if wanted[len(dynamics.carried)]:
            shape = self.state_kinds[-1][0]
            result[len(dynamics.carried)] = recurrence.through(grad[:rows]).sum_to_size(shape).view(shape)
        before = self.spikes_in[0].view(layer.rows_shape)
        if not recurrence.dense or not self.plan.unit_spikes:
            spikes = torch.cat([before, self._spikes(rows * (scan.steps - 1))]) if scan.steps > 1 else before
            result[len(wanted) - 2 : len(wanted)] = recurrence.gradients(grad, spikes, wanted[-2:])
            return
        of_weight, _ = recurrence.gradients(grad[:rows], before, (wanted[-2], False))
        if of_weight is not None and scan.steps > 1:
            of_weight = of_weight + self._recurrent_gradient(grad[rows:])
        result[len(wanted) - 2 : len(wanted)] = of_weight, grad.sum(0) if wanted[-1] else None

    def _tiles_of(self, recurrence: Recurrence) -> torch.Tensor | None:
        """The packed weight, if gradients through it are wanted at few sites only."""
        active = self.active_set(list(range(len(self.blocks))), self._crossover("input_gradient"))
        if active is None:
            return None
        product = self.recorder.scan.product if isinstance(self.recorder.scan, RecurrentScan) else None
        return product.tiles if product is not None else pack_weights(recurrence.weight.detach())

    def _raster(self, rows: int) -> Raster:
        """The spikes in the first rows ``[T * B]``."""
        rasters = [block.raster for block in self.blocks]
        return Raster.concatenate(raster for raster in rasters if raster is not None).part(0, rows)

    def _spikes(self, rows: int) -> torch.Tensor:
        """What the neurons emitted in the first rows ``[T * B, ...]``."""
        layer, dynamics = self.layer, self.plan.dynamics
        spikes = unpack(self._raster(rows), layer.dtype)
        if not self.plan.unit_spikes:
            factor = layer.parameters[dynamics.parameters.index("graded_spikes_factor")]
            spikes = spikes.view(-1, layer.rows, layer.cols) * factor
        return spikes.view(layer.rows_shape)

    def _recurrent_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """That of the recurrent weight, from the gradients of all steps but the first."""
        raster = self._raster(len(grad))
        share = density(raster) if not event_parallel(raster.device) else None
        if share is not None and share <= self._crossover("weight_gradient")(raster):
            counts["weight_gradient_sparse"] += 1
            return weight_gradient(grad.contiguous(), columns(raster), bias=False)[0]
        counts["weight_gradient_dense"] += 1
        return grad.t() @ unpack(raster, grad.dtype)

    def _crossover(self, product: str) -> Callable[[Raster], float]:
        """The density up to which a product of the recurrence is better done event by event."""
        size, options = self.layer.cols, self.plan.options
        return lambda sites: options.crossover_on(self.layer.device, product, sites.rows, size, size)

    def _return_inputs(self, grad: torch.Tensor, reached: int, needs: Sequence[bool],
                       result: list[torch.Tensor | None], first_input: int, task: int) -> None:
        """Hands the gradients of the inputs to the synapse that made them all, or else to autograd."""
        if not reached:
            return
        synapse = self.feeder.tape()
        if synapse is not None and all(needs[:reached]) and not synapse.observed():
            rows = (self.recorded.firsts[reached - 1] + self.recorded.steps_of(reached - 1)) * self.layer.rows
            synapse.deliver(Delivery(task, self.feeder.indices[:reached], dense=grad[:rows]))
            return
        first, rows = 0, self.layer.rows
        for i in range(reached):
            block = self.blocks[i]
            if needs[i]:
                result[first_input + i] = part(grad, first, block.steps * rows, block.shape)
            first += block.steps * rows

    def release(self) -> None:
        super().release()
        self._blocks, self.recorded, self.state_in, self.spikes_in = Chain(), Recorded(), [], []
        del self.recorder  # and its arena


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
    if isinstance(tape, NeuronTape):
        tape.absorb()
    if isinstance(tape, NeuronTape) and tape.continues(plan, shape, dtype, x.device, states):
        result = tape.recorder.run(x, states, steps, record, first=False, spikes=tape.last_spikes())
        result.block.source = tape.source_of(x)
        if tape.commit(result, x, states):
            tape.arm(x, result)
            return result
        give_back_current(result.block.source)
    tape = NeuronTape(plan, shape, dtype, x.device, states)
    if result is None:
        result = tape.recorder.run(x, states, steps, record, first=True)
    elif plan.dynamics.reset_is_recorded and result.block.reset is None:
        result.begin_with(tape.recorder.resets(states[0]))
    result.block.source = tape.source_of(x)
    tape.commit(result, x, states)
    tape.arm(x, result)
    return result


def computing_dtype(x: torch.Tensor, states: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype in which a step computes: that of the input and of the states that are not scalars."""
    dtype = x.dtype
    for state in states:
        if state.dtype is not dtype and state.dim():
            dtype = torch.promote_types(dtype, state.dtype)
    return dtype
