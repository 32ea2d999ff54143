"""The benchmark: stock library, compiled, fused, sparse - in one process, in turn, on the same weights and inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEFAULT_OUT = Path("benchmarks/results/local")
DEFAULT_PRESET = "first-light"
PRESET_NAMES = ("first-light", "quick")


def run(preset: str = DEFAULT_PRESET, out: Path = DEFAULT_OUT, threads: int | None = None,
        compile_seconds: float = 120.0, libraries: tuple[str, ...] = ("snntorch", "norse")) -> dict[str, Any]:
    """Measures, prints tables, and writes ``bench.json`` and ``bench.png``.

    Args:
        preset: which cases.
        out: folder of the files.
        threads: of torch; None: as torch chooses.
        compile_seconds: how long ``torch.compile`` may take; 0: do without.
        libraries: cases of others are left out.
    """
    import torch
    from rich.console import Console

    from .measure import environment
    from .report import print_tables, write
    from .runner import PRESETS, run_case

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        cases = [run_case(case, compile_seconds).as_dict() for case in PRESETS[preset] if case.library in libraries]
        results = {"preset": preset, "environment": environment(), "cases": cases}
    finally:
        torch.set_num_threads(before)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has no width of its own: nothing is cut
    print_tables(results, console)
    for path in write(results, out):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return results
