"""Handwritten digits as spikes, a loss, and a training loop: plain PyTorch, the same for both libraries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 8x8 digits: intensities ``[images, 64]`` between 0 and 1, and labels ``[images]``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @staticmethod
    def load(images: int | None = None) -> Digits:
        """A fifth is for testing; always the same. ``images``: take only so many of them."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        pixels, labels = pixels[:images] / 16, labels[:images]
        x, x_test, y, y_test = train_test_split(pixels, labels, test_size=0.2, random_state=0, stratify=labels)
        return Digits((torch.tensor(x, dtype=torch.float32), torch.tensor(y)),
                      (torch.tensor(x_test, dtype=torch.float32), torch.tensor(y_test)))


def spikes_of(intensity: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Rate code: a pixel spikes in each step with the probability of its intensity; ``[B, 64]`` -> ``[T, B, 64]``."""
    return (torch.rand(steps, *intensity.shape, generator=generator) < intensity).to(intensity.dtype)


def batches(data: tuple[Tensor, Tensor], size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in an order, and with spikes, that ``seed`` decides: ``[T, B, 64]`` and labels ``[B]``."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = data
    for chosen in torch.randperm(len(images), generator=generator).split(size):
        yield spikes_of(images[chosen], steps, generator), labels[chosen]


@dataclass(frozen=True)
class Loss:
    """Cross entropy of the mean readout, plus a regulariser that pulls every neuron's firing rate to ``rate``."""

    rate: float
    weight: float

    def __call__(self, readout: Tensor, hidden: list[Tensor], labels: Tensor) -> Tensor:
        loss = F.cross_entropy(readout.mean(0), labels)
        for spikes in hidden:
            loss = loss + self.weight * (spikes.mean((0, 1)) / self.rate - 1).square().mean()
        return loss


@dataclass(frozen=True)
class Progress:
    """What one training step reports."""

    loss: float
    forward_seconds: float
    backward_seconds: float


def train(net: nn.Module, data: Iterable[tuple[Tensor, Tensor]], loss_of: Loss,
          optimizer: torch.optim.Optimizer) -> Iterator[Progress]:
    """One epoch over batches of spikes ``[T, B, inputs]`` and labels ``[B]``, step by step."""
    net.train()
    for x, labels in data:
        optimizer.zero_grad()
        start = perf_counter()
        readout, hidden = net(x)
        loss = loss_of(readout, hidden, labels)
        middle = perf_counter()
        loss.backward()
        end = perf_counter()
        optimizer.step()
        yield Progress(loss.item(), middle - start, end - middle)


def accuracy(net: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The share of images whose label has the largest mean readout membrane."""
    net.eval()
    with torch.no_grad():
        readout, _ = net(x)
    return (readout.mean(0).argmax(1) == labels).float().mean().item()
