"""The benchmark: stock library, compiled, fused, sparse - in one process, in turn, on the same weights and inputs.

And the kernels one by one, beside the bandwidth of a copy and the dense products.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

DEFAULT_OUT = Path("benchmarks/results/local")
DEFAULT_PRESETS = {"cpu": "cpu", "cuda": "gpu"}
PRESET_NAMES = ("cpu", "quick", "gpu", "gpu-quick")


class NoGpuError(RuntimeError):
    """A GPU was asked for, and torch sees none."""


def run(preset: str | None = None, out: Path = DEFAULT_OUT, threads: int | None = None,
        compile_seconds: float = 120.0, libraries: tuple[str, ...] = ("snntorch", "norse"), device: str = "cpu",
        seconds: float | None = None) -> dict[str, Any]:
    """Measures, prints tables, and writes ``bench.json`` and ``bench.png``.

    The JSON is written after each case, so that nothing is lost when a run is cut short.

    Args:
        preset: which cases; None: those of the device.
        out: folder of the files.
        threads: of torch on the CPU; None: as torch chooses.
        compile_seconds: how long ``torch.compile`` may take; 0: do without.
        libraries: cases of others are left out.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        seconds: no case begins later than that.

    Returns:
        What is in the JSON: ``cases``, and the names of those that ``failed`` or were ``left_out``.

    Raises:
        NoGpuError: if torch does not see that device.
    """
    from .cases import PRESETS
    from .measure import environment
    from .report import print_case, print_environment, write_json, write_picture
    from .runner import run_case

    began, console = time.monotonic(), _console()
    cases: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    left_out: list[str] = []
    with _prepared(device, threads) as where:
        preset = preset or DEFAULT_PRESETS[where.type]
        results: dict[str, Any] = {"preset": preset, "environment": environment(where), "cases": cases,
                                   "failed": failed, "left_out": left_out}
        print_environment(results["environment"], console)
        write_json(results, out / "bench.json")
        for case in [case for case in PRESETS[preset] if case.library in libraries]:
            if seconds is not None and time.monotonic() - began > seconds:
                left_out.append(case.name)
                console.print(f"{case.name}: left out, {seconds:.0f} s are over", highlight=False, soft_wrap=True)
            else:
                try:
                    cases.append(run_case(case, compile_seconds, where).as_dict())
                    print_case(cases[-1], console)
                except RuntimeError as error:  # one case that fails does not cost the others
                    failed.append({"name": case.name, "error": traceback.format_exc()})
                    console.print(f"{case.name}: {type(error).__name__}: {error}", highlight=False, soft_wrap=True,
                                  markup=False)
            results["seconds"] = time.monotonic() - began
            write_json(results, out / "bench.json")
    _wrote(console, out / "bench.json")
    if cases:
        _wrote(console, write_picture(results, out / "bench.png"))
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
    console = _console()
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


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=150)  # a file has no width of its own: nothing is cut


def _wrote(console: Console, path: Path) -> None:
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
