"""The tape of a convolution (``nn.Conv2d``) that feeds a neuron or receives its spikes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import kernels
from .build import load_node
from .config import Options
from .conv_summation import adds_alike
from .convolution import (
    Convolution,
    ImageGradient,
    dense_gradients,
    event_forward,
    event_input_gradient,
    event_weight_gradient,
    events_serve,
    pack_weight,
)
from .counters import counts
from .feeds import FeedTape, PooledDelivery
from .native import event_parallel
from .neuron_tape import NeuronTape
from .raster import Raster, RasterStack
from .synapse_steps import Entry, check_version, same_values
from .tapes import TOPOLOGICAL_SLACK, Delivery, Links, SpikeTag, Tape, leave_open, open_tape, part

if TYPE_CHECKING:
    from .pool_tape import PoolTape


@dataclass(eq=False)
class ConvStep:
    """One call.

    Args:
        entry: its input.
        input: as autograd knows it, where a gradient flows to it and the step may have to move.
        shape: of the input.
        rows: of the batch.
        before: the step of the tape whose untouched output the input is.
    """

    entry: Entry
    input: torch.Tensor | None
    shape: torch.Size
    rows: int
    before: tuple[weakref.ref[Tape], int] | None = None


class ConvTape(FeedTape):
    """Records one sequence of one ``nn.Conv2d``: inputs ``[B, C, H, W]``, currents ``[B, O, H', W']``.

    Args:
        module: the convolution.
        convolution: what it does.
        options: options in force.
        owner: the neuron tape whose spikes it receives, or None.
    """

    def __init__(self, module: nn.Conv2d, convolution: Convolution, options: Options, owner: NeuronTape | None) -> None:
        super().__init__()
        self.module, self.convolution, self.options = weakref.ref(module), convolution, options
        self._owner = weakref.ref(owner) if owner is not None else None
        self._sink: weakref.ref[NeuronTape] | None = None
        self.weight, self.bias = module.weight, module.bias
        self.versions = self._versions()
        self.steps: list[ConvStep] = []
        self.outputs: list[weakref.ref[torch.Tensor]] = []
        self.image = torch.Size()  # of the currents [O, H', W']
        self.rasters: RasterStack | None = RasterStack()  # of all inputs, as long as all have one
        self.before: Links[Tape] = Links()  # the neuron or the pooling whose outputs the inputs are
        self.pools: weakref.WeakSet[PoolTape] = weakref.WeakSet()  # of these currents
        self.latest: torch.Tensor | None = None  # input of the last step
        self.current: torch.Tensor | None = None  # its current, an alias, to be copied while the input stays the same
        self.current_version = 0
        self.packed: torch.Tensor | None = None  # the weight, for a forward product event by event
        self.alike: tuple[torch.Size, bool] | None = None  # whether the host adds alike, for which inputs

    def _versions(self) -> tuple[int, int]:
        return self.weight._version, self.bias._version if self.bias is not None else 0

    @property
    def owner(self) -> weakref.ref[Any] | None:
        return self._owner

    @property
    def sink(self) -> weakref.ref[Any] | None:
        return self._sink

    @sink.setter
    def sink(self, neuron: weakref.ref[Any] | None) -> None:
        self._sink = neuron

    def continues(self, module: nn.Conv2d, convolution: Convolution, options: Options, x: torch.Tensor) -> bool:
        """Whether the next call may be recorded here; see ``SynapseTape.continues``."""
        if self._owner is None:
            claimed = max([self.claimed, *(pool.claimed_of_source() for pool in self.pools)])
            if claimed != len(self.steps) - 1:
                return False
        return (
            not self.released and options.fuse_steps and self.options is options and self.module() is module
            and self.weight is module.weight and self.bias is module.bias and self.versions == self._versions()
            and self.convolution == convolution and self.steps[0].shape[1:] == x.shape[1:]
        )

    # ------------------------------------------------------------------------------------------------ forward

    def entry_of(self, x: torch.Tensor, tag: SpikeTag | None) -> Entry:
        """What to keep of an input; the entry of the previous step if it is the same tensor again."""
        seen = (x._version, x.requires_grad)
        if self.steps and same_values(x, self.latest) and self.steps[-1].entry.seen == seen:
            return self.steps[-1].entry
        flat = x.detach().flatten(1)
        if tag is not None and (tag.raster.rows, tag.raster.cols) == tuple(flat.shape):
            return Entry(tag.raster, None, 0, seen)
        # As in SynapseTape: on CUDA the host cannot know whether the values are zeros and ones.
        raster = None if event_parallel(flat.device) else kernels.pack(flat)
        return Entry(raster, flat if raster is None else None, flat._version, seen)

    def entry_at(self, index: int, current: torch.Tensor) -> Entry | None:
        """What the current of a step was computed from, if it is still just that."""
        return self.steps[index].entry if index < len(self.steps) and current._version == 0 else None

    def output_at(self, index: int) -> torch.Tensor | None:
        """The current of a step as it came out of this node, None if nobody has it any more."""
        current = self.outputs[index]()
        return current if current is not None and load_node().tape_of(current) is self else None

    def currents(self, host: Callable[[], torch.Tensor], x: torch.Tensor, entry: Entry) -> torch.Tensor:
        """The output of the convolution outside autograd: by the host's own operation, or summed over the spikes.

        While the input stays the very same tensor, it is computed once and copied.
        """
        if self.steps and self.steps[-1].entry is entry and self.current is not None:
            if self.current._version == self.current_version:
                return self.current.clone()
        with torch.no_grad():
            current = self._event_currents(x, entry)
            current = host() if current is None else current
        self.current, self.current_version = current.detach(), current._version
        return current

    def _event_currents(self, x: torch.Tensor, entry: Entry) -> torch.Tensor | None:
        weight, bias = self.weight.detach(), self.bias.detach() if self.bias is not None else None
        if entry.raster is None or not self._pays(entry.raster):
            return None
        if self.options.forward != "sparse" and not self._adds_alike(x):
            return None
        if self.packed is None:
            self.packed = pack_weight(weight)
        counts["conv_forward_sparse"] += 1
        image = torch.Size((weight.shape[0], *self.convolution.window.stops(x.shape)))
        return event_forward(self.convolution, entry.raster, self.packed, bias, x.shape[1:], image)

    def _adds_alike(self, x: torch.Tensor) -> bool:
        """Whether events can be added in the host's order: the outputs are the same bits."""
        if self.alike is None or self.alike[0] != x.shape:
            known = adds_alike(self.convolution, x.shape, self.weight.detach(), self.bias is not None)
            self.alike = x.shape, known
        return self.alike[1] and x.is_contiguous()

    def _pays(self, raster: Raster | None) -> bool:
        """Whether a product is better done event by event."""
        if raster is None or not self.convolution.serves(raster.device):
            return False
        density = kernels.density(raster)
        return density is not None and density <= self.options.crossover_of_convolutions

    def attach(self, x: torch.Tensor | None, current: torch.Tensor, step: ConvStep) -> bool:
        """Makes ``current`` an output of this tape's node; False if the order of the graph forbids it."""
        node = load_node()
        if self.handle is None:
            self.handle = node.create(self, [self.weight, self.bias, x], [current], name="SparseConvBackward",
                                      slack=TOPOLOGICAL_SLACK, repoint=current.requires_grad)
            self.image = current.shape[1:]
            counts["conv_nodes"] += 1
        elif not node.extend(self.handle, [x], [current]):
            return False
        self.steps.append(step)
        self.rows.append(step.rows)
        self.outputs.append(weakref.ref(current))
        if step.entry.raster is None:
            self.rasters = None
        elif self.rasters is not None:
            self.rasters.add(step.entry.raster)
        self.before.add(step.before)
        return True

    def move(self, index: int, output: torch.Tensor) -> ConvTape | None:
        module = self.module()
        if module is None:
            return None
        fresh = ConvTape(module, self.convolution, self.options, None)
        fresh.weight, fresh.bias, fresh.versions = self.weight, self.bias, self.versions
        fresh.attach(self.steps[index].input, output, self.steps[index])
        if index == len(self.steps) - 1:
            fresh.latest, fresh.current, fresh.current_version = self.latest, self.current, self.current_version
        leave_open(fresh, module, None)
        return fresh

    # ------------------------------------------------------------------------------------------------ backward

    def __call__(self, grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
        result: list[torch.Tensor | None] = [None] * (2 + len(self.steps))
        task = load_node().task_id()
        chosen, grad = self._total(grads, task)
        if grad is None:
            return result
        with torch.autocast(grad.grad.device.type, enabled=False):
            self._gradients(chosen, grad, needs, result, task)
        return result

    def _total(self, grads: Sequence[torch.Tensor | None], task: int) -> tuple[list[int], ImageGradient | None]:
        """Steps that received a gradient, and the gradients of their currents; one step for all with the same input."""
        deliveries = self.accept_deliveries(task)
        if len(deliveries) == 1 and all(g is None for g in grads) and isinstance(deliveries[0], PooledDelivery):
            pooled = deliveries[0]
            chosen, places = pooled.blocks, pooled.places
            if not self._same_input(chosen):
                return chosen, self._pooled(pooled)
            if all(place is places[0] for place in places):
                assert pooled.dense is not None
                summed = pooled.dense.view(len(chosen), self.rows[chosen[0]], -1).sum(0)
                return chosen[:1], ImageGradient(summed, pooled.image, self.image, pooled.pool, places[0])
        chosen, grad = self.received(grads, deliveries)
        if grad is not None and self._same_input(chosen):
            grad, chosen = grad.view(len(chosen), self.rows[chosen[0]], -1).sum(0), chosen[:1]
        return chosen, ImageGradient(grad.contiguous(), self.image, self.image) if grad is not None else None

    def _same_input(self, chosen: list[int]) -> bool:
        """Whether these steps, more than one, all received the very same tensor."""
        return len(chosen) > 1 and all(self.steps[i].entry is self.steps[chosen[0]].entry for i in chosen)

    def _pooled(self, delivery: PooledDelivery) -> ImageGradient:
        assert delivery.dense is not None
        grad, places = delivery.dense.reshape(self.rows_of(delivery.blocks), -1), torch.cat(list(delivery.places))
        return ImageGradient(grad, delivery.image, self.image, delivery.pool, places)

    def _dense(self, delivery: Delivery) -> torch.Tensor:
        if isinstance(delivery, PooledDelivery):
            grad = self._pooled(delivery)
            return grad.part(0, grad.rows).flatten(1)
        return super()._dense(delivery)

    def _gradients(self, chosen: list[int], grad: ImageGradient, needs: Sequence[bool],
                   result: list[torch.Tensor | None], task: int) -> None:
        shape, weight, total, images = self.steps[0].shape[1:], self.weight.detach(), None, None
        if needs[1]:
            result[1] = grad.bias()
        if any(needs[2 + i] for i in chosen):
            check_version(self.weight, self.versions[0])
            if not self._active_inputs(chosen, grad, needs, task):
                total = grad.grad.new_empty((grad.rows, shape.numel()))
                counts["conv_input_dense"] += 1
        if needs[0]:
            raster = self._raster_of(chosen)
            if raster is not None and events_serve(grad) and self._pays(raster):
                counts["conv_weight_sparse"] += 1
                result[0] = event_weight_gradient(self.convolution, grad, raster, shape)
            else:
                images = self._images(chosen, shape, raster)
                counts["conv_weight_dense"] += 1
        if images is not None or total is not None:
            found = dense_gradients(self.convolution, grad, weight, images, shape, total)
            result[0] = found if found is not None else result[0]
        if total is not None:
            self._return_inputs(chosen, total, needs, result, task)

    def _active_inputs(self, chosen: list[int], grad: ImageGradient, needs: Sequence[bool], task: int) -> bool:
        """Gives the neuron before the gradients of its spikes at the active sites, if that is enough and pays."""
        before, blocks = self._before(chosen, needs)
        if not isinstance(before, NeuronTape):
            return False
        if not self.convolution.serves(grad.grad.device) or not events_serve(grad):
            return False
        shape = self.steps[0].shape[1:]
        active = before.active_set(blocks, lambda _: self.options.crossover_of_convolutions)
        if active is None or (active.rows, active.cols) != (grad.rows, shape.numel()):
            return False
        counts["conv_input_sparse"] += 1
        packed = self.packed if self.packed is not None else pack_weight(self.weight)
        values = event_input_gradient(self.convolution, grad, active, packed, shape)
        before.deliver(Delivery(task, blocks, active=values))
        return True

    def _images(self, chosen: list[int], shape: torch.Size,
                raster: Raster | None) -> Callable[[int, int], torch.Tensor]:
        """Gives some rows of the inputs of these steps."""
        dtype = self.weight.dtype
        if raster is not None:
            return lambda first, end: kernels.unpack(raster.part(first, end), dtype).view(-1, *shape)
        entries = [self.steps[i].entry for i in chosen]
        x = torch.cat([e.values(dtype) for e in entries]) if len(entries) > 1 else entries[0].values(dtype)
        return lambda first, end: x[first:end].view(-1, *shape)

    def _raster_of(self, chosen: list[int]) -> Raster | None:
        """The inputs of these steps, None if one of them is not of zeros and ones."""
        if self.rasters is None:
            return None
        if len(chosen) == len(self.steps):
            return self.rasters.whole()
        rasters = [self.steps[i].entry.raster for i in chosen]
        return Raster.concatenate(raster for raster in rasters if raster is not None)

    def _return_inputs(self, chosen: list[int], total: torch.Tensor, needs: Sequence[bool],
                       result: list[torch.Tensor | None], task: int) -> None:
        """Hands the gradients of the inputs to the one tape that made them all, or else to autograd."""
        before, blocks = self._before(chosen, needs)
        if before is not None:
            before.deliver(Delivery(task, blocks, dense=total))
            return
        first = 0
        for i in chosen:
            if needs[2 + i]:
                result[2 + i] = part(total, first, self.rows[i], self.steps[i].shape)
            first += self.rows[i]

    def _before(self, chosen: list[int], needs: Sequence[bool]) -> tuple[Tape | None, list[int]]:
        """The tape whose outputs all inputs are, if the gradients may go to it directly, and the steps there."""
        before = self.before.tape()
        if before is None:
            return None, []
        blocks = [self.before.indices[i] for i in chosen]
        if not all(needs[2 + i] for i in chosen) or len(set(blocks)) < len(blocks) or before.observed():
            return None, []
        return before, blocks

    def release(self) -> None:
        super().release()
        self.steps, self.rows, self.outputs, self.rasters = [], [], [], None
        self.latest = self.current = self.packed = None


def run_convolution(module: nn.Conv2d, convolution: Convolution, options: Options, host: Callable[[], torch.Tensor],
                    x: torch.Tensor, tag: SpikeTag | None) -> torch.Tensor:
    """One call of a convolution, recorded on the tape of its sequence.

    Args:
        module: the ``nn.Conv2d``.
        convolution: what it does.
        options: options in force.
        host: computes the host library's own output.
        x: input ``[B, C, H, W]``.
        tag: tag of ``x`` if it is spikes.
    """
    owner = tag.tape() if tag is not None and x.requires_grad else None
    tape = open_tape(module, owner)
    if not isinstance(tape, ConvTape) or not tape.continues(module, convolution, options, x):
        tape = ConvTape(module, convolution, options, owner)
    entry = tape.entry_of(x, tag)
    current = tape.currents(host, x, entry)
    step = ConvStep(entry, x if owner is None and x.requires_grad else None, x.shape, x.shape[0])
    if owner is not None and tag is not None:
        made_by = load_node().tape_of(x)
        if made_by is owner:
            step.before = weakref.ref(owner), tag.block
        elif isinstance(made_by, FeedTape):
            step.before = weakref.ref(made_by), x.output_nr
    if not tape.attach(x, current, step):
        tape = ConvTape(module, convolution, options, owner)
        tape.attach(x, current, step)
    tape.latest = x
    counts["conv_steps"] += 1
    leave_open(tape, module, owner)
    return current
