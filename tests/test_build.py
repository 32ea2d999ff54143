"""The builder, on small sources of its own: what it compiles, when, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snn_sparse_backend import build, recipes

LEVEL_H = """
// The copy that the linker keeps of this function must be the one for the plain instruction set.
inline __attribute__((noinline)) int level_of_header() {
#if defined(__AVX512F__)
  return 4;
#elif defined(__AVX2__)
  return 3;
#else
  return 0;
#endif
}
"""
KERNEL_CPP = """
#include "level.h"
namespace SSB_ISA { int level() { return level_of_header(); } }
"""
DISPATCH_CPP = """
namespace base { int level(); }
#if SSB_X86
namespace v3 { int level(); }
namespace v4 { int level(); }
int newer() { return v3::level() + v4::level(); }
#endif
extern "C" __attribute__((visibility("default"))) int base_level() { return base::level(); }
"""

# Asks for a library in a process of its own; starts when it is told to, so that two of them start together.
ASK = """
import sys
from pathlib import Path
from snn_sparse_backend import build
print("ready", flush=True)
sys.stdin.readline()
artifact = build.provide(build.core_recipe(Path(sys.argv[1])), Path(sys.argv[2]), verbose=True)
print(artifact.path, artifact.seconds > 0)
"""


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "torch").mkdir()
    (folder / "level.h").write_text(LEVEL_H)
    (folder / "cpu/kernel.cpp").write_text(KERNEL_CPP)
    (folder / "cpu/dispatch.cpp").write_text(DISPATCH_CPP)
    (folder / "torch/node.cpp").write_text("int node() { return 1; }")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that has loaded nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SNN_SPARSE_CACHE", str(folder))
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr("torch.version.cuda", None)  # test_cuda_build.py is for the CUDA library
    return folder


class Compiler:
    """A compiler that keeps a diary, takes its time, and gets stuck when a file tells it to."""

    def __init__(self, folder: Path) -> None:
        self.diary, self.stuck, self.program = folder / "diary", folder / "stuck", folder / "compiler"
        self.program.write_text(
            f"""#!/bin/sh
