"""The CUDA kernels on the CPU under AddressSanitizer, UndefinedBehaviorSanitizer and the race detector of the compiler.

And that these, or the comparisons, would have seen an error: in a copy of the sources, errors are planted that a
variable of the library switches on one at a time. Each sanitizer runs in processes of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from comparisons import SURROGATES, compare_rasters, compare_scan, compare_synapse, cuda_on_host
from cuda_builds import cuda_on_host_library
from test_cuda_host import RUNTIMES, Sanitized
from test_cuda_kernels import test_an_arena_is_not_written_beyond_its_capacity as little_room
from test_sanitizers import runtime

from snn_sparse_backend import recipes

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Error:
    """One change: within `context`, which the file has once, from what is right to what is wrong."""

    file: str
    context: str
    right: str
    wrong: str

    def planted(self, text: str, number: int) -> str:
        """The file's text with both, and a switch between them."""
        assert text.count(self.context) == 1 and self.context.count(self.right) == 1, self
        if self.right.endswith(";"):
            both = f"if (snn_planted == {number}) {{ {self.wrong} }} else {{ {self.right} }}"
        else:
            both = f"(snn_planted == {number} ? ({self.wrong}) : ({self.right}))"
        return text.replace(self.context, self.context.replace(self.right, both))


BARRIER = "__syncthreads();"
ERRORS = {
    # Accesses beside the memory they mean.
    "read beyond": Error("columns.h", "row < rows && column < columns ?", "row < rows && column < columns",
                         "row < rows"),
    "write beyond": Error("raster.cu", "if (column < a.cols)", "column < a.cols", "column <= a.cols"),
    "shared beyond": Error("columns.h", "i < kRowsPerStage * C::kTileColumns;", "i < kRowsPerStage * C::kTileColumns",
                           "i <= kRowsPerStage * C::kTileColumns"),
    "arena beyond": Error("neuron_forward.cu", "if (active && place < capacity)", "active && place < capacity",
                          "active"),
    # What a thread reads before another has written it, or writes while another still reads.
    "stage not written": Error("synapse_weight.cu", f"word] : 0;\n    {BARRIER}", BARRIER, ""),
    "stage in use": Error("synapse_weight.cu", f"{BARRIER}  // the stage before is still in use", BARRIER, ""),
    "tile not written": Error("synapse_input.cu", f"first_column, tile_);\n      {BARRIER}", BARRIER, ""),
    "tile in use": Error("synapse_input.cu", f"{BARRIER}  // the tile before is still in use", BARRIER, ""),
    "base not written": Error("neuron_forward.cu", f"{BARRIER}\n  int64_t place", BARRIER, ""),
    "sums in use": Error("sites.h", f"{BARRIER}  // `shared` may still be read from a call before", BARRIER, ""),
    "sums not written": Error("sites.h", f"= of_warp;\n  {BARRIER}", BARRIER, ""),
    "square not written": Error("synapse_forward.cu", f": T(0);\n  }}\n  {BARRIER}", BARRIER, ""),
    "not atomic": Error("neuron_forward.cu", "atomicAdd(used, static_cast<unsigned long long>(total))",
                        "atomicAdd(used, static_cast<unsigned long long>(total))", "(*used += total) - total"),
    # Wrong places, in any order of threads.
    "rank": Error("scan.h", "(threadIdx.x % 64)) - 1", "threadIdx.x % 64", "threadIdx.x % 32"),
    "carry": Error("neuron_backward.cu", "last < a.steps ? a.carry[i] : a.carry_in[i]", "last < a.steps", "false"),
    "half word": Error("raster.cu", "low | high << kWarp", "high << kWarp", "high << 31"),
    "second tile": Error("synapse_input.cu", "*to = first_column ? *to + sum", "first_column", "false"),
    "second part": Error("synapse_weight.cu", "s < a.splits", "a.splits", "1"),
    "last block": Error("sites.h", "!= gridDim.x - 1)", "gridDim.x - 1", "gridDim.x"),
    "threads": Error("raster.cu", "unpack_kernel<double>;\n  return launch(kernel, blocks_of(a.rows, a.cols), 1, "
                     "kSitesPerBlock", "kSitesPerBlock", "4 * kSitesPerBlock"),
}
NUMBERS = {name: number for number, name in enumerate(ERRORS, 1)}
SWITCH = """
#include <cstdint>
extern "C" {
__attribute__((used, visibility("default"))) inline int snn_planted = 0;
}
"""


