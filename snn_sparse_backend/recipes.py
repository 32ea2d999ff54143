"""What the libraries of the core are made from.

A `Recipe` lists the compiled files of a library with their flags, names the toolchain that compiles them, and carries a
digest of everything that decides what the library contains. build.py turns recipes into libraries.
"""

from __future__ import annotations

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .architectures import PORTABLE, architectures_of, code_flags, listed_architectures, portable_serves, visible_gpus
from .toolchain import CPP, MEANWHILE, NVCC, BuildError, Toolchain, digest, find_compiler, nvcc_candidates

__all__ = ["BuildError", "Recipe", "Unit", "core_recipe", "csrc_folder", "cuda_recipe", "find_compiler", "node_recipe"]

CORE = "snn_sparse_core"
NODE = "snn_sparse_node"
CUDA = "snn_sparse_cuda"

# The order is that of the link. An inline function of a header is kept once, from the first object that has it: with
# the plain instruction set first, code meant for a newer processor is never picked for an older one.
INSTRUCTION_SETS = {
    "base": (),
    "v3": ("-march=x86-64-v3",),
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
}
COMMON_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
CORE_FLAGS = ("-std=c++17", "-O3", *COMMON_FLAGS, "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# -lineinfo costs nothing at run time and lets profilers name the lines.
CUDA_FLAGS = ("-std=c++17", "-O3", "-lineinfo", f"-Xcompiler={','.join(COMMON_FLAGS)}")

_SOURCE_SUFFIXES = {".cpp", ".cu", ".h", ".hpp", ".inc"}


@dataclass(frozen=True)
class Unit:
    """One compiled file."""

    source: Path
    object: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """How one library is made. `places` and `link_places` only say where things lie, so they are not in the digest.

    Where the library of one of the `substitutes` is compiled already, it serves as well.
    """

    name: str
    toolchain: Toolchain
    units: tuple[Unit, ...]
    link: tuple[str, ...]
    places: tuple[str, ...]
    link_places: tuple[str, ...]
    identity: dict[str, Any]
    substitutes: tuple[Recipe, ...] = ()

    def digest(self) -> str:
        """A name for everything that decides what the library contains, but the compiler."""
        units = [(unit.object, unit.flags) for unit in self.units]
        return digest([self.identity, units, self.link, platform.machine(), platform.libc_ver()])[:20]


def csrc_folder() -> Path:
    """The sources of the core: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def core_recipe(csrc: Path | None = None) -> Recipe:
    """The CPU kernels: on x86-64 each file once per instruction set; dispatch.cpp, which chooses one, only once."""
    csrc = csrc or csrc_folder()
    sources = _sources(csrc / "cpu", "*.cpp")
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
    # A missing function fails the link instead of the first user's call.
    link = ("-shared", "-fopenmp", *(("-Wl,-z,defs",) if sys.platform == "linux" else ()))
    identity = {"sources": _contents(_others(csrc, "torch", "cuda"), csrc)}
    return Recipe(CORE, CPP, tuple(units), link, (f"-I{csrc}",), (), identity)


def _core_flags(source: Path, extra: tuple[str, ...]) -> tuple[str, ...]:
    # A fused multiply-add in a neuron's step would move its membrane by a rounding and so flip spikes of the host
    # library. The products of a synapse promise no bits, and gain from it.
    contract = "fast" if source.name.startswith(("synapse", "convolution")) else "off"
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
    units = tuple(Unit(source, f"{source.stem}.o", flags) for source in _sources(csrc / "torch", "*.cpp"))
    link = ("-shared", "-lc10", "-ltorch_cpu", "-ltorch_python")
    return Recipe(NODE, CPP, units, link, places, (f"-L{folder / 'lib'}",), identity)


def cuda_recipe(csrc: Path | None = None, architectures: Sequence[str] | None = None) -> Recipe:
    """The CUDA kernels, for `architectures` such as "8.0" and "9.0+PTX".

    By default those of $TORCH_CUDA_ARCH_LIST, else those of the GPUs that are here, else PORTABLE.
    """
    csrc = csrc or csrc_folder()
    architectures = listed_architectures() if architectures is None else architectures
    substitutes: tuple[Recipe, ...] = ()
    if not architectures:
        gpus = visible_gpus()
        architectures = architectures_of(gpus) or PORTABLE
        # A library for PORTABLE may be there already: in an image that was made where no GPU is. To have the driver
        # compile its PTX is the last resort, because a driver that is older than the nvcc may refuse.
        if gpus and portable_serves(gpus, driver_compiles=not any(nvcc_candidates())):
            substitutes = (cuda_recipe(csrc, PORTABLE),)
    code = code_flags(architectures)
    units = tuple(
        Unit(source, f"{source.stem}.o", _cuda_flags(source, code)) for source in _sources(csrc / "cuda", "*.cu")
    )
    # The CUDA runtime is linked in, which is nvcc's default: the library loads without a driver, next to any torch.
    link = ("-shared", *code, *(("-Xlinker=-z,defs",) if sys.platform == "linux" else ()))
    identity = {"sources": _contents(_others(csrc, "torch", "cpu"), csrc)}
    return Recipe(CUDA, NVCC, units, link, (f"-I{csrc}",), (), identity, substitutes)


def _cuda_flags(source: Path, code: tuple[str, ...]) -> tuple[str, ...]:
    # As in _core_flags: the neurons compute what the host library computes, to the bit.
    return (*CUDA_FLAGS, *(("-fmad=false",) if source.name.startswith("neuron_") else ()), *code)


def _sources(folder: Path, pattern: str) -> list[Path]:
    sources = sorted(folder.glob(pattern))
    if not sources:
        raise BuildError(f"no sources in {folder}: the installation is not complete. {MEANWHILE}")
    return sources


def _others(csrc: Path, *without: str) -> list[Path]:
    """All that is in `csrc`, but in these folders."""
    return [path for path in csrc.rglob("*") if path.relative_to(csrc).parts[0] not in without]


def _contents(files: list[Path], root: Path) -> dict[str, str]:
    wanted = sorted(path for path in files if path.suffix in _SOURCE_SUFFIXES and path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in wanted}
