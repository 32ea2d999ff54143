"""Other ways to train the same network, beside the host library and ours: a loop order, a library, a published layer.

All have the weights and the input of the case. Where the dynamics are another library's they are set to the same decay
and to a detached reset by subtraction, as far as that library has it; ``same_maths`` says whose gradients can be
compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case
from .networks import SLOPE, Net, NorseNet, OverTime, SnntorchNet


class LayerByLayer(SnntorchNet):
    """The same ``snn.Leaky`` layers; each synapse takes all steps at once, and only the neuron loops over time."""

    def forward(self, x: Tensor) -> Tensor:
        membranes: list[Tensor] = []
        for i, synapse in enumerate(self.synapses):
            x, membranes = self.sequence(i, OverTime(synapse)(x))
        return x if self.layer else torch.stack(membranes).mean(0)


class _FastSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, distance: Tensor) -> Tensor:
        ctx.save_for_backward(distance)
        return (distance > 0).to(distance.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (distance,) = ctx.saved_tensors
        return grad / (SLOPE * distance.abs() + 1.0) ** 2


class DenseNeuron(nn.Module):
    """A leaky neuron as an autograd loop over time, the dense form that papers publish next to their sparse one.

    Args:
        beta: decay of the membrane.
        unbind: take the currents apart once. Else ``currents[t]`` is used, whose backward fills a tensor of the whole
            sequence at each step.
    """

    def __init__(self, beta: float, unbind: bool) -> None:
        super().__init__()
        self.beta, self.unbind = beta, unbind

    def forward(self, currents: Tensor) -> tuple[Tensor, list[Tensor]]:
        parts = currents.unbind(0) if self.unbind else None
        membrane, spikes, membranes = torch.zeros_like(currents[0]), [], []
        for t in range(len(currents)):
            reset = (membrane > 1.0).to(membrane.dtype).detach()
            membrane = self.beta * membrane + (parts[t] if parts is not None else currents[t]) - reset
            spikes.append(_FastSigmoid.apply(membrane - 1.0))
            membranes.append(membrane)
        return torch.stack(spikes), membranes


class DenseNet(Net):
    """Layers of one matrix product over all steps and a :class:`DenseNeuron`."""

    def __init__(self, synapses: nn.ModuleList, beta: float, unbind: bool, layer: bool) -> None:
        super().__init__(synapses, layer)
        self.neurons = nn.ModuleList(DenseNeuron(beta, unbind) for _ in synapses)

    def forward(self, x: Tensor) -> Tensor:
        membranes: list[Tensor] = []
        for synapse, neuron in zip(self.synapses, self.neurons, strict=True):
            x, membranes = neuron(OverTime(synapse)(x))
        return x if self.layer else torch.stack(membranes).mean(0)


class SpikingJellyNet(Net):
    """SpikingJelly's multi-step ``LIFNode``, torch backend. It resets within the step, snnTorch in the next one."""

    def __init__(self, synapses: nn.ModuleList, beta: float, layer: bool) -> None:
        super().__init__(synapses, layer)
        from spikingjelly.activation_based import functional, neuron, surrogate

        self._reset = functional.reset_net
        last = len(synapses) - 1
        self.neurons = nn.ModuleList(
            neuron.LIFNode(tau=1.0 / (1.0 - beta), decay_input=False, v_threshold=1.0, v_reset=None,
                           surrogate_function=surrogate.SuperSpike(alpha=float(SLOPE)), detach_reset=True,
                           step_mode="m", store_v_seq=i == last and not layer)
            for i in range(len(synapses)))

    def forward(self, x: Tensor) -> Tensor:
        self._reset(self)
        for synapse, neuron in zip(self.synapses, self.neurons, strict=True):
            x = neuron(OverTime(synapse)(x))
        return x if self.layer else self.neurons[-1].v_seq.mean(0)  # type: ignore[operator]


def _subtract(spikes: Tensor, state: dict[str, Tensor], threshold: Tensor) -> dict[str, Tensor]:
    """sinabs' reset by subtraction, detached."""
    return {**state, "v_mem": state["v_mem"] - spikes.detach() * threshold}


def _fast_sigmoid(membrane: Tensor, threshold: Tensor) -> Tensor:
    return 1.0 / (SLOPE * (membrane - threshold).abs() + 1.0) ** 2


class SinabsNet(Net):
    """sinabs' ``LIF`` and an ``ExpLeak`` readout, on ``[B, T, ...]``. It resets within the step."""

    batch_first = True

    def __init__(self, synapses: nn.ModuleList, beta: float, layer: bool) -> None:
        super().__init__(synapses, layer)
        from sinabs.activation import SingleSpike
        from sinabs.layers import LIF, ExpLeak

        tau = -1.0 / math.log(beta)

        def lif() -> nn.Module:
            return LIF(tau_mem=tau, norm_input=False, spike_fn=SingleSpike, reset_fn=_subtract,
                       surrogate_grad_fn=_fast_sigmoid)

        last = len(synapses) - 1
        self.neurons = nn.ModuleList(lif() if layer or i < last else ExpLeak(tau_mem=tau, norm_input=False)
                                     for i in range(len(synapses)))
        for parameter in self.neurons.parameters():
            parameter.requires_grad_(False)  # its time constants are parameters, which nobody else here trains

    def forward(self, x: Tensor) -> Tensor:
        for synapse, neuron in zip(self.synapses, self.neurons, strict=True):
            neuron.reset_states()  # type: ignore[operator]
            x = neuron(OverTime(synapse)(x))
        return x if self.layer else x.mean(1)


def _norse(synapses: nn.ModuleList, case: Case, cells: bool) -> NorseNet:
    import norse.torch as norse

    lif, li = (norse.LIFCell, norse.LICell) if cells else (norse.LIF, norse.LI)
    return NorseNet(synapses, lif, li, cells, case.layer)


@dataclass(frozen=True)
class Peer:
    """One peer.

    Args:
        package: what has to be importable.
        make: builds the network from synapses of its own.
        same_maths: it computes what snnTorch computes, so that gradients can be compared.
        quadratic: its backward takes time quadratic in T, because it indexes ``input[t]`` inside autograd.
    """

    name: str
    package: str
    make: Callable[[nn.ModuleList, Case], Net]
    same_maths: bool = False
    quadratic: bool = False

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


_PEERS = (
    Peer("snnTorch, layer by layer", "snntorch", lambda s, c: LayerByLayer(s, c.beta, c.layer), same_maths=True),
    Peer("Norse sequence", "norse", lambda s, c: _norse(s, c, False), quadratic=True),
    Peer("Norse cells, unbind", "norse", lambda s, c: _norse(s, c, True)),
    Peer("SpikingJelly multi-step", "spikingjelly", lambda s, c: SpikingJellyNet(s, c.beta, c.layer)),
    Peer("sinabs", "sinabs", lambda s, c: SinabsNet(s, c.beta, c.layer), quadratic=True),
    Peer("dense layer, indexed", "torch", lambda s, c: DenseNet(s, c.beta, False, c.layer), same_maths=True,
         quadratic=True),
    Peer("dense layer, unbind", "torch", lambda s, c: DenseNet(s, c.beta, True, c.layer), same_maths=True),
)
BY_NAME = {peer.name: peer for peer in _PEERS}
