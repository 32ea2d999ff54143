"""One call of a synapse (``nn.Linear``) that feeds a neuron or receives its spikes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from .build import load_node
from .config import Options
from .counters import counts
from .synapse_steps import Step
from .synapse_tape import Feeds, SynapseTape
from .tapes import SpikeTag, leave_open, open_tape


def run_synapse(module: nn.Linear, options: Options, host: Any, x: torch.Tensor, tag: SpikeTag | None,
                feeds: Feeds | None = None, defer: bool = False, rows: int | None = None) -> torch.Tensor:
    """One call of a synapse, recorded on the tape of its sequence.

    Args:
        module: the ``nn.Linear``.
        options: options in force.
        host: computes the host library's own output.
        x: input ``[..., inputs]``.
        tag: tag of ``x`` if it is a neuron's spikes.
        feeds: the neuron that it feeds, as far as it is known, and how to ask for the options in force for that.
        defer: nobody but a neuron that is ready for it gets the currents, so that they may come as a
            :class:`DeferredCurrents`.
        rows: as many as the host multiplies at once; None: all of a call.
    """
    owner = tag.tape() if tag is not None and x.requires_grad else None
    tape = open_tape(module, owner)
    if tape is not None:
        tape.absorb()
    if not isinstance(tape, SynapseTape) or not tape.continues(module, options):
        tape = SynapseTape(module, options, owner)
    entry = tape.entry_of(x, tag)
    current = tape.currents(host, x, entry, defer, rows)
    direct = owner is not None and tag is not None and load_node().tape_of(x) is owner
    spikes = (weakref.ref(owner), tag.block) if owner is not None and tag is not None and direct else None
    # Only an unowned step may have to move; the spikes of an owner need not be kept as floats.
    movable = x if owner is None and x.requires_grad else None
    step = Step(entry, movable, x.shape, current.numel() // current.shape[-1], spikes)
    if not tape.attach(x, current, step):
        tape = SynapseTape(module, options, owner)
        tape.attach(x, current, step)
    tape.latest = x if x.dim() <= 2 else None  # a whole sequence does not come again, and would be kept
    tape.arm(x, step, feeds)
    counts["synapse_steps"] += 1
    leave_open(tape, module, owner)
    return current
