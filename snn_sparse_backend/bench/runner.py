"""Runs the benchmark: for each case, all variants in turn, round after round, on the same weights and inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..memory import layer_outputs
from .cases import Case
from .clock import Clock
from .measure import (
    MIB,
    Activity,
    activities,
    counted,
    gradients,
    milliseconds,
    require_path,
    step_memory,
    worst_difference,
)
from .networks import NorseNet, SnntorchNet, calibrate
from .variants import CUTOFF, Variant, contest_of


@dataclass
class Outcome:
    """What was measured of one case."""

    case: Case
    variants: list[Variant]
    densities: list[Activity]  # of the layers whose rate was calibrated
    input_rate: float
    factors: list[float]
    gemm_seconds: list[tuple[float, float]]
    remarks: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        floor = _times(self.gemm_seconds)
        return {
            "name": self.case.name, "library": self.case.library, "sizes": self.case.sizes,
            "T": self.case.steps, "B": self.case.batch, "rounds": self.case.rounds, "cutoff": CUTOFF,
            "gaussian_input": self.case.gaussian, "layer": self.case.layer,
            "input_rate": self.input_rate, "hidden": [asdict(d) for d in self.densities],
            "weight_factors": self.factors, "remarks": self.remarks, "gemm_floor_ms": floor,
            "variants": [_figures(v, self.variants[0], floor["step"]) for v in self.variants],
        }


def _times(seconds: list[tuple[float, float]]) -> dict[str, float]:
    forward, backward = milliseconds(f for f, _ in seconds), milliseconds(b for _, b in seconds)
    return {"forward": forward, "backward": backward, "step": milliseconds(f + b for f, b in seconds)}


def _figures(variant: Variant, host: Variant, floor: float) -> dict[str, Any]:
    ours, theirs, memory = _times(variant.seconds), _times(host.seconds), variant.memory
    return {
        "name": variant.name, **{f"{k}_ms": v for k, v in ours.items()},
        "rounds_ms": [[round(f * 1e3, 3), round(b * 1e3, 3)] for f, b in variant.seconds],
        "speedup_backward": theirs["backward"] / ours["backward"], "speedup_step": theirs["step"] / ours["step"],
        "step_per_floor": ours["step"] / floor,
        "saved_mib": variant.saved / MIB if variant.saved is not None else None, "saved_bytes": variant.saved_by_kind,
        "saved_ratio": host.saved / variant.saved if variant.saved and host.saved else None,
        "peak_mib": memory.peak / MIB if memory is not None else None,
        "peak_of_step_mib": (memory.peak - memory.before) / MIB if memory is not None else None,
        "gradient_difference": variant.gradient_difference, "fused": variant.fused_steps > 0,
        "counts": dict(variant.counts),
    }


def run_case(case: Case, compile_seconds: float, device: torch.device) -> Outcome:
    """Measures one case.

    Raises:
        NotFusedError: if a variant took another path than it is meant to measure.
    """
    contest, clock = contest_of(case, compile_seconds, device), Clock(device)
    host, variants = contest.host, contest.variants
    factors = calibrate(host, contest.x, case.hidden)
    rounds = {v.name: 1 if v.slow else case.rounds for v in variants}
    bar = tqdm(total=len(variants) + sum(rounds.values()), desc=case.name, unit="step", dynamic_ncols=True,
               disable=None)
    with bar:
        densities = _first_round(variants, host, clock, bar)
        products = _Products(host, case.steps * case.batch, clock)
        products.seconds()
        gemm: list[tuple[float, float]] = []
        for i in range(case.rounds):
            gemm.append(products.seconds())
            for variant in variants:
                if i < rounds[variant.name]:
                    bar.set_postfix_str(variant.name)
                    variant.seconds.append(_time_step(variant, host, clock))
                    bar.update()
    input_rate = (contest.x != 0).float().mean().item()
    return Outcome(case, variants, densities[: case.hidden], input_rate, factors, gemm, contest.remarks)


def _first_round(variants: list[Variant], host: nn.Module, clock: Clock, bar: tqdm) -> list[Activity]:
    """Warms up, and takes what needs no repetition: bytes, counts, gradients, densities."""
    reference: dict[str, torch.Tensor] = {}
    densities: list[Activity] = []
    for variant in variants:
        bar.set_postfix_str(variant.name)
        with variant.scope():
            # The first call teaches which synapses feed neurons, compilers need two, and on CUDA sparse or dense
            # follows from the densities of sequences that have ended.
            for _ in range(2):
                variant.loss().backward()
                clock.wait()
        host.zero_grad()
        with counted() as ran:
            variant.memory = step_memory(clock.device, partial(_time_step, variant, host, clock))
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


def _time_step(variant: Variant, host: nn.Module, clock: Clock) -> tuple[float, float]:
    host.zero_grad()
    with variant.scope():
        clock.wait()  # or the work before would hide what this step costs the host
        start = clock.mark()
        loss = variant.loss()
        middle = clock.mark()
        loss.backward()
        forward, backward = clock.between(start, middle, clock.mark())
        return forward, backward


class _Products:
    """The bare dense products of a network over all time steps, by ``torch.mm`` as the host library would do them.

    Operands and results are made once, so that only the products are timed.
    """

    def __init__(self, host: SnntorchNet | NorseNet, rows: int, clock: Clock) -> None:
        self.layers, self._clock = [], clock
        for linear in host.linears:
            assert isinstance(linear, nn.Linear)
            weight = linear.weight.detach()
            given, current = (torch.rand(rows, n, device=clock.device) for n in reversed(weight.shape))
            self.layers.append((weight, given, current, torch.empty_like(weight), torch.empty_like(given)))

    def seconds(self) -> tuple[float, float]:
        """Of the forward products, and of those for the gradients of the weights and of the hidden spikes."""
        self._clock.wait()
        start = self._clock.mark()
        for weight, given, current, _, _ in self.layers:
            torch.mm(given, weight.t(), out=current)
        middle = self._clock.mark()
        for i, (weight, given, current, grad_weight, grad_given) in enumerate(self.layers):
            torch.mm(current.t(), given, out=grad_weight)
            if i > 0:
                torch.mm(current, weight, out=grad_given)
        forward, backward = self._clock.between(start, middle, self._clock.mark())
        return forward, backward
