"""The tape of pooling between a convolution and a neuron, or behind a neuron."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import kernels
from .build import load_node
from .conv_tape import ConvTape
from .counters import counts
from .feeds import FeedTape, PooledDelivery
from .native import event_parallel
from .neuron_tape import NeuronTape
from .pooling import MaxPool, Pool
from .synapse_steps import Entry
from .tapes import TAG, TOPOLOGICAL_SLACK, Delivery, SpikeTag, part, placeholder

Source = ConvTape | NeuronTape
# The open tapes by what they pool: one belongs to one sequence of a convolution or of a neuron.
_open: weakref.WeakKeyDictionary[Source, dict[Pool, weakref.ref[PoolTape]]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class PoolStep:
    """One call.

    Args:
        index: of the step of the convolution, or block of the neuron, whose output was pooled.
        image, pooled: shapes ``[C, H, W]`` before and ``[C, h, w]`` after.
        places: of the maxima.
    """

    index: int
    image: torch.Size
    pooled: torch.Size
    places: torch.Tensor | None


class PoolTape(FeedTape):
    """Records how the outputs of one sequence are pooled: images ``[B, C, H, W]`` to ``[B, C, h, w]``.

    Args:
        pool: how.
        source: the tape whose outputs are pooled.
    """

    def __init__(self, pool: Pool, source: Source) -> None:
        super().__init__()
        self.pool, self.source = pool, weakref.ref(source)
        self.steps: list[PoolStep] = []
        # The last images that were pooled, what they became, an alias, and its version.
        self.latest: tuple[Entry, torch.Tensor, int] | None = None

    @property
    def owner(self) -> weakref.ref[Any] | None:
        source = self.source()
        return source.owner if isinstance(source, ConvTape) else self.source

    @property
    def sink(self) -> weakref.ref[Any] | None:
        source = self.source()
        return source.sink if isinstance(source, ConvTape) else None

    @sink.setter
    def sink(self, neuron: weakref.ref[Any] | None) -> None:
        source = self.source()
        if isinstance(source, ConvTape):
            source.sink = neuron

    def claimed_of_source(self) -> int:
        """The last step of the source whose pooled output a neuron consumed, -1 if none."""
        claimed = self.claimed
        return self.steps[claimed].index if 0 <= claimed < len(self.steps) else -1

    def pooled(self, x: torch.Tensor, entry: Entry | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The pooled images and the places of the maxima, copied where the images are those of the step before.

        Args:
            entry: what a convolution computed the images from, if they are still just that.
        """
        if entry is not None and self.latest is not None and self.latest[0] is entry:
            _, before, version = self.latest
            if before._version == version:
                return before.clone(), self.steps[-1].places
        with torch.no_grad():
            pooled, places = self.pool(x.detach())
        self.latest = (entry, pooled.detach(), pooled._version) if entry is not None else None
        return pooled, places

    def attach(self, x: torch.Tensor, pooled: torch.Tensor, step: PoolStep) -> bool:
        """Makes ``pooled`` an output of this tape's node; False if the order of the graph forbids it."""
        node = load_node()
        if self.handle is None:
            self.handle = node.create(self, [x], [pooled], name="SparsePoolBackward", slack=TOPOLOGICAL_SLACK,
                                      repoint=pooled.requires_grad)
            counts["pool_nodes"] += 1
        elif not node.extend(self.handle, [x], [pooled]):
            return False
        self.rows.append(pooled.shape[0])
        self.steps.append(step)
        return True

    def move(self, index: int, output: torch.Tensor) -> FeedTape | None:
        source, step = self.source(), self.steps[index]
        if not isinstance(source, ConvTape):
            return None
        images = source.output_at(step.index)
        if images is None:
            images = placeholder((self.rows[index], *step.image), output)
        elif images._backward_hooks or images.retains_grad:  # then its history cannot be replaced
            return None
        fresh_source = source.move(step.index, images)
        if fresh_source is None:
            return None
        fresh = PoolTape(self.pool, fresh_source)
        fresh.attach(images, output, PoolStep(0, step.image, step.pooled, step.places))
        _open[fresh_source] = {self.pool: weakref.ref(fresh)}
        return fresh

    def __call__(self, grads: Sequence[torch.Tensor | None], needs: Sequence[bool]) -> list[torch.Tensor | None]:
        result: list[torch.Tensor | None] = [None] * len(self.steps)
        task = load_node().task_id()
        chosen, grad = self.received(grads, self.accept_deliveries(task))
        if grad is None or not any(needs[i] for i in chosen):
            return result
        steps = [self.steps[i] for i in chosen]
        image, pooled = steps[0].image, steps[0].pooled
        blocks, source = [step.index for step in steps], self.source()
        direct = (source is not None and all(needs[i] for i in chosen) and len(set(blocks)) == len(blocks)
                  and not source.observed())
        places = [step.places for step in steps if step.places is not None]
        if direct and isinstance(source, ConvTape) and isinstance(self.pool, MaxPool):
            source.deliver(PooledDelivery(task, blocks, grad, pool=self.pool, image=pooled, places=places))
            return result
        total = self.pool.backward(grad.view(-1, *pooled), image, torch.cat(places) if places else None)
        if direct and source is not None:
            source.deliver(Delivery(task, blocks, total.flatten(1)))
            return result
        first = 0
        for i in chosen:
            if needs[i]:
                result[i] = part(total, first, self.rows[i], torch.Size((self.rows[i], *image)))
            first += self.rows[i]
        return result

    def release(self) -> None:
        super().release()
        self.steps, self.rows, self.latest = [], [], None


def run_pool(pool: Pool, x: torch.Tensor, source: Source, index: int) -> torch.Tensor:
    """One call of pooling, recorded on the tape of its sequence.

    Args:
        pool: how.
        x: images ``[B, C, H, W]``, the output of the source.
        index: number of the step of the convolution, or block of the neuron, that made them.
    """
    tapes = _open.setdefault(source, {})
    reference = tapes.get(pool)
    tape = reference() if reference is not None else None
    if tape is None or tape.released or (tape.steps and tape.steps[0].image != x.shape[1:]):
        tape = PoolTape(pool, source)
    entry = source.entry_at(index, x) if isinstance(source, ConvTape) else None
    pooled, places = tape.pooled(x, entry)
    step = PoolStep(index, x.shape[1:], pooled.shape[1:], places)
    if not tape.attach(x, pooled, step):
        tape = PoolTape(pool, source)
        tape.attach(x, pooled, step)
    if isinstance(source, ConvTape):
        source.pools.add(tape)
    elif isinstance(pool, MaxPool) and not event_parallel(x.device):  # of ones and zeros: spikes again
        raster = kernels.pack(pooled.detach().flatten(1))
        if raster is not None:
            setattr(pooled, TAG, SpikeTag(raster, source, index, pooled._version))
    counts["pool_steps"] += 1
    tapes[pool] = weakref.ref(tape)
    return pooled
