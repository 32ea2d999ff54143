"""The tape of a synapse (``nn.Linear``) that feeds a neuron or receives its spikes."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import kernels
from .build import load_node
from .config import Options
from .counters import counts
from .deferred import DeferredCurrents
from .lanes import Chain, take
from .native import address_of, event_parallel, threads_for
from .raster import Raster, RasterStack
from .reports import Counter, densities_of
from .summation import finite, order_of
from .synapse_steps import Entry, Step, SynapseRun, check_version, same_values
from .tapes import TOPOLOGICAL_SLACK, Delivery, Links, SpikeTag, Tape, leave_open, part

if TYPE_CHECKING:
    from .neuron_tape import NeuronTape

# CUDA: of the inputs that are multiplied densely, one row in so many is looked at, to know their density next time.
SAMPLED_ROWS = 16
Feeds = tuple[weakref.ref[nn.Module], Callable[[Any], Options | None]]
# Packed weights: working memory that each sequence of a module fills anew, from the weights as they are then.
_tiles: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()


class SynapseTape(Tape):
    """Records one sequence of one ``nn.Linear``: inputs ``[..., inputs]``, currents ``[..., outputs]``.

    Args:
        module: the synapse.
        options: options in force.
        owner: the neuron tape whose spikes it receives, or None.
    """

    def __init__(self, module: nn.Linear, options: Options, owner: NeuronTape | None) -> None:
        super().__init__()
        self.module, self.options = weakref.ref(module), options
        self.owner = weakref.ref(owner) if owner is not None else None
        self.sink: weakref.ref[NeuronTape] | None = None  # the neuron sequence that consumes the currents
        self._claimed = -1
        self.weight, self.bias = module.weight, module.bias
        self.versions = self._versions()
        self._steps: Chain[Step] = Chain()
        self.rows: array[int] = array("q")  # of each step
        self.entries: array[int] = array("q")  # of each step the number of its entry: the same for the same input
        self.rasters: RasterStack | None = RasterStack()  # of all inputs, as long as all have one
        self.before: Links[NeuronTape] = Links()  # the neuron whose blocks the inputs are
        self.latest: torch.Tensor | None = None  # input of the last step
        self.current: torch.Tensor | None = None  # its current, an alias, to be copied while the input stays the same
        self.current_version = 0
        self.product: kernels.SynapseForward | None = None
        self._finite: bool | None = None  # all weights, once somebody has asked

    def _versions(self) -> tuple[int, int]:
        return self.weight._version, self.bias._version if self.bias is not None else 0

    @property
    def steps(self) -> Chain[Step]:
        """What was recorded call by call, also by the lane."""
        self.absorb()
        return self._steps

    @property
    def claimed(self) -> int:
        """The last step whose current a neuron consumed, -1 if none."""
        return load_node().claimed(self.handle) if self.has_lane else self._claimed

    @claimed.setter
    def claimed(self, step: int) -> None:
        if self.has_lane:
            load_node().claimed(self.handle, step)
        self._claimed = step

    def continues(self, module: nn.Linear, options: Options) -> bool:
        """Whether the next call of this module may be recorded here.

        Currents that no neuron consumed may belong to losses of their own, each differentiated separately: they get
        nodes of their own, unless the spikes they come from tie them together anyway.
        """
        if self.owner is None and self.claimed != len(self.steps) - 1:
            return False
        return (
            not self.released and options.fuse_steps and self.options is options and self.module() is module
            and self.weight is module.weight and self.bias is module.bias and self.versions == self._versions()
        )

    # ------------------------------------------------------------------------------------------------ forward

    def entry_of(self, x: torch.Tensor, tag: SpikeTag | None) -> Entry:
        """What to keep of an input; the entry of the previous step if it is the same tensor again."""
        seen = (x._version, x.requires_grad)
        if self.steps and same_values(x, self.latest) and self.steps[-1].entry.seen == seen:
            return self.steps[-1].entry
        flat = x.detach().reshape(-1, x.shape[-1])
        if tag is not None and (tag.raster.rows, tag.raster.cols) == tuple(flat.shape):
            return Entry(tag.raster, None, 0, seen)
        # On CUDA the host cannot know whether the values are zeros and ones: they are kept, as the host library does.
        raster = None if event_parallel(flat.device) else kernels.pack(flat)
        return Entry(raster, flat if raster is None else None, flat._version, seen)

    def currents(self, host: Any, x: torch.Tensor, entry: Entry, defer: bool, rows: int | None) -> torch.Tensor:
        """The output of the synapse outside autograd: by the host's own operation, or summed over the spikes.

        While the input stays the very same tensor, it is multiplied once and its current copied.

        Args:
            defer: a sum over the spikes of several steps may be left to the neuron, see :class:`DeferredCurrents`.
            rows: as many as the host multiplies at once; None: all.
        """
        if self.steps and self.steps[-1].entry is entry and self.current is not None:
            if self.current._version == self.current_version:
                return self.current.clone()
        with torch.no_grad():
            current = self._sparse_currents(x, entry, defer, rows)
            current = host() if current is None else current
        if current._is_view():  # autograd must be able to give it a history of its own
            current = current.detach()
        if current.dim() <= 2:  # one time step, which may come again
            self.current, self.current_version = current.detach(), current._version
        return current

    def _sparse_currents(self, x: torch.Tensor, entry: Entry, defer: bool, rows: int | None) -> torch.Tensor | None:
        raster, factors = entry.raster, None
        in_order = self.options.forward != "sparse"
        # One step after another is left to the lane, which has the weights packed; a layer with inhibition has none.
        owner = self.owner() if self.owner is not None else None
        of_lane = x.dim() < 3 and (owner is None or not owner.plan.inhibition)
        if in_order and (of_lane or event_parallel(x.device) or not x.is_contiguous()):
            return None
        if raster is not None and not self._pays(kernels.density(raster), "forward", raster.rows, unknown=True):
            return None
        if raster is None:
            if entry.dense is None or not event_parallel(x.device):
                return None
            if not self._pays(self._input_density(), "forward", len(entry.dense)):
                return None
            factors = entry.dense.contiguous()
            raster = kernels.nonzero(factors)
        order = self._order_of_host(rows or raster.rows) if in_order else kernels.IN_ONE_RUN
        if order is None:
            return None
        counts["forward_sparse"] += 1
        product = self.sparse_product()
        product.add_in(order)
        shape = torch.Size((*x.shape[:-1], self.weight.shape[0]))
        if defer and x.dim() == 3 and x.shape[0] > 1 and not event_parallel(x.device):
            return DeferredCurrents(product, raster, shape).stand_in()
        return product(raster, factors).view(shape)

    def _order_of_host(self, rows: int) -> kernels.Order | None:
        """The order in which the host's own product adds, if events can be added so: the outputs are the same bits."""
        if not self.weight.is_contiguous():  # a transposed one may be added in another order
            return None
        outputs, inputs = self.weight.shape
        order = order_of(rows, inputs, outputs, self.weight.dtype, self.bias is not None)
        if order is not None and self._finite is None:
            self._finite = finite(self.weight.detach())
        return order if self._finite else None

    def _pays(self, density: float | None, product: str, rows: int, unknown: bool = False) -> bool:
        """Whether a product is better done event by event; ``unknown`` is the answer where the density is not known."""
        return unknown if density is None else density <= self._crossover(product, rows)

    def _crossover(self, product: str, rows: int) -> float:
        outputs, inputs = self.weight.shape
        return self.options.crossover_on(self.weight.device, product, rows, inputs, outputs)

    def _input_density(self) -> float | None:
        """CUDA: density of the inputs that carry no raster, in earlier sequences."""
        module = self.module()
        return densities_of(module).for_choice().spikes if module is not None else None

    def _count_inputs(self) -> Counter:
        """CUDA: a counter from which the density of the inputs will be known later."""
        counter, module = Counter(self.weight.device), self.module()
        if module is not None:
            densities_of(module).watch(counter)
        return counter

    def sparse_product(self) -> kernels.SynapseForward:
        """The event-driven product with the weights of this sequence, packed once."""
        if self.product is None:
            bias = self.bias.detach() if self.bias is not None else None
            module = self.module()
            tiles = tiles_of(module) if module is not None else None
            self.product = kernels.SynapseForward(self.weight.detach(), bias, tiles)
            if module is not None:
                _tiles[module] = self.product.tiles
        return self.product

    def attach(self, x: torch.Tensor | None, current: torch.Tensor, step: Step) -> bool:
        """Makes ``current`` an output of this tape's node; False if the order of the graph forbids it."""
        node = load_node()
        if self.handle is None:
            self.handle = node.create(self, [self.weight, self.bias, x], [current],
                                      name="SparseSynapseBackward", slack=TOPOLOGICAL_SLACK,
                                      repoint=current.requires_grad)
            counts["synapse_nodes"] += 1
        elif not node.extend(self.handle, [x], [current]):
            return False
        self.entries.append(self._number(step))
        self.rows.append(step.rows)
        self._steps.append(step)
        if step.entry.raster is None:
            self.rasters = None
        elif self.rasters is not None:
            self.rasters.add(step.entry.raster)
        self.before.add(step.spikes)
        return True

    def _number(self, step: Step) -> int:
        if not self.entries:
            return 0
        return self.entries[-1] + (self.steps[-1].entry is not step.entry)

    # ------------------------------------------------------------------------------------------------ lane

    def arm(self, x: torch.Tensor, step: Step, feeds: Feeds | None) -> None:
        """Leaves the further steps of a loop to a lane, if they may be like the one just recorded.

        Args:
            feeds: the neuron that it feeds, and how to ask for the options in force for that; needed without owner.
        """
        owner = self.owner() if self.owner is not None else None
        owned, options, weight = self.owner is not None, self.options, self.weight
        if event_parallel(x.device) or not options.fuse_steps or x.dim() != 2 or (not owned and feeds is None):
            return
        if self.bias is not None and not self.bias.is_contiguous():
            return
        if owned and (owner is None or not owner.has_lane):
            return
        entry = step.entry
        order = kernels.IN_ONE_RUN
        raster = entry.raster
        events = raster is not None and self._pays(kernels.density(raster), "forward", step.rows, unknown=True)
        if events and options.forward != "sparse":
            found = self._order_of_host(step.rows)
            events, order = found is not None, found or order
        load_node().arm_synapse(self.handle, {
            "module": self.module, "options": options, "counts": counts, "owned": owned,
            "owner": owner.handle if owner is not None else None,
            "neuron": feeds[0] if feeds is not None else None, "options_of": feeds[1] if feeds is not None else None,
            "forward_kernel": address_of("synapse_forward"), "pack_kernel": address_of("raster_pack"),
            "weight": weight, "bias": self.bias, "rows": step.rows, "threads": threads_for(step.rows * weight.shape[0]),
            "crossover": self._crossover("forward", step.rows), "chunk_ends": order.ends,
            "apart": order.apart,
            "tiles": self.sparse_product().tiles if events else None,
            "direct": step.spikes is not None, "latest": None if owned else x,
            "latest_raster": entry.raster.words if entry.raster is not None else None,
            "latest_ones": kernels.count(entry.raster) if entry.raster is not None else 0,
            "entry": self.entries[-1], "claimed": self.claimed, "steps": len(self.steps),
        })
        self.has_lane, self.latest, self.current = True, None, None

    def absorb(self) -> None:
        taken = take(self.handle) if self.has_lane else None
        if taken is None:
            return
        before = self.before.reference if taken["direct"] else None
        run = SynapseRun(taken, self.rows[-1], self.weight.shape[1], before,
                         (self._steps[-1].entry, self.entries[-1]))
        self.entries.extend(run.numbers)
        self.rows.extend([self.rows[-1]] * run.steps)
        self._steps.extend(run)
        rasters = run.rasters()
        if rasters is None:
            self.rasters = None
        elif self.rasters is not None:
            for raster in rasters:
                self.rasters.add(raster)
        self.before.extend(run.blocks)

    def move(self, index: int, current: torch.Tensor) -> SynapseTape | None:
        """Moves the current of one step to a fresh tape; the old node keeps an output nobody uses."""
        module = self.module()
        if module is None:
            return None
        fresh = SynapseTape(module, self.options, None)
        fresh.weight, fresh.bias, fresh.versions, fresh.product = self.weight, self.bias, self.versions, self.product
        fresh.attach(self.steps[index].input, current, self.steps[index])
        if index == len(self.steps) - 1:
            fresh.latest, fresh.current, fresh.current_version = self.latest, self.current, self.current_version
        leave_open(fresh, module, None)
        return fresh

    # ------------------------------------------------------------------------------------------------ backward

    def __call__(self, grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
        self.absorb()
        result: list[torch.Tensor | None] = [None] * (2 + len(self.steps))
        task = load_node().task_id()
        chosen, grad = self._total(grads, task)
        if grad is None:
            return result
        with torch.autocast(grad.device.type, enabled=False):
            if needs[0] or needs[1]:
                result[0], result[1] = self._weight_gradient(chosen, grad, bool(needs[0]), bool(needs[1]))
            if any(needs[2 + i] for i in chosen):
                self._input_gradient(chosen, grad, needs, result, task)
        return result

    def _total(self, grads: Sequence[torch.Tensor | None], task: int) -> tuple[list[int], torch.Tensor | None]:
        """Steps that received a gradient, and their gradients ``[rows of these steps, outputs]``."""
        deliveries = self.accept_deliveries(task)
        outputs = self.weight.shape[0]
        if len(deliveries) == 1 and all(g is None for g in grads) and deliveries[0].dense is not None:
            blocks = deliveries[0].blocks
            if len(set(blocks)) == len(blocks):
                rows = sum(map(self.rows.__getitem__, blocks))
                return blocks, deliveries[0].dense.view(-1, outputs)[:rows]
        found: dict[int, torch.Tensor] = {}

        def add(index: int, grad: torch.Tensor) -> None:
            grad = grad.reshape(-1, outputs)
            found[index] = found[index] + grad if index in found else grad

        for index, grad in enumerate(grads):
            if grad is not None:
                add(index, grad)
        for delivery in deliveries:
            first = 0
            for index in delivery.blocks:
                assert delivery.dense is not None
                add(index, delivery.dense.view(-1, outputs)[first : first + self.rows[index]])
                first += self.rows[index]
        chosen = sorted(found)
        return chosen, torch.cat([found[i] for i in chosen]).contiguous() if chosen else None

    def _weight_gradient(self, chosen: list[int], grad: torch.Tensor, weight: bool,
                         bias: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not weight:
            return None, grad.sum(0)
        if self._same_input(chosen):  # its gradients are summed over time first
            grad, chosen = grad.view(len(chosen), -1, grad.shape[1]).sum(0), chosen[:1]
        if self.rasters is not None:
            raster = self._rasters_of(chosen)
            if self._pays(kernels.density(raster), "weight_gradient", raster.rows, unknown=True):
                counts["weight_gradient_sparse"] += 1
                return kernels.weight_gradient(grad, kernels.columns(raster), bias=bias)
            x = kernels.unpack(raster, grad.dtype)
        else:
            entries = [self.steps[i].entry for i in chosen]
            x = (torch.cat([e.values(grad.dtype) for e in entries]) if len(entries) > 1
                 else entries[0].values(grad.dtype))
            if event_parallel(x.device):
                if self._pays(self._input_density(), "weight_gradient", len(x)):
                    counts["weight_gradient_sparse"] += 1
                    x = x.contiguous()
                    events = kernels.columns(kernels.nonzero(x, self._count_inputs()), factors=x)
                    return kernels.weight_gradient(grad, events, bias=bias)
                kernels.nonzero(x[::SAMPLED_ROWS], self._count_inputs())
        counts["weight_gradient_dense"] += 1
        return kernels.dense_product(grad.t(), x), grad.sum(0) if bias else None

    def _rasters_of(self, chosen: list[int]) -> Raster:
        if self.rasters is not None and len(chosen) == len(self.steps):
            return self.rasters.whole()
        rasters = [self.steps[i].entry.raster for i in chosen]
        return Raster.concatenate(raster for raster in rasters if raster is not None)

    def _input_gradient(self, chosen: list[int], grad: torch.Tensor, needs: Sequence[bool],
                        result: list[torch.Tensor | None], task: int) -> None:
        check_version(self.weight, self.versions[0])
        neuron, blocks = self._neuron_before(chosen, needs)
        if neuron is not None:
            active = neuron.active_set(blocks, lambda sites: self._crossover("input_gradient", sites.rows))
            if active is not None and active.cols == self.weight.shape[1]:
                counts["input_gradient_sparse"] += 1
                values = kernels.input_gradient(grad, kernels.columns(active, ranks=True), self.sparse_product().tiles)
                neuron.deliver(Delivery(task, blocks, active=values))
                return
        counts["input_gradient_dense"] += 1
        if neuron is None and self._same_input(chosen):
            grad, chosen = grad.view(len(chosen), -1, grad.shape[1]).sum(0), chosen[:1]
        total = kernels.dense_product(grad, self.weight.detach())
        if neuron is not None:
            neuron.deliver(Delivery(task, blocks, dense=total))
            return
        first = 0
        for i in chosen:
            if needs[2 + i]:
                result[2 + i] = part(total, first, self.rows[i], self.steps[i].shape)
            first += self.rows[i]

    def _same_input(self, chosen: list[int]) -> bool:
        """Whether these steps, more than one, all received the very same tensor."""
        return len(chosen) > 1 and all(self.entries[i] == self.entries[chosen[0]] for i in chosen)

    def _neuron_before(self, chosen: list[int], needs: Sequence[bool]) -> tuple[NeuronTape | None, list[int]]:
        """The neuron tape whose spikes all inputs are, if the gradients may go to it directly, and its blocks."""
        neuron = self.before.tape()
        if neuron is None:
            return None, []
        indices = self.before.indices
        blocks = indices if len(chosen) == len(self.steps) else [indices[i] for i in chosen]
        if not all(needs[2 + i] for i in chosen) or len(set(blocks)) < len(blocks) or neuron.observed():
            return None, []
        return neuron, blocks

    def release(self) -> None:
        super().release()
        self._steps, self.rows, self.entries, self.rasters = Chain(), array("q"), array("q"), None
        self.latest = self.current = self.product = None


def tiles_of(module: nn.Module) -> torch.Tensor | None:
    """The memory for the packed weights of a module, if it has any."""
    return _tiles.get(module)
