"""The CUDA sources under nvcc: they compile without a warning, and each kernel takes of a GPU what was written down."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_kernels_table import ARCHITECTURES, Kernel, Resources, markdown, nvcc_report

from snn_sparse_backend import recipes
from snn_sparse_backend.toolchain import BuildError, find_nvcc

TABLE = Path(__file__).parent.parent / "docs" / "kernel-resources.md"
# Kernels held to 64 registers (two blocks of 512 threads a multiprocessor) or 40, for which these few bytes do not fit.
SPILLING = {
    Kernel("neuron_backward", "backward_kernel<Iaf<float>, false, false>"): 4,
    Kernel("neuron_backward", "backward_kernel<Lif<double, false>, false, false>"): 16,
    Kernel("neuron_backward", "backward_kernel<Lif<float, false>, true, false>"): 4,
    Kernel("neuron_backward", "backward_kernel<Lif<float, true>, false, false>"): 4,
    Kernel("neuron_backward", "backward_kernel<Lif<float, true>, true, false>"): 4,
    Kernel("neuron_backward", "backward_kernel<LifAdex<double, false>, true, false>"): 16,
    Kernel("neuron_backward", "backward_kernel<LifAdex<double, true>, true, false>"): 16,
    Kernel("neuron_backward", "backward_kernel<LifEx<double, false>, false, false>"): 24,
    Kernel("neuron_backward", "backward_kernel<LifEx<double, true>, false, false>"): 24,
    Kernel("neuron_backward", "backward_kernel<LifEx<float, false>, false, false>"): 24,
    Kernel("neuron_backward", "backward_kernel<LifEx<float, true>, false, false>"): 8,
    Kernel("neuron_backward", "backward_kernel<LifRefrac<float, false>, true, false>"): 32,
    Kernel("neuron_backward", "backward_kernel<LifRefrac<float, true>, true, false>"): 24,
    Kernel("neuron_backward", "backward_kernel<Lsnn<float, false>, true, false>"): 20,
    Kernel("neuron_backward", "backward_kernel<RLeaky<double, true>, false, false>"): 8,
    Kernel("neuron_backward", "backward_kernel<RLeaky<float, true>, false, false>"): 4,
    Kernel("neuron_backward", "backward_kernel<Synaptic<double, false, false>, false, false>"): 16,
    Kernel("neuron_backward", "backward_kernel<Synaptic<double, false, true>, false, false>"): 16,
    Kernel("neuron_backward", "backward_kernel<Synaptic<double, true, false>, false, false>"): 22,
    Kernel("neuron_backward", "backward_kernel<Synaptic<float, false, false>, false, false>"): 4,
    Kernel("neuron_backward", "backward_kernel<Synaptic<float, false, false>, true, false>"): 4,
    Kernel("neuron_backward", "backward_kernel<Synaptic<float, true, false>, false, false>"): 12,
    Kernel("neuron_backward", "backward_kernel<Synaptic<float, true, false>, true, false>"): 12,
    Kernel("neuron_forward", "forward_kernel<LifAdex<double, false>, 28>"): 8,
    Kernel("neuron_forward", "forward_kernel<LifEx<double, true>, 28>"): 8,
    Kernel("neuron_forward", "forward_kernel<LifRefrac<double, true>, 28>"): 16,
    Kernel("neuron_forward", "forward_kernel<Lsnn<double, true>, 28>"): 8,
    Kernel("synapse_input", "input_gradient_kernel<Columns<double, 2>>"): 4,
}


SPILLING_GIVEN = 32  # backward scans with derivatives that Python evaluated: nobody is held up by these


def allowed(kernel: Kernel) -> int:
    """Bytes that a thread of a kernel may spill."""
    given = kernel.source == "neuron_backward" and kernel.name.endswith(", true, true>")
    return SPILLING_GIVEN if given else SPILLING.get(kernel, 0)


def nvcc_or_skip() -> str:
    try:
        return find_nvcc().version
    except BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def report() -> dict[Kernel, dict[str, Resources]]:
    nvcc_or_skip()
    return nvcc_report()


def test_all_kernels_compile_without_warnings(report: dict[Kernel, dict[str, Resources]]) -> None:
    columns = {f"sm_{architecture.replace('.', '')}" for architecture in ARCHITECTURES}
    assert {kernel.source for kernel in report} == {path.stem for path in (recipes.csrc_folder() / "cuda").glob("*.cu")
                                                    if path.stem != "exports"}
    assert all(set(row) == columns for row in report.values())


def test_only_these_kernels_spill(report: dict[Kernel, dict[str, Resources]]) -> None:
    spilled = {kernel: max(r.spill_stores for r in row.values()) for kernel, row in report.items()}
    assert all(number <= allowed(kernel) for kernel, number in spilled.items()), spilled
    # An array that is not in registers would be on the stack.
    assert all(allowed(kernel) for kernel, row in report.items() if any(r.stack for r in row.values()))


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    nvcc_or_skip()
    folder = tmp_path / "cuda"
    folder.mkdir()
    source = folder / "unused.cu"
    source.write_text("__global__ void kernel(int* x) { *x = 1; }\n")
    assert [kernel.name for kernel in nvcc_report(ARCHITECTURES[:1], tmp_path)] == ["kernel"]
    source.write_text("__global__ void kernel(int* x) { int unused = 2; *x = 1; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        nvcc_report(ARCHITECTURES[:1], tmp_path)


def test_the_table_is_up_to_date(report: dict[Kernel, dict[str, Resources]]) -> None:
    """``python tests/cuda_kernels_table.py --out docs/kernel-resources.md`` brings it up to date."""
    version, written = find_nvcc().version, TABLE.read_text()
    if f"with {version}." not in written:
        pytest.skip(f"the table is not from {version}")
    assert written == markdown(report, version)
