"""The CUDA library: which nvcc makes it, for which GPUs, and when. Sources of its own; none of this needs a GPU."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from pathlib import Path
from types import SimpleNamespace

import cuda_kernels_table
import pytest
import torch

from snn_sparse_backend import architectures, build, recipes, toolchain
from snn_sparse_backend.cli import main

VALUE_H = "int value();\n"
RASTER_CU = """
#include "value.h"
#define API extern "C" __attribute__((visibility("default")))
template <class T, int N> __global__ void fill_kernel(T* out) {
  __shared__ T sum[32];
  sum[threadIdx.x] = T(N);
  __syncthreads();
  out[threadIdx.x] = sum[31 - threadIdx.x];
}
API int launch() {
  fill_kernel<float, 3><<<1, 32>>>(nullptr);
  fill_kernel<double, 4><<<1, 32>>>(nullptr);
  return cudaGetLastError();
}
API int host_value() { return value(); }
"""
NEURON_CU = """
#include "value.h"
int value() { return 7; }
"""
# Says that it is an nvcc, and makes empty files.
FAKE = """#!/bin/sh
if [ "$*" != "${*%--version}" ]; then
  echo 'Cuda compilation tools, release RELEASE, VRELEASE.1'
  echo 'Build cuda_RELEASE'
  exit
fi
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
NO_DRIVER = 35  # cudaErrorInsufficientDriver


def has_nvcc() -> bool:
    try:
        return bool(toolchain.find_nvcc())
    except build.BuildError:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")


@pytest.fixture
def csrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "csrc"
    for name in ("cpu", "cuda", "torch"):
        (folder / name).mkdir(parents=True)
    (folder / "value.h").write_text(VALUE_H)
    (folder / "cuda/raster.cu").write_text(RASTER_CU)
    (folder / "cuda/neuron_one.cu").write_text(NEURON_CU)
    (folder / "cpu/kernel.cpp").write_text("int kernel() { return 1; }")
    (folder / "torch/node.cpp").write_text("int node() { return 1; }")
    monkeypatch.setattr(recipes, "csrc_folder", lambda: folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a process that has loaded nothing, and a torch without CUDA."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SNN_SPARSE_CACHE", str(folder))
    monkeypatch.setattr(build, "_outcomes", {})
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return folder


