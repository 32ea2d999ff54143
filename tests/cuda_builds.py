"""Builds of the CUDA kernels for the CPU, by the harness of cuda_host/: as they are, or under a sanitizer.

They lie in the package's own cache under a digest of all that they are made from, so any number of test processes may
ask at once, and each build is made once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from snn_sparse_backend import build, recipes
from snn_sparse_backend.recipes import Recipe
from snn_sparse_backend.toolchain import CPP

HARNESS = Path(__file__).parent / "cuda_host" / "include"
SANITIZERS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
# As in nvcc's flags for the neurons, multiply and add are not contracted: their results are compared bit for bit.
# Without GNU's unique symbols two builds in one process would share their static variables.
FLAGS = ("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-x", "c++")


def host_recipe(sanitizer: str | None = None, csrc: Path | None = None) -> Recipe:
    """How the CUDA sources are compiled for the CPU; ``sanitizer``: "address" or "thread"."""
    csrc = csrc or recipes.csrc_folder()
    recipe = recipes.cuda_recipe(csrc, ("8.0",))  # its files; the architecture is one of the flags that are replaced
    instrument = SANITIZERS[sanitizer] if sanitizer else ()
    extra = ("-O1", "-g1", "-fno-omit-frame-pointer", *instrument) if sanitizer else ("-O2",)
    return replace(
        recipe,
        name=f"{recipe.name}_on_host",
        toolchain=CPP,
        units=tuple(replace(unit, flags=(*FLAGS, *extra)) for unit in recipe.units),
        link=("-shared", "-pthread", *instrument),
        places=(f"-I{HARNESS}",),
        identity={**recipe.identity, "harness": recipes._contents(list(HARNESS.rglob("*")), HARNESS)},
    )


def cuda_on_host_library(sanitizer: str | None = None, csrc: Path | None = None) -> Path:
    """The CUDA kernels for the CPU, compiled now if they are not in the cache; ``csrc``: a changed copy of them."""
    return build.provide(host_recipe(sanitizer, csrc)).path
