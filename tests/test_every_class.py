"""What holds for each class that runs on the kernels, whichever it is: the modes of torch, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import snntorch as snn
import torch
from snn_sparse_backend.adapters import support
from snn_sparse_backend.adapters.fallback import forget_warnings
from snn_sparse_backend.adapters.norse_neurons import host_class
from torch import Tensor, nn

import snn_sparse_backend as sparse

BATCH, SIZE, STEPS = 3, 7, 4
SNNTORCH: dict[str, Callable[[], Any]] = {
    "Leaky": lambda: snn.Leaky(0.9),
    "Synaptic": lambda: snn.Synaptic(0.8, 0.9),
    "Lapicque": lambda: snn.Lapicque(R=1.5, C=3.0),
    "Alpha": lambda: snn.Alpha(0.9, 0.8),
    "DeltaLeaky": lambda: snn.DeltaLeaky(0.3, beta=0.9),
    "RLeaky": lambda: snn.RLeaky(0.9, linear_features=SIZE),
    "RSynaptic": lambda: snn.RSynaptic(0.8, 0.9, linear_features=SIZE),
}


@dataclass
class Subject:
    """A Linear and a spiking layer, called for one step, or for a sequence if the layer takes sequences."""

    library: str
    name: str

    def layer(self) -> Any:
        if self.library == "snntorch":
            return SNNTORCH[self.name]()
        sizes = (SIZE, SIZE) if "Recurrent" in self.name or "Linear" in self.name else ()
        return host_class(self.name)(*sizes)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(SIZE, SIZE), self.layer()])

    @property
    def sequence(self) -> bool:
        return self.library == "norse" and not self.name.endswith("Cell")

    def input(self) -> Tensor:
        torch.manual_seed(1)
        return 2 * torch.rand(*([STEPS] if self.sequence else []), BATCH, SIZE) - 0.5

    def run(self, model: Any, x: Tensor, steps: int = 2) -> Tensor:
        """The sum of some outputs, after a few steps with the states passed on."""
        linear, layer = model
        if self.library == "norse":
            state, total = None, torch.zeros(())
            for _ in range(steps):
                out, state = layer(linear(x), state)
                total = total + (out * torch.linspace(-1, 1.3, out.numel()).view(out.shape)).sum()
                total = total + getattr(state, "lif", state).v.sum()
            return total
        states: Any = ()
        total = torch.zeros(())
        for _ in range(steps):
            if self.name == "DeltaLeaky":
                out, states = layer(linear(x), states or (None, None))
                total = total + (out * torch.linspace(-1, 1.3, out.numel()).view(out.shape)).sum() + states[0].sum()
                continue
            out, *rest = layer(linear(x), *states)
            states = (out, *rest) if self.name.startswith("R") else tuple(rest)
            total = total + (out * torch.linspace(-1, 1.3, out.numel()).view(out.shape)).sum() + rest[-1].sum()
        return total


def subjects() -> list[Subject]:
    norse = [name for name in support.names("norse") if host_class(name) is not None]
    return [Subject("snntorch", name) for name in support.names("snntorch")] + [Subject("norse", name)
                                                                              for name in norse]


each = pytest.mark.parametrize("subject", subjects(), ids=lambda s: f"{s.library} {s.name}")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget_warnings()
    sparse.reset_counts()
    torch._dynamo.reset()
    yield
    snn.SpikingNeuron.init()


def gradients(subject: Subject, on: bool, **options: Any) -> list[Tensor | None]:
    model = subject.model()
    with ExitStack() as stack:
        if on:
            stack.enter_context(sparse.enabled(subject.library, **options))
        subject.run(model, subject.input()).backward()
    return [p.grad for p in model.parameters()]


def assert_equal(expected: list[Any], found: list[Any], tolerance: float = 1e-5) -> None:
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_all_of_them_are_here() -> None:
    assert SNNTORCH.keys() == set(support.names("snntorch"))
    assert len(subjects()) > 15


@each
def test_it_is_fused(subject: Subject) -> None:
    """What the tests below rely on: it would be fused if nothing spoke against it."""
    expected = gradients(subject, on=False)
    assert not sparse.counts["neuron_steps"]
    assert_equal(expected, gradients(subject, on=True))
    assert sparse.counts["neuron_steps"] > 0 and not sparse.counts["host_steps"]


@each
def test_double_backward_is_refused(subject: Subject) -> None:
    model, x = subject.model(), subject.input().requires_grad_()
    with sparse.enabled(subject.library):
        (grad,) = torch.autograd.grad(subject.run(model, x).pow(2), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"does not support double backward.*Disable the sparse backend"):
            grad.sum().backward()


@each
def test_compiling_does_not_break_the_graph(subject: Subject) -> None:
    """From given states, as Norse's own way to make the first ones breaks it."""
    def explain(on: bool) -> tuple[int, int]:
        torch._dynamo.reset()
        (linear, layer), x = subject.model(), subject.input()  # type: ignore[misc]
        with torch.no_grad():
            first = layer(linear(x), *([(None, None)] if subject.name == "DeltaLeaky" else []))
        together = subject.library == "norse" or subject.name == "DeltaLeaky"  # states in one tuple
        state = first[1:2] if together else first[0 if subject.name.startswith("R") else 1 :]
        with ExitStack() as stack:
            if on:
                stack.enter_context(sparse.enabled(subject.library))
            found = torch._dynamo.explain(lambda x: layer(linear(x), *state)[0])(x)
        return found.graph_count, found.graph_break_count

    assert explain(on=False) == explain(on=True) == (1, 0)
    assert not sparse.counts["neuron_steps"]


