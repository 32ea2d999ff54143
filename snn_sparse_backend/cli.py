"""The command line: ``python -m snn_sparse_backend {demo,bench,bench-compare,check,tune,build,info}``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from .bench import DEFAULT_OUT, LIBRARIES, PRESET_NAMES, SWEEPS, ChildError, NoCaseError, NoGpuError

PROGRAM = "snn_sparse_backend"
# What a missing import is called by pip; anything else that is missing is an error of ours.
_INSTALL = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "snntorch": "snntorch",
    "norse": "--no-deps norse nir nirtorch h5py",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    from .build import BuildError

    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        return code
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _INSTALL:
            raise
        print(f"{PROGRAM} {args.command}: {missing} is not installed: pip install {_INSTALL[missing]}", file=sys.stderr)
    except (BuildError, NoCaseError, NoGpuError, ChildError) as error:
        print(f"{PROGRAM} {args.command}: {error}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description="A sparse, time-fused backward for "
                                     "snnTorch and Norse.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a small network with and without the backend and draw both")
    demo.add_argument("--library", choices=("snntorch", "norse"), default="snntorch")
    demo.add_argument("--out", type=Path, metavar="FILE.png", help="the picture (default: demo-LIBRARY.png)")
    demo.add_argument("--epochs", type=_positive, metavar="N")
    demo.add_argument("--threads", type=_positive, default=1, metavar="N", help="threads of torch (default: 1)")
    demo.add_argument("--quick", action="store_true", help="a tiny network: a few seconds")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure against the host library, compiled and not")
    bench.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda, or cuda:N")
    bench.add_argument("--preset", choices=PRESET_NAMES, help="default: cpu on the CPU, gpu on CUDA")
    what = bench.add_mutually_exclusive_group()
    what.add_argument("--kernels", action="store_true", help="each kernel by itself instead of whole networks")
    what.add_argument("--sweep", choices=SWEEPS, nargs="+", metavar="WHAT",
                       help=f"one network at several values, instead of a preset: {', '.join(SWEEPS)}; "
                            "a quick preset makes them tiny")
    bench.add_argument("--threads", type=_positive, nargs="+", metavar="N",
                       help="threads of torch; for several, a process each (default: torch's own choice)")
    bench.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR",
                       help=f"where JSON and picture go (default: {DEFAULT_OUT})")
    bench.add_argument("--library", choices=LIBRARIES, action="append", help="only this (default: both)")
    bench.add_argument("--only", metavar="TEXT", help="only networks with this in their name, as in 4096-4096")
    bench.add_argument("--compile-seconds", type=float, default=120.0, metavar="S",
                       help="how long torch.compile may take for the baseline; 0: leave it out (default: 120)")
    bench.add_argument("--seconds", type=float, metavar="S", help="no network is begun later than that")
    bench.set_defaults(run=_bench)

    compare = commands.add_parser("bench-compare", help="compare the ratios of two results of bench")
    compare.add_argument("old", type=Path, metavar="OLD.json")
    compare.add_argument("new", type=Path, metavar="NEW.json")
    compare.set_defaults(run=_bench_compare)

    check = commands.add_parser("check", help="compare the gradients of your own model, dense against sparse")
    check.add_argument("spec", metavar="FILE.py:FACTORY",
                       help="a function that returns (model, inputs) or (model, inputs, loss)")
    check.add_argument("--cutoff", type=float, metavar="B", help="backpropagate only where |U - threshold| < B")
    check.set_defaults(run=_check)

    tune = commands.add_parser("tune", help="measure at which densities this machine should go event by event")
    tune.add_argument("--threads", type=_positive, metavar="N", help="threads of torch (default: torch's own choice)")
    instead = tune.add_mutually_exclusive_group()
    instead.add_argument("--show", action="store_true", help="only show what is in force")
    instead.add_argument("--reset", action="store_true", help="forget what was measured, for all numbers of threads")
    instead.add_argument("--sweep", action="store_true", help="measure how well the choice in force does")
    instead.add_argument("--defaults", action="store_true", help="measure and print the built-in values")
    tune.add_argument("--out", type=Path, metavar="FILE.json", help="where the sweep goes, besides the table")
    tune.set_defaults(run=_tune)

    build = commands.add_parser("build", help="compile the core now, unless it is in the cache already")
    build.add_argument("--cuda", action="store_true",
                       help="the CUDA kernels too (default: if torch has CUDA and nvcc is here)")
    build.add_argument("--verbose", action="store_true", help="show what the compiler says")
    build.set_defaults(run=_build)

    info = commands.add_parser("info", help="versions, configuration, and the state of the core")
    info.add_argument("--support", action="store_true", help="only the table of supported layers, as Markdown")
    info.set_defaults(run=_info)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _device(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text}")
    return text


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    out = args.out or Path(f"demo-{args.library}.png")
    run(args.library, out, epochs=args.epochs, quick=args.quick, threads=args.threads)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .bench import run, run_for_threads, run_kernels, run_sweep

    threads = (args.threads or [None])[0]
    if args.kernels:
        run_kernels(args.preset, args.out, threads=threads, device=args.device)
        return 0
    if len(args.threads or ()) > 1:
        files = [f"sweep-{name}.json" for name in args.sweep] if args.sweep else ["bench.json"]
        gathered = run_for_threads(args.threads, args.out, _for_each(args), files, args.seconds)
        return 1 if any(one["failed"] for results in gathered for one in results["runs"]) else 0
    if args.sweep:
        quick = args.preset is not None and "quick" in args.preset
        swept = [run_sweep(name, args.out, threads, args.device, quick, args.seconds) for name in args.sweep]
        return 1 if any(results["failed"] for results in swept) else 0
    results = run(args.preset, args.out, threads=threads, compile_seconds=args.compile_seconds,
                  libraries=tuple(args.library or LIBRARIES), device=args.device, seconds=args.seconds,
                  only=args.only)
    return 1 if results["failed"] else 0


def _for_each(args: argparse.Namespace) -> list[str]:
    """The arguments of ``bench`` that are the same for each number of threads."""
    given = ["--device", args.device, "--compile-seconds", str(args.compile_seconds)]
    if args.preset:
        given += ["--preset", args.preset]
    if args.only:
        given += ["--only", args.only]
    for library in args.library or ():
        given += ["--library", library]
    return [*given, *(["--sweep", *args.sweep] if args.sweep else [])]


def _bench_compare(args: argparse.Namespace) -> int:
    from .bench import make_console
    from .bench.compare import CompareError, compare_files

    try:
        return 0 if compare_files(args.old, args.new, make_console()) else 1
    except CompareError as error:
        print(f"{PROGRAM} bench-compare: {error}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> int:
    from .equivalence import check_file

    try:
        report = check_file(args.spec, cutoff=args.cutoff)
    except ValueError as error:  # a spec or an option that makes no sense
        print(f"{PROGRAM} check: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.ok else 1


def _tune(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from . import crossovers, tune

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console()
    if args.show:
        tune.show(console)
    elif args.reset:
        print(f"{'removed' if crossovers.reset() else 'there was no'} {crossovers.path()}")
    elif args.sweep:
        tune.run_sweep(console, args.out)
    elif args.defaults:
        tune.print_defaults()
    else:
        try:
            tune.run(console)
        except tune.BusyError as error:
            print(f"{PROGRAM} tune: {error}", file=sys.stderr)
            return 2
    return 0


def _build(args: argparse.Namespace) -> int:
    from .build import build

    for artifact in build(verbose=args.verbose, cuda=args.cuda or None):
        took = f"compiled in {artifact.seconds:.1f} s" if artifact.seconds else "in the cache already"
        print(f"{artifact.name}: {took}: {artifact.path}")
    return 0


def _info(args: argparse.Namespace) -> int:
    if args.support:
        from .adapters.support import markdown

        print(markdown(), end="")
        return 0
    import torch
    from rich.console import Console
    from rich.table import Table

    from . import __version__, config, crossovers
    from .build import status
    from .compat.versions import installed, known
    from .native import instruction_set
    from .recipes import CORE, CUDA

    state = status()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("snn_sparse_backend", __version__)
    table.add_row("python", sys.version.split()[0])
    for name in ("torch", "snntorch", "norse"):
        found = installed(name)
        known_or_not = "" if found is None or known(name) else " (not a known version: tried before it is trusted)"
        table.add_row(name, f"{found or 'not installed'}{known_or_not}")
    table.add_row("configuration", str(config))
    table.add_row("threads", str(torch.get_num_threads()))
    table.add_row("compiler", state.compiler.version if state.compiler is not None else "none found")
    table.add_row("nvcc", f"{state.nvcc.command[0]}: {state.nvcc.version}" if state.nvcc is not None else "none found")
    table.add_row("torch's CUDA", state.torch_cuda or "none: this torch is built without CUDA")
    table.add_row("GPUs", ", ".join(map(str, state.gpus)) or "none that torch sees")
    table.add_row("sources", str(state.csrc))
    table.add_row("cache", str(state.cache))
    for name, path in state.libraries.items():
        needed = name != CUDA or state.torch_cuda is not None
        table.add_row(name, str(path) if path is not None else "not compiled yet" if needed else "not needed")
    compiled = state.libraries[CORE] is not None
    table.add_row("instruction set", instruction_set() if compiled else "known once the core is compiled")
    if compiled:
        table.add_row("crossovers", crossovers.source())
    for problem in state.problems:
        table.add_row("problem", problem)
    Console().print(table, highlight=False)
    return 0
