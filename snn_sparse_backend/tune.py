"""Measures the density at which the sparse and the dense way of each product take equally long, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch.nn import functional as F
from tqdm import tqdm

from . import crossovers, kernels
from .config import Options
from .crossovers import PRODUCTS, Crossover, Table, short, this_machine
from .native import instruction_set
from .raster import Raster

# Of the products that are measured. Outputs: from a readout layer to a wide hidden one.
ROWS, INPUTS, OUTPUTS = 2048, 1000, (10, 32, 100, 320, 1000)
# Inputs and outputs where it is found out how many rows it takes: one where a product is cheap, one where it is not.
_SMALL, _LARGE, _MOST_ROWS = (100, 64), (1000, 1000), 1024
_LOWEST = 1e-3  # densities below are as good as zero
_HALVINGS, _TRIES, _NEIGHBOURHOOD = 6, 4, 3.0
_ROUNDS, _SWEEP_ROUNDS = 4, 12
_ROUND_SECONDS = 4e-4  # of each way

# The sweep: a wide hidden layer, a narrow one, a readout, and hidden layers in a single time step.
SWEEP_SHAPES = ((6400, 1000, 1000), (6400, 200, 200), (6400, 1000, 20), (64, 1000, 1000), (64, 200, 200))
SWEEP_DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)

_OPTIONS = Options()
Call = Callable[[], Any]


class BusyError(RuntimeError):
    """Measurements contradict each other."""


@dataclass(frozen=True)
class Ways:
    """One product on given operands: event by event, dense, and whether a sequence would choose the first."""

    sparse: Call
    dense: Call
    choose: Callable[[], bool]


class Layer:
    """A synapse with random weights and gradients.

    Args:
        rows, inputs, outputs: its shape; ``rows`` are pairs of time step and batch row.
        dtype: float32 or float64.
    """

    def __init__(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = (rows, inputs, outputs), dtype
        self._random = torch.Generator().manual_seed(0)
        self._weight, self._grad = self._normal(outputs, inputs), self._normal(rows, outputs)
        self._bias = torch.zeros(outputs, dtype=dtype)
        self._forward = kernels.SynapseForward(self._weight, self._bias)

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, generator=self._random)

    def ways(self, product: str, share: float) -> Ways:
        """A product with spikes, or active sites, of a density, done as the tapes do it."""
        rows, inputs, _ = self.shape
        x = torch.rand(rows, inputs, generator=self._random).lt(share).to(self.dtype)
        raster = kernels.pack(x)
        assert raster is not None
        sparse, dense = partial(self._sparse, product, raster), partial(self._dense, product, raster, x)
        return Ways(sparse, dense, partial(self._pays, product, raster))

    def _sparse(self, product: str, raster: Raster) -> Any:
        if product == "forward":
            return self._forward(raster)
        if product == "weight_gradient":
            return kernels.weight_gradient(self._grad, kernels.columns(raster), bias=True)
        return kernels.input_gradient(self._grad, kernels.columns(raster, ranks=True), self._forward.tiles)

    def _dense(self, product: str, raster: Raster, x: torch.Tensor) -> Any:
        if product == "forward":
            return F.linear(x, self._weight, self._bias)
        if product == "weight_gradient":
            return kernels.dense_product(self._grad.t(), kernels.unpack(raster, self.dtype)), self._grad.sum(0)
        return kernels.dense_product(self._grad, self._weight)

    def _pays(self, product: str, raster: Raster) -> bool:
        share = kernels.density(raster)
        assert share is not None
        return share <= _OPTIONS.crossover_on(raster.device, product, *self.shape)


def race(*calls: Call, rounds: int = _ROUNDS) -> list[float]:
    """Seconds that each call takes, the least of several rounds in which they run in turn, back and forth."""
    repeats, best = [], []
    for call in calls:
        call()  # the first may set something up
        start = perf_counter()
        call()
        best.append(perf_counter() - start)
        repeats.append(max(1, int(_ROUND_SECONDS / max(best[-1], 1e-9))))
    order = list(range(len(calls)))
    for _ in range(rounds):
        for i in order:
            start = perf_counter()
            for _ in range(repeats[i]):
                calls[i]()
            best[i] = min(best[i], (perf_counter() - start) / repeats[i])
        order.reverse()  # none always finds the caches as the same other one left them
    return best


def _sparse_wins(layer: Layer, product: str, share: float) -> bool:
    ways = layer.ways(product, share)
    sparse, dense = race(ways.sparse, ways.dense)
    return sparse < dense


def crossing(wins: Callable[[float], bool], low: float, high: float, halvings: int = _HALVINGS) -> float:
    """Where ``wins`` changes from true to false, by halving the ratio of the bounds; 0 if it is never true."""
    if not wins(low):
        return 0.0
    if wins(high):
        return high
    for _ in range(halvings):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if wins(middle) else (low, middle)
    return (low * high) ** 0.5


def confirmed_crossing(wins: Callable[[float], bool], low: float, high: float) -> float:
    """The crossing, looked for again in its neighbourhood.

    Raises:
        BusyError: what is found is not found again, several times.
    """
    found = []
    for _ in range(_TRIES):
        first = crossing(wins, low, high)
        if first in (0.0, high):
            if wins(low if first == 0.0 else high) == (first == high):
                return first
            found.append(first)
            continue
        far = min(high, _NEIGHBOURHOOD * first)
        second = crossing(wins, max(low, first / _NEIGHBOURHOOD), far, _HALVINGS // 2)
        if 0.0 < second < far:
            return (first * second) ** 0.5
        found.append(first)
    raise BusyError("the same measurement gave " + ", then ".join(f"{value:.3g}" for value in found)
                    + ", never confirmed; is the machine busy with something else? Nothing was kept.")


def crossover_of(product: str, progress: Callable[[], Any] = lambda: None) -> Crossover:
    """Measures one product; takes some seconds.

    Args:
        product: one of ``PRODUCTS``.
        progress: called after each of ``PARTS`` parts.

    Raises:
        BusyError: the machine does too much else for that.
    """

    def equal_at(outputs: int) -> float:
        layer = Layer(ROWS, INPUTS, outputs)
        return round(confirmed_crossing(lambda share: _sparse_wins(layer, product, share), _LOWEST, 1.0), 4)

    def fewest_rows(size: tuple[int, int]) -> float:
        return confirmed_crossing(lambda rows: not _sparse_wins(Layer(round(rows), *size), product, _LOWEST), 1.0,
                                  _MOST_ROWS)

    def counted(value: float) -> float:
        progress()
        return value

    by_outputs = tuple((outputs, counted(equal_at(outputs))) for outputs in OUTPUTS)
    small, large = counted(fewest_rows(_SMALL)), counted(fewest_rows(_LARGE))
    # What the sparse way takes longer, whatever the density, in rows and in multiplications: two equations.
    per_row, more = _SMALL[0] * _SMALL[1], _LARGE[0] * _LARGE[1]
    multiplications = max(0.0, small - large) / (1 / per_row - 1 / more)
    rows = max(0.0, large - multiplications / more)
    return Crossover(by_outputs, float(round(rows)), round(multiplications, -3))


PARTS = len(OUTPUTS) + 2


def measure() -> Table:
    """Measures all products with the threads in force; takes less than a minute.

    Raises:
        BusyError: the machine does too much else for that.
    """
    with tqdm(total=len(PRODUCTS) * PARTS, desc="tune", dynamic_ncols=True, disable=None) as bar:
        return {product: crossover_of(product, bar.update) for product in PRODUCTS}


def sweep() -> Iterator[dict[str, Any]]:
    """Over shapes, products and densities: what both ways take, and which of them is chosen.

    Yields:
        Rows with ``product, rows, inputs, outputs, density, sparse_us, dense_us, chosen, choosing_us, ratio``. Ratio:
        the better of both ways over the chosen one, at best 1. Choosing, once for a product and a sequence (a loop
        over time asks in its first step only), is not part of it; the spikes were counted before, where they were
        made.
    """
    for shape in SWEEP_SHAPES:
        layer = Layer(*shape)
        for product in PRODUCTS:
            for share in SWEEP_DENSITIES:
                ways = layer.ways(product, share)
                sparse, dense, choosing = (1e6 * t for t in race(ways.sparse, ways.dense, ways.choose,
                                                                 rounds=_SWEEP_ROUNDS))
                chosen = "sparse" if ways.choose() else "dense"
                yield {"product": product, **dict(zip(("rows", "inputs", "outputs"), shape, strict=True)),
                       "density": share, "sparse_us": sparse, "dense_us": dense, "chosen": chosen,
                       "choosing_us": choosing, "ratio": min(sparse, dense) / (sparse if chosen == "sparse" else dense)}


# ------------------------------------------------------------------------------------------------- the command


def run(console: Console) -> None:
    """Measures, keeps the result, and shows it."""
    crossovers.store(measure())
    show(console)


def show(console: Console) -> None:
    """The crossovers in force."""
    here, table = this_machine(), crossovers.in_force()
    console.print(f"{here.cpu} ({here.instruction_set}), torch {here.torch}, {here.threads} thread(s)", highlight=False)
    console.print(crossovers.source(), highlight=False, soft_wrap=True)
    widths = sorted({width for found in table.values() for width, _ in found.by_outputs})
    out = RichTable(title="density up to which a product is done event by event, by number of outputs",
                    title_justify="left")
    out.add_column("product", no_wrap=True)
    for heading in (*map(str, widths), "from\nrows", "from\nproducts"):
        out.add_column(heading, justify="right", no_wrap=True)
    for product, found in table.items():
        out.add_row(product.replace("_", " "), *(f"{found.many_rows(width):.1%}" for width in widths),
                    f"{found.rows:.0f}", f"{found.multiplications:.1e}")
    console.print(out)


def run_sweep(console: Console, out: Path | None) -> None:
    """Shows, and writes as JSON, how well the choice in force does."""
    table = RichTable(title="ratio: the better of both ways over the chosen one", title_justify="left")
    table.add_column("product", no_wrap=True)
    for heading in ("shape", "density", "sparse\nus", "dense\nus", "chosen", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows, total = [], len(SWEEP_SHAPES) * len(PRODUCTS) * len(SWEEP_DENSITIES)
    for row in tqdm(sweep(), total=total, desc="sweep", dynamic_ncols=True, disable=None):
        rows.append(row)
        shape = "x".join(str(row[name]) for name in ("rows", "inputs", "outputs"))
        table.add_row(row["product"].replace("_", " "), shape, f"{row['density']:.1%}",
                      *(f"{row[name]:.0f}" for name in ("sparse_us", "dense_us")), row["chosen"], f"{row['ratio']:.2f}")
    console.print(table)
    worst = min(rows, key=lambda row: row["ratio"])
    console.print(f"{sum(row['ratio'] >= 0.95 for row in rows)} of {len(rows)} at 0.95 or better, "
                  f"the worst at {worst['ratio']:.2f}; choosing takes "
                  f"{median(row['choosing_us'] for row in rows):.1f} us", highlight=False)
    if out is not None:
        content = {"machine": asdict(this_machine()), "source": crossovers.source(), "rows": rows}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------- built in

# Up to which instructions MKL may go when the kernels go no further than those of each limit.
_MKL_LIMITS = ("SSE4_2", "AVX2", "AVX512")
_DEFAULT_THREADS = (1, 2)
_HEAD = '''"""Built-in crossovers, by instruction set and threads: pairs of outputs and density, rows, multiplications.

