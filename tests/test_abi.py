"""The structs and constants that Python reads from the headers are those that the compiler sees."""

from __future__ import annotations

import ctypes
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from cuda_builds import cuda_on_host_library

from snn_sparse_backend import abi, build, dynamics, kernels, norse_dynamics, recipes, snntorch_dynamics

CSRC = build.csrc_folder()
PACKAGE = Path(kernels.__file__).parent
# X(name, Arguments) lines of the kernel lists.
KERNELS, CUDA_KERNELS = (dict(re.findall(r"X\((\w+), (\w+)\)", (CSRC / folder / "kernels.h").read_text()))
                         for folder in ("cpu", "cuda"))
# On CUDA counts come in reports, events from transposed rasters, and convolutions and pooling from torch.
ON_THE_CPU_ONLY = {"raster_count", "raster_columns", "max_pool", "max_pool_backward", "conv_forward",
                   "conv_weight_gradient", "conv_input_gradient", "recurrent_forward", "recurrent_backward"}


def layout(structs: dict[str, type[ctypes.Structure]]) -> dict[str, int]:
    """Size of every struct and offset of every field, as ctypes lays them out."""
    found = {name: ctypes.sizeof(struct) for name, struct in structs.items()}
    for name, struct in structs.items():
        found |= {f"{name}.{field[0]}": getattr(struct, field[0]).offset for field in struct._fields_}
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The same, and all constants, as the compiler sees them."""
    lines = []
    for name in layout(abi.STRUCTS):
        struct, _, field = name.partition(".")
        value = f"offsetof({struct}, {field})" if field else f"sizeof({struct})"
        lines.append(f'  std::printf("{name} %lld\\n", (long long){value});')
    for name in {**abi.CONSTANTS, **abi.SURROGATES}:
        lines.append(f'  std::printf("{name} %lld\\n", (long long){name});')
    headers = '#include <cstddef>\n#include <cstdio>\n#include "abi.h"\n#include "surrogates.h"\n'
    folder = tmp_path_factory.mktemp("abi")
    (folder / "layout.cpp").write_text(headers + "int main() {\n" + "\n".join(lines) + "\n}\n")
    command = [*recipes.find_compiler().command, "-std=c++17", f"-I{CSRC}", "layout.cpp", "-o", "layout"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, f"{shlex.join(command)}\n{run.stderr}"
    output = subprocess.run([folder / "layout"], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_structs_have_the_compilers_layout(compiled: dict[str, int]) -> None:
    found = layout(abi.STRUCTS)
    assert found == {name: compiled[name] for name in found}


def test_constants_have_the_compilers_values(compiled: dict[str, int]) -> None:
    found = {**abi.CONSTANTS, **abi.SURROGATES}
    assert found == {name: compiled[name] for name in found}


def test_the_layout_tells_structs_apart(compiled: dict[str, int]) -> None:
    """A field moved, widened or forgotten shows."""
    text = (CSRC / "abi.h").read_text()
    for right, wrong in (("int64_t rows, cols, row_stride;", "int64_t rows, row_stride, cols;"),
                         ("int32_t kind;", "int64_t kind;"), ("  void* scratch;", ""),
                         ("kMaxParameters = 9", "kMaxParameters = 8")):
        assert text.count(right) == 1
        found = layout(abi._parse(text.replace(right, wrong))[0])
        assert any(value != compiled[name] for name, value in found.items())


def test_no_declaration_is_overlooked() -> None:
    for header, constants in (("abi.h", abi.CONSTANTS), ("surrogates.h", abi.SURROGATES)):
        text = re.sub(r"//[^\n]*", "", (CSRC / header).read_text())
        bodies = re.findall(r"\benum\b[^{]*\{([^}]*)\}", text)
        names = re.findall(r"\bk[A-Z]\w*", " ".join(bodies)) + re.findall(r"constexpr int (\w+)", text)
        assert set(names) <= set(constants) and len(names) >= 5
    declared = re.findall(r"^struct (\w+)", (CSRC / "abi.h").read_text(), re.MULTILINE)
    assert declared == list(abi.STRUCTS)


def test_every_kernel_is_exported() -> None:
    assert len(KERNELS) >= 11
    core = build.load_core()
    for name, arguments in KERNELS.items():
        assert hasattr(core, f"snn_{name}") and arguments in abi.STRUCTS
    assert not hasattr(core, "snn_no_such_kernel")


def test_every_cuda_kernel_is_exported_and_takes_the_same_struct() -> None:
    assert CUDA_KERNELS == {name: arguments for name, arguments in KERNELS.items() if name not in ON_THE_CPU_ONLY}
    library = ctypes.CDLL(str(cuda_on_host_library()))
    for name in CUDA_KERNELS:
        assert hasattr(library, f"snn_cuda_{name}")
    assert hasattr(library, "snn_cuda_error") and not hasattr(library, "snn_cuda_raster_count")


def test_python_calls_each_kernel_with_its_own_struct() -> None:
    text = "\n".join((PACKAGE / name).read_text()
                     for name in ("kernels.py", "scans.py", "recurrence.py", "convolution.py", "pooling.py"))
    calls = re.findall(r'call\(\s*"(\w+)",\s*"(\w+)"', text)
    assert len(calls) >= 8
    for name, arguments in calls:
        assert KERNELS[name] == arguments
    filled_elsewhere = set(re.findall(r'kernel\("(\w+)", ', text))
    assert {name for name, _ in calls} | filled_elsewhere == set(KERNELS)


def test_names_that_python_uses_exist() -> None:
    text = "\n".join(path.read_text() for path in PACKAGE.glob("*.py"))
    used = set(re.findall(r'CONSTANTS\["(\w+)"\]', text)) | set(re.findall(r'"(k(?:[A-Z][a-z0-9]+)+)"', text))
    assert {"kFloat32", "kTile", "kZero", "kLif"} <= used <= set(abi.CONSTANTS)
    assert set(re.findall(r'STRUCTS\["(\w+)"\]', text)) <= set(abi.STRUCTS)


def test_surrogates_that_adapters_name_exist() -> None:
    folders = [PACKAGE, CSRC.parent / "compat", CSRC.parent / "adapters"]
    text = "\n".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    named = set(re.findall(r'Surrogate\("(\w+)"', text)) | {"Tanh", "Circ", "Erfc"}
    assert {"Atan", "Triangle", "SuperSpike"} <= named
    assert {f"k{kind}" for kind in named} <= set(abi.SURROGATES)
    header = (CSRC / "surrogates.h").read_text()
    for kind in abi.SURROGATES:
        assert kind == "kZeroDerivative" or f"case {kind}: return visit({kind[1:]}<T>(" in header


MODELS = [*(make("zero", True) for make in (snntorch_dynamics.leaky, snntorch_dynamics.synaptic,
                                            snntorch_dynamics.rleaky)),
          *(make("zero") for make in (snntorch_dynamics.lapicque, snntorch_dynamics.alpha,
                                      snntorch_dynamics.rsynaptic)),
          norse_dynamics.lif_box("value"),
          *(model for module in (snntorch_dynamics, norse_dynamics) for model in vars(module).values()
            if isinstance(model, dynamics.Dynamics))]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_models_have_as_many_states_and_parameters_as_their_struct(model: dynamics.Dynamics) -> None:
    struct = {"kRSynaptic": "kSynaptic"}.get(model.model, model.model.removesuffix("Recurrent"))[1:]
    text = "\n".join(path.read_text() for path in (CSRC / "neurons").glob("*.h"))
    found = re.search(rf"struct {struct} (?::[^{{]*)?{{.*?States = (\d), Count = (\d), Traces = (\d)", text, re.DOTALL)
    assert found is not None
    sizes = len(model.carried), len(model.parameters), len(model.traces)
    assert sizes == tuple(map(int, found.groups()))
    limits = (abi.CONSTANTS[name] for name in ("kMaxStates", "kMaxParameters", "kMaxTraces"))
    assert all(size <= limit for size, limit in zip(sizes, limits, strict=True))


def test_every_model_is_described() -> None:
    models = {name for name, _ in re.findall(r"(k\w+)(,|\n)", re.search(
        r"enum SnnModel : int32_t \{([^}]*)\}", (CSRC / "abi.h").read_text())[1])}  # type: ignore[index]
    assert models == {model.model for model in MODELS}
