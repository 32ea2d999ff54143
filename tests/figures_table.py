"""The figures of the README, from the committed files of a run of the benchmark.

``python tests/figures_table.py`` writes them between the two marks in the README; a test sees to it that they are
there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
# By instruction set and threads; cases of a later file stand for those of an earlier one.
FILES = {
    "AVX-512": ("2026-11-29-cpu/threads-1/bench.json", "2026-11-29-cpu/conv-1/bench.json",
                "2026-11-29-cpu/norse-2048-1/bench.json", "2026-11-29-cpu/norse-4096-1/bench.json"),
    "AVX-512, two threads": ("2026-11-29-cpu/threads-2/bench.json", "2026-11-29-cpu/conv-2/bench.json",
                             "2026-11-29-cpu/small-2/bench.json"),
    "AVX2": ("2026-11-28-cpu/threads-1/bench.json", "2026-11-28-cpu/recurrent-1/bench.json",
             "2026-11-28-cpu/again-1/bench.json"),
    "AVX2, two threads": ("2026-11-28-cpu/threads-2/bench.json", "2026-11-28-cpu/wide-2/bench.json",
                          "2026-11-28-cpu/norse-2/bench.json"),
}
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
ROWS = {
    "snnTorch": "stock snnTorch",
    "Norse sequence": "stock Norse, sequence (quadratic backward)",
    "Norse cells, unbind": "stock Norse, cells over `unbind`",
    "SpikingJelly multi-step": "SpikingJelly multi-step",
    "fused, dense products": "time-fused, all products dense",
    "sparse, exact (default)": "**the default** (outputs bit-identical, gradients exact)",
    "cutoff 0.2": "`cutoff=0.2`",
    "cutoff 0.2, sparse forward": '`cutoff=0.2, forward="sparse"`',
}
DEFAULT, FASTEST = "sparse, exact (default)", "cutoff 0.2, sparse forward"


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of the files in each entry of ``FILES``."""
    results = {}
    for key, names in FILES.items():
        first, *later = (json.loads((folder / name).read_text()) for name in names)
        cases = {case["name"]: case for one in (first, *later) for case in one["cases"]}
        results[key] = {**first, "cases": list(cases.values())}
    return results


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _ratio(value: float) -> str:
    return f"x{value:.1f}" if value < 99.95 else f"x{value:.0f}"


def detail(case: dict[str, Any]) -> list[str]:
    """One case, variant by variant."""
    rows = []
    for variant in case["variants"]:
        name = variant["name"]
        if name not in ROWS or (name.startswith("Norse") and case["library"] != "norse"):
            continue
        peak = variant["peak_rss_mib"]
        rows.append([ROWS[name], f"{variant['forward_ms']:.0f}", f"{variant['backward_ms']:.0f}",
                     _ratio(variant["speedup_step"]), _ratio(variant["speedup_backward"]),
                     f"{variant['saved_mib']:.1f}", f"{peak:.0f}" if peak is not None else ""])
    floor = case["gemm_floor_ms"]
    rows.append(["the dense matrix products alone, `torch.mm`", f"{floor['forward']:.0f}", f"{floor['backward']:.0f}",
                 "", "", "", ""])
    name = case["name"].replace("snntorch", "snnTorch").replace("norse", "Norse").replace("=", " = ")
    return _table([name, "forward ms", "backward ms", "step", "backward", "kept MiB", "peak MiB"], rows)


def overview(cases: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each case."""
    rows = []
    for case in cases:
        found = {variant["name"]: variant for variant in case["variants"]}
        host, default, fastest = case["variants"][0], found[DEFAULT], found[FASTEST]
        rows.append([case["name"], f"{host['step_ms']:.0f}", _ratio(default["speedup_step"]),
                     _ratio(fastest["speedup_step"]), f"{default['step_per_floor']:.2f}",
                     f"{fastest['step_per_floor']:.2f}"])
    return _table(["case", "stock ms", "default", "cutoff, sparse forward", "default / products", "cutoff / products"],
                  rows)


def shares(case: dict[str, Any]) -> str:
    """The mean share of active sites of a case's hidden layers."""
    found = [layer["active_fraction"] for layer in case["hidden"]]
    return f"{100 * sum(found) / len(found):.1f} %"


def machine(result: dict[str, Any]) -> str:
    """What a result was measured on."""
    e = result["environment"]
    return f"{e['cpu'].replace('(R)', '')} ({e['instruction_set']})"


def markdown(results: dict[str, dict[str, Any]], folder: str) -> str:
    """All of it; ``folder``: where the files are, from the README."""
    wide, wide_two, one, two = (results[key] for key in FILES)
    e = wide["environment"]
    first = {case["library"]: case for case in reversed(wide["cases"])}
    versions = ", ".join(f"{name} {e[name].split('+')[0]}" for name in ("torch", "snntorch", "norse", "spikingjelly"))
    place = f"{folder}/{Path(FILES['AVX-512'][0]).parent}"
    pictures = ", ".join(f"[{name}]({place}/{name})" for name in ("bench.png", "memory.png"))
    files = ", ".join(f"[{name}]({folder}/{name})" for names in FILES.values() for name in names)
    lines = [
        "One training step, forward and backward, medians of interleaved rounds in one process, one thread of an",
        f"{machine(wide)}, float32, {versions};",
        "input spikes 2 %, hidden layers at 2 %, active sites (\\|U - threshold\\| < 0.2) "
        f"{shares(first['snntorch'])} in snnTorch, {shares(first['norse'])} in Norse.",
        '"Kept" are the bytes held for backward, weights and input excluded; "peak" is by how much a step raises the',
        "resident memory.",
        "", *detail(first["snntorch"]), "", *detail(first["norse"]), "",
        "Whole step, stock library = 1 (Norse: its sequence form, whose backward is quadratic in T where the input",
        "of a layer needs a gradient), and as a share of the bare dense matrix products of the step:",
        "", *overview(wide["cases"]), "",
        "Two threads:",
        "", *overview(wide_two["cases"]), "",
        f"One thread of an {machine(one)}, whose dense products are slower:",
        "", *overview(one["cases"]), "",
        "Two threads of that machine:",
        "", *overview(two["cases"]), "",
        "Commands: `python -m snn_sparse_backend bench --threads 1`, and again where something had become faster: on",
        "the first machine with `--only 12C5` and `--library norse --only 2048`, then `4096`, on the second with",
        "`--only 700-1000`; `--threads 1 --preset recurrent` for the layers marked r. With `--threads 2`, on the first",
        "machine and with `--compile-seconds 0`, `--only 700-`, `12C5` and `00-10`; on the second, in three runs, the",
        "first eleven cases,",
        "`--library snntorch --only 4096`, and `--library norse --only B=16`.",
        f"Files: {files},",
        f"{pictures}.",
    ]
    return "\n".join(lines)


def replaced(readme: str, figures: str) -> str:
    """The README with these figures in it."""
    begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:begin]}\n{figures}\n{readme[end:]}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(replaced(path.read_text(), markdown(load(ROOT / RESULTS), RESULTS)))
