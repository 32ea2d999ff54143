"""The benchmark's tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LIBRARIES = ("snntorch", "norse", "spikingjelly", "sinabs")


def print_environment(where: dict[str, Any], console: Console) -> None:
    """Where and with what it ran, in one line."""
    gpu = where["gpu"]
    device = f"{gpu['name']} (sm {gpu['capability']}, driver {gpu['driver']}, CUDA {gpu['cuda']}), " if gpu else ""
    console.print(
        f"{where['date']}, {device}{where['cpu']} ({where['instruction_set']}), {where['threads']} thread(s), "
        f"{where['dtype']}, Python {where['python']}, torch {where['torch']}, "
        f"{', '.join(f'{name} {where[name]}' for name in LIBRARIES if where[name])}",
        highlight=False, soft_wrap=True,
    )


def print_case(case: dict[str, Any], console: Console) -> None:
    """The tables of one case."""
    table = Table(title=case["name"], title_justify="left")
    table.add_column("variant", no_wrap=True)
    variants = case["variants"]
    columns = [(heading, cell) for heading, cell in _COLUMNS if any(cell(v) for v in variants)]
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for v in variants:
        table.add_row(v["name"], *(cell(v) for _, cell in columns))
    table.add_section()
    floor = case["gemm_floor_ms"]
    table.add_row("dense products alone (torch)", *(f"{floor[k]:.1f}" for k in ("forward", "backward", "step")))
    console.print(table)
    _print_layers(case, console)
    layers = ", ".join(f"hidden {i}: {h['spike_rate']:.2%} spike, {h['active_fraction']:.2%} active"
                       for i, h in enumerate(case["hidden"], 1))
    console.print(f"input: {case['input_rate']:.2%} not zero, {layers} (|U - threshold| < {case['cutoff']})",
                  highlight=False, soft_wrap=True)
    last = case["variants"][-1]
    console.print(f"one step of \"{last['name']}\": {', '.join(f'{k} {n}' for k, n in last['counts'].items())}",
                  highlight=False, soft_wrap=True)
    for remark in case["remarks"]:
        console.print(remark, highlight=False, soft_wrap=True, markup=False)
    console.print()


def _when(value: float | None, form: str) -> str:
    return form.format(value) if value is not None else ""


# What is empty in every row, because it cannot be measured there, is no column.
_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("forward\nms", lambda v: f"{v['forward_ms']:.1f}"),
    ("backward\nms", lambda v: f"{v['backward_ms']:.1f}"),
    ("step\nms", lambda v: f"{v['step_ms']:.1f}"),
    ("backward\nspeed-up", lambda v: f"x{v['speedup_backward']:.2f}"),
    ("step\nspeed-up", lambda v: f"x{v['speedup_step']:.2f}"),
    ("kept\nMiB", lambda v: _when(v["saved_mib"], "{:.2f}")),
    ("kept\nratio", lambda v: _when(v["saved_ratio"], "1/{:.1f}")),
    ("packed\nMiB", lambda v: f"{v['workspace_mib']:.1f}" if v["fused"] else ""),
    ("peak RSS\nMiB", lambda v: _when(v["peak_rss_mib"], "{:.0f}")),
    ("peak\nMiB", lambda v: _when(v["peak_of_step_mib"], "{:.0f}")),
    ("gradient\ndifference", lambda v: _when(v["gradient_difference"], "{:.1e}")),
    ("step per\ndense", lambda v: f"{v['step_per_floor']:.2f}"),
)


def _print_layers(case: dict[str, Any], console: Console) -> None:
    """What is kept by which layer."""
    measured = [v for v in case["variants"] if v["saved_by_layer"] is not None]
    table = Table(title="kept for backward, MiB", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for name in measured[0]["saved_by_layer"] if measured else ():
        table.add_column(name, justify="right")
    for v in measured:
        table.add_row(v["name"], *(f"{size / 2**20:.2f}" for size in v["saved_by_layer"].values()))
    console.print(table)


def print_sweep(results: dict[str, Any], console: Console) -> None:
    """A row for each value of a sweep and each variant."""
    table = Table(title=f"sweep of the {results['sweep']}", title_justify="left")
    for heading in (results["sweep"], "variant", "forward\nms", "backward\nms", "step\nms", "step\nspeed-up",
                    "kept\nMiB", "kept bytes\na site"):
        table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
    for case in results["cases"]:
        table.add_section()
        for v in case["variants"]:
            table.add_row(f"{case['value']:g}", v["name"], f"{v['forward_ms']:.1f}", f"{v['backward_ms']:.1f}",
                          f"{v['step_ms']:.1f}", f"x{v['speedup_step']:.2f}", _when(v["saved_mib"], "{:.2f}"),
                          _when(v["bytes_per_site"], "{:.2f}"))
    console.print(table)


def print_kernels(results: dict[str, Any], console: Console) -> None:
    """A row for each kernel, shape and density."""
    table = Table(title=f"kernels; a copy by torch moves {results['copy_gb_s']:.0f} GB/s", title_justify="left")
    table.add_column("kernel", no_wrap=True)
    precisions = dict.fromkeys(name for row in results["kernels"] for name in row["gemm_us"])
    dense = [f"torch us\n{name}" for name in precisions]
    for heading in ("shape", "density", "us", "MB", "GB/s", "of copy", "Gop/s", *dense):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["kernels"]:
        table.add_row(row["kernel"], "x".join(map(str, row["shape"])),
                      f"{row['density']:.1%}" if row["density"] is not None else "", f"{row['us']:.1f}",
                      f"{row['bytes'] / 1e6:.2f}", f"{row['gb_s']:.0f}", f"{row['share_of_copy']:.0%}",
                      f"{row['gop_s']:.1f}", *(f"{us:.1f}" for us in row["gemm_us"].values()))
    console.print(table)


def write_json(results: dict[str, Any], path: Path) -> Path:
    """Writes results; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path
