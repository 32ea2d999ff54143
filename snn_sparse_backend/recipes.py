"""What the two libraries of the core are made from, and the tools that make them.

A `Recipe` lists the compiled files of a library with their flags, and carries a digest of everything that decides
what the library contains. build.py turns recipes into libraries.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORE = "snn_sparse_core"
NODE = "snn_sparse_node"

# The order is that of the link. An inline function of a header is kept once, from the first object that has it: with
# the plain instruction set first, code meant for a newer processor is never picked for an older one.
INSTRUCTION_SETS = {
    "base": (),
    "v3": ("-march=x86-64-v3",),
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
COMMON_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
CORE_FLAGS = ("-std=c++17", "-O3", *COMMON_FLAGS, "-fopenmp", "-fno-math-errno", "-fno-trapping-math")

_SOURCE_SUFFIXES = {".cpp", ".h", ".hpp", ".inc"}

MEANWHILE = "Until then the host library's own code runs."
_NO_COMPILER = (
    "no C++ compiler found (looked for $CXX, c++, g++, clang++). Install one (Debian, Ubuntu: apt install g++; "
    f"conda: conda install gxx_linux-64) and start again. {MEANWHILE}"
)


class BuildError(RuntimeError):
    """The core could not be compiled or loaded; the message says why and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command that starts it, and what it says about itself."""

    command: tuple[str, ...]
    version: str
    target: str

    def digest(self) -> str:
        """A short name for this compiler, part of the name of what it made."""
        return _digest([self.command, self.version, self.target])[:8]


@dataclass(frozen=True)
class Unit:
    """One compiled file."""

    source: Path
    object: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """How one library is made. `places` and `link_places` only say where things lie, so they are not in the digest."""

    name: str
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    places: tuple[str, ...]
    link_places: tuple[str, ...]
    identity: dict[str, Any]

    def digest(self) -> str:
        """A name for everything that decides what the library contains, but the compiler."""
        units = [(unit.object, unit.flags) for unit in self.units]
        return _digest([self.identity, units, self.link, platform.machine(), platform.libc_ver()])[:20]


def csrc_folder() -> Path:
    """The sources of the core: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def find_compiler() -> Compiler:
    """$CXX if it is set, else the first of c++, g++ and clang++ on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for program, *arguments in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(program)
        if path:
            return _describe_compiler((path, *arguments))
    if chosen:
        raise BuildError(f"$CXX names the compiler {chosen[0]!r}, which is not here. Correct or unset it. {MEANWHILE}")
    raise BuildError(_NO_COMPILER)


def _describe_compiler(command: tuple[str, ...]) -> Compiler:
    # The C locale: a translated answer would be another compiler to us.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        answer = subprocess.run([*command, "-v"], capture_output=True, text=True, env=environment, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the compiler {shlex.join(command)} does not run: {error}. {MEANWHILE}") from error
    version = re.search(r"^.*\bversion .*\S", answer.stderr, re.MULTILINE)
    target = re.search(r"^Target: (.*\S)", answer.stderr, re.MULTILINE)
    return Compiler(command, version[0] if version else answer.stderr, target[1] if target else "unknown")


def find_ninja() -> Path:
    try:
        import ninja
    except ImportError:
        folder = ""
    else:
        folder = ninja.BIN_DIR
    # Its own path, not PATH: a virtual environment that was not activated is not on PATH.
    program = Path(folder) / "ninja"
    if not folder or not program.is_file():
        raise BuildError(f"compiling needs ninja: pip install ninja. {MEANWHILE}")
    return program


def core_recipe(csrc: Path | None = None) -> Recipe:
    """The CPU kernels: on x86-64 each file once per instruction set; dispatch.cpp, which chooses one, only once."""
    csrc = csrc or csrc_folder()
    sources = _sources(csrc / "cpu")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = [
        Unit(source, f"{source.stem}.o", _core_flags(source, ("-DSSB_X86=1",) if x86 else ()))
        for source in sources
        if source.name == "dispatch.cpp"
    ]
    for isa in INSTRUCTION_SETS if x86 else ("base",):
        flags = (f"-DSSB_ISA={isa}", *INSTRUCTION_SETS[isa])
        units += [
            Unit(source, f"{source.stem}.{isa}.o", _core_flags(source, flags))
            for source in sources
            if source.name != "dispatch.cpp"
        ]
    files = [path for path in csrc.rglob("*") if path.relative_to(csrc).parts[0] not in ("torch", "cuda")]
    # A missing function fails the link instead of the first user's call.
    link = ("-shared", "-fopenmp", *(("-Wl,-z,defs",) if sys.platform == "linux" else ()))
    return Recipe(CORE, tuple(units), link, (f"-I{csrc}",), (), {"sources": _contents(files, csrc)})


def _core_flags(source: Path, extra: tuple[str, ...]) -> tuple[str, ...]:
    # A fused multiply-add in a neuron's step would move its membrane by a rounding and so flip spikes of the host
    # library. The products of a synapse promise no bits, and gain from it.
    contract = "fast" if source.name.startswith("synapse") else "off"
    return (*CORE_FLAGS, f"-ffp-contract={contract}", *extra)


def node_recipe(csrc: Path | None = None) -> Recipe:
    """The autograd node, for the torch and the Python that run now."""
    import torch

    csrc = csrc or csrc_folder()
    python = Path(sysconfig.get_paths()["include"])
    if not (python / "Python.h").is_file():
        raise BuildError(
            f"the headers of Python are not in {python}. Install them (Debian, Ubuntu: apt install python3-dev) and "
            f"start again. {MEANWHILE}"
        )
    folder = Path(torch.__file__).parent
    version = str(torch.__version__)
    abi = bool(torch.compiled_with_cxx11_abi())
    # From 2.12 on torch's headers are written in C++20.
    standard = "c++20" if tuple(int(part) for part in version.split(".")[:2]) >= (2, 12) else "c++17"
    macros = (f"-D_GLIBCXX_USE_CXX11_ABI={int(abi)}", f"-DTORCH_EXTENSION_NAME={NODE}")
    flags = (f"-std={standard}", "-O2", *COMMON_FLAGS, *macros)
    # -isystem: warnings in torch's headers are not ours.
    headers = (folder / "include", folder / "include/torch/csrc/api/include", python)
    places = (f"-I{csrc}", *(part for header in headers for part in ("-isystem", str(header))))
    identity = {
        "sources": _contents([*(csrc / "torch").rglob("*"), *csrc.glob("*")], csrc),
        "torch": [version, torch.version.git_version, abi],
        "python": sysconfig.get_config_var("SOABI"),
    }
    units = tuple(Unit(source, f"{source.stem}.o", flags) for source in _sources(csrc / "torch"))
    link = ("-shared", "-lc10", "-ltorch_cpu", "-ltorch_python")
    return Recipe(NODE, units, link, places, (f"-L{folder / 'lib'}",), identity)


def _sources(folder: Path) -> list[Path]:
    sources = sorted(folder.glob("*.cpp"))
    if not sources:
        raise BuildError(f"no sources in {folder}: the installation is not complete. {MEANWHILE}")
    return sources


def _contents(files: list[Path], root: Path) -> dict[str, str]:
    wanted = sorted(path for path in files if path.suffix in _SOURCE_SUFFIXES and path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in wanted}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
