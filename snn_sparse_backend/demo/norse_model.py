"""A spiking network for images in plain Norse: nothing here, or in ``training.py``, knows of the sparse backend.

The classes of the neurons are arguments, because swapping them is how the backend is switched on in Norse::

    Net(norse.LIF, norse.LI, ...)     # from norse.torch
    Net(sparse.LIF, sparse.LI, ...)   # from snn_sparse_backend.adapters.norse
"""

from __future__ import annotations

from typing import Any

import norse.torch as norse
import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Three fully connected layers; spikes ``[T, B, inputs]`` in, readout membrane ``[T, B, classes]`` out."""

    def __init__(self, lif: type[nn.Module], li: type[nn.Module], inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        parameters: Any = norse.LIFParameters(method="tanh", alpha=torch.as_tensor(5.0))
        self.fc1 = nn.Linear(inputs, hidden)
        self.lif1 = lif(p=parameters)
        self.fc2 = nn.Linear(hidden, hidden)
        self.lif2 = lif(p=parameters)
        self.fc3 = nn.Linear(hidden, classes)
        self.readout = li()
        with torch.no_grad():  # LIF takes in a tenth of its current per step: the default weights are too small
            self.fc1.weight *= 2
            self.fc2.weight *= 2

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        spikes1, _ = self.lif1(self.fc1(x))
        spikes2, _ = self.lif2(self.fc2(spikes1))
        readout, _ = self.readout(self.fc3(spikes2))
        return readout, [spikes1, spikes2]
