"""The demo: one network, trained by the host library alone and with the sparse backend switched on.

The networks (``snntorch_model.py``, ``norse_model.py``) and the loop (``training.py``) are plain library code to copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparison import Comparison


def run(library: str, out: Path, epochs: int | None = None, quick: bool = False, threads: int = 1) -> Comparison:
    """Trains, prints a table and draws a picture.

    Args:
        library: ``"snntorch"`` or ``"norse"``.
        out: where the PNG goes.
        epochs: instead of the usual number.
        quick: a tiny network, for tests.
        threads: of torch.
    """
    from dataclasses import replace

    import torch
    from rich.console import Console

    from ..build import load_core, load_node
    from .comparison import Settings, compare
    from .report import draw, print_table

    load_core()  # compiled now if need be, not within the first step
    load_node()
    settings = Settings.quick() if quick else Settings()
    if epochs is not None:
        settings = replace(settings, epochs=epochs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file has no width of its own: nothing is cut
    try:
        comparison = compare(library, settings)
        print_table(comparison, console)
    finally:
        torch.set_num_threads(before)
    draw(comparison, out)
    console.print(f"picture: {out}", highlight=False, soft_wrap=True)
    return comparison
