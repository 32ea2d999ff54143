"""The networks that are measured, in plain library code, and the calibration of their firing rates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case

SLOPE = 25


class OverTime(nn.Module):
    """A synapse on whole sequences ``[T, B, ...]``; time goes into the batch where the synapse is not a Linear."""

    def __init__(self, synapse: nn.Module) -> None:
        super().__init__()
        self.synapse = synapse

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.synapse, nn.Linear):
            return self.synapse(x)
        return self.synapse(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Recurrent(nn.Module):
    """The synapses of a recurrent layer: of its input, which it is called with, and of its own spikes."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.feed, self.back = nn.Linear(inputs, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed(x)


class Net(nn.Module):
    """Layers of one synapse and one neuron each.

    Args:
        synapses: shared between the networks that are compared.
        layer: one spiking layer: spikes ``[T, B, N]`` out, instead of the mean membrane ``[B, classes]`` of a readout.
    """

    batch_first = False

    def __init__(self, synapses: nn.ModuleList, layer: bool = False) -> None:
        super().__init__()
        self.synapses, self.layer = synapses, layer

    @property
    def stages(self) -> list[tuple[nn.Module, ...]]:
        """The modules of each layer."""
        return list(zip(self.synapses, self.neurons, strict=True))  # type: ignore[arg-type]

    def spikes_of(self, layer: int, currents: Tensor) -> Tensor:
        """What one layer makes of currents ``[T, B, ...]``."""
        raise NotImplementedError


