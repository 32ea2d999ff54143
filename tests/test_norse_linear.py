"""Norse's LILinearCell, whose product is inside, and the swapped one: bit-identical, the same gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

import norse.torch as stock
from hypothesis import given, settings
from hypothesis import strategies as st
from norse_oracle import assert_gradients, assert_identical, clean_slate
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor

import snn_sparse_backend as sparse
from snn_sparse_backend import SparseFallbackWarning

PARAMETERS = ("tau_syn_inv", "tau_mem_inv", "v_leak")
CASES = st.fixed_dictionaries({
    "steps": st.integers(1, 6),
    "batch": st.sampled_from((1, 3, 12)),
    "sizes": st.sampled_from(((5, 7), (64, 20), (70, 3), (130, 65))),
    "double": st.booleans(),
    "learnable": st.sets(st.sampled_from(("x", "weight", "state", "parameters"))),
    "state": st.booleans(),
    "binary": st.booleans(),
    "last": st.booleans(),
    "crossover": st.sampled_from((None, 0.0, 1.0)),
    "seed": st.integers(0, 10**6),
})


def play(case: dict[str, Any], library: Any) -> tuple[list[Any], list[Tensor], Tensor | None]:
    """Outputs and states, the leaves and the loss."""
    torch.manual_seed(case["seed"])
    dtype = torch.float64 if case["double"] else torch.float32
    inputs, hidden = case["sizes"]
    leaves: list[Tensor] = []

    def leaf(values: Tensor, group: str) -> Tensor:
        leaves.append(values.to(dtype).requires_grad_(group in case["learnable"]))
        return leaves[-1]

    scales = {"tau_syn_inv": 300.0, "tau_mem_inv": 200.0, "v_leak": 0.25}
    values = {name: leaf(torch.tensor(scale), "parameters") for name, scale in scales.items()}
    layer = library.LILinearCell(inputs, hidden, stock.LIParameters(**values))
    layer.input_weights = torch.nn.Parameter(torch.randn(hidden, inputs, dtype=dtype) / inputs**0.5)
    layer.requires_grad_("weight" in case["learnable"])
    leaves.append(layer.input_weights)
    state = None
    if case["state"]:
        state = stock.LIState(*(leaf(torch.randn(case["batch"], hidden), "state") for _ in range(2)))
    seen: list[Any] = []
    terms: list[Tensor] = []
    for step in range(case["steps"]):
        x = torch.randn(case["batch"], inputs)
        x = leaf((x > 1).to(x.dtype) if case["binary"] else x, "x")
        out, state = layer(x, state)
        seen += [out, state]
        if step == case["steps"] - 1 or not case["last"]:
            terms += [(t * torch.randn_like(t)).sum() for t in (out, state.i) if t.requires_grad]
    return seen, leaves, torch.stack(terms).sum() if terms else None


def gradients(leaves: list[Tensor], loss: Tensor | None) -> list[Tensor | None]:
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True)) if loss is not None and wanted else []


@given(case=CASES)
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
def test_linear_cell(case: dict[str, Any]) -> None:
    with clean_slate():
        seen, leaves, loss = play(case, stock)
        expected = gradients(leaves, loss)
    with clean_slate(crossover=case["crossover"]), warnings.catch_warnings():
        warnings.simplefilter("error", SparseFallbackWarning)
        found, others, other_loss = play(case, swapped)
        actual = gradients(others, other_loss)
        assert sparse.counts["host_steps"] == 0
        attached = case["learnable"] or not case["state"]  # Norse's own first state requires a gradient
        assert bool(sparse.counts["neuron_steps"]) == bool(attached)
    assert_identical(seen, found)
    assert_gradients(expected, actual, outputs=seen)


def test_its_own_forward_comes_back() -> None:
    before = stock.LILinearCell.forward
    layer, x = stock.LILinearCell(4, 3), torch.rand(2, 4)
    with sparse.enabled("norse"):
        sparse.reset_counts()
        layer(x)[0].sum().backward()
        assert sparse.counts["neuron_steps"] == 1 and layer.input_weights.grad is not None
    assert stock.LILinearCell.forward is before


def test_a_planted_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    current = swapped.input_current
    monkeypatch.setattr(swapped, "input_current", lambda *a: current(*a) * (1 + 1e-9))
    with pytest.raises(AssertionError):
        test_linear_cell()


def test_what_does_not_fit_is_left_to_norse() -> None:
    layer = swapped.LILinearCell(4, 3).double()
    with pytest.warns(SparseFallbackWarning, match="LILinearCell: .*different dtypes"), pytest.raises(RuntimeError):
        layer(torch.rand(2, 4))
