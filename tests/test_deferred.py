"""Currents of Norse sequences that are computed while the neurons run: the same bits, and never where anybody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import norse.torch as stock
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norse_oracle import Swapped, assert_gradients, assert_identical, both, clean_slate, threshold_cut_at
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import deferred, synapse_tape
from snn_sparse_backend.deferred import DeferredCurrents
from snn_sparse_backend.kernels import Order

SIZES = (30, 70, 65, 9)


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps of the batch that the tests use, so that most sequences end in between."""
    monkeypatch.setattr(deferred, "ROWS_AT_ONCE", 12)


def net_of(library: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    p = stock.LIFParameters(v_th=torch.tensor(0.3), method="tanh", alpha=torch.tensor(5.0))
    layers = [m for a, b in zip(SIZES[:-2], SIZES[1:-1], strict=True) for m in (nn.Linear(a, b), library.LIF(p))]
    net = library.SequentialState(*layers, nn.Linear(*SIZES[-2:]), library.LI(), **more).to(dtype)
    with torch.no_grad():
        for layer in list(net)[::2]:
            layer.weight.mul_(12)
    return net


def spikes(steps: int = 10, density: float = 0.2, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(steps, 4, SIZES[0]) < density).to(dtype)


def trained(net: Any, x: Tensor, call: Callable[[Any, Tensor], Tensor] | None = None) -> tuple[Tensor, list[Any]]:
    """Three steps of training, so that what feeds what is known in the last: its output and gradients."""
    for _ in range(3):
        net.zero_grad()
        sparse.reset_counts()
        out = call(net, x) if call is not None else net(x)[0]
        (out * torch.linspace(0, 1, out.shape[-1], dtype=out.dtype)).sum().backward()
    return out, [p.grad for p in net.parameters()]


@given(steps=st.integers(2, 14), density=st.sampled_from((0.0, 0.05, 0.5, 1.0)), double=st.booleans(),
       cutoff=st.sampled_from((None, 0.2, 2.0)), forward=st.sampled_from(("host", "sparse")), state=st.booleans())
@settings(max_examples=60, derandomize=True, deadline=None, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_outputs_and_gradients(steps: int, density: float, double: bool, cutoff: float | None, forward: str,
                               state: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    ran: list[int] = []

    def program(library: Any) -> tuple[Any, list[Any]]:
        net, x = net_of(library, dtype), spikes(steps, density, dtype)
        first = net(x)[1] if state else None
        first = [type(s)(*(t.detach().to(dtype) for t in s)) if s is not None else None for s in first or ()] or None

        def call(net: Any, x: Tensor) -> Tensor:
            return torch.cat([net(x, list(first) if first else None)[0], net(x.flip(0))[0]])

        result = trained(net, x, call)
        ran.append(sparse.counts["forward_deferred"])
        return result

    with threshold_cut_at(cutoff):
        (expected, gradients), (found, others) = both(program, cutoff=cutoff, forward=forward, crossover=1.0)
    if forward == "host":
        assert_identical(expected, found)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-10 if double else 1e-4, atol=1e-12 if double else 1e-4)
        assert ran == [0, 6]
    if forward == "host" or double:
        assert_gradients(gradients, others)


def test_it_happens_by_default_where_the_order_of_the_host_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synapse_tape, "order_of", lambda rows, inputs, *_: Order((inputs,)))
    with clean_slate(crossover=1.0):
        trained(net_of(Swapped()), spikes())
        assert sparse.counts["forward_deferred"] == 3 and sparse.counts["host_steps"] == 0


def test_currents_never_have_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    stand_in = DeferredCurrents.stand_in

    def watched(self: DeferredCurrents) -> Tensor:
        tensor = stand_in(self)
        seen.append(tensor.untyped_storage().nbytes())
        return tensor

    monkeypatch.setattr(DeferredCurrents, "stand_in", watched)
    with clean_slate(forward="sparse", crossover=1.0):
        trained(net_of(Swapped()), spikes())
    assert seen == [4] * 5  # the first of them is known one training step later


# ---- somebody else sees the currents: they are there ---------------------------------------------------------------


def hook_on_neuron(net: Any, seen: list[Tensor]) -> None:
    net[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach().clone()))


def hook_before_neuron(net: Any, seen: list[Tensor]) -> None:
    net[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))


def hook_on_synapse(net: Any, seen: list[Tensor]) -> None:
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))


def backward_hook_on_neuron(net: Any, seen: list[Tensor]) -> None:
    net[1].register_full_backward_hook(lambda module, gradients, outputs: seen.append(gradients[0].clone()))


def custom_state(net: Any, seen: list[Tensor]) -> None:
    neuron = net[1]

    def state(x: Tensor) -> Any:
        seen.append(x.detach().clone())
        return neuron.initial_state(x)

    neuron.state_fallback = state


