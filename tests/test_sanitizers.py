"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and that these would have seen an error.

Each build runs in a process of its own, with the sanitizer's runtime loaded before Python's. Tensors end where their
memory ends, so the comparisons of comparisons.py are checked for reads and writes beside them as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from comparisons import plain_recipe

from snn_sparse_backend import build, native, recipes

# No optimisation: with these checks it makes compiling five times as long, and it removes some of what they would find.
FLAGS = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
ISAS = {"base": (), "v3": recipes.INSTRUCTION_SETS["v3"]}

COMPARE = """
import sys, torch
from pathlib import Path
import comparisons as c, convolution_cases as i
from snn_sparse_backend.pooling import Window
with c.library(Path(sys.argv[1])), c.pytest.MonkeyPatch.context() as patch:
    patch.setattr(c.native, "SITES_PER_THREAD", 64)
    torch.set_num_threads(2)
    for dtype in c.DTYPES:
        for rows, cols in ((1, 1), (65, 63), (64, 128), (130, 200)):
            c.compare_rasters(rows, cols, 0.3, dtype, 64, rows)
            c.compare_synapse(rows, cols, cols // 2 + 1, 0.3, dtype, 64, rows)
        c.compare_synapse(300, 5, 3, 1.0, dtype, 1024, 0)
        for outputs, channels, pooled in ((5, 3, False), (16, 17, True), (65, 33, True)):
            for window in (Window((3, 2), (1, 2), (2, 1), (2, 1)), Window((1, 3), (1, 1), (0, 0))):
                i.compare_products(i.Case(130, (channels, 7, 6), outputs, window, 0.3, pooled, dtype, outputs))
        for shape in ((2, 300, 2, 2), (1, 3, 9, 130)):
            for window in (Window((2, 2), (2, 2), (0, 0)), Window((2, 3), (1, 2), (1, 1))):
                for values in ("normal", "special"):
                    i.compare_max_pool(shape, window, True, values, dtype, 0)
        for name in c.MODELS:
            for seed, surrogate in enumerate(c.SURROGATES):
                c.compare_scan(name, surrogate, 3, 5, (1, 64, 65, 127)[seed % 4], dtype, seed)
print("compared")
"""

# A buffer of exactly the right size, used as if it had one row or word more, or began one byte later.
MISUSE = """
import ctypes, sys
from snn_sparse_backend import abi
core, libc = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
rows, cols, what = 3, 70, sys.argv[2]
words, dense = libc.malloc(rows * 2 * 8), libc.malloc(rows * cols * 4)
ctypes.memset(words, 0, rows * 2 * 8)
def unpack(words, rows):
    a = abi.STRUCTS["SnnRasterUnpack"](words=words, rows=rows, cols=cols, dense=dense, dtype=0, threads=1)
    core.snn_raster_unpack(ctypes.c_void_p(ctypes.addressof(a)))
def count(words, count):
    a = abi.STRUCTS["SnnRasterCount"](words=words, count=count)
    core.snn_raster_count(ctypes.c_void_p(ctypes.addressof(a)))
unpack(words, rows)
count(words, rows * 2)
print("used")
if what == "write":
    words = libc.malloc(2 * rows * 2 * 8)
    ctypes.memset(words, 0, 2 * rows * 2 * 8)
    unpack(words, rows + 1)
elif what == "read":
    count(words, rows * 2 + 1)
else:
    count(words + 1, rows * 2 - 1)
print("survived")
"""


def runtime(name: str) -> str | None:
    """The compiler's own copy of a shared library, if it has one."""
    command = [*recipes.find_compiler().command, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (runtime("libasan.so") and runtime("libstdc++.so.6")),
    reason="the compiler has no AddressSanitizer",
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The library with both sanitizers, for each instruction set that this processor has; built side by side."""
    try:
        isas = [isa for limit, isa in enumerate(ISAS) if limit == 0 or isa in native.instruction_set(limit)]
    finally:
        native.instruction_set(2)
    recipes_of = {isa: plain_recipe(None, (*FLAGS, *ISAS[isa]), ("-fsanitize=address,undefined",)) for isa in isas}
    cache = tmp_path_factory.mktemp("sanitized")
    with ThreadPoolExecutor() as pool:
        artifacts = pool.map(lambda recipe: build.provide(recipe, cache), recipes_of.values())
        return {isa: artifact.path for isa, artifact in zip(isas, artifacts, strict=True)}


@pytest.fixture(params=ISAS)
def sanitized(request: pytest.FixtureRequest, libraries: dict[str, Path]) -> Path:
    if request.param not in libraries:
        pytest.skip(f"this processor does not run x86-64-{request.param}")
    return libraries[request.param]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)


def test_nothing_is_reported(sanitized: Path) -> None:
    child = run(COMPARE, str(sanitized))
    assert child.returncode == 0 and child.stdout == "compared\n", child.stderr[-5000:]


@pytest.mark.parametrize("misuse, report", [
    ("write", "heap-buffer-overflow"), ("read", "heap-buffer-overflow"), ("misalign", "load of misaligned address"),
])
def test_misuse_is_reported(sanitized: Path, misuse: str, report: str) -> None:
    child = run(MISUSE, str(sanitized), misuse)
    assert child.stdout == "used\n" and child.returncode != 0
    assert report in child.stderr and "raster.cpp" in child.stderr, child.stderr[-5000:]
