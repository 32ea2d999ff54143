"""What a benchmark reports besides times: densities, proof of the path taken, and where it ran."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..build import load_node
from ..config import config
from ..counters import counts
from ..native import instruction_set
from ..neuron_tape import NeuronTape

MIB = 2**20


class NotFusedError(RuntimeError):
    """The sparse backend was meant to run, or meant not to run, and the counts say otherwise."""


@dataclass(frozen=True)
class Activity:
    """Densities of one spiking layer over one batch.

    Args:
        spike_rate: share of the sites (time step, batch row, neuron) that spike.
        active_fraction: share of the sites with ``|U - threshold| < cutoff``; None without a cutoff.
    """

    spike_rate: float
    active_fraction: float | None


def activities(outputs: Iterable[Tensor]) -> list[Activity]:
    """Densities of the spiking layers that returned these tensors (see ``memory.layer_outputs``), in their order."""
    tapes: dict[int, NeuronTape] = {}
    for tensor in outputs:
        handle = load_node().handle_of(tensor)
        tape = handle.tape if handle is not None else None
        if isinstance(tape, NeuronTape) and tape.plan.dynamics.spikes:
            tapes.setdefault(id(tape), tape)
    return [_activity(tape) for tape in tapes.values()]


def _activity(tape: NeuronTape) -> Activity:
    sites = sum(block.steps for block in tape.blocks) * tape.layer.sites
    spikes = sum(block.raster.ones or 0 for block in tape.blocks if block.raster is not None)
    bounded = all(block.active is not None for block in tape.blocks)
    active = sum(block.active_sites for block in tape.blocks)
    return Activity(spikes / sites, active / sites if bounded else None)


@contextmanager
def norse_defaults(**options: Any) -> Iterator[None]:
    """Other process-wide defaults inside: they are what Norse's swapped classes follow."""
    before = config.defaults
    config.set(**options)
    try:
        yield
    finally:
        config.defaults = before


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """The counts of what ran inside; filled when it ends."""
    before, inside = counts.copy(), Counter[str]()
    yield inside
    inside.update(counts - before)


def require_path(ran: Counter[str], neuron_steps: int) -> None:
    """Proves the path: exactly so many time steps of neuron layers were fused, and none fell back.

    Raises:
        NotFusedError: if not.
    """
    if ran["neuron_steps"] != neuron_steps or ran["host_steps"]:
        raise NotFusedError(f"expected {neuron_steps} fused time steps of neuron layers and no host_steps, "
                            f"but the counts are {dict(ran)}")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients of all parameters."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_difference(host: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of gradients, relative to the largest entry of that parameter's gradient.

    Raises:
        ValueError: if they are not of the same parameters.
    """
    if not host or host.keys() != other.keys():
        raise ValueError(f"gradients of different parameters: {sorted(host)} and {sorted(other)}")
    scales = {name: grad.abs().max().clamp(min=1e-30) for name, grad in host.items()}
    return max(((other[name] - grad).abs().max() / scales[name]).item() for name, grad in host.items())


def milliseconds(seconds: Iterable[float]) -> float:
    """The median, in ms."""
    return median(seconds) * 1e3


def environment() -> dict[str, Any]:
    """Where and with what it ran."""
    return {
        "date": date.today().isoformat(),
        "device": "cpu",
        "cpu": _cpu_model(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "snn_sparse_backend": __version__,
        **{name: installed(name) for name in ("torch", "snntorch", "norse")},
    }


def installed(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
