"""What is special of Norse's refractory neurons: a second threshold, states in a tuple within a tuple."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

import norse.torch as stock
from devices import cuda_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from norse.torch.functional import lif_refrac
from norse_cases import Case, Value, assert_same
from norse_oracle import (
    FLOAT,
    agree,
    assert_gradients,
    clean_slate,
    data,
    grads,
    needs,
    tensors_in,
    threshold_cut_at,
    tuple_of,
    unroll,
    weighted,
)
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import SparseFallbackWarning

NAMES = ("LIFRefracCell", "LIFRefracRecurrentCell", "LIFRefracRecurrent")
pytestmark = needs(*NAMES)
each = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def slate() -> Iterator[None]:
    torch.manual_seed(0)
    with clean_slate():
        yield


def make(library: Any, name: str, **values: Any) -> Any:
    p = tuple_of("LIFRefracParameters", {"v_th": torch.tensor(0.2), **values})
    return getattr(library, name)(*((7, 9) if "Recurrent" in name else ()), p)


def run(layer: Any, x: Tensor, state: Any = None) -> tuple[Any, list[Any]]:
    """The outputs, and the states that the user sees, over the steps of a sequence."""
    if type(layer).__name__.endswith("Cell"):
        return unroll(layer, x, state)
    out, state = layer(x, state)
    return out, [state]


@each
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT], ids=str)
@pytest.mark.parametrize("method", ["super", "triangle"])
@pytest.mark.parametrize("cutoff", [None, 0.4])
def test_neurons_are_refractory_and_fused(name: str, dtype: torch.dtype, method: str, cutoff: float | None) -> None:
    """Everything that may have a gradient has one; spikes are masked, and counters are between their ends."""
    size, means = 9 if "Recurrent" in name else 7, {"tau_syn_inv": 200.0, "tau_mem_inv": 300.0, "v_leak": 0.05,
                                                    "v_th": 0.3, "v_reset": 0.1, "rho_reset": 2.3}

    def program(library: Any) -> Any:
        p = {n: (m * (0.9 + 0.2 * torch.rand(size, dtype=dtype))).requires_grad_() for n, m in means.items()}
        first = {n: torch.rand(4, size, dtype=dtype, requires_grad=True)
                 for n in (("z", "v", "i", "rho") if "Recurrent" in name else ("v", "i", "rho"))}
        layer = make(library, name, **p, method=method, alpha=torch.tensor(0.7)).to(dtype)
        x = data(9, 4, 7, dtype=dtype)
        state = tuple_of("LIFRefracState" if "Recurrent" in name else "LIFRefracFeedForwardState", first)
        out, states = run(layer, 4 * x, state)
        if library is not stock:
            assert sparse.counts["neuron_steps"] == 9 and sparse.counts["neuron_nodes"] == 1
            assert sparse.counts["host_steps"] == 0
            assert cuda_kernels() or (sparse.counts["lane_steps"] > 0) == (name == "LIFRefracCell")
        counted = states[-1].rho
        assert 0.05 < float((counted > 0).double().mean()) < 0.95 and bool((counted != counted.round()).any())
        wanted = [x, *p.values(), *first.values(), *layer.parameters()]
        found = grads(weighted(*tensors_in([out, states])), *wanted)
        assert all(g is not None and bool(g.any()) for g in found)
        return (out, states), found

    with threshold_cut_at(cutoff):
        agree(program, cutoff=cutoff)


@pytest.mark.parametrize("loop", [False, True], ids=["sequence", "cells"])
@given(cutoff=st.sampled_from((None, 0.2, 0.7)), crossover=st.sampled_from((0.0, 0.3, 1.0)), seed=st.integers(0, 999),
       states=st.booleans(), dtype=st.sampled_from((torch.float32, FLOAT)))
@settings(max_examples=30, derandomize=True, deadline=None, database=None)
def test_nets(loop: bool, cutoff: float | None, crossover: float, seed: int, states: bool, dtype: torch.dtype) -> None:
    """Gradients of spikes come from a Linear behind them, at the active sites only where there is a cutoff."""

    def program(library: Any) -> Any:
        torch.manual_seed(seed)
        p = tuple_of("LIFRefracParameters", {"v_th": torch.tensor(0.2), "rho_reset": torch.tensor(1.5)})
        spiking = library.LIFRefracCell(p) if loop else library.LIFRefracRecurrent(30, 30, p)
        model = library.SequentialState(nn.Linear(20, 30), spiking, nn.Linear(30, 5),
                                        library.LICell() if loop else library.LI()).to(dtype)
        x = (torch.rand(7, 4, 20) < 0.4).to(dtype)
        out, state = unroll(model, 4 * x) if loop else model(4 * x)
        kept = [state[-1] if loop else state] if states else []
        return (out, kept), grads(weighted(*tensors_in([out, kept])), *model.parameters())

    with threshold_cut_at(cutoff):
        agree(program, cutoff=cutoff, crossover=crossover)


host_threshold = lif_refrac.threshold
CASE = Case(name="LIFRefracCell", steps=5, shape=(3, 65), double=True, method="super", alpha=1.0, dt=0.002,
            parameters=(Value("0-d", True),) * 6, states=None, by_subtraction=False, record=False,
            kept=("all", "all", "all"), between="carry", input_grad=True, permuted=False, cutoff=None, seed=0)


def test_a_planted_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the derivative at the counter alone."""
    assert_same(CASE)
    monkeypatch.setattr(lif_refrac, "threshold", lambda x, *_: host_threshold(x, "triangle", 1.0))
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same(CASE)


