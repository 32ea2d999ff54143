"""The benchmark's tables, JSON and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_COLOURS = {"fused": "#1f77b4", "host": "#8a8a8a"}


def print_environment(where: dict[str, Any], console: Console) -> None:
    """Where and with what it ran, in one line."""
    gpu = where["gpu"]
    device = f"{gpu['name']} (sm {gpu['capability']}, driver {gpu['driver']}, CUDA {gpu['cuda']}), " if gpu else ""
    console.print(
        f"{where['date']}, {device}{where['cpu']} ({where['instruction_set']}), {where['threads']} thread(s), "
        f"{where['dtype']}, Python {where['python']}, torch {where['torch']}, "
        f"snntorch {where['snntorch']}, norse {where['norse']}",
        highlight=False, soft_wrap=True,
    )


def print_case(case: dict[str, Any], console: Console) -> None:
    """The table of one case."""
    table = Table(title=case["name"], title_justify="left")
    table.add_column("variant", no_wrap=True)
    on_gpu = case["variants"][0]["peak_mib"] is not None
    for heading in ("forward\nms", "backward\nms", "step\nms", "backward\nspeed-up", "step\nspeed-up", "kept\nMiB",
                    "kept\nratio", *(["peak\nMiB"] if on_gpu else []), "gradient\ndifference", "step per\ndense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for v in case["variants"]:
        kept = (f"{v['saved_mib']:.1f}", f"1/{v['saved_ratio']:.1f}") if v["saved_mib"] is not None else ("", "")
        peak = [f"{v['peak_of_step_mib']:.0f}"] if on_gpu else []
        table.add_row(v["name"], f"{v['forward_ms']:.1f}", f"{v['backward_ms']:.1f}", f"{v['step_ms']:.1f}",
                      f"x{v['speedup_backward']:.2f}", f"x{v['speedup_step']:.2f}", *kept, *peak,
                      f"{v['gradient_difference']:.1e}", f"{v['step_per_floor']:.2f}")
    table.add_section()
    floor = case["gemm_floor_ms"]
    table.add_row("dense products alone (torch.mm)", *(f"{floor[k]:.1f}" for k in ("forward", "backward", "step")))
    console.print(table)
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


def write_picture(results: dict[str, Any], out: Path) -> Path:
    """Draws times and memory of all cases; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases, where = results["cases"], results["environment"]
    heights = [len(c["variants"]) + 2.5 for c in cases]
    figure, rows = plt.subplots(len(cases), 2, figsize=(13, 0.42 * sum(heights) + 0.8), layout="constrained",
                                squeeze=False, gridspec_kw={"height_ratios": heights, "width_ratios": (3, 1)})
    device = where["gpu"]["name"] if where["gpu"] else f"{where['cpu']} ({where['instruction_set']})"
    figure.suptitle(f"{device}, {where['threads']} thread(s), torch {where['torch']}, {where['date']}")
    for case, (times, memory) in zip(cases, rows, strict=True):
        _draw_times(times, case)
        _draw_memory(memory, case)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def _draw_times(axis: Any, case: dict[str, Any]) -> None:
    variants, floor = case["variants"], case["gemm_floor_ms"]
    names = [v["name"] for v in variants]
    colours = [_COLOURS["fused" if v["fused"] else "host"] for v in variants]
    forward, steps = [v["forward_ms"] for v in variants], [v["forward_ms"] + v["backward_ms"] for v in variants]
    axis.barh(names, forward, color=colours)
    ends = axis.barh(names, [v["backward_ms"] for v in variants], left=forward, color=colours, alpha=0.5, hatch="//",
                     edgecolor="white")
    axis.bar_label(ends, [f"{v['step_ms']:.0f} ms, x{v['speedup_step']:.1f}" for v in variants], padding=4,
                   bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    line = axis.axvline(floor["step"], color="#d62728", linestyle=":", zorder=0.5)
    solid, hatched = axis.barh([0], [0], color="0.4"), axis.barh([0], [0], color="0.4", alpha=0.5, hatch="//")
    axis.legend([solid, hatched, line], ["forward", "backward", "dense products alone (torch.mm)"], loc="lower right")
    rates = ", ".join(f"{h['spike_rate']:.1%}" for h in case["hidden"])
    axis.set(title=f"{case['name']}, hidden layers spike at {rates}", xlabel="ms per training step",
             xlim=(0, max(steps) * 1.2))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _draw_memory(axis: Any, case: dict[str, Any]) -> None:
    variants = case["variants"]
    saved = [v["saved_mib"] or 0.0 for v in variants]
    bars = axis.barh([v["name"] for v in variants], saved,
                     color=[_COLOURS["fused" if v["fused"] else "host"] for v in variants])
    axis.bar_label(bars, ["not measured" if v["saved_mib"] is None else f"{v['saved_mib']:.1f}" for v in variants],
                   padding=4)
    axis.set(title="kept for backward", xlabel="MiB", xlim=(0, max(saved) * 1.3), yticks=[])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
