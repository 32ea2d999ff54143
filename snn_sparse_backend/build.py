"""Finds or compiles the libraries of the core, and loads them.

``snn_sparse_core`` holds the CPU kernels: every ``csrc/cpu/*.cpp``, without torch or Python, so that one binary serves
every version of both. ``snn_sparse_node`` is the autograd node of ``csrc/torch``: a Python extension, one binary per
torch version. ``snn_sparse_cuda`` holds the CUDA kernels of ``csrc/cuda``: like the first, one for every torch.
Each is compiled on first use and kept in a cache folder under a name that is a digest of everything
they depend on, so that nothing stale is ever loaded and nothing is compiled twice.

Importing this module is cheap: torch, ninja and filelock are imported where they are needed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import platformdirs

from .architectures import Gpu, visible_gpus
from .recipes import CORE, CUDA, NODE, Recipe, core_recipe, csrc_folder, cuda_recipe, node_recipe
from .toolchain import BuildError, Compiler, CompilerMissing, find_compiler, find_ninja, find_nvcc

__all__ = [
    "Artifact",
    "BuildError",
    "Status",
    "build",
    "cache_root",
    "core_recipe",
    "csrc_folder",
    "cuda_recipe",
    "load_core",
    "load_cuda",
    "load_node",
    "node_recipe",
    "provide",
    "status",
]

_EXCERPT_LINES = 60
_WAIT_SECONDS = 10.0  # between two messages while another process compiles
_logger = logging.getLogger("snn_sparse_backend")


@dataclass(frozen=True)
class Artifact:
    """A library that is ready to be loaded. `seconds`: what compiling it took, 0 when it was there already."""

    name: str
    path: Path
    seconds: float = 0.0


@dataclass(frozen=True)
class Status:
    """What `info` reports. `problems` says why something is missing; None in `libraries` is "not compiled yet".

    `torch_cuda` is the CUDA version that torch is built for. Nothing about CUDA is a problem where torch sees no GPU.
    """

    compiler: Compiler | None
    nvcc: Compiler | None
    torch_cuda: str | None
    gpus: tuple[Gpu, ...]
    csrc: Path
    cache: Path
    libraries: dict[str, Path | None]
    problems: tuple[str, ...]


def cache_root() -> Path:
    """Where compiled libraries are kept: $SNN_SPARSE_CACHE, or the user's cache folder."""
    chosen = os.environ.get("SNN_SPARSE_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("snn_sparse_backend")


def provide(recipe: Recipe, cache: Path | None = None, verbose: bool = False) -> Artifact:
    """The library of `recipe` from the cache, compiled now if it is not there.

    Any number of processes may ask at once: one compiles, the others wait.
    """
    cache = cache or cache_root()
    try:
        compiler = recipe.toolchain.find()
    except BuildError:
        # A cache that was filled where a compiler is, also serves where none is.
        ready = _find_library(recipe, cache, None)
        if ready is None:
            raise
        return Artifact(recipe.name, ready)
    ready = _find_library(recipe, cache, compiler)
    if ready is not None:
        return Artifact(recipe.name, ready)
    ninja = find_ninja()
    library = cache / _entry(recipe, compiler.digest()) / f"{recipe.name}.so"
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _locked(library.parent, verbose):
            seconds = 0.0 if library.is_file() else _compile(recipe, compiler, ninja, library, verbose)
    except OSError as error:
        raise BuildError(
            f"the build cache {cache} cannot be used: {error}. Set SNN_SPARSE_CACHE to a folder on a local disk that "
            f"can be written. {recipe.toolchain.meanwhile}"
        ) from error
    return Artifact(recipe.name, library, seconds)


def _entry(recipe: Recipe, compiler_digest: str) -> str:
    return f"{recipe.name}-{recipe.digest()}-{compiler_digest}"


def _find_library(recipe: Recipe, cache: Path, compiler: Compiler | None) -> Path | None:
    """The finished library; without a compiler, whichever compiler made it."""
    made_by = compiler.digest() if compiler else "*"
    for each in (recipe, *recipe.substitutes):
        found = sorted(cache.glob(f"{_entry(each, made_by)}/{each.name}.so"))
        if found:
            return found[0]
    return None


@contextmanager
def _locked(entry: Path, verbose: bool) -> Iterator[None]:
    """Holds the lock of a cache entry. The system releases it when its holder dies, however it dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(str(entry / "lock"))
    start = time.monotonic()
    timeout = 0.0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            waited = time.monotonic() - start
            say(f"waiting for another process that is compiling in {entry} ({waited:.0f} s so far)", verbose)
            timeout = _WAIT_SECONDS
    try:
        yield
    finally:
        lock.release()


def _compile(recipe: Recipe, compiler: Compiler, ninja: Path, library: Path, verbose: bool) -> float:
    """Compiles under the entry's lock; the library appears complete or not at all. Returns the seconds it took."""
    start = time.monotonic()
    entry = library.parent
    say(f"compiling {recipe.name} ({len(recipe.units)} files), once for this machine, into {entry}", verbose)
    for leftover in entry.glob("tmp-*"):  # of a builder that was killed: it does not hold the lock any more
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=entry, ignore_cleanup_errors=True) as folder:
        (Path(folder) / "build.ninja").write_text(_ninja_file(recipe, compiler, library.name))
        status, output = _run_ninja(ninja, Path(folder), verbose)
        (entry / "build.log").write_text(output)
        if status != 0:
            raise BuildError(_failure(recipe, compiler, entry, output))
        key = {"recipe": recipe.identity, "compiler": [compiler.command, compiler.version, compiler.target]}
        (entry / "key.json").write_text(json.dumps(key, indent=1))
        os.replace(Path(folder) / library.name, library)
    seconds = time.monotonic() - start
    say(f"compiled {recipe.name} in {seconds:.1f} s", verbose)
    return seconds


