"""The matrix of versions without a network: what is run, what is written, and that a failure is one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import compat_matrix as matrix
import pytest
from compat_matrix import Combination, Outcome

TODAY = date.today().isoformat()
PINNED = Combination("3.11", matrix.series(matrix.pins()["torch"]), "1.0.0", "1.1.0")
EMPTY = f"# Versions\n\n{matrix.BEGIN}\n{matrix.END}\n\nafter\n"
ONE = ("--python", "3.11", "--snntorch", "1.0.0", "--norse", "1.1.0")


class Fake:
    """Stands for the shell.

    Args:
        report: numbers of tests, failures, errors and skipped tests; None: no report is left.
        fails: a word of the command that fails.
        installed: what the environment says it has.
    """

    def __init__(self, report: tuple[int, int, int, int] | None = (7, 0, 0, 2), fails: str = "",
                 installed: str = "2.13.0+cpu 1.0.0 1.1.0") -> None:
        self.report, self.fails, self.installed = report, fails, installed
        self.commands: list[tuple[str, ...]] = []

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(tuple(command))
        if self.fails and self.fails in command:
            return subprocess.CompletedProcess(command, 1, "much ado\nERROR: a | b\n\n")
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)
        path = next((word.partition("=")[2] for word in command if word.startswith("--junitxml=")), None)
        if path is None:
            return subprocess.CompletedProcess(command, 0, self.installed if "-c" in command else "")
        if self.report is None:
            return subprocess.CompletedProcess(command, 4, "usage: pytest")
        numbers = dict(zip(("tests", "failures", "errors", "skipped"), self.report, strict=True))
        words = " ".join(f'{name}="{number}"' for name, number in numbers.items())
        Path(path).write_text(f"<testsuites><testsuite {words}/></testsuites>")
        return subprocess.CompletedProcess(command, int(self.report[1] + self.report[2] > 0), "")


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A document without a table, on a machine that has Python 3.11 only."""
    monkeypatch.setattr(matrix, "interpreter", lambda python: "python" if python == "3.11" else None)
    path = tmp_path / "versions.md"
    path.write_text(EMPTY)
    return path


def run(document: Path, fake: Any, *more: str) -> tuple[int, dict[Combination, Outcome]]:
    code = matrix.main([*more, "--out", str(document), "--environments", str(document.parent / "made")], fake)
    return code, matrix.parse(document.read_text())


# ---------------------------------------------------------------------------------------------------- the table


def test_what_is_written_can_be_read() -> None:
    outcomes = (Outcome("passed", "12 tests (3 skipped)", "2026-01-31"), Outcome("failed", "pip install: ERROR, no",
                "2026-01-31"), Outcome("untested", "no Python 3.10, nor a reason"))
    results = {combination: outcomes[i % 3] for i, combination in enumerate(matrix.every())}
    text = matrix.written(EMPTY, results)
    assert matrix.parse(text) == results
    assert text.startswith("# Versions\n\n") and text.endswith(f"{matrix.END}\n\nafter\n")
    assert matrix.written(text, results) == text


@pytest.mark.parametrize("cell", ["", "passed", "fine: 3 tests", "passed:"])
def test_other_cells_are_refused(cell: str) -> None:
    with pytest.raises(ValueError, match="not an outcome"):
        matrix.outcome_of(cell)


def test_a_document_without_a_place() -> None:
    assert matrix.parse("# Versions\n") == {}
    with pytest.raises(ValueError, match="no '<!-- begin"):
        matrix.written("# Versions\n", {PINNED: Outcome("passed", "1 tests")})


def test_every_supported_version_is_in_the_matrix() -> None:
    assert len(matrix.every()) == len(set(matrix.every())) == 4 * 5 * 2 * 2 and PINNED in matrix.every()
    wishes = Combination("3.12", "2.15", "0.9.4", "1.0.0").wishes
    assert list(wishes.values()) == ["torch==2.15.*", "snntorch==0.9.4", "norse==1.0.0"]
    assert PINNED.wishes["torch"] == matrix.pins()["torch"]


def test_the_document_has_the_matrix() -> None:
    found = matrix.parse(matrix.DOCUMENT.read_text())
    assert list(found) == matrix.every()
    assert found[PINNED].status == "passed"
    assert all(outcome.day for outcome in found.values() if outcome.status != "untested")


def test_pyproject_asks_for_the_oldest_known_versions() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text())["project"]
    known = matrix.versions().KNOWN
    assert f"torch>={matrix.series(known['torch'][0])}" in project["dependencies"]
    extras = project["optional-dependencies"]
    assert extras["snntorch"] == [f"snntorch>={known['snntorch'][0]}"]
    assert extras["norse"] == [f"norse>={matrix.series(known['norse'][0])}"]
    assert project["requires-python"] == f">={matrix.versions().PYTHONS[0]}"
    for python in matrix.versions().PYTHONS:
        assert f"Programming Language :: Python :: {python}" in project["classifiers"]


# ---------------------------------------------------------------------------------------------------- running


