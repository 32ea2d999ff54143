"""The harness that runs CUDA kernels on the CPU: right kernels give right results, and planted errors are seen.

The kernels are those of cuda_host/planted.cu. Each sanitizer runs in processes of its own, with its runtime loaded
before Python's.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_builds import SANITIZERS
from test_sanitizers import runtime

from snn_sparse_backend import recipes

SOURCE = Path(__file__).parent / "cuda_host" / "planted.cu"
FLAGS = (
    "-std=c++17", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-gnu-unique", "-O1", "-g",
    "-I", str(SOURCE.parent / "include"), "-x", "c++", str(SOURCE),
)
VARIANTS = {
    "plain": (),
    "ucontext": ("-DCUDA_HOST_UCONTEXT",),
    "address": (*SANITIZERS["address"], "-fno-omit-frame-pointer"),
    "thread": SANITIZERS["thread"],
}
RUNTIMES = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so",)}
OPTIONS = {
    "PYTHONMALLOC": "malloc",
    "ASAN_OPTIONS": "detect_leaks=0",
    # By default it reports one race an address, and dynamic shared memory is often at the same one.
    "TSAN_OPTIONS": "suppress_equal_addresses=0:exitcode=66",
}

RIGHT = (
    "block_sum", "row_sums", "pack", "reverse", "early_exit", "last_block", "half_warps", "votes", "spin_lock",
    "coordinates", "many_bytes", "undefined_shared", "large_parameters",
)
SEEDS = ("", *map(str, range(10)))  # "": in order

# Each answer is preceded by its name on stderr, between the reports of the sanitizer.
ASK = """
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1])
library.planted.restype = ctypes.c_char_p
for seed in sys.argv[2].split(","):
    os.environ["SNN_CUDA_HOST_SEED"] = seed
    for name in sys.argv[3:]:
        print(f"== {name}", file=sys.stderr, flush=True)
        print(seed, name, library.planted(name.encode()).decode(), flush=True)
"""


def line_of(kernel: str) -> int:
    """The line of planted.cu with this kernel's error."""
    return next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if line.endswith(f"// {kernel}"))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The planted kernels in all variants that the compiler can make, built side by side."""
    folder = tmp_path_factory.mktemp("planted")

    def compiled(variant: str) -> Path:
        path = folder / f"{variant}.so"
        subprocess.run([*recipes.find_compiler().command, *VARIANTS[variant], *FLAGS, "-o", str(path)], check=True)
        return path

    variants = [variant for variant in VARIANTS if all(map(runtime, RUNTIMES.get(variant, ())))]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(variants, pool.map(compiled, variants), strict=True))


class Planted:
    """The kernels in this process."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.planted.restype = ctypes.c_char_p

    def ask(self, name: str) -> str:
        return self.library.planted(name.encode()).decode()


class Sanitized:
    """The kernels under a sanitizer, in processes of their own."""

    def __init__(self, variant: str, libraries: dict[str, Path]) -> None:
        if variant not in libraries:
            pytest.skip(f"the compiler has no -fsanitize={variant}")
        self.library = libraries[variant]
        preload = " ".join(str(runtime(name)) for name in RUNTIMES[variant])
        python = ["env", *(f"{k}={v}" for k, v in OPTIONS.items()), f"LD_PRELOAD={preload}", sys.executable]
        # Some releases of the race detector do not start where Linux puts things at random addresses.
        for prefix in ([], ["setarch", "-R"] if shutil.which("setarch") else []):
            self.python = [*prefix, *python]
            if subprocess.run([*self.python, "-c", ""], capture_output=True).returncode == 0:
                return
        pytest.skip(f"Python does not start under -fsanitize={variant}")

    def ask(self, *names: str, seeds: tuple[str, ...] = ("",)) -> subprocess.CompletedProcess[str]:
        command = [*self.python, "-c", ASK, str(self.library), ",".join(seeds), *names]
        return subprocess.run(command, capture_output=True, text=True)

    def assert_right(self, seeds: tuple[str, ...]) -> None:
        child = self.ask(*RIGHT, seeds=seeds)
        answers = child.stdout.splitlines()
        assert child.returncode == 0 and len(answers) == len(RIGHT) * len(seeds), child.stderr[-5000:]
        assert all(answer.endswith(" right") for answer in answers), child.stdout


@pytest.fixture(scope="module")
def plain(libraries: dict[str, Path]) -> Planted:
    return Planted(libraries["plain"])


@pytest.fixture(scope="module")
def address(libraries: dict[str, Path]) -> Sanitized:
    return Sanitized("address", libraries)


@pytest.fixture(scope="module")
def thread(libraries: dict[str, Path]) -> Sanitized:
    return Sanitized("thread", libraries)


