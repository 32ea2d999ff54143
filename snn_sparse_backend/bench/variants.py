"""The ways to compute one and the same training step: by the host library, compiled, by its peers, and fused."""

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
from ..memory import workspace_bytes
from .cases import Case
from .compiled import compiled_loss, problem_with
from .kept import Kept, fused_kept, host_kept
from .measure import Memory, norse_defaults
from .networks import Net, NorseNet, SnntorchNet, batch_of, same_parameters, synapses_of
from .peers import BY_NAME

CUTOFF = 0.2
DEFAULT, SPARSE_FORWARD = "sparse, exact (default)", f"cutoff {CUTOFF}, sparse forward"
DENSE = "fused, dense products"
OPTIONS: dict[str, dict[str, Any]] = {
    DENSE: {"crossover": 0.0},
    DEFAULT: {},
    f"cutoff {CUTOFF}": {"cutoff": CUTOFF},
    SPARSE_FORWARD: {"cutoff": CUTOFF, "forward": "sparse"},
}
# A backward that is quadratic in T: from here on one round of it has to do, without a warm-up.
_LONG = 200
TOO_SLOW_SECONDS = 15.0  # ... and a step that takes longer is not worth anybody's time.
_PROBE_SHARE = 4  # how much shorter the sequence is that tells beforehand


