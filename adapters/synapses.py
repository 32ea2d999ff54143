"""``nn.Linear`` on a neuron's spikes, or feeding a neuron, goes through the synapse tapes; all others are untouched."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..build import load_node
from ..config import Options, config
from ..lanes import steps as lane_steps
from ..native import DTYPES
from ..neuron_tape import NeuronTape
from ..synapse_run import run_synapse
from ..synapse_tape import SynapseTape
from ..tapes import TAG, SourceTag, tag_of
from .fallback import mode_problem, tensor_problem

host_forward = nn.Linear.forward
OptionsOf = Callable[[Any], Options | None]
# (synapse, neuron): whether the call that runs gives a sequence to that neuron only, which can have it deferred.
HandsOver = Callable[[nn.Module, Any], bool]


@dataclass(frozen=True)
class _Fed:
    """The neuron that a synapse was seen to feed.

    Args:
        options_of: how to ask for the options in force for it.
    """

    neuron: weakref.ref[nn.Module]
    options_of: OptionsOf
    hands_over: HandsOver | None


_feeding: weakref.WeakKeyDictionary[nn.Module, _Fed] = weakref.WeakKeyDictionary()


def linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """Replaces ``nn.Linear.forward`` while a library is enabled; input ``[..., in_features]``."""
    if torch.compiler.is_compiling() or config.suspended:
        return host_forward(self, input)
    current = lane_steps.synapse(self, input)
    if current is not None:
        return current
    tag = tag_of(input) if type(input) is torch.Tensor else None
    owner = tag.tape() if tag is not None else None
    options = owner.plan.options if isinstance(owner, NeuronTape) else options_of(self)
    if options is None:
        output = host_forward(self, input)
        if type(self) is nn.Linear and output.requires_grad and type(output) is torch.Tensor:
            setattr(output, TAG, SourceTag(self))
        return output
    if not _eligible(self, input):
        return host_forward(self, input)
    lane_steps.prepare()
    fed = _feeding.get(self)
    feeds = (fed.neuron, fed.options_of) if fed is not None else None
    defer = _may_defer(self, input, fed)
    return run_synapse(self, options, lambda: host_forward(self, input), input, tag, feeds, defer)


def _may_defer(synapse: nn.Module, x: torch.Tensor, fed: _Fed | None) -> bool:
    if x.dim() != 3 or fed is None or fed.hands_over is None:
        return False
    neuron = fed.neuron()
    return neuron is not None and fed.hands_over(synapse, neuron)


def _eligible(module: nn.Linear, x: torch.Tensor) -> bool:
    if type(module) is not nn.Linear or not torch.is_grad_enabled():
        return False
    weight, bias, dtype, shape = module.weight, module.bias, x.dtype, x.shape
    if not (weight.requires_grad or x.requires_grad) or not shape or shape[-1] != weight.shape[1]:
        return False
    if dtype not in DTYPES or weight.dtype is not dtype or (bias is not None and bias.dtype is not dtype):
        return False
    return bool(x.numel() and weight.numel()) and tensor_problem(x, weight) is None and mode_problem(x.device) is None


def options_of(synapse: nn.Module) -> Options | None:
    """Options in force for the neuron that a synapse feeds; None if it is not known to feed one."""
    fed = _feeding.get(synapse)
    neuron = fed.neuron() if fed is not None else None
    return fed.options_of(neuron) if fed is not None and neuron is not None else None


def learn_source(current: torch.Tensor, neuron: nn.Module, options_of: OptionsOf,
                 hands_over: HandsOver | None = None) -> None:
    """Remembers the synapse that made a neuron's input, so that its next calls are recorded."""
    tag, tape = getattr(current, TAG, None), None
    if hands_over is not None and current.requires_grad and not isinstance(tag, SourceTag):
        tape = load_node().tape_of(current)  # of a synapse that a neuron's spikes made known before
    known = tag if isinstance(tag, SourceTag) else tape if isinstance(tape, SynapseTape) else None
    module = known.module() if known is not None else None
    if module is not None:
        _feeding[module] = _Fed(weakref.ref(neuron), options_of, hands_over)


_users: set[str] = set()


def switch(user: str, on: bool) -> None:
    """Puts the synapse path under every ``nn.Linear`` and ``nn.Conv2d`` while at least one user wants it."""
    if on:
        _users.add(user)
    else:
        _users.discard(user)
    from . import convolutions  # which asks this module what feeds what

    nn.Linear.forward = linear_forward if _users else host_forward  # type: ignore[method-assign]
    convolutions.switch(bool(_users))
