"""The networks that are measured, in plain library code, and the calibration of their firing rates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BETA, SLOPE = 0.9, 25
HIDDEN_RATE = 0.02


class SnntorchNet(nn.Module):
    """Linear and ``snn.Leaky`` layers in the loop over time that snnTorch's tutorials use.

    Spikes ``[T, B, inputs]`` in, mean membrane of the readout ``[B, classes]`` out.
    """

    def __init__(self, linears: nn.ModuleList) -> None:
        super().__init__()
        import snntorch as snn
        from snntorch import surrogate

        self.linears = linears
        self.neurons = nn.ModuleList(snn.Leaky(BETA, spike_grad=surrogate.fast_sigmoid(SLOPE)) for _ in linears)

    def step(self, x: Tensor, membranes: list[Tensor]) -> list[Tensor]:
        """One time step: the new membranes of all layers."""
        new = []
        for linear, neuron, membrane in zip(self.linears, self.neurons, membranes, strict=True):
            x, membrane = neuron(linear(x), membrane)
            new.append(membrane)
        return new

    def forward(self, x: Tensor) -> Tensor:
        membranes = [neuron.reset_mem() for neuron in self.neurons]  # type: ignore[operator]
        readout = []
        for x_t in x:
            membranes = self.step(x_t, membranes)
            readout.append(membranes[-1])
        return torch.stack(readout).mean(0)

    def spikes_of(self, layer: int, currents: Tensor) -> Tensor:
        """What one layer makes of currents ``[T, B, N]``."""
        neuron: Any = self.neurons[layer]
        membrane, spikes = neuron.reset_mem(), []
        for current in currents:
            spike, membrane = neuron(current, membrane)
            spikes.append(spike)
        return torch.stack(spikes)


class SnntorchLayer(SnntorchNet):
    """One Linear and one ``snn.Leaky`` in a loop over time: spikes out."""

    def forward(self, x: Tensor) -> Tensor:
        linear, neuron = self.linears[0], self.neurons[0]
        membrane, spikes = neuron.reset_mem(), []  # type: ignore[operator]
        for x_t in x:
            spike, membrane = neuron(linear(x_t), membrane)
            spikes.append(spike)
        return torch.stack(spikes)


class NorseNet(nn.Module):
    """``SequentialState`` of Linear and LIF layers and an LI readout, on whole sequences ``[T, B, inputs]``.

    Args:
        linears: the synapses, shared between the networks that are compared.
        lif, li: neuron classes; cells if ``cells``.
        cells: call it once a time step, on ``x.unbind(0)``.
        layer: do without the readout: one spiking layer, spikes out.
    """

    def __init__(self, linears: nn.ModuleList, lif: Callable[..., Any], li: Callable[..., Any],
                 cells: bool = False, layer: bool = False) -> None:
        super().__init__()
        import norse.torch as norse

        parameters: Any = norse.LIFParameters(method="tanh", alpha=torch.as_tensor(5.0))
        self.linears, self.cells, self.layer = linears, cells, layer
        layers: list[Any] = []
        for linear in linears if layer else linears[:-1]:
            layers += [linear, lif(p=parameters)]
        self.layers = norse.SequentialState(*layers, *([] if layer else [linears[-1], li()]))

    def forward(self, x: Tensor) -> Tensor:
        if not self.cells:
            out = self.layers(x)[0]
            return out if self.layer else out.mean(0)
        state, readout = None, []
        for x_t in x.unbind(0):
            out, state = self.layers(x_t, state)
            readout.append(out)
        stacked = torch.stack(readout)
        return stacked if self.layer else stacked.mean(0)

    def spikes_of(self, layer: int, currents: Tensor) -> Tensor:
        """What one layer makes of currents ``[T, B, N]``."""
        return self.layers[2 * layer + 1](currents)[0]


def linear_layers(sizes: Sequence[int]) -> nn.ModuleList:
    """The synapses of a network."""
    return nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))


def same_parameters(linears: nn.ModuleList) -> nn.ModuleList:
    """Modules of their own with the very same weights, so that nothing remembered about one reaches another."""
    return copy.deepcopy(linears, {id(p): p for p in linears.parameters()})


@torch.no_grad()
def calibrate(net: SnntorchNet | NorseNet, x: Tensor, hidden: int, rate: float = HIDDEN_RATE) -> list[float]:
    """Scales the weights of the first ``hidden`` layers, in place, until each spikes at about ``rate``.

    Biases become zero.

    Returns:
        The factors.
    """
    factors = []
    for i, linear in enumerate(net.linears):
        assert isinstance(linear, nn.Linear)
        linear.bias.zero_()
        if i >= hidden:
            continue
        currents = linear(x)
        low, high = 0.05, 200.0
        for _ in range(12):
            middle = (low * high) ** 0.5
            x = net.spikes_of(i, currents * middle)
            low, high = (middle, high) if x.mean() < rate else (low, middle)
        linear.weight *= middle
        factors.append(middle)
    return factors
