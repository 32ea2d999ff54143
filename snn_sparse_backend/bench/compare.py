"""Compares two results of the benchmark: their ratios, which depend less on the machine than milliseconds do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

TOLERANCE = 0.10
RATIOS = {"speedup_step": "step speed-up", "speedup_backward": "backward speed-up", "saved_ratio": "kept ratio"}


class CompareError(ValueError):
    """The files are no results of the benchmark, or cannot be compared."""


@dataclass(frozen=True)
class Change:
    """One ratio of one fused variant in both results."""

    case: str
    variant: str
    ratio: str
    old: float
    new: float

    @property
    def factor(self) -> float:
        return self.new / self.old

    @property
    def fell(self) -> bool:
        return self.factor < 1 - TOLERANCE


def compare_files(old: Path, new: Path, console: Console) -> bool:
    """Prints how the ratios changed from one file to another.

    Returns:
        Whether no ratio fell by more than ``TOLERANCE``, and none is missing.

    Raises:
        CompareError: if a file is no result of the benchmark, or they share nothing.
    """
    before, after = _ratios(_read(old)), _ratios(_read(new))
    shared = [key for key in before if key in after]
    if not shared:
        raise CompareError(f"{old} and {new} share no case: {_cases(before)} and {_cases(after)}")
    changes = [Change(*key, before[key], after[key]) for key in shared]
    _print(changes, console)
    lost = _lost(before, after)
    for name in lost:
        console.print(f"missing in {new}: {name}", highlight=False, soft_wrap=True, markup=False)
    for case in dict.fromkeys(key[0] for key in after if key[0] not in {k[0] for k in before}):
        console.print(f"only in {new}: {case}", highlight=False, soft_wrap=True, markup=False)
    fallen = [change for change in changes if change.fell]
    console.print(f"{len(changes)} ratios, {len(fallen)} fell by more than {TOLERANCE:.0%}, "
                  f"{sum(change.factor > 1 + TOLERANCE for change in changes)} rose by more than that", highlight=False)
    return not fallen and not lost


def _lost(before: dict[tuple[str, str, str], float], after: dict[tuple[str, str, str], float]) -> list[str]:
    """What a case that both have no longer says; whole cases may be left out on purpose."""
    cases = {case for case, _, _ in after}
    return [f"{case}: {variant}: {RATIOS[ratio]}" for case, variant, ratio in before
            if case in cases and (case, variant, ratio) not in after]


def _read(path: Path) -> list[dict[str, Any]]:
    """The results for each number of threads."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise CompareError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CompareError(f"{path} is no JSON: {error}") from error
    runs = found.get("runs", [found]) if isinstance(found, dict) else []
    if not runs or not all(isinstance(run, dict) and {"environment", "cases"} <= run.keys() for run in runs):
        raise CompareError(f"{path} is no result of the benchmark: it has no environment and cases")
    return runs


def _ratios(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """By case (with its device and threads), variant, and name of the ratio; of what runs fused."""
    found = {}
    try:
        for run in runs:
            where = run["environment"]
            device = where["gpu"]["name"] if where["gpu"] else f"{where['threads']} thread(s)"
            for case in run["cases"]:
                for variant in (v for v in case["variants"] if v["fused"]):
                    for ratio in RATIOS:
                        if variant[ratio]:
                            found[f"{case['name']}, {device}", variant["name"], ratio] = float(variant[ratio])
    except (KeyError, TypeError, ValueError) as error:
        raise CompareError(f"no result of the benchmark: a part is missing or of another kind ({error!r})") from error
    return found


def _cases(ratios: dict[tuple[str, str, str], float]) -> str:
    return "; ".join(dict.fromkeys(case for case, _, _ in ratios)) or "no case"


def _print(changes: list[Change], console: Console) -> None:
    for case in dict.fromkeys(change.case for change in changes):
        table = Table(title=case, title_justify="left")
        table.add_column("variant", no_wrap=True)
        table.add_column("ratio", no_wrap=True)
        for heading in ("old", "new", "new / old", ""):
            table.add_column(heading, justify="right", no_wrap=True)
        for change in changes:
            if change.case == case:
                table.add_row(change.variant, RATIOS[change.ratio], f"x{change.old:.2f}", f"x{change.new:.2f}",
                              f"{change.factor:.2f}", "FELL" if change.fell else "",
                              style="red" if change.fell else None)
        console.print(table)
