"""Norse's own installed tests, with its classes and with the swapped ones: the same tests pass.

This file is also the pytest plugin of these two runs (``-p test_norse_own_suite``): the hooks at the end swap the
classes and write down what passed.
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

SWAP, REPORT = "SNN_SPARSE_TEST_SWAP", "SNN_SPARSE_TEST_REPORT"
FILES = ("module/test/test_lif.py", "module/test/test_leaky_integrator.py", "module/test/test_lif_box.py",
         "module/test/test_leaky_integrator_box.py", "module/test/test_iaf.py", "module/test/test_lsnn.py",
         "module/test/test_lif_refrac.py",
         "module/test/test_sequential.py", "module/test/test_lift.py", "module/test/test_snn.py",
         "module/test/test_regularization.py", "module/test/test_training.py", "utils/test/test_nir_export.py",
         "utils/test/test_nir_import.py")


def run(folder: Path, files: list[Path], swap: bool) -> dict[str, Any]:
    """Runs Norse's tests in a process of their own; what passed, and what the backend counted."""
    here, report = Path(__file__).resolve().parent, folder / f"{swap}.json"
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), SWAP: str(int(swap)), REPORT: str(report)}
    options = ["-q", "-p", "test_norse_own_suite", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", os.devnull]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *map(str, files)], env=environment, cwd=folder,
                          capture_output=True, text=True, timeout=600)
    assert report.exists(), done.stdout + done.stderr
    return json.loads(report.read_text())


def test_norse_passes_its_own_tests_with_the_swapped_classes(tmp_path: Path) -> None:
    pytest.importorskip("norse")
    spec = find_spec("norse.torch")
    assert spec is not None and spec.origin is not None
    files = [path for path in (Path(spec.origin).parent / name for name in FILES) if path.exists()]
    if not files:
        pytest.skip("the installed Norse has no tests")
    expected, found = run(tmp_path, files, swap=False), run(tmp_path, files, swap=True)
    assert found["passed"] == expected["passed"] and len(expected["passed"]) > 40
    assert found["failed"] == expected["failed"]
    assert expected["counts"] == {} and found["counts"]["neuron_steps"] > 50


# ------------------------------------------------------------------------------------------------ the plugin

outcomes: dict[str, set[str]] = {"passed": set(), "failed": set(), "skipped": set()}


def pytest_configure() -> None:
    import torch

    torch.compile = functools.partial(torch.compile, backend="eager")  # traced like always, compiled in no time
    if os.environ[SWAP] != "1":
        return
    import norse.torch as stock
    from snn_sparse_backend.adapters import norse as swapped

    for found in pkgutil.iter_modules(import_module("norse.torch.module").__path__, "norse.torch.module."):
        import_module(found.name)
    hosts = {name: getattr(stock, name) for name in swapped.__all__}
    for module in [m for name, m in sys.modules.items() if name.startswith("norse.")]:
        for name, host in hosts.items():
            if vars(module).get(name) is host:
                setattr(module, name, getattr(swapped, name))


def pytest_runtest_setup() -> None:
    import torch

    torch.manual_seed(0)  # some of Norse's tests fail for some random inputs


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        path, _, name = report.location
        outcomes[report.outcome].add(f"{Path(path).name}::{name}")


def pytest_sessionfinish() -> None:
    import snn_sparse_backend as sparse

    written: dict[str, Any] = {name: sorted(ids) for name, ids in outcomes.items()}
    Path(os.environ[REPORT]).write_text(json.dumps({**written, "counts": dict(sparse.counts)}))