@each
def test_its_own_forward_comes_back(name: str) -> None:
    host = getattr(stock, name)
    before, layer, x = host.forward, make(stock, name), data(*([] if name.endswith("Cell") else [4]), 3, 7)
    x = x.float()
    with sparse.enabled("norse"):
        layer(x)[0].sum().backward()
        assert sparse.counts["neuron_steps"] > 0 and sparse.counts["host_steps"] == 0
    assert host.forward is before


def test_the_library_is_truncated_at_both_thresholds() -> None:
    layer, found = make(stock, "LIFRefracCell"), []
    state = tuple_of("LIFRefracFeedForwardState", {n: data(3, 7, dtype=FLOAT) for n in ("v", "i", "rho")})
    x = data(3, 7)
    for scope in (threshold_cut_at(0.5), swapped.adapter.truncated(layer, 0.5)):
        with scope:
            torch.manual_seed(1)
            found.append(grads(weighted(*tensors_in(layer(x, state))), x, *tensors_in(state)))
    assert_gradients(*found)
    torch.manual_seed(1)
    whole = grads(weighted(*tensors_in(layer(x, state))), *tensors_in(state))[-1]
    assert whole is not None and not torch.allclose(whole, found[0][-1])


@pytest.mark.parametrize(("change", "reason"), [
    ("record", "record_states is not supported with a recurrence"),
    ("batchless", "a state of shape .* does not broadcast"),
    ("rho", "its rho of torch.float64 would count in another dtype"),
    ("numbers", "not all tensors"),
    ("activation", "its activation is not the library's"),
])
def test_what_is_left_to_norse(change: str, reason: str) -> None:
    def program(library: Any) -> Any:
        x, state = torch.rand(3, 7), None
        if change == "record":
            layer = library.LIFRefracRecurrent(7, 9, record_states=True)
            x = torch.rand(2, 3, 7)
        elif change == "batchless":
            layer, x = library.LIFRefracRecurrentCell(7, 9), torch.rand(7)
        else:
            layer = make(library, "LIFRefracCell", **({"v_reset": 0} if change == "numbers" else {}))
        if change == "rho":
            zeros, rho = torch.zeros(3, 7), torch.tensor(1.3, dtype=FLOAT)
            state = tuple_of("LIFRefracFeedForwardState", {"v": zeros.clone().requires_grad_(), "i": zeros, "rho": rho})
        if change == "activation":
            own = layer.activation
            layer.activation = lambda *a: own(*a)
        out, state = layer(x, state)
        return (out, state), []

    with pytest.warns(SparseFallbackWarning, match=reason):
        agree(program)


def test_a_counter_may_be_anything_that_broadcasts() -> None:
    for rho in (torch.tensor(1), torch.tensor(-0.5), torch.tensor([[0.0], [2.5], [1.0]]), torch.arange(7)):
        def program(library: Any, rho: Tensor = rho) -> Any:
            state = tuple_of("LIFRefracFeedForwardState", {"v": torch.zeros((), requires_grad=True),
                                                           "i": torch.zeros(3, 7), "rho": rho})
            x = 20 * torch.rand(4, 3, 7)
            out, states = unroll(make(library, "LIFRefracCell"), x.requires_grad_(), state)
            assert library is stock or sparse.counts["host_steps"] == 0
            return (out, states), grads(weighted(*tensors_in([out, states])), x, state.lif.v)

        agree(program)
