"""Up to which density a product of a synapse is better done event by event.

Values measured on this machine by ``python -m snn_sparse_backend tune`` are used where there are any for its processor,
instruction set, torch and number of threads; else built-in ones for the instruction set.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import warnings
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock

from .crossover_defaults import DEFAULTS
from .native import instruction_set

PRODUCTS = ("forward", "weight_gradient", "input_gradient")
_FORMAT = "snn_sparse_backend crossovers 1"


@dataclass(frozen=True)
class Crossover:
    """Where the sparse and the dense way of one product take equally long.

    Args:
        by_outputs: pairs of a number of outputs, rising, and the density at which both ways take equally long when
            there are many rows. Between them it is interpolated, beyond them it stays.
        rows: with fewer rows the sparse way never pays: what it does once, whatever the rows, costs as much.
        multiplications: likewise for small products, ``rows * inputs * outputs``.
    """

    by_outputs: tuple[tuple[int, float], ...]
    rows: float
    multiplications: float

    def __post_init__(self) -> None:
        outputs = [width for width, _ in self.by_outputs]
        if not outputs or outputs != sorted(set(outputs)) or outputs[0] < 1:
            raise ValueError(f"by_outputs: expected rising numbers of outputs, got {outputs}")
        for name, value in (*(("density", density) for _, density in self.by_outputs),
                            ("rows", self.rows), ("multiplications", self.multiplications)):
            if not 0 <= value <= (1 if name == "density" else math.inf):
                raise ValueError(f"{name}: {value} makes no sense")

    def density(self, rows: int, inputs: int, outputs: int) -> float:
        """The density up to which this product pays event by event; 0 where it never does."""
        overhead = self.rows / max(rows, 1) + self.multiplications / max(rows * inputs * outputs, 1)
        return max(0.0, 1.0 - overhead) * self.many_rows(outputs)

    def many_rows(self, outputs: int) -> float:
        """The density at which both ways take equally long when there are many rows."""
        after = bisect_right(self.by_outputs, (outputs, math.inf))
        (low, a), (high, b) = self.by_outputs[max(after - 1, 0)], self.by_outputs[min(after, len(self.by_outputs) - 1)]
        if outputs <= low:
            return a
        if low == high or not a or not b:  # no logarithm of zero; the lower one is the safe one
            return min(a, b)
        return float(a * (b / a) ** (math.log(outputs / low) / math.log(high / low)))


Table = dict[str, Crossover]  # by product


@dataclass(frozen=True)
class Machine:
    """What measured crossovers hold for."""

    cpu: str
    instruction_set: str
    torch: str
    threads: int


def this_machine() -> Machine:
    """As it is now, with the threads in force."""
    return Machine(cpu_model(), instruction_set(), str(torch.__version__), torch.get_num_threads())


def density(product: str, rows: int, inputs: int, outputs: int) -> float:
    """The density up to which a product is better done event by event on the CPU.

    Args:
        product: one of ``PRODUCTS``.
        rows, inputs, outputs: its shape; ``rows`` are pairs of time step and batch row.
    """
    return _density(product, rows, inputs, outputs, torch.get_num_threads())


@lru_cache(4096)
def _density(product: str, rows: int, inputs: int, outputs: int, threads: int) -> float:
    return _in_force(threads)[product].density(rows, inputs, outputs)


def in_force() -> Table:
    """The crossovers of all products, for the threads in force."""
    return _in_force(torch.get_num_threads())


@cache
def _in_force(threads: int) -> Table:
    return measured() or default(instruction_set(), threads)


def default(instructions: str, threads: int) -> Table:
    """The built-in crossovers of an instruction set, for so many threads or the next fewer that there are."""
    by_threads = DEFAULTS[short(instructions)]
    found = by_threads[max(n for n in by_threads if n <= max(threads, 1))]
    return {product: Crossover(*found[product]) for product in PRODUCTS}


def short(instructions: str) -> str:
    """The name of an instruction set without explanations."""
    return instructions.partition(" ")[0]


def source() -> str:
    """Where the crossovers in force come from, in words."""
    if measured() is not None:
        return f"measured on this machine: {path()}"
    here = this_machine()
    return f"built in for {short(here.instruction_set)}; `python -m snn_sparse_backend tune` measures this machine's"


# ------------------------------------------------------------------------------------------------- measured here


def path() -> Path:
    """Where measured crossovers are kept: in $SNN_SPARSE_CONFIG, or in the user's configuration folder."""
    chosen = os.environ.get("SNN_SPARSE_CONFIG")
    folder = Path(chosen).expanduser().absolute() if chosen else platformdirs.user_config_path("snn_sparse_backend")
    return folder / "crossovers.json"


def measured() -> Table | None:
    """The crossovers that were measured under the conditions of now, if any."""
    return _entries().get(this_machine())


def store(table: Table) -> Path:
    """Keeps the crossovers of this machine, with the threads in force, beside those measured before.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        try:
            entries = _read(target)
        except ValueError:  # is replaced
            entries = {}
        entries[this_machine()] = table
        content = {"format": _FORMAT, "entries": [
            {"machine": asdict(machine), "crossovers": {product: asdict(c) for product, c in found.items()}}
            for machine, found in entries.items()
        ]}
        with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, target)
    forget()
    return target


def reset() -> bool:
    """Removes all measured crossovers; says whether there were any.

    Raises:
        OSError: the file cannot be removed.
    """
    existed = path().exists()
    path().unlink(missing_ok=True)
    forget()
    return existed


def forget() -> None:
    """Makes this process look anew at what is measured."""
    for remembered in (_density, _in_force, _entries):
        remembered.cache_clear()


@cache
def _entries() -> dict[Machine, Table]:
    """What is measured. A file that is not ours, or broken, is left alone, with one warning."""
    try:
        return _read(path())
    except (OSError, ValueError) as error:
        warnings.warn(f"measured crossovers are ignored: {path()}: {error}; `python -m snn_sparse_backend tune` "
                      "replaces them", stacklevel=2)
        return {}


def _read(file: Path) -> dict[Machine, Table]:
    """The content of a file; nothing if there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not one of ours.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"expected the format {_FORMAT!r}")
    try:
        return {Machine(**entry["machine"]): {product: _crossover(**entry["crossovers"][product])
                                              for product in PRODUCTS} for entry in content["entries"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an entry is broken: {error!r}") from error


def _crossover(by_outputs: list[list[float]], rows: float, multiplications: float) -> Crossover:
    return Crossover(tuple((int(outputs), float(share)) for outputs, share in by_outputs), float(rows),
                     float(multiplications))


@cache
def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
