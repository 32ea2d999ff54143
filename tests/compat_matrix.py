"""Runs the equivalence tests with other versions of Python, torch, snnTorch and Norse, each in a fresh environment.

    python tests/compat_matrix.py [--norse 1.0.0] [--torch 2.13] ...

Needs nothing but Python and pip. What was found is kept in the table of docs/versions.md; combinations that are not run
keep the row they have there, or are said to be untested, and why.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- begin: written by make compat -->", "<!-- end -->"
TESTS = ("test_snntorch_equivalence", "test_snntorch_delta", "test_snntorch_inhibition", "test_snntorch_graded",
         "test_norse_equivalence", "test_norse_recurrent", "test_norse_linear", "test_norse_exponential",
         "test_norse_refrac", "test_norse_versions", "test_registered", "test_fallback", "test_probe", "test_trials")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "numpy", "setuptools", "wheel")


def versions() -> Any:
    """compat/versions.py by itself: the package needs torch, which may not be there."""
    spec = importlib.util.spec_from_file_location("versions", ROOT / "compat" / "versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins() -> dict[str, str]:
    """The lines of constraints.txt by the name of the package."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {line.partition("==")[0]: line for line in lines}


@dataclass(frozen=True)
class Combination:
    """One environment; Python and torch by their series, like 3.11 and 2.13."""

    python: str
    torch: str
    snntorch: str
    norse: str

    @property
    def name(self) -> str:
        return f"python-{self.python}-torch-{self.torch}-snntorch-{self.snntorch}-norse-{self.norse}"

    @property
    def wishes(self) -> dict[str, str]:
        """What pip is asked for: of torch the pinned release, if it is of this series."""
        pinned = pins()["torch"]
        torch = pinned if series(pinned) == self.torch else f"torch=={self.torch}.*"
        return {"torch": torch, "snntorch": f"snntorch=={self.snntorch}", "norse": f"norse=={self.norse}"}


@dataclass(frozen=True)
class Outcome:
    """What is known of a combination: ``passed``, ``failed`` or ``untested``."""

    status: str
    detail: str
    day: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}" + (f", {self.day}" if self.day else "")


def outcome_of(cell: str) -> Outcome:
    """Reads what ``str`` of an outcome wrote.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"(passed|failed|untested): (.+?)(?:, (\d{4}-\d\d-\d\d))?", cell.strip())
    if found is None:
        raise ValueError(f"not an outcome: {cell.strip()!r}")
    return Outcome(found[1], found[2], found[3] or "")


def series(requirement: str) -> str:
    """``torch==2.13.0`` or ``2.13.*`` -> ``2.13``."""
    found = re.search(r"\d+\.\d+", requirement)
    assert found is not None, requirement
    return found[0]


# ---------------------------------------------------------------------------------------------------- the table


def every() -> list[Combination]:
    """All combinations of supported versions."""
    known = versions().KNOWN
    torches = map(series, known["torch"])
    return [Combination(*each) for each in product(versions().PYTHONS, torches, known["snntorch"], known["norse"])]


def table(results: Mapping[Combination, Outcome]) -> str:
    """A row for each Python and torch, a column for each pair of libraries."""
    pairs = sorted({(c.snntorch, c.norse) for c in results})
    lines = ["| Python | torch | " + " | ".join(f"snntorch {s}, norse {n}" for s, n in pairs) + " |",
             "|---" * (len(pairs) + 2) + "|"]
    for python, torch in dict.fromkeys((c.python, c.torch) for c in results):
        cells = [str(results[Combination(python, torch, *pair)]) for pair in pairs]
        lines.append(f"| {python} | {torch} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(text: str) -> dict[Combination, Outcome]:
    """The outcomes in a document; none if it has no table yet."""
    inside = text.partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in inside.splitlines() if "|" in line]
    if not rows:
        return {}
    pairs = [tuple(re.findall(r"\d\S*\b", title)) for title in rows[0][2:]]
    return {Combination(row[0], row[1], *pair): outcome_of(cell)
            for row in rows[2:] for pair, cell in zip(pairs, row[2:], strict=True)}


def written(text: str, results: Mapping[Combination, Outcome]) -> str:
    """The document with this table in the place of the one it has.

    Raises:
        ValueError: if it has no place for one.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN!r} and {END!r} in the document")
    return f"{before}{BEGIN}\n{table(results)}{END}{after}"