def test_one_combination(document: Path) -> None:
    code, results = run(document, fake := Fake(), *ONE)
    assert code == 0 and list(results) == matrix.every()
    assert results.pop(PINNED) == Outcome("passed", "5 tests (2 skipped)", TODAY)
    assert {outcome.status for outcome in results.values()} == {"untested"}
    assert results[Combination("3.12", "2.13", "1.0.0", "1.1.0")].detail == "no python3.12 on the PATH"
    assert results[Combination("3.11", "2.13", "1.0.0", "1.0.0")].detail == "not asked for"
    assert "torch 2.14 was not asked for" in results[Combination("3.11", "2.14", "1.0.0", "1.1.0")].detail
    (venv,) = [command for command in fake.commands if "venv" in command]
    limits = (Path(venv[-1]) / "constraints.txt").read_text().split("\n")
    assert {"torch==2.13.0", "snntorch==1.0.0", "norse==1.1.0", matrix.pins()["nir"]} <= set(limits)
    tests = fake.commands[-1]
    assert [f"tests/{name}.py" for name in matrix.TESTS] == [word for word in tests if word.startswith("tests/")]
    assert all((matrix.ROOT / "tests" / f"{name}.py").exists() for name in matrix.TESTS)


def test_all_that_can_be_run(document: Path) -> None:
    calls: list[Combination] = []

    def remembered(combination: Combination, *_: Any) -> Outcome:
        calls.append(combination)
        return Outcome("passed", "1 tests", TODAY)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "try_out", remembered)
        assert run(document, Fake())[0] == 0
    assert calls == [Combination("3.11", "2.13", s, n) for s in ("0.9.4", "1.0.0") for n in ("1.0.0", "1.1.0")]


def test_other_rows_stay(document: Path) -> None:
    run(document, Fake(), *ONE)
    code, results = run(document, Fake(installed="2.13.0+cpu 1.0.0 1.0.0"), *ONE[:-1], "1.0.0")
    assert code == 0
    passed = {combination for combination, outcome in results.items() if outcome.status == "passed"}
    assert passed == {PINNED, Combination("3.11", "2.13", "1.0.0", "1.0.0")}


def test_another_torch_compiles_norse_anew(document: Path) -> None:
    run(document, pinned := Fake(), *ONE)
    run(document, other := Fake(installed="2.14.1 1.0.0 1.1.0"), *ONE, "--torch", "2.14")
    assert not any("--no-cache-dir" in command for command in pinned.commands)
    (norse,) = [command for command in other.commands if "--no-cache-dir" in command]
    assert "--no-deps" in norse and any("torch==2.14.*" in command for command in other.commands)


def test_an_environment_is_found_again(document: Path) -> None:
    run(document, Fake(), *ONE)
    _, results = run(document, again := Fake((9, 0, 0, 0)), *ONE)
    assert len(again.commands) == 1 and results[PINNED].detail == "9 tests"


@pytest.mark.parametrize(("fake", "detail"), [
    (lambda: Fake(fails="pip"), "pip install: ERROR: a / b"),
    (lambda: Fake(fails="venv"), "venv: ERROR: a / b"),
    (lambda: Fake(report=None), "pytest ended with 4 and left no report"),
    (lambda: Fake(report=(9, 1, 1, 3)), "2 of 6 tests (pytest: 1)"),
    (lambda: Fake(report=(3, 0, 0, 3)), "0 of 0 tests (pytest: 0)"),
    (lambda: Fake(installed="2.15.0 1.0.0 1.1.0"), "pip installed 2.15.0 1.0.0 1.1.0 for 2.13 1.0.0 1.1.0"),
    (lambda: Fake(installed="2.13.0 1.0.0 1.0.0"), "pip installed 2.13.0 1.0.0 1.0.0 for 2.13 1.0.0 1.1.0"),
])
def test_a_failure_is_written_and_returned(fake: Callable[[], Fake], detail: str, document: Path) -> None:
    code, results = run(document, fake(), *ONE)
    assert code == 1 and results[PINNED] == Outcome("failed", detail, TODAY)
    code, results = run(document, Fake(), *ONE)
    assert code == 0 and results[PINNED].status == "passed", "what was left half made is made anew"


def test_a_python_that_does_not_run(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "interpreter", lambda python: "false" if python == "3.11" else None)
    code, results = run(document, matrix.shell, *ONE)
    assert code == 1 and results[PINNED] == Outcome("failed", "venv: no output", TODAY)


def test_interpreters_are_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, code in (("python3.90", 0), ("python3.91", 127)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.interpreter("3.90") == str(tmp_path / "python3.90")
    assert matrix.interpreter("3.91") is None and matrix.interpreter("3.92") is None


@pytest.mark.parametrize("given", [("--norse", "7"), ("--torch", "9.9"), ("--python", "2.7"), ("--snntorch",),
                                   ("--what",)])
def test_wrong_options(given: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        matrix.main(list(given))
    assert caught.value.code == 2