case "$*" in *-v) ;; *) echo "$*" >> "{self.diary}"; sleep 0.1 ;; esac
case "$*" in *" -c "*) if [ -e "{self.stuck}" ]; then sleep 300; fi ;; esac
exec {" ".join(recipes.find_compiler().command)} "$@"
"""
        )
        self.program.chmod(0o755)

    def calls(self) -> list[str]:
        return self.diary.read_text().splitlines() if self.diary.exists() else []

    def links(self) -> int:
        return sum(" -c " not in call for call in self.calls())


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(made.program))
    return made


def ask(csrc: Path, cache: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", ASK, str(csrc), str(cache)],
        cwd=Path(build.__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob("*/tmp-*"))


# ---- what is compiled ------------------------------------------------------------------------------------------------


def test_compiles_once_and_loads(csrc: Path, cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "csrc_folder", lambda: csrc)
    assert build.load_core().base_level() == 0  # also: no code for a newer processor in the base variant
    calls = compiler.calls()
    assert build.load_core() is build.load_core()
    again = build.provide(build.core_recipe(), cache)
    assert again.seconds == 0 and again.path.is_file()
    assert compiler.calls() == calls and compiler.links() == 1
    assert leftovers(cache) == []


def test_flags(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (csrc / "cpu/synapse_forward.cpp").write_text("")
    monkeypatch.setattr(recipes.platform, "machine", lambda: "x86_64")
    flags = {unit.object: unit.flags for unit in build.core_recipe(csrc).units}
    assert list(flags) == ["dispatch.o"] + [
        f"{stem}.{isa}.o" for isa in ("base", "v3", "v4") for stem in ("kernel", "synapse_forward")
    ]
    assert "-DSSB_X86=1" in flags["dispatch.o"] and "-DSSB_ISA=v4" in flags["kernel.v4.o"]
    assert "-march=x86-64-v3" in flags["kernel.v3.o"]
    assert not any(flag.startswith("-march") for flag in flags["kernel.base.o"] + flags["dispatch.o"])
    for name, given in flags.items():
        assert ("-ffp-contract=fast" in given) == name.startswith("synapse")
        assert ("-ffp-contract=off" in given) != name.startswith("synapse")


def test_other_machines_get_the_base_variant(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes.platform, "machine", lambda: "aarch64")
    units = build.core_recipe(csrc).units
    assert [unit.object for unit in units] == ["dispatch.o", "kernel.base.o"]
    assert not any(flag.startswith(("-march", "-DSSB_X86")) for unit in units for flag in unit.flags)


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_key_follows_sources_not_their_place(csrc: Path, tmp_path: Path) -> None:
    core, node = build.core_recipe(csrc).digest(), build.node_recipe(csrc).digest()
    moved = tmp_path / "moved"
    shutil.copytree(csrc, moved)
    assert (build.core_recipe(moved).digest(), build.node_recipe(moved).digest()) == (core, node)

    (moved / "torch/node.cpp").write_text("int node() { return 2; }")
    assert build.core_recipe(moved).digest() == core
    assert build.node_recipe(moved).digest() != node
    (moved / "level.h").write_text(LEVEL_H + "// changed\n")
    changed = build.core_recipe(moved).digest()
    assert changed != core
    (moved / "cpu/tables.inc").write_text("1, 2, 3")
    assert build.core_recipe(moved).digest() != changed


def test_key_follows_flags(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.core_recipe(csrc).digest()
    monkeypatch.setattr(recipes, "CORE_FLAGS", (*recipes.CORE_FLAGS, "-g"))
    assert build.core_recipe(csrc).digest() != before


def test_node_key_follows_torch(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    seen = {build.node_recipe(csrc).digest()}
    for owner, name, value in (
        (torch, "__version__", "2.6.0"),
        (torch.version, "git_version", "another"),
        (torch, "compiled_with_cxx11_abi", lambda: False),
    ):
        monkeypatch.setattr(owner, name, value)
        seen.add(build.node_recipe(csrc).digest())
    assert len(seen) == 4
    assert "-std=c++17" in build.node_recipe(csrc).units[0].flags
    monkeypatch.setattr(torch, "__version__", "2.12.0a0+gitabc")
    assert "-std=c++20" in build.node_recipe(csrc).units[0].flags


def test_each_compiler_has_its_own_entry(csrc: Path, cache: Path, compiler: Compiler, tmp_path: Path) -> None:
    first = build.provide(build.core_recipe(csrc), cache)
    moved = tmp_path / "another"
    shutil.copy(compiler.program, moved)
    os.environ["CXX"] = str(moved)  # the fixture puts the old value back
    second = build.provide(build.core_recipe(csrc), cache)
    assert first.path != second.path and compiler.links() == 2


# ---- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_compile_once(csrc: Path, cache: Path, compiler: Compiler) -> None:
    children = [ask(csrc, cache) for _ in range(2)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    answers = [child.communicate(timeout=60) for child in children]
    assert compiler.links() == 1
    paths, compiled = zip(*(out.split() for out, _ in answers), strict=True)
    assert len(set(paths)) == 1 and sorted(compiled) == ["False", "True"]
    assert sum("waiting for another process that is compiling" in err for _, err in answers) == 1


def test_killed_builder_does_not_block_the_next(csrc: Path, cache: Path, compiler: Compiler) -> None:
    compiler.stuck.touch()
    child = ask(csrc, cache)
    try:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        deadline = time.monotonic() + 30
        while not compiler.calls() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.kill()
        child.wait()
        assert len(leftovers(cache)) == 1
        compiler.stuck.unlink()
        assert build.provide(build.core_recipe(csrc), cache).path.is_file()
        assert leftovers(cache) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its compiler processes outlive it
        child.communicate()


# ---- when it cannot be done ------------------------------------------------------------------------------------------


def test_no_compiler(csrc: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C[+][+] compiler found") as error:
        build.provide(build.core_recipe(csrc), cache)
    message = str(error.value)
    assert "apt install g++" in message and "conda install" in message and "host library's own code" in message
    assert "\n" not in message


def test_filled_cache_needs_no_compiler(csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.provide(build.core_recipe(csrc), cache)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.provide(build.core_recipe(csrc), cache).path == built.path


@pytest.mark.parametrize("command", ["no-such-compiler -m32", "false"])
def test_wrong_cxx(csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.BuildError, match=command.split()[0]):
        build.provide(build.core_recipe(csrc), cache)


def test_broken_source_shows_the_compilers_words(csrc: Path, cache: Path, compiler: Compiler) -> None:
    (csrc / "cpu/kernel.cpp").write_text("#error these very words\n")
    with pytest.raises(build.BuildError) as error:
        build.provide(build.core_recipe(csrc), cache)
    message = str(error.value)
    assert f"-c {csrc / 'cpu/kernel.cpp'}" in message
    assert message.count("error: #error these very words") == 1  # not once more for each instruction set
    (entry,) = cache.iterdir()
    assert str(entry) in message and "these very words" in (entry / "build.log").read_text()
    assert leftovers(cache) == [] and list(cache.rglob("*.so")) == []


def test_long_output_is_cut(csrc: Path, cache: Path) -> None:
    (csrc / "cpu/kernel.cpp").write_text("".join(f"unknown{i} x{i};\n" for i in range(100)))
    with pytest.raises(build.BuildError, match="unknown0") as error:
        build.provide(build.core_recipe(csrc), cache)
    assert len(str(error.value).splitlines()) < 70 and "more lines)" in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="other linkers find this out when the library is loaded")
def test_missing_function_fails_the_link(csrc: Path, cache: Path) -> None:
    (csrc / "cpu/kernel.cpp").write_text("")
    with pytest.raises(build.BuildError, match="level"):
        build.provide(build.core_recipe(csrc), cache)


def test_no_sources(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="the installation is not complete"):
        build.core_recipe(tmp_path)


@pytest.mark.parametrize("installed", [False, True])
def test_no_ninja(csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    if installed:
        monkeypatch.setattr("ninja.BIN_DIR", "")
    else:
        monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(build.BuildError, match="pip install ninja"):
        build.provide(build.core_recipe(csrc), cache)


def test_unusable_cache(csrc: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(build.BuildError, match="Set SNN_SPARSE_CACHE to a folder"):
        build.provide(build.core_recipe(csrc), tmp_path / "file/cache")


def test_failure_is_remembered(csrc: Path, cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "csrc_folder", lambda: csrc)
    good = (csrc / "cpu/kernel.cpp").read_text()
    (csrc / "cpu/kernel.cpp").write_text("#error wrong\n")
    messages = []
    for _ in range(2):
        with pytest.raises(build.BuildError) as error:
            build.load_core()
        messages.append(str(error.value))
        calls = len(compiler.calls())
        (csrc / "cpu/kernel.cpp").write_text(good)  # repaired, but this process remembers ...
    assert messages[0] == messages[1] and len(compiler.calls()) == calls
    (csrc / "torch/node.cpp").write_text("int node() { return 1; }")
    assert [artifact.path.is_file() for artifact in build.build()] == [True, True]
    assert build.load_core().base_level() == 0  # ... until it is asked to build


def test_library_that_does_not_load(csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "csrc_folder", lambda: csrc)
    build.provide(build.core_recipe(), cache).path.write_bytes(b"not a library")
    build.provide(build.node_recipe(), cache)  # compiles, but is no Python module
    for load in (build.load_core, build.load_node):
        with pytest.raises(build.BuildError, match="was compiled but does not load"):
            load()


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_log(csrc: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "snn_sparse_backend")
    for _ in range(2):
        build.provide(build.core_recipe(csrc), cache)
    starts, ends = caplog.messages
    assert starts.startswith("compiling snn_sparse_core") and ends.startswith("compiled snn_sparse_core in")


def test_status_compiles_nothing(csrc: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "csrc_folder", lambda: csrc)
    before = build.status()
    assert not cache.exists() and before.cache == cache and before.problems == ()
    assert before.libraries == {"snn_sparse_core": None, "snn_sparse_node": None, "snn_sparse_cuda": None}
    assert before.compiler is not None and before.compiler.version
    built = build.provide(build.core_recipe(), cache)
    assert build.status().libraries["snn_sparse_core"] == built.path
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    without = build.status()
    assert without.compiler is None and "no C++ compiler" in without.problems[0]
    assert without.libraries["snn_sparse_core"] == built.path


# ---- the real sources ------------------------------------------------------------------------------------------------


def test_real_core_and_node() -> None:
    for artifact in build.build():
        assert "warning:" not in (artifact.path.parent / "build.log").read_text()
    assert isinstance(build.load_core(), ctypes.CDLL)
    assert build.load_node().__name__ == "snn_sparse_node"
