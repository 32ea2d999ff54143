"""The tools that make the libraries of the core: a C++ compiler, nvcc, and ninja."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

MEANWHILE = "Until then the host library's own code runs."
MEANWHILE_CUDA = "Until then the host library's own code runs for CUDA tensors; CPU tensors stay fast."
_NO_COMPILER = (
    "no C++ compiler found (looked for $CXX, c++, g++, clang++). Install one (Debian, Ubuntu: apt install g++; "
    f"conda: conda install gxx_linux-64) and start again. {MEANWHILE}"
)
_CUDA_FOLDER = Path("/usr/local/cuda")


class BuildError(RuntimeError):
    """The core could not be compiled or loaded; the message says why and what to do."""


class CompilerMissing(BuildError):
    """No compiler is installed: nothing is wrong, it is only not there."""


@dataclass(frozen=True)
class Compiler:
    """A compiler: the command that starts it, and what it says about itself and its target."""

    command: tuple[str, ...]
    version: str
    target: str

    def digest(self) -> str:
        """A short name for this compiler, part of the name of what it made."""
        return digest([self.command, self.version, self.target])[:8]


@dataclass(frozen=True)
class Toolchain:
    """What makes a library: how its compiler is found, and what to say when that does not make it."""

    find: Callable[[], Compiler]
    advice: str
    meanwhile: str


def find_compiler() -> Compiler:
    """$CXX if it is set, else the first of c++, g++ and clang++ on PATH."""
    chosen = _chosen()
    for program, *arguments in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(program)
        if path:
            return _describe_compiler((path, *arguments))
    raise CompilerMissing(_NO_COMPILER)


def _chosen() -> list[str]:
    """The words of $CXX; none when it is not set."""
    words = shlex.split(os.environ.get("CXX", ""))
    if words and not shutil.which(words[0]):
        raise BuildError(f"$CXX names the compiler {words[0]!r}, which is not here. Correct or unset it. {MEANWHILE}")
    return words


def _describe_compiler(command: tuple[str, ...]) -> Compiler:
    said = _ask((*command, "-v")).stderr
    version = re.search(r"^.*\bversion .*\S", said, re.MULTILINE)
    target = re.search(r"^Target: (.*\S)", said, re.MULTILINE)
    return Compiler(command, version[0] if version else said, target[1] if target else "unknown")


def _ask(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    # The C locale: a translated answer would be another compiler to us.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the compiler {shlex.join(command[:-1])} does not run: {error}. {MEANWHILE}") from error


def find_nvcc() -> Compiler:
    """The first nvcc of the CUDA version that torch is built for; only if there is none, the first of another."""
    # A CUDA runtime needs a driver of its own major version or newer. The one that torch needs is there.
    import torch

    cuda = torch.version.cuda
    host = _host_compiler()
    others: list[Compiler] = []
    broken: list[BuildError] = []
    for program in nvcc_candidates():
        try:
            nvcc = _describe_nvcc((str(program), *_runtime_folder(program), *host))
        except BuildError as error:
            broken.append(error)
            continue
        if cuda is None or re.search(rf"\brelease {cuda.split('.')[0]}\.", nvcc.version):
            return nvcc
        others.append(nvcc)
    if others:
        return others[0]
    raise broken[0] if broken else CompilerMissing(_no_nvcc(cuda))


def nvcc_candidates() -> Iterator[Path]:
    """Every nvcc of this machine, those that the user chose first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield from _programs(Path(os.environ[variable]).expanduser(), "bin/nvcc")
    for pattern in ("nvidia/cu[0-9]*/bin/nvcc", "nvidia/cuda_nvcc/bin/nvcc"):
        for entry in sys.path:
            yield from _programs(Path(entry), pattern)
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield from _programs(_CUDA_FOLDER, "bin/nvcc")


def _programs(folder: Path, pattern: str) -> list[Path]:
    found = [path for path in folder.absolute().glob(pattern) if os.access(path, os.X_OK)]
    return sorted(found, reverse=True)  # newest first


def _runtime_folder(nvcc: Path) -> tuple[str, ...]:
    """Where the CUDA runtime to link with is: the packages for pip have it in lib, but some look in lib64 only."""
    folder = nvcc.parent.parent / "lib"
    return (f"-L{folder}",) if (folder / "libcudart_static.a").is_file() else ()


def _host_compiler() -> tuple[str, ...]:
    """How nvcc is told to use $CXX: a program, and arguments for it."""
    words = _chosen()
    # The last, because the ones before it start it: $CXX may be "ccache g++".
    programs = list(takewhile(lambda word: not word.startswith("-"), words))
    arguments = [f"-Xcompiler={word}" for word in words[len(programs) :]]
    return ("-ccbin", programs[-1], *arguments) if programs else ()


def _describe_nvcc(command: tuple[str, ...]) -> Compiler:
    said = _ask((*command, "--version")).stdout
    version = re.search(r"\brelease \d.*\S", said)
    if version is None:
        raise BuildError(f"{command[0]} --version does not say what release of nvcc it is: {said!r}. {MEANWHILE_CUDA}")
    build = re.search(r"^Build (.*\S)", said, re.MULTILINE)
    return Compiler(command, f"nvcc {version[0]}", build[1] if build else "unknown")


def _no_nvcc(cuda: str | None) -> str:
    """What to say when there is no nvcc; `cuda` is the version that torch is built for."""
    version = ".".join(cuda.split(".")[:2]) if cuda else ""
    toolkit = f"the CUDA toolkit {version}".rstrip()
    if cuda and int(cuda.split(".")[0]) < 13:  # the older packages for pip lack the program itself
        install = f'{toolkit}; if the driver is one for CUDA 13, also pip install "cuda-toolkit[nvcc]==13.0.*"'
    else:
        pin = f"=={version}.*" if version else ""
        install = f'pip install "cuda-toolkit[nvcc]{pin}" or "snn-sparse-backend[cuda]"; or {toolkit}'
    return (
        "no nvcc found (looked in $CUDA_HOME/bin, $CUDA_PATH/bin, the installed Python packages, PATH, "
        f"{_CUDA_FOLDER}/bin). Install one ({install}) and start again. {MEANWHILE_CUDA}"
    )


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


def digest(value: Any) -> str:
    """A name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


CPP = Toolchain(find_compiler, "g++ 11 or clang 12 or newer is needed; $CXX chooses another compiler.", MEANWHILE)
NVCC = Toolchain(
    find_nvcc,
    "$CUDA_HOME chooses another nvcc, $CXX the C++ compiler that it uses, and $TORCH_CUDA_ARCH_LIST the architectures.",
    MEANWHILE_CUDA,
)
