"""The oracle of the snnTorch tests: the host library itself, dense, on the same weights and inputs.

A *program* is a function of a :class:`Side`. It builds its model, runs it, and hands every output and every gradient
to the side. :func:`assert_same` runs it twice, with the stock library and with the backend on, and compares all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn

import snn_sparse_backend as sparse

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CANCELLATION = 10  # a gradient that is a single number is a sum over all sites, most of which may cancel
TINY = 1e-30
STEPS, BATCH, SIZES = 6, 4, (12, 20, 5)  # of the model below


@contextmanager
def double_spikes() -> Iterator[None]:
    """snnTorch always emits float32 spikes, by ``.float()``: inside, they are float64, so nets can run in double."""
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        del torch.Tensor.float


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """New tensors and modules have this dtype, and so have spikes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with double_spikes() if dtype is torch.float64 else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """For hundreds of tiny models: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Cut(torch.autograd.Function):
    """The identity, whose gradient is dropped where ``|x| >= cutoff``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cutoff: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.cutoff = cutoff
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < ctx.cutoff, grad, torch.zeros_like(grad)), None


def cut(spike_grad: Callable[[Tensor], Tensor], cutoff: float | None) -> Callable[[Tensor], Tensor]:
    """The stock surrogate with its derivative multiplied by ``1[|x| < cutoff]``: what a cutoff has to compute."""
    if cutoff is None:
        return spike_grad
    return lambda x: spike_grad(_Cut.apply(x, cutoff))


class Side:
    """One of the two runs of a program.

    Attributes:
        sparse: whether the backend is on.
        outputs, gradients: what the program handed over.
        counts: what ran, of the sparse side.
    """

    def __init__(self, sparse: bool, cutoff: float | None) -> None:
        self.sparse, self.cutoff = sparse, cutoff
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor | None] = {}
        self.counts: Counter[str] = Counter()

    def surrogate(self, spike_grad: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The surrogate to give to a neuron: the stock side carries the cutoff in it."""
        return spike_grad if self.sparse else cut(spike_grad, self.cutoff)

    def output(self, name: str, value: Tensor) -> None:
        assert name not in self.outputs
        self.outputs[name] = value.detach().clone()

    def gradient(self, name: str, value: Tensor | None) -> None:
        assert name not in self.gradients
        self.gradients[name] = None if value is None else value.detach().clone()

    def collect(self, *models: nn.Module, prefix: str = "", **leaves: Tensor) -> None:
        """Hands over the ``grad`` of all parameters of some models and of some leaves."""
        for i, model in enumerate(models):
            for name, parameter in model.named_parameters():
                self.gradient(f"{prefix}{i}.{name}", parameter.grad)
        for name, leaf in leaves.items():
            self.gradient(f"{prefix}{name}", leaf.grad)


Program = Callable[[Side], None]


def run(program: Program, *, on: bool, seed: int = 0, **options: Any) -> Side:
    """Runs a program on one side, from the same seed."""
    side = Side(on, options.get("cutoff"))
    torch.manual_seed(seed)
    sparse.reset_counts()
    snn.SpikingNeuron.init()  # forget the layers of earlier models, which utils.reset() would reset as well
    with one_thread(), sparse.enabled("snntorch", **options) if on else nullcontext():
        program(side)
    side.counts = Counter(sparse.counts)
    return side


def relative_error(expected: Tensor, found: Tensor, rounding: float = 0.0) -> float:
    """``||a - b|| / ||a||`` over the finite entries; infinite if shapes, dtypes or the places of NaN and inf differ.

    Differences up to ``rounding`` do not count.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()) or not torch.equal(expected.isnan(), found.isnan()):
        return float("inf")
    a, b = expected[finite].double(), found[finite].double()
    return max(float((a - b).norm()) - rounding, 0.0) / max(float(a.norm()), TINY)


def rounding_of(stock: Side) -> float:
    """A few units in the last place of the whole run: what is left of a sum whose terms cancel is no error."""
    found = [g[g.isfinite()] for g in (*stock.gradients.values(), *stock.outputs.values()) if g is not None]
    size = sum(float(g.double().norm()) ** 2 for g in found) ** 0.5
    return 4 * torch.finfo(found[0].dtype).eps * size if found else 0.0


def differences(stock: Side, backend: Side, *, tolerance: float, bitwise: bool = True) -> list[str]:
    """What differs, in words; empty if nothing does."""
    found, rounding = [], rounding_of(stock)
    for kind in ("outputs", "gradients"):
        expected, got = getattr(stock, kind), getattr(backend, kind)
        if expected.keys() != got.keys():
            found.append(f"{kind}: {sorted(expected.keys() ^ got.keys())} on one side only")
        for name in expected.keys() & got.keys():
            a, b = expected[name], got[name]
            if a is None or b is None:
                if a is not b:
                    found.append(f"gradient of {name}: {'None' if b is None else 'not None'}, unlike stock")
            elif kind == "outputs" and bitwise:
                if not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
                    found.append(f"output {name}: not the same bits, largest difference {(a - b).abs().max()}")
            elif not relative_error(a, b, rounding) < tolerance * (CANCELLATION if a.numel() == 1 else 1):
                found.append(f"{kind[:-1]} {name}: relative error {relative_error(a, b):.2e}, norm {a.norm():.2e}")
    return found


