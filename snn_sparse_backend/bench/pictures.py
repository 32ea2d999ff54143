"""The benchmark's pictures: times and memory by library, and what a sweep shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = {"host": "#5b6770", "compiled": "#8d7bb0", "peer": "#c0935a", "fused": "#1f77b4"}
KINDS = {"host": "host library", "compiled": "torch.compile", "peer": "peers", "fused": "this backend"}
_LAYERS = ("#1b4f72", "#2e86c1", "#85c1e9", "#aed6f1", "#d6eaf8")
_FLOOR, _OUTSIDE = "#d62728", "#b0b0b0"
# Lines of a sweep; what is not named here is another library.
_LINES = {"snnTorch": ("#5b6770", "o"), "fused, dense products": ("#8d7bb0", "s"),
          "sparse, exact (default)": ("#2ca02c", "^"), "cutoff 0.2": ("#ff7f0e", "v"),
          "cutoff 0.2, sparse forward": ("#1f77b4", "D")}


def title_of(where: dict[str, Any]) -> str:
    """Where it ran, in one line."""
    device = where["gpu"]["name"] if where["gpu"] else f"{where['cpu']} ({where['instruction_set']})"
    return f"{device}, {where['threads']} thread(s), torch {where['torch']}, {where['date']}"


def draw_times(results: dict[str, Any], out: Path) -> Path:
    """The time of a step by library, forward and backward stacked, a panel for each case; returns the path."""
    with _panels(results, out, "training step, forward and backward", _shades_of_times(results["cases"])) as panels:
        for case, axis in panels:
            _draw_times(axis, case)
    return out


def draw_memory(results: dict[str, Any], out: Path) -> Path:
    """What is kept for backward by library, stacked by layer, a panel for each case; returns the path."""
    what = "kept for backward (weights and input excluded), beside packed weights and the peak of a step"
    with _panels(results, out, what, _shades_of_layers(results["cases"])) as panels:
        for case, axis in panels:
            _draw_memory(axis, case)
    return out


@contextmanager
def _panels(results: dict[str, Any], out: Path, what: str,
            legend: list[Any]) -> Iterator[Iterator[tuple[dict[str, Any], Any]]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = results["cases"]
    columns = min(2, len(cases))
    rows = [cases[i:i + columns] for i in range(0, len(cases), columns)]
    heights = [max(len(case["variants"]) for case in row) + 2.5 for row in rows]
    figure, axes = plt.subplots(len(rows), columns, figsize=(9 * columns, 0.27 * sum(heights) + 1.5), squeeze=False,
                                layout="constrained", gridspec_kw={"height_ratios": heights})
    figure.suptitle(f"{what}\n{title_of(results['environment'])}")
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    for axis in axes.flat[len(cases):]:
        axis.set_visible(False)
    yield zip(cases, axes.flat, strict=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_times(axis: Any, case: dict[str, Any]) -> None:
    variants, floor = case["variants"], case["gemm_floor_ms"]
    rows, colours = range(len(variants)), [COLOURS[v["kind"]] for v in variants]
    # What is quadratic in T would leave no room for the others: its bar ends at the edge, and its label says how long.
    limit = max([v["step_ms"] for v in variants if not v["quadratic"]] or [v["step_ms"] for v in variants]) * 1.35
    axis.barh(rows, [v["forward_ms"] for v in variants], color=colours)
    axis.barh(rows, [v["backward_ms"] for v in variants], left=[v["forward_ms"] for v in variants], color=colours,
              alpha=0.55, hatch="///", edgecolor="white", linewidth=0)
    for row, v in zip(rows, variants, strict=True):
        text = f"{_short(v['step_ms'])} ms  x{v['speedup_step']:.1f}"
        beyond = v["step_ms"] > limit
        axis.text(limit * 0.99 if beyond else v["step_ms"] + limit * 0.01, row, f"{text} \u25b8" if beyond else text,
                  ha="right" if beyond else "left", va="center", fontsize=9,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.axvline(floor["step"], color=_FLOOR, linestyle=":", zorder=3)
    rates = ", ".join(f"{h['spike_rate']:.1%}" for h in case["hidden"])
    axis.set_xlim(0, limit)
    axis.set_title(f"{case['name']}, hidden layers spike at {rates}; ms", fontsize=10, loc="left")
    _rows_of(axis, variants)


def _shades_of_times(cases: list[dict[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = dict.fromkeys(v["kind"] for case in cases for v in case["variants"])
    return [*(Patch(color=COLOURS[kind], label=name) for kind, name in KINDS.items() if kind in used),
            Patch(facecolor="0.4", label="forward"),
            Patch(facecolor="0.7", hatch="///", edgecolor="white", label="backward"),
            Line2D([], [], color=_FLOOR, linestyle=":", label="dense products alone")]


def _shades_of_layers(cases: list[dict[str, Any]]) -> list[Any]:
    from matplotlib.patches import Patch

    layers = max(len(case["sizes"]) - 1 for case in cases)
    return [*(Patch(color=_LAYERS[i % len(_LAYERS)], label=f"layer {i + 1}") for i in range(layers)),
            Patch(color=_OUTSIDE, label="outside the layers")]


def _draw_memory(axis: Any, case: dict[str, Any]) -> None:
    variants = [v for v in case["variants"] if v["saved_by_layer"] is not None]
    names = list(variants[0]["saved_by_layer"])
    left = [0.0] * len(variants)
    for i, name in enumerate(names):
        sizes = [v["saved_by_layer"][name] / 2**20 for v in variants]
        if any(sizes):
            colour = _OUTSIDE if i == len(names) - 1 else _LAYERS[i % len(_LAYERS)]
            axis.barh(range(len(variants)), sizes, left=left, color=colour)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    limit = max(left) * 1.5
    for row, v in enumerate(variants):
        ratio = f"  1/{v['saved_ratio']:.1f}" if v["saved_ratio"] else ""
        peak = f", peak {_short(v['peak_rss_mib'])}" if v["peak_rss_mib"] is not None else ""
        packed = f", packed {_short(v['workspace_mib'])}" if v["workspace_mib"] else ""
        axis.text(left[row] + limit * 0.01, row, f"{_short(v['saved_mib'])} MiB{ratio}{packed}{peak}", va="center",
                  fontsize=9)
    axis.set_xlim(0, limit)
    axis.set_title(f"{case['name']}; MiB", fontsize=10, loc="left")
    _rows_of(axis, variants)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rows_of(axis: Any, variants: list[dict[str, Any]]) -> None:
    axis.set_yticks(range(len(variants)), [v["name"] for v in variants])
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def draw_sweep(results: dict[str, Any], out: Path) -> Path:
    """Speed-up, time and bytes kept against the value that is swept; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases, sweep = results["cases"], results["sweep"]
    figure, (speed, time, kept) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    figure.suptitle(f"{_swept(results)}\n{title_of(results['environment'])}")
    _lines(speed, cases, lambda v: v["speedup_step"])
    speed.axhline(1.0, color="0.7", linewidth=1, zorder=0)
    speed.set(ylabel="times as fast as snnTorch, whole step", ylim=(0, None))
    _lines(time, cases, lambda v: v["step_ms"])
    time.plot([c["value"] for c in cases], [c["gemm_floor_ms"]["step"] for c in cases], color=_FLOOR, linestyle=":",
              label="dense products alone")
    time.set(ylabel="ms per training step", yscale="log")
    _lines(kept, cases, lambda v: v["bytes_per_site"])
    kept.set(ylabel="bytes kept for backward, per site (step, row, neuron)", yscale="log")
    values = [case["value"] for case in cases]
    for axis in (speed, time, kept):
        axis.set(xlabel=_AXES[sweep], xscale="log")
        axis.set_xticks(values, [f"{value:.1%}" if sweep == "density" else f"{value:g}" for value in values])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


_AXES = {"density": "share of sites that spike, input and hidden layers", "steps": "T, steps", "batch": "B, rows",
         "width": "N, neurons of each hidden layer"}


def _swept(results: dict[str, Any]) -> str:
    first = results["cases"][0]
    sizes = ["N" if results["sweep"] == "width" and 0 < i < len(first["sizes"]) - 1 else str(size)
             for i, size in enumerate(first["sizes"])]
    fixed = [f"{key}={first[key]}" for key, sweep in (("T", "steps"), ("B", "batch")) if results["sweep"] != sweep]
    return f"{first['library']} {'-'.join(sizes)}, {', '.join(fixed)}"


def _lines(axis: Any, cases: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> None:
    for name in dict.fromkeys(v["name"] for case in cases for v in case["variants"]):
        points = [(case["value"], value(v)) for case in cases for v in case["variants"] if v["name"] == name]
        known = [(x, y) for x, y in points if y is not None]
        colour, marker = _LINES.get(name, ("#c0935a", "x"))
        axis.plot([x for x, _ in known], [y for _, y in known], color=colour, marker=marker, label=name)