class Machine:
    """A machine without any nvcc but those that are put there."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        for variable in ("CUDA_HOME", "CUDA_PATH", "CXX"):
            patch.delenv(variable, raising=False)
        patch.setenv("PATH", str(root / "bin"))
        patch.setattr(toolchain, "_CUDA_FOLDER", root / "local")
        patch.setattr(toolchain, "sys", SimpleNamespace(path=[str(root / "site")]))

    def put(self, where: str, release: str = "13.0") -> str:
        program = self.root / where
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(FAKE.replace("RELEASE", release))
        program.chmod(0o755)
        return str(program)

    def see(self, *capabilities: tuple[int, int], cuda: str = "13.0") -> None:
        """Makes torch see these GPUs."""
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        self.patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        devices = [SimpleNamespace(name=f"GPU {i}", major=m, minor=n) for i, (m, n) in enumerate(capabilities)]
        self.patch.setattr(torch.cuda, "get_device_properties", devices.__getitem__)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "machine", monkeypatch)


# ---- which nvcc ------------------------------------------------------------------------------------------------------

PLACES = (
    "home/bin/nvcc",
    "path/bin/nvcc",
    "site/nvidia/cu14/bin/nvcc",
    "site/nvidia/cu13/bin/nvcc",
    "site/nvidia/cuda_nvcc/bin/nvcc",
    "bin/nvcc",
    "local/bin/nvcc",
)


def test_order(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(machine.root / "home"))
    monkeypatch.setenv("CUDA_PATH", str(machine.root / "path"))
    programs = [machine.put(place) for place in PLACES]
    assert list(map(str, toolchain.nvcc_candidates())) == programs
    for program in programs:
        found = toolchain.find_nvcc()
        assert found.command == (program,) and found.version == "nvcc release 13.0, V13.0.1"
        assert found.target == "cuda_13.0"
        os.remove(program)
    with pytest.raises(toolchain.CompilerMissing):
        toolchain.find_nvcc()


def test_torchs_version_comes_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, older, fits = machine.put(PLACES[2], "14.1"), machine.put("bin/nvcc", "12.8"), machine.put(PLACES[6])
    assert toolchain.find_nvcc().command == (newest,)
    for cuda, wanted in (("13.2", fits), ("12.1", older), ("11.8", newest), ("1.0", newest)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert toolchain.find_nvcc().command == (wanted,)


def test_broken_ones_are_passed_over(machine: Machine) -> None:
    broken = Path(machine.put("bin/nvcc"))
    broken.write_text("#!/bin/sh\necho hello\n")
    with pytest.raises(build.BuildError, match="does not say what release of nvcc it is: 'hello"):
        toolchain.find_nvcc()
    works = machine.put("local/bin/nvcc")
    assert toolchain.find_nvcc().command == (works,)
    broken.write_text("#!/bin/sh\nexit 1\n")
    assert toolchain.find_nvcc().command == (works,)
    os.remove(works)
    with pytest.raises(build.BuildError, match=f"the compiler {broken} does not run"):
        toolchain.find_nvcc()


def test_runtime_beside_nvcc_is_found(machine: Machine) -> None:
    program = machine.put(PLACES[3])
    folder = machine.root / "site/nvidia/cu13/lib"
    folder.mkdir()
    assert toolchain.find_nvcc().command == (program,)
    (folder / "libcudart_static.a").touch()
    assert toolchain.find_nvcc().command == (program, f"-L{folder}")


@pytest.mark.parametrize("chosen, told", [
    ("host", ("-ccbin", "host")),
    ("ccache host", ("-ccbin", "host")),
    ("host -m64 -g", ("-ccbin", "host", "-Xcompiler=-m64", "-Xcompiler=-g")),
])
def test_host_compiler(machine: Machine, monkeypatch: pytest.MonkeyPatch, chosen: str, told: tuple[str, ...]) -> None:
    program, _, _ = [machine.put(f"bin/{name}") for name in ("nvcc", "host", "ccache")]
    plain = toolchain.find_nvcc()
    monkeypatch.setenv("CXX", chosen)
    assert toolchain.find_nvcc().command == (program, *told)
    assert toolchain.find_nvcc().digest() != plain.digest()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX names the compiler 'no-such-compiler'"):
        toolchain.find_nvcc()


@pytest.mark.parametrize("cuda, advice", [
    ("13.2", 'pip install "cuda-toolkit[nvcc]==13.2.*" or "snn-sparse-backend[cuda]"; or the CUDA toolkit 13.2)'),
    ("12.8", "Install one (the CUDA toolkit 12.8;"),  # what pip has for 12 lacks the program
    (None, 'pip install "cuda-toolkit[nvcc]" or "snn-sparse-backend[cuda]"; or the CUDA toolkit)'),
])
def test_no_nvcc(machine: Machine, csrc: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, advice: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for _ in range(2):  # the second time from memory
        with pytest.raises(build.BuildError, match="no nvcc found") as error:
            build.load_cuda()
        message = str(error.value)
        assert advice in message and "\n" not in message
        assert message.endswith("the host library's own code runs for CUDA tensors; CPU tensors stay fast.")


# ---- what is compiled ------------------------------------------------------------------------------------------------


def code(recipe: recipes.Recipe) -> list[str]:
    return [flag.split(",code=")[1] for flag in recipe.link if flag.startswith("-gencode")]


def test_flags(csrc: Path) -> None:
    recipe = build.cuda_recipe(csrc, ["9.0+PTX"])
    neuron, raster = recipe.units
    assert (neuron.object, raster.object) == ("neuron_one.o", "raster.o")
    assert "-fmad=false" in neuron.flags and "-fmad=false" not in raster.flags
    for unit in recipe.units:
        assert {"-std=c++17", "-O3", "-lineinfo", "-gencode=arch=compute_90,code=sm_90"} < set(unit.flags)
        assert "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra" in unit.flags
    assert code(recipe) == ["compute_90", "sm_90"]


def test_architectures(machine: Machine, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    portable = ["sm_80", "compute_90", "sm_90"]
    assert code(build.cuda_recipe()) == portable
    machine.see((9, 0), (8, 6), (9, 0))
    assert code(build.cuda_recipe()) == ["sm_86", "sm_90"]
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
    assert code(build.cuda_recipe()) == portable
    machine.see()
    assert code(build.cuda_recipe()) == portable
    machine.see((9, 0))
    for listed in ("8.0;9.0a+PTX;12.0", " 12.0 9.0a+PTX 8.0 8.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert code(build.cuda_recipe()) == ["sm_120", "sm_80", "compute_90a", "sm_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="expected a CUDA architecture like 8.0 or 9.0[+]PTX, got 'Hopper'"):
        build.cuda_recipe()
    with pytest.raises(build.BuildError, match="no sources in"):
        build.cuda_recipe(csrc / "cpu", architectures.PORTABLE)


def test_key(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [build.cuda_recipe(csrc).digest()]

    def changed() -> bool:
        seen.append(build.cuda_recipe(csrc).digest())
        return seen[-1] not in seen[:-1]

    (csrc / "cpu/kernel.cpp").write_text("int kernel() { return 2; }")
    (csrc / "torch/node.cpp").write_text("int node() { return 2; }")
    assert not changed()
    core = build.core_recipe(csrc).digest()
    (csrc / "cuda/raster.cu").write_text(RASTER_CU + "// changed\n")
    assert changed()
    (csrc / "cuda/scan.h").write_text("// new\n")
    assert changed() and build.core_recipe(csrc).digest() == core
    (csrc / "value.h").write_text(VALUE_H + "// changed\n")
    assert changed()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert changed()
    monkeypatch.setattr(recipes, "CUDA_FLAGS", (*recipes.CUDA_FLAGS, "-g"))
    assert changed()


def test_each_nvcc_has_its_own_entry(machine: Machine, csrc: Path) -> None:
    machine.put("bin/nvcc", "13.0")
    first = build.provide(build.cuda_recipe())
    machine.put("bin/nvcc", "13.1")
    second = build.provide(build.cuda_recipe())
    assert first.path != second.path and first.path.is_file() and second.path.is_file()
    assert build.provide(build.cuda_recipe()).seconds == 0


def test_library_of_an_image(machine: Machine, csrc: Path) -> None:
    """What was compiled without a GPU serves a machine with one, where it can."""
    nvcc = machine.put("bin/nvcc")
    made = build.provide(build.cuda_recipe())

    def found(*capabilities: tuple[int, int]) -> Path | None:
        machine.see(*capabilities)
        return build.status().libraries["snn_sparse_cuda"]

    for served in ([(8, 0)], [(8, 9), (9, 0)]):
        assert found(*served) == made.path
        assert build.provide(build.cuda_recipe()) == build.Artifact(made.name, made.path)
    assert found((12, 0)) is None and found((8, 0), (7, 5)) is None
    os.remove(nvcc)
    assert found((8, 0)) == found((8, 0), (12, 0)) == made.path  # the driver compiles the rest
    assert found((7, 5)) is None
    machine.put("bin/nvcc")
    machine.see((12, 0))
    assert build.provide(build.cuda_recipe()).path != made.path


@needs_nvcc
def test_compiles_and_loads(csrc: Path, cache: Path) -> None:
    library = build.load_cuda()
    assert isinstance(library, ctypes.CDLL) and build.load_cuda() is library
    assert library.host_value() == 7
    (entry,) = cache.iterdir()
    assert "warning" not in (entry / "build.log").read_text()
    assert build.provide(build.cuda_recipe()).seconds == 0
    if ctypes.util.find_library("cuda") is None:
        assert library.launch() == NO_DRIVER


@needs_nvcc
def test_failures_show_the_compilers_words(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (csrc / "cuda/neuron_one.cu").write_text("")
    with pytest.raises(build.BuildError, match="undefined reference to `value"):
        build.load_cuda()
    (csrc / "cuda/neuron_one.cu").write_text("#error these very words\n")
    with pytest.raises(build.BuildError, match="these very words") as error:
        build.provide(build.cuda_recipe())
    assert "nvcc release" in str(error.value) and "$CUDA_HOME chooses another nvcc" in str(error.value)


@needs_nvcc
def test_kernels_table(csrc: Path) -> None:
    report = cuda_kernels_table.nvcc_report(("8.0", "9.0"), csrc)
    assert list(report) == [("raster", "fill_kernel<double, 4>"), ("raster", "fill_kernel<float, 3>")]
    for kernel, row in report.items():
        assert list(row) == ["sm_80", "sm_90"]
        for resources in row.values():
            assert resources.registers > 0 and resources.shared == (256 if "double" in kernel.name else 128)
            assert (resources.stack, resources.spill_stores, resources.spill_loads) == (0, 0, 0)
    table = cuda_kernels_table.markdown(report, "an nvcc")
    assert table.count("\n| raster.cu | `fill_kernel<") == 2 and "sm_90 registers" in table
    (csrc / "cuda/neuron_one.cu").write_text("__global__ void kernel() { int unused; }")
    with pytest.raises(RuntimeError, match="unused"):
        cuda_kernels_table.nvcc_report(("9.0",), csrc)


# ---- when, and what it says ------------------------------------------------------------------------------------------


@pytest.fixture
def provided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The libraries that were asked for; none is compiled, but nvcc is looked for."""
    names: list[str] = []

    def provide(recipe: recipes.Recipe, verbose: bool = False) -> build.Artifact:
        if recipe.name == "snn_sparse_cuda":
            recipe.toolchain.find()
        names.append(recipe.name)
        return build.Artifact(recipe.name, Path("somewhere"), 1.0)

    monkeypatch.setattr(build, "provide", provide)
    return names