@each
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "jvp", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_modes_of_torch_run_the_hosts_code(subject: Subject, mode: str) -> None:
    modes: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "no_grad": torch.no_grad()(subject.run),
        "inference_mode": lambda model, x: torch.inference_mode()(subject.run)(model, x).clone(),
        "jvp": lambda model, x: torch.func.jvp(lambda x: subject.run(model, x), (x,), (x + 1,))[1].detach(),
        "trace": lambda model, x: torch.jit.trace(lambda x: subject.run(model, x), x, check_trace=False)(x).detach(),
    }

    def outcome(on: bool) -> Any:
        with ExitStack() as stack:
            if on:
                stack.enter_context(sparse.enabled(subject.library))
            try:
                return modes[mode](subject.model(), subject.input())
            except RuntimeError as error:  # some modes are more than the host can do
                return type(error)

    expected, found = outcome(on=False), outcome(on=True)
    assert torch.equal(expected, found) if isinstance(expected, Tensor) else expected is found
    assert not sparse.counts["neuron_steps"]


@each
def test_half_precision_and_autocast_run_the_hosts_code(subject: Subject) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            expected = gradients(subject, on=False)
            found = gradients(subject, on=True)
    assert_equal(expected, found, 0.0)
    assert sparse.counts["host_steps"] > 0 and not sparse.counts["neuron_steps"]


@each
def test_one_warning_a_layer_and_reason(subject: Subject) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
                gradients(subject, on=True)
    messages = [str(w.message) for w in caught if w.category is sparse.SparseFallbackWarning]
    assert len(messages) == 1 and messages[0].startswith(f"{subject.name}: ") and "autocast" in messages[0]


def names_in(model: nn.Module) -> tuple[list[str], list[str]]:
    return list(model.state_dict()), [name for name, _ in model.named_buffers()]


@each
def test_it_can_be_copied_and_has_the_hosts_names(subject: Subject) -> None:
    model, stock = subject.model(), subject.model()
    subject.run(stock, subject.input()).backward()
    with sparse.enabled(subject.library):
        subject.run(model, subject.input()).backward()
        assert names_in(model) == names_in(stock)
        for name, buffer in list(model[1].named_buffers()):  # type: ignore[index]
            if buffer.grad_fn is not None:  # torch copies leaves only
                setattr(model[1], name, buffer.detach())  # type: ignore[index]
        if hasattr(model[1], "mem_prev"):  # type: ignore[index]
            model[1].mem_prev = None  # type: ignore[index]
        twin = copy.deepcopy(model)
        sparse.reset_counts()
        subject.run(twin, subject.input()).backward()
    assert sparse.counts["neuron_steps"] > 0
