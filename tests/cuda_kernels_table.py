"""What each CUDA kernel takes of a GPU, as the compiler reports it: registers, shared memory, stack and spills.

``python tests/cuda_kernels_table.py --out docs/kernel-resources.md`` writes the table; the tests call `nvcc_report`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout that is not installed

from snn_sparse_backend.recipes import Unit, cuda_recipe  # noqa: E402
from snn_sparse_backend.toolchain import Compiler, find_nvcc  # noqa: E402

ARCHITECTURES = ("8.0", "9.0")
STRICT = ("-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Werror")


class Kernel(NamedTuple):
    """One instance of a kernel: the file that it is in and its name, such as ``forward_kernel<Lif<float>, 32>``."""

    source: str
    name: str


@dataclass(frozen=True)
class Resources:
    """What a thread takes, and a block of static shared memory: all in bytes but the registers."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def nvcc_report(
    architectures: Sequence[str] = ARCHITECTURES, csrc: Path | None = None
) -> dict[Kernel, dict[str, Resources]]:
    """Compiles the CUDA sources with their own flags, warnings as errors; {kernel: {"sm_80": resources}}.

    Raises RuntimeError with what nvcc said when a file does not compile.
    """
    nvcc = find_nvcc()
    recipe = cuda_recipe(csrc, architectures)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        said = pool.map(lambda unit: _compile(nvcc, unit, recipe.places, Path(folder)), recipe.units)
        outputs = dict(zip((unit.source.stem for unit in recipe.units), said, strict=True))
    return {
        Kernel(stem, name): resources
        for stem, output in sorted(outputs.items())
        for name, resources in sorted(parse(output).items())
    }


def _compile(nvcc: Compiler, unit: Unit, places: tuple[str, ...], folder: Path) -> str:
    command = [*nvcc.command, *unit.flags, *STRICT, *places, "-c", str(unit.source), "-o", str(folder / unit.object)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{unit.source} does not compile without warnings:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def parse(output: str) -> dict[str, dict[str, Resources]]:
    """{readable kernel name: {architecture: resources}} from what ``ptxas -v`` says."""
    entries = re.split(r"Compiling entry function ", output)[1:]
    symbols = [entry.split("'")[1] for entry in entries]
    kernels: dict[str, dict[str, Resources]] = {}
    for entry, symbol, name in zip(entries, symbols, readable(symbols), strict=True):
        # A kernel may call functions with properties of their own, in any order.
        properties = entry.split(f"Function properties for {symbol}\n")[1]
        kernels.setdefault(name, {})[entry.split("'")[3]] = Resources(
            registers=_number(r"Used (\d+) registers", entry),
            shared=_number(r"(\d+) bytes smem", entry),
            stack=_number(r"(\d+) bytes stack frame", properties),
            spill_stores=_number(r"(\d+) bytes spill stores", properties),
            spill_loads=_number(r"(\d+) bytes spill loads", properties),
        )
    return kernels


def _number(pattern: str, text: str) -> int:
    """ptxas leaves out what is zero."""
    match = re.search(pattern, text)
    return int(match[1]) if match else 0


def readable(symbols: Sequence[str]) -> list[str]:
    """Short names of mangled kernels: without namespaces, parameters and casts."""
    program = next(filter(None, map(shutil.which, ("cu++filt", "c++filt"))), None)
    if program is None:
        return list(symbols)
    done = subprocess.run([program, "-p"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = [re.sub(r"(?:\(anonymous namespace\)|\b\w+)::|\(\w+\)", "", line) for line in done.stdout.splitlines()]
    return [name.replace("> >", ">>") for name in names]


def markdown(report: dict[Kernel, dict[str, Resources]], nvcc: str) -> str:
    """A row for each kernel, and three columns for each architecture."""
    architectures = sorted({architecture for row in report.values() for architecture in row})
    titles = ["source", "kernel"]
    for architecture in architectures:
        titles += [f"{architecture} registers", "shared", "spills"]
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"Made by `python tests/cuda_kernels_table.py` with {nvcc}.",
        "Registers per thread, bytes of static shared memory per block, bytes that a thread spills (stored / loaded).",
        "",
        f"| {' | '.join(titles)} |",
        "| --- | --- |" + " ---: |" * (len(titles) - 2),
    ]
    for kernel, row in report.items():
        cells = [f"{kernel.source}.cu", f"`{kernel.name}`"]
        for architecture in architectures:
            r = row.get(architecture)
            spills = f"{r.spill_stores} / {r.spill_loads}" if r and (r.spill_stores or r.spill_loads) else "0"
            cells += [str(r.registers), str(r.shared), spills] if r else ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes what each CUDA kernel takes of a GPU as a markdown table.")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="default: to the terminal")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="X.Y", help="default: 8.0 9.0")
    args = parser.parse_args()
    text = markdown(nvcc_report(args.architectures), find_nvcc().version)
    if args.out is None:
        print(text, end="")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