@dataclass
class Variant:
    """One way to compute the same step.

    Args:
        kind: ``"host"``, ``"compiled"``, ``"peer"`` or ``"fused"``.
        loss: runs the forward pass.
        scope: what is switched on meanwhile.
        fused_steps: time steps of neuron layers that have to be fused in one training step, the proof of the path.
        measure: gives the bytes kept for backward, where that can be measured.
        workspace: gives the bytes of packed weights that its modules hold on to.
        prepare: brings the input into the layout of the variant, which is not part of a step.
        same_maths: gradients can be compared with the host's.
        quadratic: its backward takes time quadratic in T.
        slow: so slow that it is timed once only, without a warm-up.
    """

    name: str
    kind: str
    loss: Callable[[], Tensor]
    scope: Callable[[], AbstractContextManager[None]] = nullcontext
    fused_steps: int = 0
    measure: Callable[[], Kept] | None = None
    workspace: Callable[[], int] = lambda: 0
    prepare: Callable[[], Any] = lambda: None
    same_maths: bool = True
    quadratic: bool = False
    slow: bool = False
    seconds: list[tuple[float, float]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    kept: Kept | None = None
    workspace_bytes: int = 0
    memory: Memory | None = None
    peak_rss: int | None = None
    gradient_difference: float | None = None

    @property
    def saved(self) -> int | None:
        """Bytes kept for backward, None if they were not measured."""
        return self.kept.total if self.kept is not None else None

    @property
    def warm_ups(self) -> int:
        """The first fused call teaches which synapses feed neurons, compilers need two, and on CUDA sparse or dense
        follows from the densities of sequences that have ended."""
        return 0 if self.slow else 2 if self.kind in ("fused", "compiled") else 1


@dataclass
class Contest:
    """The variants of a case: the host's own first, all with the same weights and input.

    Args:
        host: the stock network, which owns the weights.
        x, labels: the batch.
        only: the variant that is wanted besides the host; None: all.
        remarks: what could not be measured, and why.
    """

    case: Case
    host: Net
    x: Tensor
    labels: Tensor
    only: str | None = None
    variants: list[Variant] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    _turned: Tensor | None = None

    @property
    def fused_steps(self) -> int:
        return self.case.steps * (len(self.case.sizes) - 1)

    def wants(self, name: str) -> bool:
        """Whether this variant is to be made."""
        return self.only is None or name == self.only

    def use(self, x: Tensor) -> None:
        """Another input from now on."""
        self.x, self._turned = x, None

    def given(self, net: Net) -> Tensor:
        """The input in the layout of a network, made once."""
        if not net.batch_first:
            return self.x
        if self._turned is None:
            self._turned = self.x.transpose(0, 1).contiguous()
        return self._turned

    def loss_of(self, net: Net) -> Callable[[], Tensor]:
        """The forward pass of a network on this batch."""
        if self.case.layer:
            return lambda: net(self.given(net)).sum()
        return lambda: F.cross_entropy(net(self.given(net)), self.labels)

    def add_host(self, name: str, net: Net, **properties: Any) -> None:
        """A network that plain autograd records; ``properties`` are the :class:`Variant`'s."""
        loss = self.loss_of(net)
        self.variants.append(Variant(name, properties.pop("kind", "host"), loss, **properties,
                                     measure=lambda: host_kept(net, loss, [self.given(net)]),
                                     prepare=lambda: self.given(net)))

    def add_fused(self, name: str, net: Net, scope: Callable[[], AbstractContextManager[None]]) -> None:
        """A network that runs fused inside a scope."""
        loss = self.loss_of(net)
        self.variants.append(Variant(name, "fused", loss, scope, self.fused_steps,
                                     lambda: fused_kept(net, loss, [self.x]), lambda: workspace_bytes(net)))

    def add_peers(self) -> None:
        """The peers of the case, as far as they are installed."""
        for peer in (BY_NAME[name] for name in self.case.peers if self.wants(name)):
            if not peer.installed:
                self.remarks.append(f"{peer.name}: left out, {peer.package} is not installed")
                continue
            net = peer.make(same_parameters(self.host.synapses), self.case).to(self.x.device)
            self.add_host(peer.name, net, kind="peer", same_maths=peer.same_maths, quadratic=peer.quadratic)

    def drop_slow(self, seconds_of: Callable[[Variant], float]) -> None:
        """Leaves out what is quadratic in T and would take too long, as a part of the sequence tells beforehand.

        Args:
            seconds_of: times one step of a variant.
        """
        whole = self.x
        for variant in [v for v in self.variants if v.quadratic and self.case.steps > _LONG]:
            self.use(whole[: self.case.steps // _PROBE_SHARE])
            expected = seconds_of(variant) * _PROBE_SHARE**2
            variant.slow = True
            if expected > TOO_SLOW_SECONDS and variant is not self.variants[0]:
                self.variants.remove(variant)
                self.remarks.append(f"{variant.name}: left out, a step would take about {expected:.0f} s, as its "
                                    "backward is quadratic in T")
        self.use(whole)


def contest_of(case: Case, compile_seconds: float, device: torch.device, only: str | None = None) -> Contest:
    """Makes the networks and the batch of a case on a device; ``only``: one variant, besides the host."""
    torch.manual_seed(0)
    x, labels = batch_of(case, device)
    synapses = synapses_of(case).to(device)
    make = _snntorch if case.library == "snntorch" else _norse
    return make(case, synapses, x, labels, compile_seconds, only)


def _snntorch(case: Case, synapses: nn.ModuleList, x: Tensor, labels: Tensor, compile_seconds: float,
              only: str | None) -> Contest:
    net = SnntorchNet(synapses, case.beta, case.layer).to(x.device)
    contest = Contest(case, net, x, labels, only)
    contest.add_host("snnTorch", net)
    if case.compiled and compile_seconds > 0:
        torch.compiler.reset()  # what was compiled for other cases counts towards its limits
    for kind in case.compiled:
        name = f"snnTorch, compiled {kind}"
        if not contest.wants(name):
            continue
        problem = problem_with(kind, case, x.device, compile_seconds)
        if problem is None:
            own = SnntorchNet(same_parameters(synapses), case.beta, case.layer).to(x.device)
            contest.variants.append(Variant(name, "compiled", compiled_loss(own, contest.loss_of(own), kind)))
        else:
            contest.remarks.append(f"{name}: {problem}")
    contest.add_peers()
    for name, options in OPTIONS.items():
        if contest.wants(name):
            own = SnntorchNet(same_parameters(synapses), case.beta, case.layer).to(x.device)
            contest.add_fused(name, own, lambda o=options: enabled("snntorch", **o))  # type: ignore[misc]
    return contest


def _norse(case: Case, synapses: nn.ModuleList, x: Tensor, labels: Tensor, compile_seconds: float,
           only: str | None) -> Contest:
    import norse.torch as stock

    from ..adapters import norse as swapped

    def net_of(synapses: nn.ModuleList, lif: Any, li: Any, cells: bool = False) -> NorseNet:
        return NorseNet(synapses, lif, li, cells, case.layer).to(x.device)

    lif = "LIFRecurrent" if case.recurrent else "LIF"
    contest = Contest(case, net_of(synapses, getattr(stock, lif), stock.LI), x, labels, only)
    contest.add_host("Norse sequence", contest.host, quadratic=True)
    if contest.wants("Norse cells, unbind"):
        cells = net_of(synapses, getattr(stock, f"{lif}Cell"), stock.LICell, cells=True)
        contest.add_host("Norse cells, unbind", cells)

    for name, options in OPTIONS.items():
        if contest.wants(name):
            contest.add_fused(name, net_of(same_parameters(synapses), getattr(swapped, lif), swapped.LI),
                              lambda o=options: norse_defaults(**o))  # type: ignore[misc]
    return contest
