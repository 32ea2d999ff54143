"""Checks the package on a GPU in one go: compiles, runs the tests there, measures, and writes ``gpu-check.json``.

``make gpu-check`` or ``python tests/gpu_check.py --out FOLDER``. With ``--dry-run`` the same on the CPU, in small. Each
part has a time limit; one that fails is reported, and the others still run. Needs no network, and installs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that is not installed

NEEDED = ("torch", "numpy", "pytest", "hypothesis", "ninja", "filelock", "platformdirs", "rich", "tqdm", "matplotlib",
          "snntorch", "norse", "nir", "nirtorch")
TAIL = 15  # lines of a failed part that are shown
SANITIZERS = ("memcheck", "racecheck")
UNSUPPORTED = "Device not supported"  # what a sanitizer says where it cannot work, under some virtual machines
_GRACE = 10.0  # for a part that is asked to end, to write what it has


@dataclass(frozen=True)
class Part:
    """One command.

    Args:
        limit: seconds it may take at most.
        least: seconds that the parts before must leave to it.
        environment: variables of its own.
        told: whether the command itself is told by ``--seconds`` to end in time.
    """

    name: str
    command: list[str]
    limit: float
    least: float
    environment: dict[str, str] = field(default_factory=dict)
    told: bool = False


@dataclass
class Outcome:
    """What became of a part: "ok", "failed", "over time" or "not supported"."""

    name: str
    command: list[str]
    result: str
    code: int | None
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        return self.result in ("ok", "not supported")


def parts_of(args: argparse.Namespace, report: Path) -> list[Part]:
    """The parts, in their order."""
    ours = [sys.executable, "-m", "snn_sparse_backend"]
    device = "cpu" if args.dry_run else "cuda"
    bench = [*ours, "bench", "--device", device, "--preset", args.preset, "--out", str(args.out)]
    parts = [Part("build", [*ours, "build", *([] if args.dry_run else ["--cuda"])], 180, 60)]
    if not args.skip_tests:
        what = ["tests/test_abi.py"] if args.dry_run else ["tests", "--kernels", "cuda", *_workers()]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *what]
        parts.append(Part("tests", command, 240, 60))
        program = None if args.dry_run else _sanitizer()
        quick = [*ours, "bench", "--kernels", "--device", device, "--preset", "gpu-quick", "--out", str(report.parent)]
        if program is not None:
            for tool in SANITIZERS:
                # Ours only: what torch launches is slow to check and not our affair.
                options = ["--tool", tool, "--kernel-name", "kernel_substring=snn4cuda", "--error-exitcode", "66"]
                # An allocation of its own for each tensor, so that nothing lies between them unnoticed.
                parts.append(Part(tool, [program, *options, *quick], 60, 15, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
    if not args.skip_bench:
        libraries = [name for name in ("snntorch", "norse") if importlib.util.find_spec(name) is not None]
        chosen = [option for name in libraries for option in ("--library", name)]
        parts.append(Part("kernels", [*bench, "--kernels"], 60, 20))
        compiling = ["--compile-seconds", "0" if args.dry_run else "40"]
        parts.append(Part("bench", [*bench, *chosen, *compiling], 240, 100, told=True))
    return parts


def _workers() -> list[str]:
    """Several test processes where that is possible: most of a test's time is the host's."""
    if importlib.util.find_spec("xdist") is None or (os.cpu_count() or 1) < 8:
        return []
    return ["-n", "4", "--dist", "loadfile"]


def _sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(
        [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]))


def run(part: Part, limit: float, log: Path) -> Outcome:
    """Runs a part in a process group of its own, which is asked to end when its time is over, and then ended.

    Args:
        log: what it prints is appended here, too.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **part.environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # What it has begun by then, it shall be able to end.
    command = [*part.command, *(["--seconds", f"{max(limit - 60, limit / 2):.0f}"] if part.told else [])]
    began, before = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(limit)
            result = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, result = None, "over time"
            _end(process)
    output = log.read_bytes()[before:].decode(errors="replace")
    if part.name in SANITIZERS and code != 0 and UNSUPPORTED in output:
        result = "not supported"
    return Outcome(part.name, command, result, code, time.monotonic() - began, output)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)  # pytest then still writes its report
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing of it is left
        pass
    process.wait()


def run_all(parts: Sequence[Part], seconds: float, log: Path) -> list[Outcome]:
    """Runs the parts one after the other; each leaves to the others what they need at least."""
    end, outcomes = time.monotonic() + seconds, []
    for i, part in enumerate(parts):
        reserved = sum(later.least for later in parts[i + 1 :])
        limit = max(1.0, min(part.limit, end - reserved - time.monotonic()))
        print(f"{part.name} (at most {limit:.0f} s) ...", end=" ", flush=True)
        outcome = run(part, limit, log)
        print(f"{outcome.result}, {outcome.seconds:.1f} s", flush=True)
        if not outcome.good:
            print(*outcome.output.splitlines()[-TAIL:], sep="\n", flush=True)
        outcomes.append(outcome)
    return outcomes


def tests_of(report: Path) -> dict[str, Any] | None:
    """Counts and the names of failed tests, from pytest's report; None if there is none."""
    try:
        root = ElementTree.parse(report).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    suites = list(root.iter("testsuite"))
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites)
              for name in ("tests", "failures", "errors", "skipped")}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in root.iter("testcase")
              if case.find("failure") is not None or case.find("error") is not None]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"passed": passed, **counts, "failed": failed}


def read(path: Path, since: float) -> dict[str, Any]:
    """The JSON that a part of this run wrote; nothing if it is missing or older."""
    try:
        return json.loads(path.read_text()) if path.stat().st_mtime >= since else {}
    except (OSError, ValueError):
        return {}


