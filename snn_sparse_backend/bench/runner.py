"""Runs the benchmark: for each case, all variants in turn, round after round, on the same weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from tqdm import tqdm

from ..memory import layer_outputs
from ..summation import found_at_once
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
from .networks import Net, OverTime, Recurrent, calibrate, weighted
from .peak import PeakError, peak_of
from .variants import CUTOFF, Variant, contest_of

_QUADRATIC_ROUNDS = 3  # they take so long that the others would be measured too little


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
            "gaussian_input": self.case.gaussian, "layer": self.case.layer, "sites": self.case.sites,
            "input_rate": self.input_rate, "hidden": [asdict(d) for d in self.densities],
            "weight_factors": self.factors, "remarks": self.remarks, "gemm_floor_ms": floor,
            "variants": [_figures(v, self.variants[0], floor["step"], self.case.sites) for v in self.variants],
        }


def _times(seconds: list[tuple[float, float]]) -> dict[str, float]:
    forward, backward = milliseconds(f for f, _ in seconds), milliseconds(b for _, b in seconds)
    return {"forward": forward, "backward": backward, "step": milliseconds(f + b for f, b in seconds)}


def _figures(variant: Variant, host: Variant, floor: float, sites: int) -> dict[str, Any]:
    ours, theirs, memory = _times(variant.seconds), _times(host.seconds), variant.memory
    return {
        "name": variant.name, "kind": variant.kind, **{f"{k}_ms": v for k, v in ours.items()},
        "rounds_ms": [[round(f * 1e3, 3), round(b * 1e3, 3)] for f, b in variant.seconds],
        "speedup_backward": theirs["backward"] / ours["backward"], "speedup_step": theirs["step"] / ours["step"],
        "step_per_floor": ours["step"] / floor,
        "saved_mib": variant.saved / MIB if variant.saved is not None else None,
        "saved_bytes": variant.kept.by_kind if variant.kept is not None else None,
        "saved_by_layer": variant.kept.by_layer if variant.kept is not None else None,
        "saved_ratio": host.saved / variant.saved if variant.saved and host.saved else None,
        "workspace_mib": variant.workspace_bytes / MIB,
        "peak_rss_mib": variant.peak_rss / MIB if variant.peak_rss is not None else None,
        "peak_mib": memory.peak / MIB if memory is not None else None,
        "peak_of_step_mib": (memory.peak - memory.before) / MIB if memory is not None else None,
        "bytes_per_site": variant.saved / sites if variant.saved is not None else None,
        "gradient_difference": variant.gradient_difference, "fused": variant.fused_steps > 0,
        "same_maths": variant.same_maths, "quadratic": variant.quadratic, "counts": dict(variant.counts),
    }


def run_case(case: Case, compile_seconds: float, device: torch.device) -> Outcome:
    """Measures one case.

    Raises:
        NotFusedError: if a variant took another path than it is meant to measure.
    """
    contest, clock = contest_of(case, compile_seconds, device), Clock(device)
    host = contest.host
    factors = calibrate(host, contest.x, case.hidden, case.hidden_rate)
    contest.drop_slow(lambda variant: sum(_time_step(variant, host, clock)))
    variants = contest.variants
    rounds = {v.name: _rounds(v, case.rounds) for v in variants}
    bar = tqdm(total=len(variants) + sum(rounds.values()), desc=case.name, unit="step", dynamic_ncols=True,
               disable=None)
    with bar:
        densities = _first_round(variants, host, clock, bar)
        products = _Products(host, contest.x, clock)
        products.seconds()
        gemm: list[tuple[float, float]] = []
        for _ in range(case.rounds):
            gemm.append(products.seconds())
            for variant in variants:
                if len(variant.seconds) < rounds[variant.name]:
                    bar.set_postfix_str(variant.name)
                    variant.seconds.append(_time_step(variant, host, clock))
                    bar.update()
        if case.peak and device.type == "cpu":
            _measure_peaks(contest.remarks, case, variants, factors, bar)
    input_rate = (contest.x != 0).float().mean().item()
    return Outcome(case, variants, densities[: case.hidden], input_rate, factors, gemm, contest.remarks)


def _rounds(variant: Variant, rounds: int) -> int:
    return 1 if variant.slow else min(rounds, _QUADRATIC_ROUNDS) if variant.quadratic else rounds


def _first_round(variants: list[Variant], host: nn.Module, clock: Clock, bar: tqdm) -> list[Activity]:
    """Warms up, and takes what needs no repetition: bytes, counts, gradients, densities.

    For a slow variant this is the only round there is.
    """
    reference: dict[str, Tensor] = {}
    densities: list[Activity] = []
    for variant in variants:
        bar.set_postfix_str(variant.name)
        with variant.scope(), found_at_once():  # what a training run would look for in its twentieth step
            for _ in range(variant.warm_ups):
                variant.loss().backward()
                clock.wait()
        times: list[tuple[float, float]] = []
        host.zero_grad()
        with counted() as ran:
            variant.memory = step_memory(clock.device, partial(_note_step, times, variant, host, clock))
        require_path(ran, variant.fused_steps)
        if variant.slow:
            variant.seconds = times
        variant.counts = ran
        found = gradients(host)
        reference = reference or found
        if variant.same_maths:
            variant.gradient_difference = worst_difference(reference, found)
        with variant.scope():
            variant.kept = variant.measure() if variant.measure is not None else None
            variant.workspace_bytes = variant.workspace()
            if variant is variants[-1]:  # it has a cutoff, and so tells of active sites too
                with layer_outputs() as made:
                    result = variant.loss()
                densities = activities(made)
                del result, made
        bar.update()
    return densities


def _measure_peaks(remarks: list[str], case: Case, variants: list[Variant], factors: list[float], bar: tqdm) -> None:
    for variant in variants:
        if variant.kind == "compiled" or variant.slow:  # it would have to compile again, or take minutes
            continue
        bar.set_postfix_str(f"peak memory of {variant.name}")
        try:
            variant.peak_rss = peak_of(case, variant.name, factors, torch.get_num_threads())
        except PeakError as error:
            remarks.append(f"{variant.name}: no peak of memory: {error}")


def _note_step(times: list[tuple[float, float]], variant: Variant, host: nn.Module, clock: Clock) -> None:
    times.append(_time_step(variant, host, clock))


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
    """The bare dense products of a network over all time steps, by torch as the host library would do them.

    Operands are made once, and so are the results of matrix products, so that only the products are timed.
    """

    def __init__(self, host: Net, x: Tensor, clock: Clock) -> None:
        self._clock = clock
        self._forward: list[Callable[[], object]] = []
        self._backward: list[Callable[[], object]] = []
        shape = x.shape[2:]
        with torch.no_grad():
            for i, synapse in enumerate(host.synapses):
                self._add(weighted(synapse), torch.rand(x.shape[0] * x.shape[1], *shape, device=clock.device), i > 0)
                if isinstance(synapse, Recurrent):
                    self._add_recurrence(synapse.back.weight.detach(), x.shape[0], x.shape[1])
                shape = OverTime(synapse)(x[:1, :1].new_zeros(1, 1, *shape)).shape[2:]

    def _add(self, synapse: nn.Linear | nn.Conv2d, given: Tensor, inner: bool) -> None:
        weight = synapse.weight.detach()
        if isinstance(synapse, nn.Conv2d):
            current = torch.rand_like(F.conv2d(given, weight))
            self._forward.append(lambda: F.conv2d(given, weight))
            self._backward.append(lambda: conv2d_weight(given, weight.shape, current))
            if inner:
                self._backward.append(lambda: conv2d_input(given.shape, weight, current))
            return
        given = given.flatten(1)
        current = torch.rand(len(given), len(weight), device=given.device)
        grad_weight, grad_given = torch.empty_like(weight), torch.empty_like(given)
        self._forward.append(partial(torch.mm, given, weight.t(), out=current))
        self._backward.append(partial(torch.mm, current.t(), given, out=grad_weight))
        if inner:
            self._backward.append(partial(torch.mm, current, weight, out=grad_given))

    def _add_recurrence(self, weight: Tensor, steps: int, batch: int) -> None:
        """Step by step, as each needs the one before it; the gradient of the weight does not."""
        spikes, current = (torch.rand(steps, batch, len(weight), device=weight.device) for _ in range(2))
        grad_weight, grad_spikes = torch.empty_like(weight), torch.empty_like(spikes)

        def each(given: Tensor, by: Tensor, out: Tensor) -> None:
            for one, result in zip(given.unbind(0), out.unbind(0), strict=True):
                torch.mm(one, by, out=result)

        self._forward.append(partial(each, spikes, weight.t(), current))
        self._backward.append(partial(torch.mm, current.flatten(0, 1).t(), spikes.flatten(0, 1), out=grad_weight))
        self._backward.append(partial(each, current, weight, grad_spikes))

    def seconds(self) -> tuple[float, float]:
        """Of the forward products, and of those for the gradients of the weights and of the hidden spikes."""
        self._clock.wait()
        start = self._clock.mark()
        for product in self._forward:
            product()
        middle = self._clock.mark()
        for product in self._backward:
            product()
        forward, backward = self._clock.between(start, middle, self._clock.mark())
        return forward, backward
