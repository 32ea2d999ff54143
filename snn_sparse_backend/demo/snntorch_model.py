"""A spiking network for images in plain snnTorch: nothing here, or in ``training.py``, knows of the sparse backend."""

from __future__ import annotations

import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn


class Net(nn.Module):
    """Three fully connected layers; spikes ``[T, B, inputs]`` in, readout membrane ``[T, B, classes]`` out."""

    def __init__(self, inputs: int, hidden: int, classes: int, beta: float = 0.9) -> None:
        super().__init__()
        spike_grad = surrogate.fast_sigmoid(slope=25)
        self.fc1 = nn.Linear(inputs, hidden)
        self.lif1 = snn.Leaky(beta, spike_grad=spike_grad)
        self.fc2 = nn.Linear(hidden, hidden)
        self.lif2 = snn.Leaky(beta, spike_grad=spike_grad)
        self.fc3 = nn.Linear(hidden, classes)
        self.readout = snn.Leaky(beta, reset_mechanism="none")

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.readout.reset_mem()
        spikes1, spikes2, readout = [], [], []
        for step in range(x.shape[0]):
            spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            _, mem3 = self.readout(self.fc3(spk2), mem3)
            spikes1.append(spk1)
            spikes2.append(spk2)
            readout.append(mem3)
        return torch.stack(readout), [torch.stack(spikes1), torch.stack(spikes2)]
