"""The benchmark on a device of choice, kernel by kernel, and the check of a GPU, as far as they go without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
import torch
from comparisons import cuda_on_host
from cuda_builds import cuda_on_host_library

from snn_sparse_backend import bench, build, kernels
from snn_sparse_backend.bench import measure, neurons, roofline, runner
from snn_sparse_backend.bench.cases import PRESETS, Case
from snn_sparse_backend.bench.clock import Clock, Meter
from snn_sparse_backend.bench.kernels import PRESETS as KERNEL_PRESETS
from snn_sparse_backend.bench.measure import Memory, ones, step_memory
from snn_sparse_backend.cli import main
from snn_sparse_backend.norse_dynamics import LIF

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KERNELS = {"raster pack", "raster unpack", "raster transpose", "pack weights", "synapse forward", "weight gradient",
           "input gradient"}
ROW = {"kernel", "shape", "density", "us", "bytes", "operations", "gb_s", "share_of_copy", "gop_s", "gemm_us"}
PYTHON = [sys.executable, "-c"]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------ the device


def test_every_preset_has_its_cases_and_its_shapes() -> None:
    assert set(PRESETS) == set(KERNEL_PRESETS) == set(bench.PRESET_NAMES)
    assert set(bench.DEFAULT_PRESETS.values()) <= set(bench.PRESET_NAMES)
    for cases in PRESETS.values():
        assert len({case.name for case in cases}) == len(cases)


@without_gpu
@pytest.mark.parametrize("options", [["--device", "cuda"], ["--device", "cuda:3"], ["--kernels", "--device", "cuda"]])
def test_without_a_gpu_one_line_says_so(options: list[str], tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "no cuda" in said[0] and "0 GPUs" in said[0]
    assert not (tmp_path / "out").exists()


def test_an_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--device", "tpu"])
    assert "expected cpu, cuda or cuda:N" in capsys.readouterr().err


class Gpu:
    """A GPU whose clock runs on by one millisecond with each event, and whose memory is what a test says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.log, self.allocated, self.peak = 0.0, [], 100, 0
        patch.setattr(torch.cuda, "Event", self.event)
        patch.setattr(torch.cuda, "synchronize", lambda device: self.log.append("wait"))
        patch.setattr(torch.cuda, "memory_allocated", lambda device: self.allocated)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.log.append("reset"))

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()

        def record() -> None:
            self.now += 1.0
            event.at = self.now
            self.log.append("event")

        event.record, event.elapsed_time = record, lambda end: end.at - event.at
        return event


def test_cuda_is_timed_by_events_and_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, clock = Gpu(monkeypatch), Clock(CUDA)
    assert clock.between(clock.mark(), clock.mark(), clock.mark()) == pytest.approx((1e-3, 1e-3))
    assert gpu.log == ["event", "event", "event", "wait"]
    Clock(CPU).wait()
    assert len(gpu.log) == 4 and Clock(CPU).between(1.0, 3.0) == (2.0,)


def test_peak_memory_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)

    def step() -> None:
        assert gpu.log == ["wait", "reset"]
        gpu.peak = 700

    assert step_memory(CUDA, step) == Memory(700, 100) and gpu.log[-1] == "wait"
    ran: list[int] = []
    assert step_memory(CPU, lambda: ran.append(1)) is None and ran


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**31,
                                 uuid="1-2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = measure.gpu(CUDA)
    assert found["capability"] == "9.0" and found["memory_mib"] == 2048 and found["driver"] is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n[ \"$3\" = --id=GPU-1-2 ] && echo '580.1, 1980, 3201, 1980, 3201, 700.00, 31'\n")
    program.chmod(0o755)
    found = measure.gpu(CUDA)
    assert (found["driver"], found["sm_mhz"], found["celsius"]) == ("580.1", "1980", "31")


# ------------------------------------------------------------------------------------------------------ networks


