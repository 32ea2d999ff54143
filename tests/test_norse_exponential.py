"""Norse neurons with an exponential of their own membrane; the property tests have them among the others."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

import norse.torch as stock
from norse_oracle import agree, both, clean_slate, data, fused, grads, weighted
from snn_sparse_backend.adapters import norse as swapped
from snn_sparse_backend.adapters import norse_neurons
from snn_sparse_backend.adapters.fallback import SparseFallbackWarning
from torch import Tensor, nn

import snn_sparse_backend as sparse

NAMES = ("LIFEx", "LIFAdEx")
each = pytest.mark.parametrize("name", NAMES)


def run(library: Any, name: str, x: Tensor, **values: Any) -> tuple[Any, list[Tensor | None]]:
    layer = getattr(library, name)(getattr(stock, f"{name}Parameters")(**values))
    out, state = layer(x)
    return (out, state), grads(weighted(out, *state), x)


@each
def test_a_network_whose_currents_come_when_they_are_needed(name: str) -> None:
    def program(library: Any) -> tuple[Any, list[Tensor | None]]:
        p = getattr(stock, f"{name}Parameters")(v_th=torch.tensor(0.3), method="tanh", alpha=2.0)
        model = library.SequentialState(nn.Linear(20, 70), getattr(library, name)(p), nn.Linear(70, 5),
                                        library.LI()).double()
        y, states = model((torch.rand(40, 3, 20) < 0.3).double() * 4)
        if library is not stock:
            assert fused() and sparse.counts["neuron_nodes"] == 2
        loss = weighted(y, *states[1], *states[3])
        return (y, states), grads(loss, *model.parameters())

    agree(program)
    agree(program, cutoff=1e6)


@each
def test_a_membrane_that_runs_away_does_so_as_in_norse(name: str) -> None:
    """Infinity times no spike is NaN, as Norse computes the reset, and from there on everywhere."""
    x = torch.full((30, 2, 3), 1.5, dtype=torch.float64, requires_grad=True)
    (expected, _), (found, _) = both(lambda library: run(library, name, x, v_th=torch.tensor(1e-3),
                                                         delta_T=torch.tensor(1e-4), v_reset=torch.tensor(5.0)))
    assert not expected[0].isfinite().all() or not expected[1].v.isfinite().all()
    for a, b in zip((expected[0], *expected[1]), (found[0], *found[1]), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def test_a_first_exponential_in_another_dtype_is_left_to_norse() -> None:
    """The default membrane of this cell is v_leak itself, float32 although the input is not."""

    def program(library: Any) -> Any:
        cell, state, seen = library.LIFAdExCell(), None, []
        for step in data(4, 3, 7):
            out, state = cell(step, state)
            seen += [out, *state]
        return [t.detach() for t in seen]

    with pytest.warns(SparseFallbackWarning, match="v_th of torch.float32 would be subtracted in another dtype"):
        expected, found = both(program)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@each
@pytest.mark.parametrize("recurrent", [False, True])
def test_an_exponential_that_is_not_quite_torchs_is_noticed(name: str, recurrent: bool,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    host = getattr(stock, f"{name}Recurrent" if recurrent else name)
    layer = getattr(swapped, host.__name__)(*((7, 7) if recurrent else ())).double()
    other, x = copy.deepcopy(layer), data(6, 3, 7)  # which has no plan yet

    def membrane(layer: Any) -> Tensor:
        with clean_slate():
            v = layer(x)[1].v
            assert fused()
            return v.detach()

    right = membrane(layer)
    assert torch.equal(host.forward(layer, x)[1].v, right)
    kind = norse_neurons.KINDS[host]
    assert kind.precompute is not None
    exact = kind.precompute
    monkeypatch.setitem(swapped._KINDS, type(layer),
                        replace(kind, precompute=lambda p: lambda v: exact(p)(v) * (1 + 1e-15)))
    assert not torch.equal(membrane(other), right)