def test_build_follows_torch(
    machine: Machine, csrc: Path, provided: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["snn_sparse_core", "snn_sparse_node"]

    def run(*arguments: str) -> tuple[int, list[str], str]:
        provided.clear()
        result = main(["build", *arguments])
        return result, sorted(provided), capsys.readouterr().err

    machine.put("bin/nvcc")
    assert run() == (0, both, "")
    assert run("--cuda") == (0, sorted([*both, "snn_sparse_cuda"]), "")
    machine.see()
    assert run() == (0, sorted([*both, "snn_sparse_cuda"]), "")
    os.remove(machine.root / "bin/nvcc")
    assert run() == (0, both, "")  # a CPU that runs torch's default build misses nothing
    machine.see((9, 0))
    result, names, said = run()
    assert result == 0 and names == both and "snn_sparse_cuda is left out: no nvcc found" in said
    result, names, said = run("--cuda")
    assert result == 2 and said.startswith("snn_sparse_backend build: no nvcc found")


def test_status(machine: Machine, csrc: Path, cache: Path) -> None:
    def about_cuda() -> list[str]:
        return [problem for problem in build.status().problems if "CUDA" in problem]

    state = build.status()
    assert state.nvcc is None and state.torch_cuda is None and state.gpus == () and about_cuda() == []
    machine.see(cuda="13.0")
    assert build.status().torch_cuda == "13.0" and about_cuda() == []
    machine.see((9, 0), (8, 0))
    state = build.status()
    assert list(map(str, state.gpus)) == ["GPU 0 (sm_90)", "GPU 1 (sm_80)"]
    assert len(about_cuda()) == 1 and "no nvcc found" in about_cuda()[0]
    machine.put("bin/nvcc")
    state = build.status()
    assert state.nvcc is not None and about_cuda() == [] and not cache.exists()


def test_info(
    machine: Machine, csrc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")

    def rows() -> dict[str, str]:
        assert main(["info"]) == 0
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        return {name.strip(): value.strip() for name, _, value in (line.partition("  ") for line in lines)}

    without = rows()
    assert without["nvcc"] == "none found" and without["GPUs"] == "none that torch sees"
    assert without["torch's CUDA"] == "none: this torch is built without CUDA"
    assert without["snn_sparse_cuda"] == "not needed"
    program = machine.put("bin/nvcc")
    machine.see((9, 0), cuda="13.0")
    shown = rows()
    assert shown["nvcc"] == f"{program}: nvcc release 13.0, V13.0.1" and shown["GPUs"] == "GPU 0 (sm_90)"
    assert shown["torch's CUDA"] == "13.0" and shown["snn_sparse_cuda"] == "not compiled yet"
    made = build.provide(build.cuda_recipe())
    assert rows()["snn_sparse_cuda"] == str(made.path)
