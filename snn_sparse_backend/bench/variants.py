"""The ways to compute one and the same training step: by the host library, compiled, and fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import enabled
from ..memory import host_saved_bytes, layer_outputs, saved_by_kind
from .cases import Case
from .compiled import compiled_loss, problem_with
from .measure import Memory, norse_defaults
from .networks import NorseNet, SnntorchLayer, SnntorchNet, linear_layers, same_parameters

CUTOFF = 0.2
INPUT_RATE = 0.02
_OPTIONS: dict[str, dict[str, Any]] = {
    "fused, dense products": {"crossover": 0.0},
    "sparse, exact (default)": {},
    f"cutoff {CUTOFF}": {"cutoff": CUTOFF},
    f"cutoff {CUTOFF}, sparse forward": {"cutoff": CUTOFF, "forward": "sparse"},
}
# Norse's sequence classes have a backward that is quadratic in T: from here on one round of them has to do.
_LONG = 200


@dataclass
class Variant:
    """One way to compute the same step.

    Args:
        loss: runs the forward pass.
        scope: what is switched on meanwhile.
        fused_steps: time steps of neuron layers that have to be fused in one training step, the proof of the path.
        measure: gives the bytes kept for backward, by kind, where that can be measured.
        slow: so slow that it is timed once only.
    """

    name: str
    loss: Callable[[], Tensor]
    scope: Callable[[], AbstractContextManager[None]] = nullcontext
    fused_steps: int = 0
    measure: Callable[[], dict[str, int]] | None = None
    slow: bool = False
    seconds: list[tuple[float, float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    saved_by_kind: dict[str, int] | None = None
    memory: Memory | None = None
    gradient_difference: float | None = None

    @property
    def saved(self) -> int | None:
        """Bytes kept for backward, None if they were not measured."""
        return sum(self.saved_by_kind.values()) if self.saved_by_kind is not None else None


@dataclass
class Contest:
    """The variants of a case: the host's own first, all with the same weights and input.

    Args:
        host: the stock network, which owns the weights.
        x, labels: the batch.
        remarks: what could not be measured, and why.
    """

    case: Case
    host: SnntorchNet | NorseNet
    x: Tensor
    labels: Tensor
    variants: list[Variant] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def fused_steps(self) -> int:
        return self.case.steps * (len(self.case.sizes) - 1)

    def loss_of(self, net: nn.Module) -> Callable[[], Tensor]:
        """The forward pass of a network on this batch."""
        if self.case.layer:
            return lambda: net(self.x).sum()
        return lambda: F.cross_entropy(net(self.x), self.labels)

    def add_host(self, name: str, net: nn.Module, slow: bool = False) -> None:
        """A network of the host library."""
        loss = self.loss_of(net)
        self.variants.append(Variant(name, loss, measure=lambda: {"saved": host_saved_bytes(loss, [self.x])},
                                     slow=slow))

    def add_fused(self, name: str, net: nn.Module, scope: Callable[[], AbstractContextManager[None]]) -> None:
        """A network that runs fused inside a scope."""
        loss = self.loss_of(net)

        def kept() -> dict[str, int]:
            with layer_outputs() as made:
                result = loss()
            return saved_by_kind([result, *made], [self.x])

        self.variants.append(Variant(name, loss, scope, self.fused_steps, kept))


def contest_of(case: Case, compile_seconds: float, device: torch.device) -> Contest:
    """Makes the networks and the batch of a case on a device."""
    torch.manual_seed(0)
    x = torch.empty(case.steps, case.batch, case.sizes[0], device=device)
    x = x.normal_() if case.gaussian else x.bernoulli_(INPUT_RATE)
    labels = torch.randint(0, case.sizes[-1], (case.batch,), device=device)
    make = _snntorch if case.library == "snntorch" else _norse
    return make(case, x, labels, compile_seconds)


def _snntorch(case: Case, x: Tensor, labels: Tensor, compile_seconds: float) -> Contest:
    linears = linear_layers(case.sizes)
    net = (SnntorchLayer if case.layer else SnntorchNet)(linears).to(x.device)
    contest = Contest(case, net, x, labels)
    contest.add_host("snnTorch", net)
    if case.compiled and compile_seconds > 0:
        torch.compiler.reset()  # what was compiled for other cases counts towards its limits
    for kind in case.compiled:
        name, problem = f"snnTorch, compiled {kind}", problem_with(kind, case, x.device, compile_seconds)
        if problem is None:
            own = SnntorchNet(same_parameters(linears)).to(x.device)
            contest.variants.append(Variant(name, compiled_loss(own, x, labels, kind)))
        else:
            contest.remarks.append(f"{name}: {problem}")
    for name, options in _OPTIONS.items():
        contest.add_fused(name, net, lambda o=options: enabled("snntorch", **o))  # type: ignore[misc]
    return contest


def _norse(case: Case, x: Tensor, labels: Tensor, compile_seconds: float) -> Contest:
    import norse.torch as stock

    from ..adapters import norse as swapped

    linears = linear_layers(case.sizes).to(x.device)

    def net_of(synapses: nn.ModuleList, lif: Any, li: Any, cells: bool = False) -> NorseNet:
        return NorseNet(synapses, lif, li, cells, case.layer).to(x.device)

    contest = Contest(case, net_of(linears, stock.LIF, stock.LI), x, labels)
    contest.add_host("Norse sequence", contest.host, slow=case.steps > _LONG)
    contest.add_host("Norse cells, unbind", net_of(linears, stock.LIFCell, stock.LICell, cells=True))
    for name, options in _OPTIONS.items():
        contest.add_fused(name, net_of(same_parameters(linears), swapped.LIF, swapped.LI),
                          lambda o=options: norse_defaults(**o))  # type: ignore[misc]
    return contest