def _ninja_file(recipe: Recipe, compiler: Compiler, library: str) -> str:
    command = _for_ninja(shlex.join(compiler.command))
    places = _for_ninja(shlex.join(recipe.places))
    link = _for_ninja(shlex.join((*recipe.link_places, *recipe.link)))
    lines = [
        f"rule compile\n command = {command} $flags {places} -c $in -o $out\n description = $out",
        f"rule link\n command = {command} $in {link} -o $out\n description = $out",
    ]
    for unit in recipe.units:
        source = re.sub(r"([$ :])", r"$\1", str(unit.source))
        lines.append(f"build {unit.object}: compile {source}\n flags = {_for_ninja(shlex.join(unit.flags))}")
    lines.append(f"build {library}: link {' '.join(unit.object for unit in recipe.units)}")
    return "\n".join(lines) + "\n"


def _for_ninja(text: str) -> str:
    return text.replace("$", "$$")


def _run_ninja(ninja: Path, folder: Path, verbose: bool) -> tuple[int, str]:
    lines: list[str] = []
    with subprocess.Popen(
        [ninja], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if verbose:
                sys.stderr.write(line)
    return process.returncode, "".join(lines)


def _failure(recipe: Recipe, compiler: Compiler, entry: Path, output: str) -> str:
    """The message of a failed build: the first file that failed, because the others often say the same again."""
    start = max(output.find("FAILED:"), 0)
    end = re.compile(r"^(\[\d+/\d+\]|FAILED:|ninja:) ", re.MULTILINE).search(output, start + 1)
    lines = output[start : end.start() if end else None].splitlines()
    if len(lines) > _EXCERPT_LINES:
        lines[_EXCERPT_LINES:] = [f"... ({len(lines) - _EXCERPT_LINES} more lines)"]
    return "\n".join(
        [
            f"compiling {recipe.name} failed ({compiler.version}); everything the compiler said is in "
            f"{entry / 'build.log'}, first:",
            *lines,
            f"{recipe.toolchain.advice} {recipe.toolchain.meanwhile}",
        ]
    )


def say(text: str, verbose: bool = False) -> None:
    """One line for whoever wonders why a call takes so long."""
    _logger.info(text)
    if verbose or (sys.stderr.isatty() and not _logger.isEnabledFor(logging.INFO)):
        print(f"snn_sparse_backend: {text}", file=sys.stderr, flush=True)


Loaded = TypeVar("Loaded")
_outcomes: dict[str, Any] = {}  # what each load gave in this process: a library, or the BuildError
_loading = threading.Lock()


def load_core() -> ctypes.CDLL:
    """The CPU kernels, compiled first if necessary. Raises BuildError, at once if it did before."""
    return _once(CORE, lambda: _open(core_recipe))


def load_cuda() -> ctypes.CDLL:
    """The CUDA kernels, compiled first if necessary. Raises BuildError, at once if it did before."""
    return _once(CUDA, lambda: _open(cuda_recipe))


def load_node() -> ModuleType:
    """The module with the autograd node, compiled first if necessary. Raises BuildError, at once if it did before."""
    return _once(NODE, _load_node)


def build(verbose: bool = False, cuda: bool | None = None) -> list[Artifact]:
    """Compiles what is not compiled yet, side by side. Loads that failed before may be tried again.

    `cuda`: whether the CUDA kernels too. By default they are if torch has CUDA, and left out where no nvcc is.
    """
    import torch

    recipes = [core_recipe(), node_recipe()]
    if cuda or (cuda is None and torch.version.cuda is not None):
        recipes.append(cuda_recipe())
    with ThreadPoolExecutor() as pool:
        pending = [pool.submit(provide, recipe, verbose=verbose) for recipe in recipes]
    artifacts = []
    for recipe, result in zip(recipes, pending, strict=True):
        try:
            artifacts.append(result.result())
        except CompilerMissing as error:
            if recipe.name != CUDA or cuda:
                raise
            say(f"{CUDA} is left out: {error}", verbose or bool(visible_gpus()))
    with _loading:
        for name in [name for name, outcome in _outcomes.items() if isinstance(outcome, BuildError)]:
            del _outcomes[name]
    return artifacts


def status() -> Status:
    """What is compiled and what could be; compiles nothing and never raises BuildError."""
    import torch

    problems: list[str] = []
    compiler = _or_problem(find_compiler, problems)
    _or_problem(find_ninja, problems)
    gpus = visible_gpus()
    of_cuda: list[str] = []
    nvcc = _or_problem(find_nvcc, of_cuda)
    libraries: dict[str, Path | None] = {}
    for name, make, made_by, into in (
        (CORE, core_recipe, compiler, problems),
        (NODE, node_recipe, compiler, problems),
        (CUDA, cuda_recipe, nvcc, of_cuda),
    ):
        recipe = _or_problem(make, into)
        libraries[name] = _find_library(recipe, cache_root(), made_by) if recipe else None
    return Status(
        compiler=compiler,
        nvcc=nvcc,
        torch_cuda=torch.version.cuda,
        gpus=gpus,
        csrc=csrc_folder(),
        cache=cache_root(),
        libraries=libraries,
        problems=(*problems, *(of_cuda if gpus else ())),
    )


def _or_problem(ask: Callable[[], Loaded], problems: list[str]) -> Loaded | None:
    try:
        return ask()
    except BuildError as error:
        problems.append(str(error))
        return None


def _once(name: str, load: Callable[[], Loaded]) -> Loaded:
    outcome = _outcomes.get(name)
    if outcome is None:
        with _loading:
            if name not in _outcomes:
                try:
                    _outcomes[name] = load()
                except BuildError as error:
                    _outcomes[name] = error
            outcome = _outcomes[name]
    if isinstance(outcome, BuildError):
        raise BuildError(str(outcome))
    return outcome


def _open(make: Callable[[], Recipe]) -> ctypes.CDLL:
    # torch first: our OpenMP calls then bind to the runtime that torch brings. Loaded the other way round there would
    # be two, and torch.set_num_threads would not reach ours.
    import torch  # noqa: F401

    recipe = make()
    path = provide(recipe).path
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(_unloadable(recipe, path, error)) from error


def _load_node() -> ModuleType:
    recipe = node_recipe()
    path = provide(recipe).path
    spec = importlib.util.spec_from_file_location(NODE, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(_unloadable(recipe, path, error)) from error
    return module


def _unloadable(recipe: Recipe, path: Path, error: Exception) -> str:
    return (
        f"{path} was compiled but does not load: {error}. Remove its folder to compile it again; if its file system "
        f"forbids execution, set SNN_SPARSE_CACHE to another folder. {recipe.toolchain.meanwhile}"
    )