Printed by ``python -m snn_sparse_backend tune --defaults``.
"""

from __future__ import annotations

Values = tuple[tuple[tuple[int, float], ...], float, float]

DEFAULTS: dict[str, dict[int, dict[str, Values]]] = {'''


def print_defaults() -> None:
    """Measures the built-in crossovers for all instruction sets up to this machine's; prints their Python module.

    A process for each: only a fresh one can tell MKL which instructions to use.
    """
    print(_HEAD)
    best, seen = short(instruction_set()), set()
    for limit, mkl in enumerate(_MKL_LIMITS):
        code = f"from snn_sparse_backend import tune; tune.print_default({limit})"
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "MKL_ENABLE_INSTRUCTIONS": mkl},
                              stdout=subprocess.PIPE, text=True, check=True)
        name = done.stdout.split('"')[1]
        if name not in seen:
            print(done.stdout, end="", flush=True)
        seen.add(name)
        if name == best:
            break
    print("}")


def print_default(limit: int) -> None:
    """Prints the built-in crossovers as they should be for one instruction set: 0, 1, 2, or as far as there is one."""
    name = short(instruction_set(limit))
    print(f'    "{name}": {{')
    for threads in _DEFAULT_THREADS:
        torch.set_num_threads(threads)
        print(f"        {threads}: {{")
        for product, found in measure().items():
            print(f'            "{product}": (\n                {found.by_outputs},')
            print(f"                {found.rows}, {found.multiplications},\n            ),")
        print("        },")
    print("    },")