def own_forward(net: Any, seen: list[Tensor]) -> None:
    neuron = net[1]
    forward = neuron.forward

    def looking(x: Tensor, state: Any = None) -> Any:
        seen.append(x.detach().clone())
        return forward(x, state)

    neuron.forward = looking


LOOKERS = (hook_on_neuron, hook_before_neuron, hook_on_synapse, backward_hook_on_neuron, custom_state, own_forward)


@pytest.mark.parametrize("look", LOOKERS, ids=lambda look: look.__name__)
def test_who_looks_sees_currents(look: Callable[[Any, list[Tensor]], None]) -> None:
    def program(library: Any) -> Any:
        net, seen = net_of(library), []
        look(net, seen)
        out, gradients = trained(net, spikes())
        return out, gradients, seen, sparse.counts["forward_deferred"]

    (expected, gradients, seen, _), (found, others, also_seen, count) = both(program, crossover=1.0)
    assert_identical(expected, found)
    assert_gradients(gradients, others)
    assert len(seen) == len(also_seen) == 3
    for a, b in zip(seen, also_seen, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert count <= 2  # the other layers may


@pytest.fixture
def global_hook() -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(output.detach().clone()) if isinstance(module, nn.Linear) else None)
    yield seen
    handle.remove()


def test_a_global_hook_sees_currents(global_hook: list[Tensor]) -> None:
    with clean_slate(forward="sparse", crossover=1.0):
        net, x = net_of(Swapped()), spikes()
        trained(net, x)
        assert sparse.counts["forward_sparse"] == 3 and not sparse.counts["forward_deferred"]
        torch.testing.assert_close(global_hook[0], net[0](x).detach())


def by_hand(net: Any, x: Tensor) -> Tensor:
    """Without the container: the user has the currents in hand."""
    for layer in net:
        x = layer(x) if isinstance(layer, nn.Linear) else layer(x)[0]
    return x


def all_hidden(net: Any, x: Tensor) -> Tensor:
    return torch.cat([h.flatten(2) for h in net(x)[0]], -1)


@pytest.mark.parametrize(("call", "more"), [(by_hand, {}), (all_hidden, {"return_hidden": True})])
def test_currents_in_the_hands_of_the_user(call: Callable[[Any, Tensor], Tensor], more: dict[str, Any]) -> None:
    def program(library: Any) -> Any:
        result = trained(net_of(library, torch.float64, **more), spikes(dtype=torch.float64), call)
        return *result, sparse.counts["forward_deferred"]

    (expected, gradients, _), (found, others, count) = both(program, forward="sparse", crossover=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_gradients(gradients, others)
    assert count == 0


def test_two_synapses_in_a_row() -> None:
    def program(library: Any) -> Any:
        net = library.SequentialState(nn.Linear(30, 20), nn.Linear(20, 20), library.LIF(), nn.Linear(20, 20))
        return trained(net.double(), spikes(dtype=torch.float64))

    (expected, gradients), (found, others) = both(program, forward="sparse", crossover=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_gradients(gradients, others)


@pytest.mark.parametrize("what", ["host", "dtype"])
@pytest.mark.filterwarnings("ignore::snn_sparse_backend.SparseFallbackWarning")
def test_a_neuron_that_needs_them_all_after_all(what: str) -> None:
    """The neuron was ready for deferred currents, and then cannot take them: it gets ordinary ones."""

    def program(library: Any) -> Any:
        net, x = net_of(library), spikes()
        trained(net, x)
        if what == "host":  # alpha differs from neuron to neuron
            net[1].p = net[1].p._replace(alpha=torch.linspace(1, 5, SIZES[1]))
        state = None
        if what == "dtype":
            state = [None] * 6
            zero = torch.zeros(4, SIZES[-1], dtype=torch.float64)
            state[5] = type(net(x)[1][5])(v=zero, i=zero)
        sparse.reset_counts()
        net.zero_grad()
        out = net(x, state)[0]
        out.square().sum().backward()
        return out, [p.grad for p in net.parameters()], sparse.counts["host_steps"]

    (expected, gradients, _), (found, others, host_steps) = both(program, forward="sparse", crossover=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert (host_steps > 0) == (what == "host")


def test_a_planted_error_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step too few at a time: the comparison of the first test would see it."""
    monkeypatch.setattr(DeferredCurrents, "compute", lambda self, first: min(first + self._at_once, self._shape[0]))

    def program(library: Any) -> Any:
        return trained(net_of(library, torch.float64), spikes(dtype=torch.float64))[0]

    expected, found = both(program, forward="sparse", crossover=1.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_swapped_classes_and_patched_ones() -> None:
    """``sparse.enable("norse")`` puts the same under Norse's own classes."""
    with clean_slate(), sparse.enabled("norse", forward="sparse", crossover=1.0):
        trained(net_of(stock), spikes())
        assert sparse.counts["forward_deferred"] == 3
    assert swapped.LIF.forward is not stock.LIF.forward