def plant(folder: Path) -> Path:
    """A copy of the sources with all errors in it, switched off."""
    csrc = folder / "csrc"
    shutil.copytree(recipes.csrc_folder(), csrc)
    for name, error in ERRORS.items():
        file = csrc / "cuda" / error.file
        file.write_text(error.planted(file.read_text(), NUMBERS[name]))
    launch = csrc / "cuda" / "launch.h"
    launch.write_text(launch.read_text().replace("\n#include <cstdint>\n", SWITCH, 1))
    return csrc


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Builds by sanitizer, if the compiler has it: as they are, and (``planted ...``) with errors."""
    planted = plant(tmp_path_factory.mktemp("planted"))
    found = {"planted plain": cuda_on_host_library(None, planted)}
    for sanitizer, names in RUNTIMES.items():
        if all(map(runtime, names)):
            found[sanitizer] = cuda_on_host_library(sanitizer)
            found[f"planted {sanitizer}"] = cuda_on_host_library(sanitizer, planted)
    return found


# ---- in processes of their own ---------------------------------------------------------------------------------------

# Jobs are "error/schedule/comparison"; before each its name is written to stderr, between the sanitizer's reports.
SCRIPT = """
import ctypes, os, sys, torch
from pathlib import Path
import comparisons as c
torch.set_num_threads(1)

def rasters(sizes):
    for dtype in c.DTYPES:
        for rows, cols in sizes:
            for density in (0.3, 1.0):
                c.compare_rasters(rows, cols, density, dtype, 64, rows)

def synapses(sizes):
    for dtype in c.DTYPES:
        for rows, inputs, outputs in sizes:
            c.compare_synapse(rows, inputs, outputs, 0.3, dtype, 64, rows)

def scans(models, surrogates, sizes):
    for dtype in c.DTYPES:
        for name in models:
            for seed, surrogate in enumerate(surrogates):
                steps, rows, cols = sizes[seed % len(sizes)]
                c.compare_scan(name, surrogate, steps, rows, cols, dtype, seed)

COMPARISONS = {
    "rasters": lambda: rasters([(1, 1), (65, 63), (64, 128), (130, 200)]),
    "synapses": lambda: synapses([(1, 1, 1), (65, 63, 33), (130, 129, 65), (127, 33, 130), (1030, 3, 2)]),
    "scans": lambda: scans(c.MODELS, c.SURROGATES, [(3, 5, 65), (1, 9, 64), (2, 1, 1), (3, 9, 127), (4, 6, 200)]),
    "long scans": lambda: scans(["subtract", "LIF"], c.SURROGATES[1:2], [(35, 3, 65)]),
    "few rasters": lambda: rasters([(9, 65)]),
    "few synapses": lambda: synapses([(130, 5, 65)]),
    "few scans": lambda: scans(["subtract", "LIF"], c.SURROGATES[1:2], [(3, 9, 65)]),
}
with c.cuda_on_host(Path(sys.argv[1])) as library:
    for job in sys.argv[2:]:
        error, schedule, comparison = job.split("/")
        if int(error):
            ctypes.c_int.in_dll(library, "snn_planted").value = int(error)
        os.environ["SNN_CUDA_HOST_SEED"] = schedule
        print(f"== {job}", file=sys.stderr, flush=True)
        try:
            COMPARISONS[comparison]()
        except AssertionError:
            print("wrong", flush=True)
        else:
            print("right", flush=True)
