"""Each kernel by itself, beside the bandwidth of a copy and the dense product of the same shape.

Called through the same wrappers as in training. On the CPU these are the kernels of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import kernels
from ..dynamics import Dynamics
from ..native import event_parallel
from ..norse_dynamics import LIF
from ..raster import Raster
from . import roofline
from .clock import Meter
from .measure import MIB, ones
from .neurons import LEAKY, Sequence

DENSITIES = (0.01, 0.03, 0.1)
_DENSITY = 0.03  # where one has to do


@dataclass(frozen=True)
class Shapes:
    """What is measured.

    Args:
        scans: T, B and N of neuron layers; the last is also that of the rasters, and of Norse's neuron.
        products: rows, inputs and outputs of synapses.
        copy: bytes of the tensor whose copy gives the bandwidth.
    """

    scans: tuple[tuple[int, int, int], ...]
    products: tuple[tuple[int, int, int], ...]
    copy: int


# Odd sizes, more steps than one launch takes, more rows and outputs than one tile: also a subject for sanitizers.
_TINY = Shapes(((1, 3, 70), (35, 3, 70)), ((140, 70, 33), (15, 200, 130)), 4 * MIB)
PRESETS = {
    "cpu": Shapes(((1, 64, 1000), (100, 64, 1000)), ((6400, 1000, 1000),), 256 * MIB),
    "recurrent": Shapes(((1, 64, 256), (250, 64, 256)), ((16000, 700, 256), (64, 256, 256)), 256 * MIB),
    "quick": _TINY,
    "gpu": Shapes(((1, 256, 1000), (500, 256, 200), (500, 256, 1000)),
                  ((128000, 700, 200), (128000, 1000, 1000), (8000, 4096, 4096)), 1024 * MIB),
    "gpu-quick": _TINY,
}


def measure(preset: str, device: torch.device) -> dict[str, Any]:
    """Measures every kernel; gives the rows of the table and the bandwidth of a copy."""
    torch.manual_seed(0)
    table, shapes = _Table(device, PRESETS[preset].copy), PRESETS[preset]
    jobs: list[Callable[[], None]] = []
    for shape in shapes.scans:
        jobs += [partial(table.scans, LEAKY, shape, density) for density in (None, *DENSITIES)]
    jobs += [partial(table.scans, LIF, shapes.scans[-1], density) for density in (None, _DENSITY)]
    steps, rows, cols = shapes.scans[-1]
    jobs.append(partial(table.rasters, steps * rows, cols))
    jobs += [partial(table.products, *shape) for shape in shapes.products]
    for job in tqdm(jobs, desc="kernels", dynamic_ncols=True, disable=None):
        job()
    return {"copy_gb_s": table.meter.copy_rate / 1e9, "kernels": table.rows}


class _Table:
    """Measures kernels and collects a row for each."""

    def __init__(self, device: torch.device, copy: int) -> None:
        self.device, self.meter = device, Meter(device, copy)
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, shape: tuple[int, ...], work: roofline.Work, call: Callable[[], Any], *,
            density: float | None = None, prepare: Callable[[], Any] = lambda: None,
            gemm_us: dict[str, float] | None = None) -> None:
        """Measures one kernel."""
        seconds = self.meter.seconds(call, prepare)
        rate = work.bytes / seconds
        self.rows.append({
            "kernel": name, "shape": shape, "density": density, "us": seconds * 1e6, "bytes": work.bytes,
            "operations": work.operations, "gb_s": rate / 1e9, "share_of_copy": rate / self.meter.copy_rate,
            "gop_s": work.operations / seconds / 1e9, "gemm_us": gemm_us or {},
        })

    def scans(self, dynamics: Dynamics, shape: tuple[int, int, int], density: float | None) -> None:
        """Both scans of a neuron layer."""
        layer, sites = Sequence(dynamics, shape, density, self.device), shape[0] * shape[1] * shape[2]
        share = layer.active / sites if layer.active is not None else None
        name = f"{dynamics.name} {'step' if shape[0] == 1 else 'sequence'}, {'dense' if density is None else 'active'}"
        self.add(f"forward {name}", shape, roofline.neuron_forward(*shape, len(dynamics.states), layer.active),
                 layer.forward, density=share, prepare=layer.prepare)
        self.add(f"backward {name}", shape, roofline.neuron_backward(*shape, dynamics.attached_reset, layer.active),
                 layer.backward(), density=share)

    def rasters(self, rows: int, cols: int) -> None:
        """What turns a raster into something else, or something else into a raster."""
        dense, shape = self._spikes(rows, cols, _DENSITY), (rows, cols)
        raster = self._raster(dense)
        both = roofline.raster_and_dense(rows, cols)
        self.add("raster pack", shape, both, lambda: self._raster(dense))
        self.add("raster unpack", shape, both, lambda: kernels.unpack(raster, torch.float32))
        self.add("raster transpose", shape, roofline.raster_transpose(rows, cols), lambda: kernels.transpose(raster))

    def products(self, rows: int, inputs: int, outputs: int) -> None:
        """The products of a synapse, and torch's dense ones."""
        shape, weight = (rows, inputs, outputs), torch.randn(outputs, inputs, device=self.device)
        grad, x = (torch.randn(rows, n, device=self.device) for n in (outputs, inputs))
        forward = kernels.SynapseForward(weight, torch.zeros(outputs, device=self.device))
        self.add("pack weights", (inputs, outputs), roofline.pack_weights(inputs, outputs),
                 lambda: kernels.pack_weights(weight))
        dense = [self._gemm_us(a, b) for a, b in ((x, weight.t()), (grad.t(), x), (grad, weight))]
        for density in DENSITIES:
            raster = self._raster(self._spikes(rows, inputs, density))
            columns, events = kernels.columns(raster, ranks=True), ones([raster])
            sizes, share = (*shape, events), events / raster.sites
            self.add("synapse forward", shape, roofline.synapse_forward(*sizes), partial(forward, raster),
                     density=share, gemm_us=dense[0])
            self.add("weight gradient", shape, roofline.weight_gradient(*sizes),
                     partial(kernels.weight_gradient, grad, columns, bias=False), density=share, gemm_us=dense[1])
            self.add("input gradient", shape, roofline.input_gradient(*sizes),
                     partial(kernels.input_gradient, grad, columns, forward.tiles), density=share, gemm_us=dense[2])

    def _spikes(self, rows: int, cols: int, density: float) -> Tensor:
        return torch.empty(rows, cols, device=self.device).bernoulli_(density)

    def _raster(self, spikes: Tensor) -> Raster:
        raster = kernels.nonzero(spikes) if event_parallel(self.device) else kernels.pack(spikes)
        assert raster is not None
        return raster

    def _gemm_us(self, a: Tensor, b: Tensor) -> dict[str, float]:
        """What torch takes for ``a @ b``, by precision; TF32 exists on CUDA only."""
        found = {}
        for name in ("highest", "high") if self.device.type == "cuda" else ("highest",):
            with _precision(name):
                found[{"highest": "float32", "high": "tf32"}[name]] = 1e6 * self.meter.seconds(lambda: a @ b)
        return found


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