# ---------------------------------------------------------------------------------------------------- one environment

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def shell(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in the root and keeps what it prints."""
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class StepError(Exception):
    """A command failed; the message is what the table says."""


def must(run: Run, what: str, *command: str) -> str:
    done = run(command)
    if done.returncode:
        print(done.stdout, flush=True)
        last = ([line for line in done.stdout.splitlines() if line.strip()] or ["no output"])[-1]
        raise StepError(f"{what}: {last.replace('|', '/').strip()[:120]}")
    return done.stdout


@cache
def interpreter(python: str) -> str | None:
    """A Python of a series, None if there is none here."""
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    found = shutil.which(f"python{python}")  # which may be a shim of pyenv, for a Python that is not there
    if found is None or subprocess.run([found, "--version"], capture_output=True).returncode:
        return None
    return found


def install(combination: Combination, folder: Path, base: str, run: Run) -> str:
    """Makes an environment, or takes the one that an earlier run left; returns its Python."""
    python, ready = str(folder / "bin" / "python"), folder / ".installed"
    if ready.exists():
        return python
    must(run, "venv", base, "-m", "venv", "--clear", str(folder))
    limits = folder / "constraints.txt"
    limits.write_text("\n".join({**pins(), **combination.wishes}.values()) + "\n")
    pip = (python, "-m", "pip", "install", "-q", "-c", str(limits))
    torch, snntorch, _ = combination.wishes.values()
    must(run, "pip install", *pip, torch, snntorch, *TOOLS, "-e", str(ROOT))
    # Norse 1.0 is compiled against the torch that is there, and pip would take that of another environment for it.
    fresh = () if torch == pins()["torch"] else ("--no-cache-dir",)
    must(run, "pip install", *pip, *fresh, "--no-deps", "--no-build-isolation", "-r",
         str(ROOT / "requirements" / "norse-without-torchvision.txt"))
    ask = "import importlib.metadata as m; print(*[m.version(n) for n in ('torch', 'snntorch', 'norse')])"
    found = must(run, "asking for versions", python, "-c", ask).split()
    wanted = (combination.torch, combination.snntorch, combination.norse)
    if (series(found[0]), *found[1:]) != wanted:
        raise StepError(f"pip installed {' '.join(found)} for {' '.join(wanted)}")
    ready.touch()
    return python


def try_out(combination: Combination, folder: Path, base: str, tests: Sequence[str], run: Run) -> Outcome:
    """Runs the tests of one combination."""
    today = date.today().isoformat()
    try:
        python, report = install(combination, folder, base, run), folder / "report.xml"
        report.unlink(missing_ok=True)
        done = run((python, "-m", "pytest", *(f"tests/{name}.py" for name in tests), "-p", "no:cacheprovider",
                    f"--junitxml={report}"))
        if done.returncode or not report.exists():
            print(done.stdout, flush=True)
        if not report.exists():
            raise StepError(f"pytest ended with {done.returncode} and left no report")
        numbers = counted(report.read_text())
    except StepError as error:
        return Outcome("failed", str(error), today)
    bad, ran = numbers["failures"] + numbers["errors"], numbers["tests"] - numbers["skipped"]
    if bad or done.returncode or not ran:
        return Outcome("failed", f"{bad} of {ran} tests (pytest: {done.returncode})", today)
    return Outcome("passed", f"{ran} tests" + (f" ({numbers['skipped']} skipped)" if numbers["skipped"] else ""), today)


def counted(report: str) -> dict[str, int]:
    """The numbers in a JUnit report."""
    suites = list(ElementTree.fromstring(report).iter("testsuite"))
    return {name: sum(int(suite.get(name, 0)) for suite in suites)
            for name in ("tests", "failures", "errors", "skipped")}


# ---------------------------------------------------------------------------------------------------- the command


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    known, pythons, torch = versions().KNOWN, list(versions().PYTHONS), series(pins()["torch"])
    torches = list(map(series, known["torch"]))
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=pythons, choices=pythons)
    parser.add_argument("--torch", nargs="+", default=[torch], choices=torches,
                        help=f"default: {torch}, which is pinned; others may be downloads of gigabytes")
    parser.add_argument("--snntorch", nargs="+", default=list(known["snntorch"]), choices=known["snntorch"])
    parser.add_argument("--norse", nargs="+", default=list(known["norse"]), choices=known["norse"])
    parser.add_argument("--tests", nargs="+", default=list(TESTS), metavar="NAME", help="files in tests/, without .py")
    parser.add_argument("--out", type=Path, default=DOCUMENT, help="the document (default: docs/versions.md)")
    parser.add_argument("--environments", type=Path, metavar="FOLDER",
                        help="where environments are made, kept and found again (default: made anew and removed)")
    return parser.parse_args(given)


def reason(combination: Combination, base: str | None) -> str:
    """Why a combination is not run."""
    if base is None:
        return f"no python{combination.python} on the PATH"
    return f"torch {combination.torch} was not asked for, nor is it pinned" if combination.torch != series(
        pins()["torch"]) else "not asked for"


def main(given: Sequence[str] | None = None, run: Run = shell) -> int:
    """Runs what was asked for and is possible here, and writes the table after each; 1 if anything failed."""
    options, failed = arguments(given), False
    text = options.out.read_text()
    before, results, todo = parse(text), {}, {}
    for combination in every():
        base = interpreter(combination.python)
        if base is not None and all(getattr(combination, name) in getattr(options, name)
                                    for name in ("python", "torch", "snntorch", "norse")):
            todo[combination] = base
        kept = before.get(combination)
        if kept is None or kept.status == "untested":
            kept = Outcome("untested", reason(combination, base))
        results[combination] = kept
    for combination, base in todo.items():
        with tempfile.TemporaryDirectory(prefix="compat-") as temporary:
            folder = (options.environments or Path(temporary)).absolute() / combination.name
            results[combination] = try_out(combination, folder, base, options.tests, run)
        failed |= results[combination].status == "failed"
        print(f"{combination.name}: {results[combination]}", flush=True)
        options.out.write_text(written(text, results))
    options.out.write_text(written(text, results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
