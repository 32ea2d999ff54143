"""``pytest --kernels``: the same tests with the CUDA kernels, on a GPU or compiled for the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import devices
import pytest
import torch

from snn_sparse_backend import crossovers, native

# What these test is the CPU's kernels, the builder or the package, or they choose their kernels themselves.
OF_THE_CPU = ("test_kernels", "test_sanitizers", "test_abi", "test_build", "test_packaging", "test_demo_bench",
              "test_bench", "test_gpu_check", "test_lanes", "test_workspace", "test_convolution_kernels",
              "test_summation", "test_tune", "test_deferred", "test_cuda_", "node/", "test_norse_own_suite",
              "test_figures", "test_probe", "test_trials", "test_compat_matrix")
WITH_ANY_CUDA = ("test_cuda_device",)


@pytest.fixture(autouse=True, scope="session")
def one_crossover_for_all() -> Iterator[None]:
    """Small products run event by event as well, on any machine, whatever was measured there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossovers, "density", lambda *_: 0.2)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", choices=("cpu", "cuda-host", "cuda"), default="cpu",
                     help="cuda: tensors are on the GPU; cuda-host: CPU tensors go through the CUDA kernels, which are "
                          "compiled for the CPU; both leave out what tests the CPU's kernels")


def pytest_configure(config: pytest.Config) -> None:
    kernels = config.getoption("--kernels")
    if kernels == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--kernels cuda: torch sees no GPU")
        devices.device = torch.device("cuda", torch.cuda.current_device())
        torch.set_default_device(devices.device)
    elif kernels == "cuda-host":
        from cuda_builds import cuda_on_host_library

        native.cuda_on_host = ctypes.CDLL(str(cuda_on_host_library()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kernels") == "cpu":
        return
    chosen = [item for item in items
              if any(name in item.nodeid for name in WITH_ANY_CUDA)
              or not any(name in item.nodeid for name in OF_THE_CPU)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
