"""Trains the same network with the host library alone and with the backend, epoch by epoch in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import enabled
from ..bench.measure import Activity, activities, counted, gradients, norse_defaults, require_path, worst_difference
from ..memory import host_saved_bytes, layer_outputs, saved_bytes
from .training import Digits, Loss, Progress, accuracy, batches, spikes_of, train

CUTOFF = 0.2
LAYERS = 3  # neuron layers of the network


@dataclass(frozen=True)
class Settings:
    """Size of the demo; the defaults take one to three minutes."""

    hidden: int = 800
    steps: int = 40
    batch: int = 128
    epochs: int = 8
    learning_rate: float = 4e-3
    rate: float = 0.027
    rate_weight: float = 0.2
    images: int | None = None
    seed: int = 0

    @staticmethod
    def quick() -> Settings:
        """A few seconds, for tests."""
        return Settings(hidden=64, steps=16, batch=64, epochs=3, images=400)


@dataclass
class Contestant:
    """One way to train the network.

    Args:
        name: for the table.
        make: builds the network.
        scope: what is switched on meanwhile.
        is_host: the host library alone.
    """

    name: str
    make: Callable[[], nn.Module]
    scope: Callable[[], AbstractContextManager[None]]
    is_host: bool = False
    net: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    schedule: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    progress: list[Progress] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # mean of each epoch
    accuracies: list[float] = field(default_factory=list)  # on the test images, after each epoch
    counts: Counter[str] = field(default_factory=Counter)
    saved: int = 0
    hidden: list[Activity] = field(default_factory=list)
    gradient_difference: float = 0.0


def contestants(library: str, settings: Settings) -> list[Contestant]:
    """The host library alone, the backend with exact gradients, and with a cutoff and event-driven forward.

    Raises:
        ModuleNotFoundError: if the library is not installed.
    """
    options: list[dict[str, Any]] = [{}, {"cutoff": CUTOFF, "forward": "sparse"}]
    names = ["sparse, exact", f"sparse, cutoff {CUTOFF}"]
    if library == "snntorch":
        from . import snntorch_model

        def make() -> nn.Module:
            return snntorch_model.Net(64, settings.hidden, 10)

        host = Contestant("snnTorch", make, nullcontext, is_host=True)
        return [host, *(Contestant(name, make, lambda o=o: enabled("snntorch", **o))  # type: ignore[misc]
                        for name, o in zip(names, options, strict=True))]
    import norse.torch as stock

    from ..adapters import norse as swapped
    from . import norse_model

    def make_from(classes: Any) -> nn.Module:
        return norse_model.Net(classes.LIF, classes.LI, 64, settings.hidden, 10)

    host = Contestant("Norse", lambda: make_from(stock), nullcontext, is_host=True)
    return [host, *(Contestant(name, lambda: make_from(swapped), lambda o=o: norse_defaults(**o))  # type: ignore[misc]
                    for name, o in zip(names, options, strict=True))]


@dataclass
class Comparison:
    """What the demo found out; the first contestant is the host library."""

    library: str
    settings: Settings
    contestants: list[Contestant]
    raster: Tensor  # spikes of the first hidden layer [T, images, N] of the exact contestant
    raster_labels: list[int]


def compare(library: str, settings: Settings) -> Comparison:
    """Runs the demo for ``"snntorch"`` or ``"norse"``."""
    entrants = contestants(library, settings)
    data = Digits.load(settings.images)
    loss_of = Loss(settings.rate, settings.rate_weight)
    for entrant in entrants:
        torch.manual_seed(settings.seed)
        entrant.net = entrant.make()
        entrant.optimizer = torch.optim.Adam(entrant.net.parameters(), settings.learning_rate)
        entrant.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(entrant.optimizer, settings.epochs)
    test = spikes_of(data.test[0], settings.steps, torch.Generator().manual_seed(settings.seed))
    _train_all(entrants, data, test, loss_of, settings)
    _measure_all(entrants, data, loss_of, settings)
    with torch.no_grad():
        shown = [int((data.test[1] == digit).nonzero()[0]) for digit in data.test[1].unique()]
        _, (raster, _) = entrants[1].net(test[:, shown])
    return Comparison(library, settings, entrants, raster, data.test[1][shown].tolist())


def _train_all(entrants: list[Contestant], data: Digits, test: Tensor, loss_of: Loss, settings: Settings) -> None:
    per_epoch = -(-len(data.train[1]) // settings.batch)
    with tqdm(total=settings.epochs * per_epoch * len(entrants), unit="step", dynamic_ncols=True, disable=None) as bar:
        for epoch in range(settings.epochs):
            for entrant in entrants:
                bar.set_description(f"epoch {epoch + 1}/{settings.epochs}, {entrant.name}")
                epoch_losses: list[float] = []
                with entrant.scope(), counted() as ran:
                    spikes = batches(data.train, settings.batch, settings.steps, settings.seed + 1 + epoch)
                    for done in train(entrant.net, spikes, loss_of, entrant.optimizer):
                        entrant.progress.append(done)
                        epoch_losses.append(done.loss)
                        bar.set_postfix(loss=f"{done.loss:.3f}",
                                        accuracy=f"{entrant.accuracies[-1]:.1%}" if entrant.accuracies else "-")
                        bar.update()
                require_path(ran, 0 if entrant.is_host else LAYERS * settings.steps * per_epoch)
                entrant.counts += ran
                entrant.schedule.step()
                entrant.losses.append(sum(epoch_losses) / len(epoch_losses))
                entrant.accuracies.append(accuracy(entrant.net, test, data.test[1]))
                bar.set_postfix(loss=f"{entrant.losses[-1]:.3f}", accuracy=f"{entrant.accuracies[-1]:.1%}")


def _measure_all(entrants: list[Contestant], data: Digits, loss_of: Loss, settings: Settings) -> None:
    """Densities with each one's own weights; gradients and memory on one batch from the host's weights."""
    x, labels = next(batches(data.train, settings.batch, settings.steps, settings.seed))

    def loss_with(net: nn.Module) -> Tensor:
        net.zero_grad()
        readout, hidden = net(x)
        return loss_of(readout, hidden, labels)

    host, probe = entrants[0], entrants[-1]
    trained = [{k: v.clone() for k, v in entrant.net.state_dict().items()} for entrant in entrants]
    for entrant, weights in zip(entrants, trained, strict=True):
        with probe.scope(), layer_outputs() as made:
            probe.net.load_state_dict(weights)
            loss_with(probe.net)
            entrant.hidden = activities(made)[:2]
    host.saved = host_saved_bytes(lambda: loss_with(host.net), [x])
    loss_with(host.net).backward()
    for entrant, weights in zip(entrants[1:], trained[1:], strict=True):
        with entrant.scope():
            entrant.net.load_state_dict(trained[0])
            with layer_outputs() as made:
                loss = loss_with(entrant.net)
            entrant.saved = saved_bytes([loss, *made], [x])
            loss.backward()
        entrant.gradient_difference = worst_difference(gradients(host.net), gradients(entrant.net))
        entrant.net.load_state_dict(weights)