def test_a_case_that_fails_or_comes_too_late_does_not_cost_the_others(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = runner.run_case

    def run_case(case: Case, *rest: Any) -> runner.Outcome:
        if case.gaussian:
            raise RuntimeError("no [such] luck")
        return original(case, *rest)

    monkeypatch.setattr(runner, "run_case", run_case)
    assert main(["bench", "--preset", "gpu-quick", "--out", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [case["library"] for case in results["cases"]] == ["snntorch", "norse"]
    assert "Gaussian" in results["failed"][0]["name"] and "luck" in results["failed"][0]["error"]
    assert "no [such] luck" in capsys.readouterr().out
    assert main(["bench", "--preset", "gpu-quick", "--out", str(tmp_path), "--seconds", "-1"]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert not results["cases"] and len(results["left_out"]) == len(PRESETS["gpu-quick"])


def test_one_layer_with_both_inputs() -> None:
    for library in ("snntorch", "norse"):
        dense, spikes = (runner.run_case(Case(library, (96, 96), 12, 4, rounds=1, layer=True, gaussian=gaussian,
                                              compiled=()), 0.0, CPU).as_dict() for gaussian in (True, False))
        assert dense["input_rate"] > 0.99 and spikes["input_rate"] < 0.05
        for case in (dense, spikes):
            (layer,) = case["hidden"]
            assert 0.01 < layer["spike_rate"] < 0.04
            assert all(v["gradient_difference"] < 1e-4 for v in case["variants"] if "cutoff" not in v["name"])
            assert all(v["peak_mib"] is None and v["step_per_floor"] > 0 for v in case["variants"])
        best = spikes["variants"][-1]["counts"]
        assert best["weight_gradient_sparse"] and best["forward_sparse"]
        assert dense["variants"][-1]["counts"]["weight_gradient_dense"]


def test_densities_through_cuda_kernels_are_those_of_the_cpu() -> None:
    case = Case("snntorch", (40, 50, 10), 8, 4, rounds=1, compiled=())
    on_cpu = runner.run_case(case, 0.0, CPU)
    with cuda_on_host(cuda_on_host_library()):
        through_cuda = runner.run_case(case, 0.0, CPU)
    assert through_cuda.densities == on_cpu.densities and 0 < on_cpu.densities[0].spike_rate < 0.1
    exact = next(v for v in through_cuda.variants if "exact" in v.name)
    assert exact.counts["weight_gradient_sparse"] and exact.gradient_difference < 1e-4


# ------------------------------------------------------------------------------------------------------ kernels


def assert_table(results: dict[str, Any]) -> None:
    rows = results["kernels"]
    assert all(row.keys() == ROW and row["us"] > 0 and row["bytes"] > 0 for row in rows)
    names = {row["kernel"] for row in rows}
    assert names >= KERNELS
    for form in ("Leaky step, dense", "Leaky step, active", "Leaky sequence, dense", "Leaky sequence, active",
                 "LIF sequence, dense", "LIF sequence, active"):
        assert {f"forward {form}", f"backward {form}"} <= names
    products = [row for row in rows if row["gemm_us"]]
    assert {row["kernel"] for row in products} == {"synapse forward", "weight gradient", "input gradient"}
    for row in rows:
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    for density in (0.01, 0.03, 0.1):
        assert any(row["density"] == pytest.approx(density, rel=0.3) for row in products)
    assert results["copy_gb_s"] > 0


def test_kernel_table_of_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--kernels", "--preset", "quick", "--threads", "1", "--out", str(tmp_path)]
    assert main(["bench", *arguments]) == 0
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert_table(results)
    assert results["environment"]["device"] == "cpu" and results["preset"] == "quick"
    said = capsys.readouterr().out
    assert "input gradient" in said and "of copy" in said and "kernels.json" in said


def test_kernel_table_of_the_cuda_kernels(tmp_path: Path) -> None:
    with cuda_on_host(cuda_on_host_library()):
        assert_table(bench.run_kernels("gpu-quick", tmp_path))


@pytest.mark.parametrize("dynamics", [neurons.LEAKY, LIF], ids=lambda dynamics: dynamics.name)
@pytest.mark.parametrize("density", [None, 0.1])
def test_the_scans_that_are_timed_are_right(dynamics: Any, density: float | None) -> None:
    """CUDA's kernels and the CPU's make the same of the same currents, also after many calls."""
    found = []
    for through_cuda in (False, True):
        torch.manual_seed(0)
        if through_cuda:
            with cuda_on_host(cuda_on_host_library()):
                found.append(_scanned(neurons.Sequence(dynamics, (35, 3, 70), density, CPU)))
        else:
            found.append(_scanned(neurons.Sequence(dynamics, (35, 3, 70), density, CPU)))
    (spikes, active, grad), (expected, expected_active, _) = found
    assert torch.equal(spikes, expected) and active == expected_active
    assert (active is None) == (density is None) and grad.isfinite().all() and grad.any()
    if density is not None:
        assert active == pytest.approx(density * 35 * 3 * 70, rel=0.05)


def _scanned(sequence: neurons.Sequence) -> tuple[torch.Tensor, int | None, torch.Tensor]:
    sequence.prepare()
    for _ in range(Meter.LAUNCHES):
        sequence.forward()
    sequence.backward()()
    return sequence._output.clone(), sequence.active, sequence._grad_input.clone()


def test_bytes_are_those_of_the_tensors() -> None:
    rows, inputs, outputs = 15, 70, 33
    x = torch.zeros(rows, inputs)
    x[::2, ::3] = 1
    raster, weight = kernels.pack(x), torch.randn(outputs, inputs)
    assert raster is not None
    events, tiles = ones([raster]), kernels.pack_weights(weight)
    assert events == x.count_nonzero()
    transposed, grad = kernels.transpose(raster), torch.randn(rows, outputs)
    assert roofline.raster_and_dense(rows, inputs).bytes == x.nbytes + raster.words.nbytes
    assert roofline.raster_transpose(rows, inputs).bytes == raster.words.nbytes + transposed.words.nbytes
    assert roofline.pack_weights(inputs, outputs).bytes == weight.nbytes + tiles.nbytes
    forward = roofline.synapse_forward(rows, inputs, outputs, events)
    assert forward.bytes == raster.words.nbytes + weight.nbytes + 4 * outputs + grad.nbytes
    assert forward.operations == events * outputs
    assert roofline.weight_gradient(rows, inputs, outputs, events).bytes == (
        grad.nbytes + transposed.words.nbytes + weight.nbytes)
    assert roofline.input_gradient(rows, inputs, outputs, events).bytes == (
        grad.nbytes + transposed.words.nbytes + weight.nbytes + 4 * events)
    steps, sites = 5, rows * inputs
    scan = roofline.neuron_forward(steps, rows, inputs, 1, None)
    assert scan.bytes == 3 * steps * x.nbytes + 2 * x.nbytes + steps * raster.words.nbytes
    kept = roofline.neuron_forward(steps, rows, inputs, 1, 100).bytes - scan.bytes
    assert kept == 400 + steps * raster.words.nbytes - steps * x.nbytes
    assert roofline.neuron_backward(steps, rows, inputs, False, None).bytes == 3 * 4 * steps * sites


# ------------------------------------------------------------------------------------------------------ gpu-check


def test_dry_run(tmp_path: Path) -> None:
    script = Path(gpu_check.__file__)
    done = subprocess.run([sys.executable, str(script), "--dry-run", "--out", str(tmp_path)], capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout.splitlines()[-1]
    results = json.loads((tmp_path / "gpu-check.json").read_text())
    assert results["ok"] and results["dry_run"] and results["environment"]["torch"] == torch.__version__
    assert [part["name"] for part in results["parts"]] == ["build", "tests", "kernels", "bench"]
    assert results["tests"]["passed"] > 5 and results["tests"]["failed"] == [] and results["build_seconds"] > 0
    figures = results["figures"]
    assert len(figures["cases"]) == len(PRESETS["gpu-quick"]) and figures["copy_gb_s"] > 0
    assert {row["kernel"] for row in figures["kernels"]} >= KERNELS
    assert all(variant["step_ms"] > 0 for case in figures["cases"] for variant in case["variants"])
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.png", "memory.png", "kernels.json",
                                                          "gpu-check.json", "gpu-check.log"}


@without_gpu
def test_the_check_refuses_to_begin_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1 and "no GPU" in said.err and not said.out
    assert not (tmp_path / "out").exists()


def test_a_part_that_fails_or_hangs_is_reported_and_the_others_run(tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    hangs = "import os, signal, time; signal.signal(signal.SIGINT, lambda *_: os._exit(3)); time.sleep(60)"
    parts = [gpu_check.Part("one", [*PYTHON, "print('some words'); raise SystemExit(4)"], 30, 0),
             gpu_check.Part("two", [*PYTHON, hangs], 1, 0),
             gpu_check.Part("memcheck", [*PYTHON, "print('Device not supported'); raise SystemExit(1)"], 30, 0),
             gpu_check.Part("three", [*PYTHON, "import sys; print(sys.argv[1:])"], 30, 0, told=True)]
    outcomes = gpu_check.run_all(parts, 200, tmp_path / "log")
    assert [o.result for o in outcomes] == ["failed", "over time", "not supported", "ok"]
    assert [o.code for o in outcomes] == [4, None, 1, 0] and outcomes[1].seconds < 20
    assert [o.good for o in outcomes] == [False, False, True, True]
    assert outcomes[3].output == "['--seconds', '15']\n" and "some words" in (tmp_path / "log").read_text()
    assert "some words" in capsys.readouterr().out


def test_a_part_leaves_to_the_later_ones_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def run(part: gpu_check.Part, limit: float, log: Path) -> gpu_check.Outcome:
        limits.append(limit)
        return gpu_check.Outcome(part.name, part.command, "ok", 0, 0.0, "")

    monkeypatch.setattr(gpu_check, "run", run)
    gpu_check.run_all([gpu_check.Part(name, [], 200, 60) for name in "abc"], 300, tmp_path / "log")
    assert limits == [pytest.approx(limit, abs=1) for limit in (180, 200, 200)]


def test_counts_of_the_tests(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert gpu_check.tests_of(report) is None
    report.write_text('<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1"><testcase classname="a" '
                      'name="b"><failure/></testcase><testcase classname="c" name="d"><error/></testcase>'
                      '<testcase classname="e" name="f"/></testsuite></testsuites>')
    found = gpu_check.tests_of(report)
    assert found is not None and found["passed"] == 1 and found["failed"] == ["a::b", "c::d"]


def test_on_a_gpu_the_whole_suite_runs_there_and_sanitizers_where_they_are(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "compute-sanitizer").touch(0o755)
    options = Namespace(dry_run=False, preset="gpu", out=tmp_path, skip_tests=False, skip_bench=False)
    parts = {part.name: part.command for part in gpu_check.parts_of(options, tmp_path / "tests.xml")}
    assert list(parts) == ["build", "tests", "memcheck", "racecheck", "kernels", "bench"]
    assert parts["build"][-1] == "--cuda" and " ".join(parts["tests"]).count("tests --kernels cuda") == 1
    assert parts["memcheck"][0] == str(tmp_path / "compute-sanitizer") and "gpu-quick" in parts["memcheck"]
    assert all(parts[name][parts[name].index("--device") + 1] == "cuda" for name in ("racecheck", "kernels", "bench"))
    assert parts["bench"].count("--library") == 2


def test_what_is_left_when_nothing_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: Any) -> None:
        raise build.BuildError("no compiler")

    monkeypatch.setattr(measure, "environment", fail)
    assert gpu_check.environment_of(None)["problem"] == "no compiler"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                  tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package", "nor_this"))
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "has no no_such_package, nor_this: install them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_make_installs_nothing_into_a_python_that_is_named() -> None:
    # The tests may themselves run under make, which hands its variables on.
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in inherited}

    def said(*arguments: str) -> str:
        return subprocess.run(["make", "-n", "gpu-check", *arguments], capture_output=True, text=True, check=True,
                              cwd=gpu_check.ROOT, env=environment).stdout

    assert said("PYTHON=/some/python", "OUT=/some/folder", "ARGS=--skip-tests").splitlines() == [
        "/some/python tests/gpu_check.py --out /some/folder --skip-tests"]
    assert "pip install" in said("VENV=/no/such/venv")
