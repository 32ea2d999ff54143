"""What the tapes of neurons and of synapses share.

A tape records one sequence of one layer and is owned by its autograd node (``csrc/torch/sequence_node.cpp``). Two
fused layers that follow each other hand gradients over beside the autograd engine, as one batch for all time steps and
possibly at the active sites only; the engine still decides who runs when. This is done only where nobody else looks at
those gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from .build import load_node
from .compat.cuda import current_stream
from .raster import Raster

if TYPE_CHECKING:
    from .neuron_tape import NeuronTape

TAG = "_snn_sparse"
# Room for inputs that lie deeper in the graph than those of the first step (a dropout that starts late, say).
TOPOLOGICAL_SLACK = 16


@dataclass
class Delivery:
    """Gradients that one tape hands to another.

    Args:
        task: the backward call it belongs to.
        blocks: indices of the receiver's blocks, in order.
        dense: ``[rows of all blocks, cols]``, or None. The receiver may divide the same sites into other rows: of
            spikes ``[A, B, N]`` a neuron layer has A, a synapse A * B.
        active: gradients at the active sites of the blocks only, as ``kernels.input_gradient`` returns them, or None.
    """

    task: int
    blocks: list[int]
    dense: torch.Tensor | None = None
    active: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._given = self.dense if self.dense is not None else self.active
        assert self._given is not None
        # Work on CUDA is ordered within a stream only, and the engine does not know of this gradient.
        self._stream = torch.cuda.current_stream(self._given.device) if self._given.is_cuda else None

    def receive(self) -> None:
        """Lets the current stream wait for the gradient, if it was computed on another one."""
        if self._stream is None:
            return
        here = torch.cuda.current_stream(self._stream.device)
        if here != self._stream:
            here.wait_stream(self._stream)
            assert self._given is not None
            self._given.record_stream(here)


class Tape:
    """Base of the tapes: the node's callback, and a box for deliveries."""

    def __init__(self) -> None:
        self.handle: Any = None
        self.inbox: list[Delivery] = []
        self.released = False
        self.has_lane = False  # of its node, see lanes.py

    def deliver(self, delivery: Delivery) -> None:
        self.inbox.append(delivery)

    def accept_deliveries(self, task: int) -> list[Delivery]:
        """The deliveries of this backward call; leftovers of a call that failed are dropped."""
        mine = [d for d in self.inbox if d.task == task]
        self.inbox = []
        for delivery in mine:
            delivery.receive()
        return mine

    def absorb(self) -> None:
        """Takes over what the lane recorded."""

    def observed(self) -> bool:
        """Whether someone looks at the gradient of one of the outputs (hook, retain_grad, autograd.grad)."""
        return self.handle is None or load_node().has_requests(self.handle)

    def release(self) -> None:
        """Called by the node once backward is done and the graph is not retained."""
        self.released, self.has_lane = True, False
        self.inbox = []


OtherTape = TypeVar("OtherTape", bound=Tape)


class Links(Generic[OtherTape]):
    """Which step or block of another tape belongs to each one of this tape, as long as it is always the same tape.

    Attributes:
        indices: of the other tape.
    """

    def __init__(self) -> None:
        self.indices: list[int] = []
        self._other: weakref.ref[OtherTape] | None = None
        self._added = 0

    def add(self, link: tuple[weakref.ref[OtherTape], int] | None) -> None:
        """The next one's; None if no tape has it."""
        first, self._added = not self._added, self._added + 1
        if link is not None and (first or (self._other is not None and link[0]() is self._other())):
            self._other = link[0]
            self.indices.append(link[1])
        else:
            self._other = None

    def extend(self, indices: Sequence[int] | None) -> None:
        """Those of a run that belong to the same tape as the ones before; None if no tape has them."""
        self._added += 1
        if indices is None or self._other is None:
            self._other = None
        else:
            self.indices.extend(indices)

    @property
    def reference(self) -> weakref.ref[OtherTape] | None:
        """The other tape, if it is one."""
        return self._other

    def tape(self) -> OtherTape | None:
        """The other tape, if it is one and still there."""
        return self._other() if self._other is not None else None


class Tag:
    """Rides on a tensor as an attribute. Copies and pickles become None: a copied tensor is an ordinary one."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        return type(None), ()


class SourceTag(Tag):
    """Rides on the output of an ``nn.Linear`` that nobody has recorded yet: the module that made it."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)


class SpikeTag(Tag):
    """Rides on a spike tensor that a neuron returned: its raster, and where it came from."""

    __slots__ = ("raster", "tape", "block", "version", "stream")

    def __init__(self, raster: Raster, tape: NeuronTape, block: int, version: int) -> None:
        self.raster, self.tape, self.block, self.version = raster, weakref.ref(tape), block, version
        self.stream = tape.stream


def tag_of(tensor: torch.Tensor) -> SpikeTag | None:
    """The tag of an unmodified spike tensor or of a view of it that keeps its rows.

    On another CUDA stream than that of the neuron the tensor is an ordinary one: its raster belongs to that stream.
    """
    tag = getattr(tensor, TAG, None)
    if tag is None:
        base = tensor._base
        tag = getattr(base, TAG, None) if base is not None and tensor.numel() == base.numel() else None
        if tag is not None and not tensor.is_contiguous():
            return None
    if not isinstance(tag, SpikeTag):
        return _tag_from_lane(tensor)
    if tag.version != tensor._version:
        return None
    return tag if tag.stream is None or tag.stream == current_stream(tensor.device) else None


def _tag_from_lane(tensor: torch.Tensor) -> SpikeTag | None:
    found = load_node().spikes_at(tensor) if tensor.requires_grad else None
    if found is None:
        return None
    tape, index = found
    tape.absorb()
    return SpikeTag(tape.blocks[index].raster, tape, index, tensor._version)


# The open tapes of synapses and convolutions whose input carries no raster, so that no neuron sequence owns them yet.
_unowned: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Tape]] = weakref.WeakKeyDictionary()


def open_tape(module: nn.Module, owner: NeuronTape | None) -> Tape | None:
    """The tape on which the last call of a synapse was recorded, on spikes of this neuron sequence or on none."""
    reference = owner.synapses.get(id(module)) if owner is not None else _unowned.get(module)
    return reference() if reference is not None else None


def leave_open(tape: Tape, module: nn.Module, owner: NeuronTape | None) -> None:
    """Makes this the tape that the next call of a synapse may continue."""
    if owner is not None:
        owner.synapses[id(module)] = weakref.ref(tape)
    else:
        _unowned[module] = weakref.ref(tape)


def part(total: torch.Tensor, first: int, rows: int, shape: torch.Size) -> torch.Tensor:
    """Rows ``[first, first + rows)`` of a matrix, in the shape of one block."""
    return total[first : first + rows].view(shape)


def placeholder(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape almost without memory: it stands in the graph for an output whose values are not there."""
    one = torch.empty(1, dtype=like.dtype, device=like.device)
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(one.untyped_storage(), 0, tuple(shape),
                                                                     (0,) * len(shape))
