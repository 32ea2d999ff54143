"""Which neuron sequence the step of a synapse belongs to."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from .build import load_node
from .feeds import FeedTape
from .synapse_tape import SynapseTape

if TYPE_CHECKING:
    from .neuron_tape import NeuronTape


def claim_current(x: torch.Tensor, neuron: NeuronTape) -> tuple[weakref.ref[Any], int] | None:
    """The step of a synapse, a convolution or a pooling that made a neuron's input, if it was recorded on a tape.

    A synapse that no spikes own belongs to the neuron sequence that consumes its current. If it belongs to another one
    already, the current moves to a node of its own, so that both sequences can be differentiated separately.
    """
    tape = load_node().tape_of(x)
    if not isinstance(tape, (SynapseTape, FeedTape)):
        return None
    tape.absorb()
    index = x.output_nr
    if tape.owner is None:
        if tape.sink is None:
            tape.sink = weakref.ref(neuron)
        elif tape.sink() is not neuron:
            watched = bool(x._backward_hooks) or x.retains_grad  # then its history cannot be replaced
            moved = None if watched else tape.move(index, x)
            if moved is None:
                return None
            moved.sink, tape, index = weakref.ref(neuron), moved, 0
        tape.claimed = index
    return weakref.ref(tape), index


def give_back_current(source: tuple[weakref.ref[Any], int] | None) -> None:
    """Undoes a claim, as far as it was the first: the next one need not move the current."""
    tape = source[0]() if source is not None and source[1] == 0 else None
    if tape is not None and tape.owner is None:
        tape.sink = None