def figures_of(bench: dict[str, Any], kernels: dict[str, Any]) -> dict[str, Any]:
    """What matters most; everything is in the files of the benchmark."""
    keys = ("name", "forward_ms", "backward_ms", "step_ms", "speedup_backward", "speedup_step", "step_per_floor",
            "saved_ratio", "peak_of_step_mib", "gradient_difference", "fused", "counts")
    cases = [{"name": case["name"], "gemm_floor_ms": case["gemm_floor_ms"], "hidden": case["hidden"],
              "variants": [{key: variant[key] for key in keys} for variant in case["variants"]]}
             for case in bench.get("cases", [])]
    return {"cases": cases, "failed": bench.get("failed", []), "left_out": bench.get("left_out", []),
            "copy_gb_s": kernels.get("copy_gb_s"), "kernels": kernels.get("kernels", [])}


def environment_of(device: Any) -> dict[str, Any]:
    """Where it ran, as the benchmark tells it; less if the core did not compile."""
    from snn_sparse_backend.bench import measure
    from snn_sparse_backend.build import BuildError

    try:
        return measure.environment(device)
    except BuildError as error:
        return {"gpu": measure.gpu(device) if device is not None else None, "torch": measure.installed("torch"),
                "python": platform.python_version(), "problem": str(error)}


def print_summary(results: dict[str, Any]) -> None:
    """The short tables that come last."""
    from rich.console import Console
    from rich.table import Table

    console, where, figures = Console(width=150), results["environment"], results["figures"]
    gpu = where["gpu"]
    device = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}" if gpu else "dry run on the CPU"
    console.print(f"\n{device}, torch {where['torch']}, Python {where['python']}", highlight=False, soft_wrap=True)
    if figures["cases"]:
        fused = [v["name"] for v in figures["cases"][0]["variants"] if v["fused"]]
        table = Table("network", "backward, x", "step, x", "kept, 1/x", "step per dense products", box=None,
                      pad_edge=False, title="against the stock library: " + "; ".join(fused), title_justify="left")
        for case in figures["cases"]:
            ours = [variant for variant in case["variants"] if variant["fused"]]
            columns = ("speedup_backward", "speedup_step", "saved_ratio", "step_per_floor")
            table.add_row(case["name"], *("  ".join(f"{v[key] or 0:.3g}" for v in ours) for key in columns))
        console.print(table)
    largest: dict[str, dict[str, Any]] = {}  # row of each kernel
    for row in figures["kernels"]:
        if row["bytes"] >= largest.get(row["kernel"], row)["bytes"]:
            largest[row["kernel"]] = row
    if largest:
        table = Table("kernel", "shape", "density", "us", "GB/s", "of copy", "torch us", box=None, pad_edge=False,
                      title=f"a copy moves {figures['copy_gb_s']:.0f} GB/s", title_justify="left")
        for row in largest.values():
            dense = ", ".join(f"{us:.0f} ({name})" for name, us in row["gemm_us"].items())
            table.add_row(row["kernel"], "x".join(map(str, row["shape"])),
                          f"{row['density']:.1%}" if row["density"] is not None else "", f"{row['us']:.1f}",
                          f"{row['gb_s']:.0f}", f"{row['share_of_copy']:.0%}", dense)
        console.print(table)
    table = Table("part", "result", "seconds", "", box=None, pad_edge=False)
    tests = results["tests"]
    for part in results["parts"]:
        note = ""
        if part["name"] == "tests" and tests:
            note = f"{tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped"
        table.add_row(part["name"], part["result"], f"{part['seconds']:.1f}", note)
    console.print(table)


def missing() -> list[str]:
    """Packages that this Python lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def main(arguments: Sequence[str] | None = None) -> int:
    lacking = missing()
    if lacking:
        print(f"gpu-check: {sys.executable} has no {', '.join(lacking)}: install them into it, or name another Python "
              "(norse with --no-deps: it asks for torchvision)", file=sys.stderr)
        return 2
    from snn_sparse_backend.bench import DEFAULT_OUT

    parser = argparse.ArgumentParser(description="Compiles, tests and measures the package on a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / DEFAULT_OUT, metavar="DIR", help="where results go")
    parser.add_argument("--preset", help="of the benchmark (default: gpu)")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-bench", action="store_true")
    parser.add_argument("--seconds", type=float, default=540, metavar="S", help="for everything (default: 540)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small: tries this script itself")
    args = parser.parse_args(arguments)
    args.preset, args.out = args.preset or ("gpu-quick" if args.dry_run else "gpu"), args.out.absolute()

    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print(f"gpu-check: no GPU here: torch {torch.__version__} sees none", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "gpu-check.log"
    log.unlink(missing_ok=True)
    began, clock = time.time(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        outcomes = run_all(parts_of(args, report), args.seconds, log)
        tests = tests_of(report)
    seconds = time.monotonic() - clock

    bench, kernels = (read(args.out / name, began) for name in ("bench.json", "kernels.json"))
    ok = all(outcome.good for outcome in outcomes)
    results = {
        "ok": ok, "dry_run": args.dry_run, "preset": args.preset, "seconds": seconds,
        "environment": environment_of(None if args.dry_run else torch.device("cuda", torch.cuda.current_device())),
        "build_seconds": next(o.seconds for o in outcomes if o.name == "build"), "tests": tests,
        "parts": [{key: value for key, value in asdict(o).items() if key != "output"} for o in outcomes],
        "figures": figures_of(bench, kernels),
    }
    (args.out / "gpu-check.json").write_text(json.dumps(results, indent=1) + "\n")
    print_summary(results)
    print(f"{'all well' if ok else 'NOT all well'} after {seconds:.0f} s; wrote {args.out / 'gpu-check.json'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
