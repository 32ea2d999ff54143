"""What a benchmark reports besides times: densities, proof of the path taken, and where it ran."""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..build import load_node
from ..compat.versions import installed
from ..config import config
from ..counters import counts
from ..crossovers import cpu_model
from ..kernels import unpack
from ..native import instruction_set
from ..neuron_tape import NeuronTape
from ..raster import Raster

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
    spikes = [block.raster for block in tape.blocks if block.raster is not None]
    active = [block.active for block in tape.blocks if block.active is not None]
    return Activity(ones(spikes) / sites, ones(active) / sites if len(active) == len(tape.blocks) else None)


def ones(rasters: list[Raster]) -> int:
    """How many bits are set, counted on the device and waited for: on CUDA the host does not know otherwise."""
    return int(torch.count_nonzero(unpack(Raster.concatenate(rasters), torch.float32)))


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


@dataclass(frozen=True)
class Memory:
    """Bytes of CUDA memory during a step: the peak, and what was allocated when the step began."""

    peak: int
    before: int


def step_memory(device: torch.device, step: Callable[[], Any]) -> Memory | None:
    """Runs a step; says what CUDA memory it took. None on the CPU, where nobody counts."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device), before)


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Where and with what it ran; None: on the CPU."""
    return {
        "date": date.today().isoformat(),
        "device": str(device or "cpu"),
        "gpu": gpu(device) if device is not None and device.type == "cuda" else None,
        "cpu": cpu_model(),
        "instruction_set": instruction_set(),
        "threads": torch.get_num_threads(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "snn_sparse_backend": __version__,
        **{name: installed(name) for name in ("torch", "snntorch", "norse", "spikingjelly", "sinabs")},
    }


# What nvidia-smi is asked for, and under which name it is kept.
_SMI = {"driver_version": "driver", "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "clocks.max.sm": "max_sm_mhz",
        "clocks.max.mem": "max_memory_mhz", "power.limit": "power_limit_w", "temperature.gpu": "celsius"}


def gpu(device: torch.device) -> dict[str, Any]:
    """What torch knows of a GPU, and nvidia-smi where there is one."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // MIB,
        "cuda": torch.version.cuda,
        **_ask_smi(str(getattr(properties, "uuid", ""))),
    }


def _ask_smi(uuid: str) -> dict[str, str | None]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, *([f"--id=GPU-{uuid}"] if uuid else [])], capture_output=True, text=True,
                              timeout=20, check=True)
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    except (OSError, subprocess.SubprocessError, IndexError):
        return dict.fromkeys(_SMI.values())
    return dict(zip(_SMI.values(), values, strict=False))