class SnntorchNet(Net):
    """Synapses and ``snn.Leaky`` layers in the loop over time that snnTorch's tutorials use."""

    def __init__(self, synapses: nn.ModuleList, beta: float, layer: bool = False) -> None:
        super().__init__(synapses, layer)
        import snntorch as snn
        from snntorch import surrogate

        self.neurons = nn.ModuleList()
        for synapse in synapses:
            spike_grad = surrogate.fast_sigmoid(SLOPE)
            if isinstance(synapse, Recurrent):
                neuron = snn.RLeaky(beta, linear_features=synapse.back.in_features, spike_grad=spike_grad)
                neuron.recurrent = synapse.back
            else:
                neuron = snn.Leaky(beta, spike_grad=spike_grad)
            self.neurons.append(neuron)

    def step(self, x: Tensor, states: list[Any]) -> tuple[Tensor, list[Any]]:
        """One time step: the spikes of the last layer and the new states of all."""
        new: list[Any] = []
        for synapse, neuron, state in zip(self.synapses, self.neurons, states, strict=True):
            if isinstance(synapse, Recurrent):
                x, membrane = neuron(synapse(x), *state)
                new.append((x, membrane))
            else:
                x, membrane = neuron(synapse(x), state)
                new.append(membrane)
        return x, new

    def forward(self, x: Tensor) -> Tensor:
        states = [neuron.reset_mem() for neuron in self.neurons]  # type: ignore[operator]
        out = []
        for x_t in x:
            spikes, states = self.step(x_t, states)
            out.append(spikes if self.layer else states[-1])
        return torch.stack(out) if self.layer else torch.stack(out).mean(0)

    def spikes_of(self, layer: int, currents: Tensor) -> Tensor:
        return self.sequence(layer, currents)[0]

    def sequence(self, layer: int, currents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Spikes ``[T, B, ...]`` of one layer, and its membrane at each step."""
        neuron: Any = self.neurons[layer]
        recurrent = isinstance(self.synapses[layer], Recurrent)
        membrane, spikes, membranes = neuron.reset_mem(), [], []
        if recurrent:
            spike, membrane = membrane
        for current in currents:
            spike, membrane = neuron(current, spike, membrane) if recurrent else neuron(current, membrane)
            spikes.append(spike)
            membranes.append(membrane)
        return torch.stack(spikes), membranes


class NorseNet(Net):
    """``SequentialState`` of synapses and LIF layers and an LI readout, on whole sequences ``[T, B, inputs]``.

    Args:
        lif, li: neuron classes; cells if ``cells``. ``lif`` takes sizes where it is recurrent, and has both synapses.
        cells: call it once a time step, on ``x.unbind(0)``.
    """

    def __init__(self, synapses: nn.ModuleList, lif: Callable[..., Any], li: Callable[..., Any],
                 cells: bool = False, layer: bool = False) -> None:
        super().__init__(synapses, layer)
        import norse.torch as norse

        parameters: Any = norse.LIFParameters(method="tanh", alpha=torch.as_tensor(5.0))
        self.cells = cells
        spiking = len(synapses) - (0 if layer else 1)
        self.neurons, modules = nn.ModuleList(), []
        for i, synapse in enumerate(synapses):
            if isinstance(synapse, Recurrent):
                neuron = lif(synapse.feed.in_features, synapse.feed.out_features, p=parameters)
                neuron.input_weights, neuron.recurrent_weights = synapse.feed.weight, synapse.back.weight
            else:
                neuron = lif(p=parameters) if i < spiking else li()
                modules.append(synapse if cells or isinstance(synapse, nn.Linear) else OverTime(synapse))
            modules.append(neuron)
            self.neurons.append(neuron)
        self.layers = norse.SequentialState(*modules)

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
        neuron: Any = self.neurons[layer]
        if not isinstance(self.synapses[layer], Recurrent):
            return neuron(currents)[0]
        before = neuron.input_weights  # what it is given are currents
        neuron.input_weights = nn.Parameter(torch.eye(currents.shape[-1], device=currents.device))
        try:
            return neuron(currents)[0]
        finally:
            neuron.input_weights = before


def synapses_of(case: Case) -> nn.ModuleList:
    """The synapses of a case, with the weights that the random generator gives."""
    if case.conv:
        return nn.ModuleList([nn.Sequential(nn.Conv2d(1, 12, 5), nn.MaxPool2d(2)),
                              nn.Sequential(nn.Conv2d(12, 64, 5), nn.MaxPool2d(2)),
                              nn.Sequential(nn.Flatten(), nn.Linear(case.sizes[-2], case.sizes[-1]))])
    synapses = linear_layers(case.sizes)
    if case.recurrent:
        synapses[0] = Recurrent(*case.sizes[:2])
    return synapses


def linear_layers(sizes: Sequence[int]) -> nn.ModuleList:
    """The synapses of a fully connected network."""
    return nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))


def weighted(synapse: nn.Module) -> nn.Linear | nn.Conv2d:
    """The part of a synapse that has the weights."""
    return next(m for m in synapse.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))


def batch_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """The input ``[T, B, ...]`` and the labels of a case."""
    if case.conv:  # a fifth of the pixels are lit, as in MNIST
        image = torch.rand(case.batch, 1, 28, 28, device=device)
        image *= torch.rand_like(image) < 0.2
        x = image.expand(case.steps, *image.shape)
    else:
        x = torch.empty(case.steps, case.batch, case.sizes[0], device=device)
        x = x.normal_() if case.gaussian else x.bernoulli_(case.input_rate)
    return x, torch.randint(0, case.sizes[-1], (case.batch,), device=device)


def same_parameters(synapses: nn.ModuleList) -> nn.ModuleList:
    """Modules of their own with the very same weights, so that nothing remembered about one reaches another."""
    return copy.deepcopy(synapses, {id(p): p for p in synapses.parameters()})


@torch.no_grad()
def scale(synapses: nn.ModuleList, factors: Sequence[float]) -> None:
    """What :func:`calibrate` does to the weights, with factors that it found before."""
    for synapse in synapses:
        bias = weighted(synapse).bias
        if bias is not None:
            bias.zero_()
    for synapse, factor in zip(synapses, factors, strict=False):
        weighted(synapse).weight *= factor


@torch.no_grad()
def calibrate(net: Net, x: Tensor, hidden: int, rate: float) -> list[float]:
    """Scales the weights of the first ``hidden`` layers, in place, until each spikes at about ``rate``.

    Biases become zero.

    Returns:
        The factors.
    """
    scale(net.synapses, ())
    factors = []
    for i, synapse in enumerate(net.synapses[:hidden]):
        currents = OverTime(synapse)(x)
        low, high = 0.05, 200.0
        for _ in range(12):
            middle = (low * high) ** 0.5
            x = net.spikes_of(i, currents * middle)
            low, high = (middle, high) if x.mean() < rate else (low, middle)
        weighted(synapse).weight *= middle
        factors.append(middle)
    return factors