"""


class Runner:
    def __init__(self, sanitizer: str, libraries: dict[str, Path]) -> None:
        self.libraries, self.sanitizer = libraries, sanitizer
        self.python = Sanitized(sanitizer, libraries).python

    def run(self, *jobs: str, planted: bool = False) -> subprocess.CompletedProcess[str]:
        library = self.libraries[f"planted {self.sanitizer}" if planted else self.sanitizer]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
        return subprocess.run([*self.python, "-c", SCRIPT, str(library), *jobs], env=environment, capture_output=True,
                              text=True)

    def assert_right(self, *jobs: str) -> None:
        child = self.run(*jobs)
        assert child.returncode == 0, child.stderr[-5000:]
        assert child.stdout.split() == ["right"] * len(jobs)


@pytest.fixture(scope="module")
def address(libraries: dict[str, Path]) -> Runner:
    return Runner("address", libraries)


@pytest.fixture(scope="module")
def thread(libraries: dict[str, Path]) -> Runner:
    return Runner("thread", libraries)


def test_no_access_is_wrong(address: Runner) -> None:
    address.assert_right("0//rasters", "0//synapses", "0//scans", "0//long scans",
                         "0/1/rasters", "0/2/few synapses", "0/3/scans")


def test_no_race(thread: Runner) -> None:
    thread.assert_right("0//few rasters", "0//few synapses", "0//few scans", "0/1/few synapses", "0/2/few scans")


@pytest.mark.parametrize("error, comparison", [
    ("read beyond", "few synapses"), ("write beyond", "few rasters"), ("shared beyond", "few synapses"),
])
def test_wrong_accesses_are_reported(error: str, comparison: str, address: Runner) -> None:
    child = address.run(f"0//{comparison}", f"{NUMBERS[error]}//{comparison}", planted=True)
    assert child.stdout.split() == ["right"] and child.returncode != 0
    before, _, report = child.stderr.partition(f"== {NUMBERS[error]}/")
    assert "Sanitizer" not in before
    assert "heap-buffer-overflow" in report and f"cuda/{ERRORS[error].file}:" in report, child.stderr[-5000:]


# A process reports a race between the same two places only once.
@pytest.mark.parametrize("races", [
    {"sums not written": "rasters", "stage not written": "synapses", "tile not written": "synapses",
     "square not written": "synapses", "base not written": "scans", "not atomic": "scans"},
    {"stage in use": "synapses", "tile in use": "synapses", "sums in use": "scans"},
], ids=["writes", "reads"])
def test_races_are_reported(races: dict[str, str], thread: Runner) -> None:
    right = [f"0//few {comparison}" for comparison in sorted(set(races.values()))]
    wrong = {name: f"{NUMBERS[name]}//few {comparison}" for name, comparison in races.items()}
    child = thread.run(*right, *wrong.values(), planted=True)
    reports = dict(re.findall(r"^== (.*)\n((?s:.*?))(?=^== |\Z)", child.stderr, re.MULTILINE))
    assert child.returncode == 66 and list(reports) == [*right, *wrong.values()], child.stderr[-5000:]
    assert not [job for job in right if "data race" in reports[job]]
    for name, job in wrong.items():
        assert "data race" in reports[job] and f"cuda/{ERRORS[name].file}:" in reports[job], name


# ---- in this process -------------------------------------------------------------------------------------------------


def compare(name: str, steps: int) -> None:
    compare_scan(name, SURROGATES[1], steps, 9, 65, torch.float64, 0)


@pytest.mark.parametrize("error, comparison", [
    ("arena beyond", partial(little_room, 3, torch.float32, "")),
    ("rank", partial(compare, "subtract", 3)),
    ("carry", partial(compare, "LIF", 33)),
    ("half word", partial(compare_rasters, 40, 5, 0.5, torch.float32, 64, 0)),
    ("second tile", partial(compare_synapse, 5, 7, 130, 0.5, torch.float32, 64, 0)),
    ("second part", partial(compare_synapse, 1100, 3, 2, 0.5, torch.float32, 64, 0)),
    ("last block", partial(compare_rasters, 9, 65, 0.5, torch.float32, 64, 0)),
])
def test_wrong_places_give_wrong_results(error: str, comparison: Callable[[], None],
                                         libraries: dict[str, Path]) -> None:
    with cuda_on_host(libraries["planted plain"]) as library:
        switch = ctypes.c_int.in_dll(library, "snn_planted")
        comparison()
        switch.value = NUMBERS[error]
        try:
            with pytest.raises(AssertionError):
                comparison()
        finally:
            switch.value = 0
        comparison()


@pytest.mark.parametrize("error, comparison", [
    ("stage not written", partial(compare_synapse, 130, 5, 33, 0.5, torch.float32, 64, 0)),
    ("base not written", partial(compare, "subtract", 3)),
    ("sums not written", partial(compare_rasters, 9, 65, 0.5, torch.float32, 64, 0)),
])
def test_missing_barriers_give_wrong_results(error: str, comparison: Callable[[], None], libraries: dict[str, Path],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """In some orders of threads; those whose threads hardly ever drift far enough apart are the race detector's."""
    with cuda_on_host(libraries["planted plain"]) as library:
        switch, wrong = ctypes.c_int.in_dll(library, "snn_planted"), 0
        try:
            for schedule in ("", "1", "2", "3", "4"):
                monkeypatch.setenv("SNN_CUDA_HOST_SEED", schedule)
                switch.value = 0
                comparison()
                switch.value = NUMBERS[error]
                try:
                    comparison()
                except AssertionError:
                    wrong += 1
        finally:
            switch.value = 0
    assert wrong >= 3


def test_an_error_of_a_launch_is_told(libraries: dict[str, Path]) -> None:
    """In the words that CUDA has for it; the next call works."""
    with cuda_on_host(libraries["planted plain"]) as library:
        switch = ctypes.c_int.in_dll(library, "snn_planted")
        try:
            for number in (0, NUMBERS["threads"], 0):
                switch.value = number
                if number:
                    with pytest.raises(RuntimeError, match=r"snn_cuda_raster_unpack: .*block of \(2048,1,1\) threads"):
                        compare_rasters(9, 65, 0.5, torch.float32, 64, 0)
                else:
                    compare_rasters(9, 65, 0.5, torch.float32, 64, 0)
        finally:
            switch.value = 0


def test_every_planted_error_is_looked_for() -> None:
    text = Path(__file__).read_text()
    for name in ERRORS:
        assert text.count(f'"{name}"') >= 2, name
