"""What is shipped: the list of packages, the wheel, and the pins."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("snn_sparse_backend", "adapters", "compat", "csrc")

needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77,
    reason="building a wheel without the network needs setuptools 77 or newer",
)


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def shipped_files() -> list[str]:
    """Every file that has to be in the wheel, by its place there."""
    files = []
    for top in SHIPPED:
        inside = "" if top == "snn_sparse_backend" else "snn_sparse_backend/"
        files += [
            inside + path.relative_to(ROOT).as_posix()
            for path in (ROOT / top).rglob("*")
            if path.is_file() and path.suffix != ".pyc" and path.name != ".gitignore"
        ]
    return files


def name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found is not None
    return found[0].lower()


def test_packages_are_the_folders() -> None:
    folders = {str(Path(file).parent).replace("/", ".") for file in shipped_files()}
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_everything_named_is_pinned() -> None:
    project = pyproject()["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    wanted += [
        line
        for line in (ROOT / "requirements/norse-without-torchvision.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    # setuptools builds the wheel; which versions of the two torch accepts depends on torch.
    assert {name(each) for each in wanted} - {name(pin) for pin in pins} == {"setuptools", "cuda-toolkit"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the checkout: building leaves files behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for top in SHIPPED:
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.toml"), *ROOT.glob("LICENSE"), *ROOT.glob("*.md")]:
        shutil.copy(file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return made


@needs_setuptools
def test_wheel_holds_what_is_needed_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = [file for file in archive.namelist() if ".dist-info/" not in file]
        info = [file.split(".dist-info/")[1] for file in archive.namelist() if ".dist-info/" in file]
    assert sorted(held) == sorted(shipped_files())
    assert "licenses/LICENSE" in info and "entry_points.txt" in info
    assert wheel.name.endswith("-py3-none-any.whl")


@needs_setuptools
def test_installed_package_finds_its_parts(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib.util, snn_sparse_backend.build as build\n"
        "print(build.csrc_folder())\n"
        "for part in ('adapters', 'compat'):\n"
        "    print(importlib.util.find_spec(f'snn_sparse_backend.{part}').submodule_search_locations[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package = tmp_path / "snn_sparse_backend"
    assert done.stdout.splitlines() == [str(package / part) for part in ("csrc", "adapters", "compat")]