def assert_fused(counts: Counter[str], *, neurons: bool = True, synapses: bool = False) -> None:
    """The sentinel: the fused path really ran, and nothing fell back to the host's code."""
    assert counts["host_steps"] == 0, counts
    assert not neurons or counts["neuron_steps"] > 0, counts
    assert not synapses or counts["synapse_steps"] > 0, counts


def assert_same(program: Program, *, fused: bool | None = True, synapses: bool = False, bitwise: bool = True,
                tolerance: float | None = None, seed: int = 0, **options: Any) -> Side:
    """The backend gives what the stock library gives; returns the sparse side.

    Args:
        program: what to run.
        fused: True: the sentinel must hold; False: no neuron step may be fused; None: unchecked.
        synapses: synapses must have run fused too.
        bitwise: outputs must be the same bits.
        tolerance: largest relative error of a gradient; by default that of the dtype in force.
        seed: for torch.
        options: of ``enable``.
    """
    stock = run(program, on=False, seed=seed, **options)
    backend = run(program, on=True, seed=seed, **options)
    assert stock.outputs or stock.gradients, "the program compares nothing"
    assert not stock.counts, "the stock side must not run any code of ours"
    if tolerance is None:
        tolerance = TOLERANCE[torch.get_default_dtype()]
    found = differences(stock, backend, tolerance=tolerance, bitwise=bitwise)
    assert not found, "\n".join(found)
    if fused is not None:
        if fused:
            assert_fused(backend.counts, synapses=synapses)
        else:
            assert not backend.counts["neuron_steps"], backend.counts
    return backend


# ---------------------------------------------------------------------------------------------------- a model


class Net(nn.Module):
    """Linear, Leaky, Linear, Leaky; states are passed, or left in the layers if ``mems`` is None."""

    def __init__(self, side: Side, **options: Any) -> None:
        super().__init__()
        spike_grad = side.surrogate(surrogate.atan(alpha=2.0))
        options = {"beta": 0.9, "learn_beta": True, "threshold": 0.7, "spike_grad": spike_grad, **options}
        self.fc1, self.lif1 = nn.Linear(*SIZES[:2]), snn.Leaky(**options)
        self.fc2, self.lif2 = nn.Linear(*SIZES[1:]), snn.Leaky(**options)
        for fc in (self.fc1, self.fc2):
            nn.init.uniform_(fc.weight, -0.7, 0.7)

    def step(self, x: Tensor, mems: list[Tensor] | None = None,
             between: Callable[[Tensor], Tensor] = lambda s: s) -> tuple[Tensor, Tensor]:
        mem1, mem2 = mems or (None, None)
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(between(spk1)), mem2)
        if mems is not None:
            mems[:] = [mem1, mem2]
        return spk2, mem2

    def forward(self, xs: Tensor, mems: list[Tensor] | None = None, **options: Any) -> Tensor:
        """A loss of all steps."""
        mems = self.start() if mems is None else mems
        return sum((weighted(*self.step(x, mems, **options)) for x in xs), xs.new_zeros(()))

    def start(self) -> list[Tensor]:
        return [self.lif1.reset_mem(), self.lif2.reset_mem()]


def frames(steps: int = STEPS, density: float = 0.3) -> Tensor:
    return (torch.rand(steps, BATCH, SIZES[0]) < density).to(torch.get_default_dtype())


def weighted(*tensors: Tensor) -> Tensor:
    """A loss in which no two entries count the same."""
    return sum((t * torch.linspace(-1, 1.3, t.numel()).view(t.shape)).sum() for t in tensors)


def train_two_streams(net: Any, first: Tensor, second: Tensor, together: bool) -> None:
    """Two sequences in turn through one network (``start``, ``step``), with one backward for both or one for each."""
    losses, streams = [torch.zeros(()), torch.zeros(())], [net.start(), net.start()]
    for x, y in zip(first, second, strict=True):
        for i, frame in enumerate((x, y)):
            losses[i] = losses[i] + weighted(*net.step(frame, streams[i]))
    for loss in [sum(losses)] if together else losses:
        loss.backward()


def train(side: Side, net: nn.Module, loss: Tensor, name: str = "", **leaves: Tensor) -> None:
    side.output(f"{name}loss", loss)
    loss.backward()
    side.collect(net, prefix=name, **leaves)
