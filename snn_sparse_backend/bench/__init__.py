"""The benchmark: stock library, compiled, its peers, fused, sparse - in one process, in turn, on the same batch.

And the kernels one by one, beside the bandwidth of a copy and the dense products.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .cases import Case

DEFAULT_OUT = Path("benchmarks/results/local")
DEFAULT_PRESETS = {"cpu": "cpu", "cuda": "gpu"}
LIBRARIES = ("snntorch", "norse")
SWEEPS = ("density", "steps", "batch", "width")
PRESET_NAMES = ("cpu", "recurrent", "quick", "gpu", "gpu-quick")


class NoGpuError(RuntimeError):
    """A GPU was asked for, and torch sees none."""


class NoCaseError(RuntimeError):
    """No network of the preset is wanted."""


class ChildError(RuntimeError):
    """The process for one number of threads failed."""


def run(preset: str | None = None, out: Path = DEFAULT_OUT, threads: int | None = None,
        compile_seconds: float = 120.0, libraries: tuple[str, ...] = LIBRARIES, device: str = "cpu",
        seconds: float | None = None, only: str | None = None) -> dict[str, Any]:
    """Measures, prints tables, and writes ``bench.json``, ``bench.png`` (times) and ``memory.png``.

    The JSON is written after each case, so that nothing is lost when a run is cut short.

    Args:
        preset: which cases; None: those of the device.
        out: folder of the files.
        threads: of torch on the CPU; None: as torch chooses.
        compile_seconds: how long ``torch.compile`` may take; 0: do without.
        libraries: cases of others are left out.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        seconds: no case begins later than that.
        only: cases without this in their names are left out.

    Returns:
        What is in the JSON: ``cases``, and the names of those that ``failed`` or were ``left_out``.

    Raises:
        NoGpuError: if torch does not see that device.
        NoCaseError: if no case is left.
    """
    from .cases import PRESETS
    from .pictures import draw_memory, draw_times
    from .report import print_case

    console = make_console()
    with _prepared(device, threads) as where:
        preset = preset or DEFAULT_PRESETS[where.type]
        cases = [case for case in PRESETS[preset] if case.library in libraries and (only or "") in case.name]
        if not cases:
            names = "\n".join(f"  {case.name}" for case in PRESETS[preset])
            raise NoCaseError(f"nothing to measure: --library and --only leave none of\n{names}")
        results = _measure({"preset": preset}, cases, where, out / "bench.json", compile_seconds, seconds,
                           lambda case, figures: print_case(figures, console), console)
    if results["cases"]:
        _wrote(console, draw_times(results, out / "bench.png"))
        _wrote(console, draw_memory(results, out / "memory.png"))
    return results


def run_sweep(sweep: str, out: Path = DEFAULT_OUT, threads: int | None = None, device: str = "cpu",
              quick: bool = False, seconds: float | None = None) -> dict[str, Any]:
    """Measures one network at several densities, lengths, batches or widths; writes ``sweep-NAME.json`` and ``.png``.

    Args:
        sweep: one of ``SWEEPS``.
        quick: a tiny network and few values.
        out, threads, device, seconds: as for :func:`run`.

    Returns:
        What is in the JSON, as :func:`run` does; each case has its ``value`` on the axis.

    Raises:
        NoGpuError: if torch does not see that device.
        ValueError: if there is no such sweep.
    """
    from .cases import sweep_cases, swept_value
    from .pictures import draw_sweep
    from .report import print_sweep

    console = make_console()

    def place(case: Case, figures: dict[str, Any]) -> None:
        figures["value"] = swept_value(sweep, case)

    cases = sweep_cases(sweep, quick)
    with _prepared(device, threads) as where:
        results = _measure({"sweep": sweep}, cases, where, out / f"sweep-{sweep}.json", 0.0, seconds, place, console)
    if results["cases"]:
        print_sweep(results, console)
        _wrote(console, draw_sweep(results, out / f"sweep-{sweep}.png"))
    return results


def run_for_threads(counts: Sequence[int], out: Path, arguments: Sequence[str], files: Sequence[str],
                    seconds: float | None = None) -> list[dict[str, Any]]:
    """Runs the benchmark once for each number of threads and gathers the JSON.

    Each has a process of its own: a number of threads is part of what ``torch.compile`` generates, of the pools that
    OpenMP keeps, and of what was allocated before.

    Args:
        counts: of threads.
        out: each process writes into ``threads-N`` in there.
        arguments: of the command ``bench``, without the threads, the folder and the seconds.
        files: which JSON files there will be.
        seconds: no case of any process begins later than that.

    Returns:
        For each file, what is in it: ``runs``, the results by number of threads.

    Raises:
        ChildError: if a process fails for other reasons than a case that failed.
    """
    from .report import write_json

    began = time.monotonic()
    gathered: list[dict[str, Any]] = [{"runs": []} for _ in files]
    for count in counts:
        folder = out / f"threads-{count}"
        command = [sys.executable, "-m", "snn_sparse_backend", "bench", *arguments, "--threads", str(count),
                   "--out", str(folder)]
        if seconds is not None:
            command += ["--seconds", f"{seconds - (time.monotonic() - began):.0f}"]
        code = subprocess.run(command).returncode
        if code not in (0, 1):
            raise ChildError(f"the process for {count} thread(s) ended with code {code}")
        for name, results in zip(files, gathered, strict=True):
            results["runs"].append(json.loads((folder / name).read_text()))
            write_json(results, out / name)
    for name in files:
        _wrote(make_console(), out / name)
    return gathered


def _measure(results: dict[str, Any], cases: Sequence[Case], where: torch.device, path: Path, compile_seconds: float,
             seconds: float | None, done: Callable[[Case, dict[str, Any]], None], console: Console) -> dict[str, Any]:
    """Measures cases one by one and writes the JSON after each."""
    from .measure import environment
    from .report import print_environment, write_json
    from .runner import run_case

    began = time.monotonic()
    results.update(environment=environment(where), cases=[], failed=[], left_out=[])
    print_environment(results["environment"], console)
    write_json(results, path)
    for case in cases:
        if seconds is not None and time.monotonic() - began > seconds:
            results["left_out"].append(case.name)
            console.print(f"{case.name}: left out, {seconds:.0f} s are over", highlight=False, soft_wrap=True)
        else:
            try:
                figures = run_case(case, compile_seconds, where).as_dict()
                done(case, figures)
                results["cases"].append(figures)
            except RuntimeError as error:  # one case that fails does not cost the others
                results["failed"].append({"name": case.name, "error": traceback.format_exc()})
                console.print(f"{case.name}: {type(error).__name__}: {error}", highlight=False, soft_wrap=True,
                              markup=False)
        results["seconds"] = time.monotonic() - began
        write_json(results, path)
    _wrote(console, path)
    return results


def run_kernels(preset: str | None = None, out: Path = DEFAULT_OUT, threads: int | None = None,
                device: str = "cpu") -> dict[str, Any]:
    """Measures each kernel by itself, prints a table, and writes ``kernels.json``; arguments as for :func:`run`."""
    from .kernels import measure
    from .measure import environment
    from .report import print_environment, print_kernels, write_json

    with _prepared(device, threads) as where:
        preset = preset or DEFAULT_PRESETS[where.type]
        results = {"preset": preset, "environment": environment(where), **measure(preset, where)}
    console = make_console()
    print_environment(results["environment"], console)
    print_kernels(results, console)
    _wrote(console, write_json(results, out / "kernels.json"))
    return results


@contextmanager
def _prepared(device: str, threads: int | None) -> Iterator[torch.device]:
    """The device, with its kernels compiled, as the current one."""
    import torch

    from ..build import load_cuda

    where, before = torch.device(device), torch.get_num_threads()
    with ExitStack() as stack:
        if where.type == "cuda":
            if not torch.cuda.is_available() or (where.index or 0) >= torch.cuda.device_count():
                raise NoGpuError(f"no {device} here: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
            where = torch.device("cuda", where.index if where.index is not None else torch.cuda.current_device())
            load_cuda()
            stack.enter_context(torch.cuda.device(where))
        torch.set_num_threads(threads or before)
        stack.callback(torch.set_num_threads, before)
        yield where


def make_console() -> Console:
    """Where tables go."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=150)  # a file has no width of its own: nothing is cut


def _wrote(console: Console, path: Path) -> None:
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
