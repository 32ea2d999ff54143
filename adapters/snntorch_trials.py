"""Small runs of snnTorch's classes, each with every formula of its step, for versions that are not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

from ..compat.probe import Outcome, Trial
from ..compat.spikes import float64_spikes
from ..config import Options
from . import synapses
from .adapter import OPTIONS
from .snntorch_neurons import Kind

INPUTS, NEURONS, BATCH, STEPS = 4, 6, 3, 7
_THRESHOLD: dict[str, Any] = {"threshold": 0.5, "learn_threshold": True}
_BETA: dict[str, Any] = {"learn_beta": True, **_THRESHOLD}
_SYNAPTIC: dict[str, Any] = {"learn_alpha": True, **_BETA}

LAYERS: dict[type, Callable[..., Any]] = {
    snn.Leaky: partial(snn.Leaky, 0.8, learn_graded_spikes_factor=True, **_BETA),
    snn.Synaptic: partial(snn.Synaptic, 0.7, 0.8, **_SYNAPTIC),
    snn.Lapicque: partial(snn.Lapicque, 0.8, **_THRESHOLD),
    snn.Alpha: partial(snn.Alpha, 0.8, 0.6, **_BETA),
    snn.RLeaky: partial(snn.RLeaky, 0.8, linear_features=NEURONS, **_BETA),
    snn.RSynaptic: partial(snn.RSynaptic, 0.7, 0.8, linear_features=NEURONS, **_SYNAPTIC),
}
if hasattr(snn, "DeltaLeaky"):
    LAYERS[snn.DeltaLeaky] = partial(snn.DeltaLeaky, 0.3, beta=0.8, learn_beta=True)
_RECURRENCES: dict[type, tuple[Callable[..., Any], ...]] = {
    host: (partial(make, all_to_all=False, V=0.7), partial(make, conv2d_channels=1, kernel_size=3))
    for host, make in ((snn.RLeaky, partial(snn.RLeaky, 0.8, **_BETA)),
                       (snn.RSynaptic, partial(snn.RSynaptic, 0.7, 0.8, **_SYNAPTIC)))
}
_MAPS = (1, 2, 3)  # channels, height and width of the neurons before a convolution
_EARLY_RESETS = (snn.Leaky, snn.Synaptic, snn.RLeaky)  # those that are fused with reset_delay=False


def trials(kind: Kind, host: type, forward: Callable[..., Any], spike_grad: Any) -> Iterator[Trial]:
    """One for each way to reset, for inhibition, and for each other recurrence.

    Args:
        forward: the fused one.
        spike_grad: the surrogate to try it with.
    """
    delays: tuple[dict[str, Any], ...] = ({}, {"reset_delay": False}) if host in _EARLY_RESETS else ({},)
    for reset in ("subtract", "zero", "none"):
        for delay in delays:
            options = {"reset_mechanism": reset, "spike_grad": spike_grad, **delay}
            yield partial(_play, kind, partial(LAYERS[host], **options), forward)
    if kind.methods:  # DeltaLeaky ignores it, and all others the factor
        factor = {"learn_graded_spikes_factor": False} if host is snn.Leaky else {}
        yield partial(_play, kind, partial(LAYERS[host], spike_grad=spike_grad, **factor), forward, inhibition=True)
    for make in _RECURRENCES.get(host, ()):
        yield partial(_play, kind, partial(make, spike_grad=spike_grad), forward, factor=0.9)


def _play(kind: Kind, make: Callable[[], Any], forward: Callable[..., Any], fused: bool,
          inhibition: bool = False, factor: float | None = None) -> Outcome:
    """A ``Linear`` and the layer on its output, in a loop over time; the loss has every output and state."""
    instances = snn.SpikingNeuron.instances  # of every layer there is, for utils.reset()
    before = len(instances)
    try:
        linear, layer = nn.Linear(INPUTS, NEURONS).double(), make().double()
    finally:
        del instances[before:]
    layer.__dict__[OPTIONS] = Options()
    layer.inhibition = inhibition  # as an argument it warns
    if factor is not None:  # the recurrent classes do not take it as an argument
        layer.graded_spikes_factor.fill_(factor)
    step, multiply = (forward, synapses.linear_forward) if fused else (kind.host, synapses.host_forward)
    draw = partial(torch.rand, dtype=torch.float64)
    x = (3 * draw(STEPS, BATCH, INPUTS)).requires_grad_()
    shape = _MAPS if isinstance(getattr(layer, "recurrent", None), nn.Conv2d) else (NEURONS,)
    first = {name: draw(BATCH, *shape).requires_grad_() for name in kind.states}
    leaves = {"input": x, **first, **dict(layer.named_parameters()),
              **{f"Linear's {name}": parameter for name, parameter in linear.named_parameters()}}
    outputs: dict[str, Tensor] = {}
    states, loss = tuple(first.values()), torch.zeros((), dtype=torch.float64)
    with float64_spikes():
        for t, frame in enumerate(x):
            current = multiply(linear, frame)
            if isinstance(layer, getattr(snn, "DeltaLeaky", ())):  # its states come in a pair
                spk, (mem, _) = step(layer, current, (*states, None))
                given = spk, mem
            else:
                given = step(layer, current if shape == (NEURONS,) else current.view(BATCH, *shape), *states)
            states = given if kind.recurrent else given[1:]
            named = {"spk": given[0], **dict(zip(kind.states, states, strict=True))}
            outputs |= {f"{name} of step {t}": value.detach() for name, value in named.items()}
            loss = loss + sum((value * (draw(value.shape) - 0.5)).sum() for value in named.values())
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return Outcome(outputs, dict(zip(leaves, gradients, strict=True)))
