"""Runs the benchmark: for each case, all variants in turn, round after round, on the same weights and inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .. import enabled
from ..memory import host_saved_bytes, layer_outputs, saved_by_kind
from .compiled import KINDS, compiled_loss, problem_with
from .measure import (
    MIB,
    Activity,
    activities,
    counted,
    gradients,
    milliseconds,
    norse_defaults,
    require_path,
    worst_difference,
)
from .networks import NorseNet, SnntorchNet, calibrate, linear_layers, same_parameters

CUTOFF = 0.2
INPUT_RATE = 0.02
_OPTIONS: dict[str, dict[str, Any]] = {
    "fused, dense products": {"crossover": 0.0},
    "sparse, exact (default)": {},
    f"cutoff {CUTOFF}": {"cutoff": CUTOFF},
    f"cutoff {CUTOFF}, sparse forward": {"cutoff": CUTOFF, "forward": "sparse"},
}


@dataclass(frozen=True)
class Case:
    """One network to measure."""

    library: str
    sizes: tuple[int, ...]
    steps: int
    batch: int
    rounds: int = 7

    @property
    def name(self) -> str:
        return f"{self.library} {'-'.join(map(str, self.sizes))}, T={self.steps}, B={self.batch}"


PRESETS = {
    "first-light": (
        Case("snntorch", (700, 1000, 1000, 20), 100, 64),
        Case("snntorch", (700, 200, 200, 20), 500, 64),
        Case("norse", (700, 1000, 1000, 20), 100, 64),
    ),
    "quick": (
        Case("snntorch", (50, 80, 80, 10), 12, 8, rounds=2),
        Case("norse", (50, 80, 80, 10), 12, 8, rounds=2),
    ),
}


@dataclass
class Variant:
    """One way to compute the same step.

    Args:
        loss: runs the forward pass.
        scope: what is switched on meanwhile.
        fused_steps: time steps of neuron layers that have to be fused in one training step, the proof of the path.
        measure: gives the bytes kept for backward, by kind, where that can be measured.
    """

    name: str
    loss: Callable[[], Tensor]
    scope: Callable[[], AbstractContextManager[None]] = nullcontext
    fused_steps: int = 0
    measure: Callable[[], dict[str, int]] | None = None
    seconds: list[tuple[float, float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    saved_by_kind: dict[str, int] | None = None
    gradient_difference: float | None = None

    @property
    def saved(self) -> int | None:
        """Bytes kept for backward, None if they were not measured."""
        return sum(self.saved_by_kind.values()) if self.saved_by_kind is not None else None


@dataclass
class Outcome:
    """What was measured of one case."""

    case: Case
    variants: list[Variant]
    densities: list[Activity]  # of the hidden layers
    input_rate: float
    factors: list[float]
    gemm_seconds: list[tuple[float, float]]
    remarks: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        host = self.variants[0]
        return {
            "name": self.case.name, "library": self.case.library, "sizes": self.case.sizes,
            "T": self.case.steps, "B": self.case.batch, "rounds": self.case.rounds, "cutoff": CUTOFF,
            "input_rate": self.input_rate, "hidden": [asdict(d) for d in self.densities],
            "weight_factors": self.factors, "remarks": self.remarks,
            "gemm_floor_ms": _times(self.gemm_seconds),
            "variants": [_figures(v, host) for v in self.variants],
        }


def _times(seconds: list[tuple[float, float]]) -> dict[str, float]:
    forward, backward = milliseconds(f for f, _ in seconds), milliseconds(b for _, b in seconds)
    return {"forward": forward, "backward": backward, "step": milliseconds(f + b for f, b in seconds)}


def _figures(variant: Variant, host: Variant) -> dict[str, Any]:
    ours, theirs = _times(variant.seconds), _times(host.seconds)
    return {
        "name": variant.name, **{f"{k}_ms": v for k, v in ours.items()},
        "rounds_ms": [[round(f * 1e3, 3), round(b * 1e3, 3)] for f, b in variant.seconds],
        "speedup_backward": theirs["backward"] / ours["backward"], "speedup_step": theirs["step"] / ours["step"],
        "saved_mib": variant.saved / MIB if variant.saved is not None else None, "saved_bytes": variant.saved_by_kind,
        "saved_ratio": host.saved / variant.saved if variant.saved and host.saved else None,
        "gradient_difference": variant.gradient_difference, "fused": variant.fused_steps > 0,
        "counts": dict(variant.counts),
    }


def run_case(case: Case, compile_seconds: float) -> Outcome:
    """Measures one case.

    Raises:
        NotFusedError: if a variant took another path than it is meant to measure.
    """
    torch.manual_seed(0)
    x = (torch.rand(case.steps, case.batch, case.sizes[0]) < INPUT_RATE).float()
    labels = torch.randint(0, case.sizes[-1], (case.batch,))
    remarks: list[str] = []
    host: SnntorchNet | NorseNet
    if case.library == "snntorch":
        host, variants = _snntorch_variants(case, x, labels, compile_seconds, remarks)
    else:
        host, variants = _norse_variants(case, x, labels)
    factors = calibrate(host, x)
    bar = tqdm(total=len(variants) * (case.rounds + 1), desc=case.name, unit="step", dynamic_ncols=True, disable=None)
    with bar:
        densities = _first_round(variants, host, bar)
        products = _Products(host, case.steps * case.batch)
        products.seconds()
        gemm: list[tuple[float, float]] = []
        for _ in range(case.rounds):
            gemm.append(products.seconds())
            for variant in variants:
                bar.set_postfix_str(variant.name)
                variant.seconds.append(_time_step(variant, host))
                bar.update()
    return Outcome(case, variants, densities[: len(case.sizes) - 2], x.mean().item(), factors, gemm, remarks)


def _snntorch_variants(case: Case, x: Tensor, labels: Tensor, compile_seconds: float,
                       remarks: list[str]) -> tuple[SnntorchNet, list[Variant]]:
    linears = linear_layers(case.sizes)
    net = SnntorchNet(linears)

    def loss() -> Tensor:
        return F.cross_entropy(net(x), labels)

    variants = [Variant("snnTorch", loss, measure=lambda: {"saved": host_saved_bytes(loss, [x])})]
    for kind in KINDS:
        problem = problem_with(kind, case.sizes, case.steps, case.batch, compile_seconds)
        name = f"snnTorch, compiled {kind}"
        if problem is None:
            own = SnntorchNet(same_parameters(linears))
            variants.append(Variant(name, compiled_loss(own, x, labels, kind)))
        else:
            remarks.append(f"{name}: {problem}")
    fused = case.steps * (len(case.sizes) - 1)
    for name, options in _OPTIONS.items():
        variants.append(Variant(name, loss, lambda o=options: enabled("snntorch", **o), fused,  # type: ignore[misc]
                                lambda: _kept(loss, x)))
    return net, variants


def _norse_variants(case: Case, x: Tensor, labels: Tensor) -> tuple[NorseNet, list[Variant]]:
    import norse.torch as stock

    from ..adapters import norse as swapped

    linears = linear_layers(case.sizes)
    net, cells = NorseNet(linears, stock.LIF, stock.LI), NorseNet(linears, stock.LIFCell, stock.LICell, cells=True)

    def variant_of(name: str, model: nn.Module, options: dict[str, Any] | None) -> Variant:
        def loss() -> Tensor:
            return F.cross_entropy(model(x), labels)

        if options is None:
            return Variant(name, loss, measure=lambda: {"saved": host_saved_bytes(loss, [x])})
        fused = case.steps * (len(case.sizes) - 1)
        return Variant(name, loss, lambda: norse_defaults(**options), fused, lambda: _kept(loss, x))

    variants = [variant_of("Norse sequence", net, None), variant_of("Norse cells, unbind", cells, None)]
    for name, options in _OPTIONS.items():
        variants.append(variant_of(name, NorseNet(same_parameters(linears), swapped.LIF, swapped.LI), options))
    return net, variants


def _kept(loss: Callable[[], Tensor], x: Tensor) -> dict[str, int]:
    with layer_outputs() as made:
        result = loss()
    return saved_by_kind([result, *made], [x])


def _first_round(variants: list[Variant], host: nn.Module, bar: tqdm) -> list[Activity]:
    """Warms up, and takes what needs no repetition: bytes, counts, gradients, densities."""
    reference: dict[str, Tensor] = {}
    densities: list[Activity] = []
    for variant in variants:
        bar.set_postfix_str(variant.name)
        with variant.scope():
            for _ in range(2):  # the first call teaches which synapses feed neurons; compilers need two
                variant.loss().backward()
        with variant.scope(), counted() as ran:
            _time_step(variant, host)
        require_path(ran, variant.fused_steps)
        variant.counts = ran
        found = gradients(host)
        reference = reference or found
        variant.gradient_difference = worst_difference(reference, found)
        with variant.scope():
            variant.saved_by_kind = variant.measure() if variant.measure is not None else None
            if variant.fused_steps:
                with layer_outputs() as made:
                    result = variant.loss()
                densities = activities(made)  # those of the last variant, which has a cutoff, are returned
                del result, made
        bar.update()
    return densities


def _time_step(variant: Variant, host: nn.Module) -> tuple[float, float]:
    host.zero_grad()
    with variant.scope():
        start = perf_counter()
        loss = variant.loss()
        middle = perf_counter()
        loss.backward()
        return middle - start, perf_counter() - middle


class _Products:
    """The bare dense products of a network over all time steps, by ``torch.mm`` as the host library would do them.

    Operands and results are made once, so that only the products are timed.
    """

    def __init__(self, host: SnntorchNet | NorseNet, rows: int) -> None:
        self.layers = []
        for linear in host.linears:
            assert isinstance(linear, nn.Linear)
            weight = linear.weight.detach()
            given, current = torch.rand(rows, weight.shape[1]), torch.rand(rows, weight.shape[0])
            self.layers.append((weight, given, current, torch.empty_like(weight), torch.empty_like(given)))

    def seconds(self) -> tuple[float, float]:
        """Of the forward products, and of those for the gradients of the weights and of the hidden spikes."""
        start = perf_counter()
        for weight, given, current, _, _ in self.layers:
            torch.mm(given, weight.t(), out=current)
        middle = perf_counter()
        for i, (weight, given, current, grad_weight, grad_given) in enumerate(self.layers):
            torch.mm(current.t(), given, out=grad_weight)
            if i > 0:
                torch.mm(current, weight, out=grad_given)
        return middle - start, perf_counter() - middle
