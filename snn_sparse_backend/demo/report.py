"""The demo's table and its picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..bench.measure import MIB, environment, milliseconds
from .comparison import CUTOFF, Comparison, Contestant

COLOURS = ("#8a8a8a", "#1f77b4", "#2ca02c")
_WARM_UP = 2  # steps


def times(entrant: Contestant) -> tuple[float, float]:
    """Median ms of forward and backward of one step."""
    steps = entrant.progress[_WARM_UP:]
    return milliseconds(p.forward_seconds for p in steps), milliseconds(p.backward_seconds for p in steps)


def print_table(comparison: Comparison, console: Console) -> None:
    """The figures of all contestants, one column each."""
    settings, entrants = comparison.settings, comparison.contestants
    where = environment()
    table = Table(title=f"8x8 digits, 64-{settings.hidden}-{settings.hidden}-10, T={settings.steps}, "
                        f"batch {settings.batch}, {settings.epochs} epochs, {where['threads']} thread(s)")
    table.add_column(no_wrap=True)
    for entrant in entrants:
        table.add_column(entrant.name, justify="right", no_wrap=True)

    def row(label: str, cell: Callable[[Contestant], str]) -> None:
        table.add_row(label, *(cell(entrant) for entrant in entrants))

    host = entrants[0]
    host_times = times(host)
    row("test accuracy", lambda e: f"{e.accuracies[-1]:.1%}")
    row("loss, last epoch", lambda e: f"{e.losses[-1]:.4f}")
    row("forward", lambda e: f"{times(e)[0]:.1f} ms (x{host_times[0] / times(e)[0]:.2f})")
    row("backward", lambda e: f"{times(e)[1]:.1f} ms (x{host_times[1] / times(e)[1]:.2f})")
    row("step", lambda e: f"{sum(times(e)):.1f} ms (x{sum(host_times) / sum(times(e)):.2f})")
    row("kept for backward", lambda e: f"{e.saved / MIB:.1f} MiB (1/{host.saved / e.saved:.1f})")
    for layer in range(2):
        row(f"spike rate, layer {layer + 1}", lambda e, i=layer: f"{e.hidden[i].spike_rate:.2%}")  # type: ignore[misc]
        row(f"active, layer {layer + 1}",
            lambda e, i=layer: f"{e.hidden[i].active_fraction:.2%}")  # type: ignore[misc]
    row("gradient difference",
        lambda e: "" if e.is_host else f"{e.gradient_difference:.1e}")
    console.print(table, width=max(console.width, 100))
    for entrant in entrants[1:]:
        ran = ", ".join(f"{name} {entrant.counts[name]}" for name in
                        ("neuron_steps", "neuron_nodes", "synapse_nodes", "weight_gradient_sparse",
                         "input_gradient_sparse", "forward_sparse", "host_steps"))
        console.print(f"fused path, {entrant.name}: {ran}", highlight=False, soft_wrap=True)
    console.print("Times: medians over all training steps, the contestants in turn within every epoch. Active: sites "
                  f"with |U - threshold| < {CUTOFF}. Gradient difference: the worst of all parameters, relative, one "
                  "batch, the same weights; a cutoff changes gradients by design.",
                  highlight=False, soft_wrap=True)


def draw(comparison: Comparison, out: Path) -> None:
    """Loss curves, a raster, times and memory, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings, entrants = comparison.settings, comparison.contestants
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    (curves, spikes), (bars, memory) = axes
    figure.suptitle(f"{entrants[0].name} with and without the sparse backend: 8x8 digits, "
                    f"64-{settings.hidden}-{settings.hidden}-10, T = {settings.steps}, batch {settings.batch}")

    epochs = range(1, settings.epochs + 1)
    for entrant, colour, style, width in zip(entrants, COLOURS, ("-", "--", "-"), (4.0, 1.8, 1.8), strict=True):
        label = f"{entrant.name}: {entrant.accuracies[-1]:.1%} of the test images"
        curves.plot(epochs, entrant.losses, style, color=colour, linewidth=width, label=label)
    curves.set(title="Training loss", xlabel="epoch", ylabel="loss", yscale="log")
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.legend()

    _draw_raster(spikes, comparison)

    names = [e.name for e in entrants]
    forward, backward = zip(*(times(e) for e in entrants), strict=True)
    steps = [f + b for f, b in zip(forward, backward, strict=True)]
    bars.bar(names, forward, color=COLOURS, width=0.6)
    hatched: dict[str, Any] = {"alpha": 0.55, "hatch": "//", "edgecolor": "white"}
    tops = bars.bar(names, backward, bottom=forward, color=COLOURS, width=0.6, **hatched)
    bars.bar_label(tops, [f"{s:.0f} ms\nx{steps[0] / s:.1f}" for s in steps], padding=3)
    bars.bar([0], [0], color="0.4", label="forward")
    bars.bar([0], [0], color="0.4", label="backward", **hatched)
    bars.set(title="One training step, median", ylabel="ms", ylim=(0, max(steps) * 1.2))
    bars.legend()

    saved = [e.saved / MIB for e in entrants]
    shown = memory.bar(names, saved, color=COLOURS, width=0.6)
    memory.bar_label(shown, [f"{s:.1f} MiB" for s in saved], padding=3)
    memory.set(title="Kept for backward (without weights and input)", ylabel="MiB", ylim=(0, max(saved) * 1.15))
    for axis in (curves, bars, memory):
        axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _draw_raster(axis: Any, comparison: Comparison) -> None:
    raster, steps = comparison.raster, comparison.settings.steps
    time, image, neuron = raster.nonzero(as_tuple=True)
    axis.scatter((image * steps + time).numpy(), neuron.numpy(), s=1.5, color="black", linewidths=0)
    for i in range(1, raster.shape[1]):
        axis.axvline(i * steps - 0.5, color="0.75", linewidth=0.8)
    axis.set_xticks([(i + 0.5) * steps for i in range(raster.shape[1])], [str(n) for n in comparison.raster_labels])
    axis.tick_params(axis="x", length=0)
    axis.set(title=f"Spikes of hidden layer 1 on ten test images ({raster.mean().item():.1%})",
             xlabel=f"digit shown, {steps} time steps each", ylabel="neuron",
             xlim=(-0.5, raster.shape[1] * steps - 0.5), ylim=(-0.5, raster.shape[2] - 0.5))