@pytest.mark.parametrize("variant", ["plain", "ucontext"])
def test_right_kernels(variant: str, libraries: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Planted(libraries[variant])
    for seed in SEEDS:
        monkeypatch.setenv("SNN_CUDA_HOST_SEED", seed)
        assert {name: kernels.ask(name) for name in RIGHT} == dict.fromkeys(RIGHT, "right"), seed


def test_launches_of_several_threads(plain: Planted) -> None:
    def ask(turn: int) -> tuple[str, str]:
        return plain.ask("block_sum"), plain.ask(("stuck", "many_threads", "last_block")[turn % 3])

    with ThreadPoolExecutor(6) as pool:
        for turn, (right, other) in enumerate(pool.map(ask, range(60))):
            assert right == "right"
            assert ("deadlock", "(1025,1,1) threads", "right")[turn % 3] in other


# The last one is wrong in any order of threads.
@pytest.mark.parametrize("kernel", [
    "missing_syncthreads", "missing_second_barrier", "missing_syncwarp", "wrong_index",
])
def test_wrong_results(kernel: str, plain: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for seed in SEEDS[1:]:
        monkeypatch.setenv("SNN_CUDA_HOST_SEED", seed)
        answers.append(plain.ask(kernel))
    assert answers.count("wrong") >= 8


@pytest.mark.parametrize("kernel, code, parts", [
    ("divergent", 719, ["launch of divergent", "divergent barrier", "thread (16,0,0) of block (0,0,0)"]),
    ("stuck", 702, ["deadlock in block (0,0,0), 0 of 64", "threads (0,0,0) to (15,0,0) wait in __shfl_down_sync at ",
                    "mask ffffffff", "threads (16,0,0) to (63,0,0) wait in __syncthreads at "]),
    ("outside_mask", 719, ["__shfl_sync", "lane 16 is not in its own mask 0000ffff"]),
    ("absent_source", 719, ["__shfl_sync", "reads lane 20, which takes no part in it"]),
    ("much_shared", 9, ["49153 bytes of dynamic shared memory, at most 49152"]),
    ("too_much_shared", 1, ["232449 bytes of dynamic shared memory"]),
    ("many_threads", 9, ["a block of (1025,1,1) threads"]),
    ("no_blocks", 9, ["a grid of (0,1,1) blocks"]),
    ("many_blocks", 9, ["a grid of (1,65536,1) blocks"]),
    ("larger_parameters", 9, ["4104 bytes of kernel parameters, at most 4096"]),
    ("no_device", 101, ["invalid device ordinal 2"]),
])
def test_errors_of_launches(kernel: str, code: int, parts: list[str], plain: Planted) -> None:
    answer = plain.ask(kernel)
    assert answer.startswith(f"error {code}: ")
    for part in parts:
        assert part in answer
    for function, path, line in re.findall(r"(__\w+) at (\S+):(\d+)", answer):
        assert Path(path) == SOURCE and function in SOURCE.read_text().splitlines()[int(line) - 1]
    assert plain.ask("block_sum") == "right"  # nothing is left behind


def test_device_calls_are_recorded(plain: Planted) -> None:
    calls = (ctypes.c_int * 8)()
    plain.library.cuda_host_device_calls(calls, 8)
    assert plain.ask("no_device").startswith("error 101: ")
    assert plain.library.cuda_host_current_device() == 1
    assert plain.library.cuda_host_device_calls(calls, 8) == 2 and calls[:2] == [1, 2]
    assert plain.library.cuda_host_device_calls(calls, 8) == 0


def test_right_kernels_with_address_sanitizer(address: Sanitized) -> None:
    address.assert_right(SEEDS)


@pytest.mark.parametrize("kernel, report", [
    ("read_beyond", "heap-buffer-overflow"),
    ("write_beyond", "heap-buffer-overflow"),
    ("dynamic_beyond", "heap-buffer-overflow"),
    ("static_beyond", "insufficient space|global-buffer-overflow"),
    ("misaligned", "misaligned address"),
])
def test_wrong_accesses(kernel: str, report: str, address: Sanitized) -> None:
    child = address.ask("stuck", kernel)  # also after a launch that has left its threads half-way
    assert "deadlock" in child.stdout and kernel not in child.stdout and child.returncode != 0
    assert re.search(report, child.stderr), child.stderr[-5000:]
    assert f"planted.cu:{line_of(kernel)}" in child.stderr, child.stderr[-5000:]


def test_right_kernels_with_race_detector(thread: Sanitized) -> None:
    thread.assert_right(("", "1"))


def test_races(thread: Sanitized) -> None:
    names = (
        "missing_syncthreads", "missing_second_barrier", "missing_syncwarp", "missing_atomic",
        "missing_atomic_between_blocks", "missing_fence",
    )
    child = thread.ask(*names, "stuck", "divergent", *RIGHT)
    assert child.returncode == 66
    reports = dict(re.findall(r"^== (\w+)\n(.*?)(?=^== |\Z)", child.stderr, re.MULTILINE | re.DOTALL))
    for name in names:
        assert "data race" in reports[name] and f"planted.cu:{line_of(name)}" in reports[name], name
    assert not [name for name in RIGHT if "data race" in reports[name]]
