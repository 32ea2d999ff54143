"""Norse's classes and the swapped ones on whatever hypothesis can think of: bit-identical, the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

from hypothesis import given, settings
from hypothesis import strategies as st
from norse_cases import METHODS, Case, assert_same, cases
from norse_oracle import Swapped, agree, assert_gradients, both, needs, threshold_cut_at
from torch import Tensor, nn

import snn_sparse_backend as sparse


def often(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


# ------------------------------------------------------------------------------------------------ one layer


@needs("LIF")
@given(case=cases("LIF"))
@often(500)
def test_lif(case: Case) -> None:
    assert_same(case)


@needs("LIFCell")
@given(case=cases("LIFCell"))
@often(500)
def test_lif_cell(case: Case) -> None:
    assert_same(case)


@given(case=cases("LI"))
@often(250)
def test_li(case: Case) -> None:
    assert_same(case)


@given(case=cases("LICell"))
@often(250)
def test_li_cell(case: Case) -> None:
    assert_same(case)


@given(case=cases("LIFBoxCell"))
@often(250)
def test_lif_box_cell(case: Case) -> None:
    assert_same(case)


@needs("LIBoxCell")
@given(case=cases("LIBoxCell"))
@often(150)
def test_li_box_cell(case: Case) -> None:
    assert_same(case)


@needs("IAF")
@given(case=cases("IAF"))
@often(200)
def test_iaf(case: Case) -> None:
    assert_same(case)


@given(case=cases("IAFCell"))
@often(200)
def test_iaf_cell(case: Case) -> None:
    assert_same(case)


@given(case=cases("LSNN"))
@often(300)
def test_lsnn(case: Case) -> None:
    assert_same(case)


@given(case=cases("LSNNCell"))
@often(300)
def test_lsnn_cell(case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize("name", ["LIFEx", "LIFExCell", "LIFAdEx", "LIFAdExCell"])
@given(data=st.data())
@often(150)
def test_lif_with_an_exponential(name: str, data: st.DataObject) -> None:
    assert_same(data.draw(cases(name)))


@needs("LIFRefracCell")
@given(case=cases("LIFRefracCell"))
@often(500)
def test_lif_refrac_cell(case: Case) -> None:
    assert_same(case)


@needs("LIF")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("record", [False, True])
def test_lif_with_everything_learnable(method: str, dtype: torch.dtype, record: bool) -> None:
    """All parameters per neuron, all outputs in the loss, a second call that goes on: the full adjoint at once."""

    def program(library: Any) -> tuple[Any, list[Tensor | None]]:
        means = (200.0, 100.0, 0.05, 0.5, 0.1)
        parameters = [(m * (0.9 + 0.2 * torch.rand(70, dtype=dtype))).requires_grad_() for m in means]
        layer = library.LIF(library.LIFParameters(*parameters, method, 3.0), record_states=record)
        x = (3 * torch.randn(9, 4, 70, dtype=dtype)).requires_grad_()
        v, i = (torch.randn(4, 70, dtype=dtype, requires_grad=True) for _ in range(2))
        z1, s1 = layer(x, library.LIFFeedForwardState(v, i))
        z2, s2 = layer(2 * x, library.LIFFeedForwardState(s1.v[-1], s1.i[-1]) if record else s1)
        kept = [t for t in (z1, *s1, z2, *s2) if t.requires_grad]
        loss = sum((t * torch.randn_like(t)).sum() for t in kept)
        assert 0.05 < z1.mean() < 0.5
        return (z1, s1, z2, s2), list(torch.autograd.grad(loss, [x, v, i, *parameters], allow_unused=True))

    agree(program)


# ------------------------------------------------------------------------------------------------ whole nets

NETS = st.fixed_dictionaries({
    "sizes": st.sampled_from(((30, 80, 10), (64, 65, 3), (7, 20, 1), (128, 64, 64))),
    "steps": st.integers(1, 8),
    "batch": st.sampled_from((1, 3, 6)),
    "density": st.sampled_from((0.05, 0.3, None)),  # None: an input that is not binary
    "input_grad": st.booleans(),
    "method": st.sampled_from(METHODS),
    "alpha": st.sampled_from((1.0, 5.0, 50.0)),
    "bias": st.booleans(),
    "cutoff": st.sampled_from((None, None, 0.3)),
    "crossover": st.sampled_from((0.0, 0.2, 1.0)),
    "states_in_loss": st.booleans(),
    "iterations": st.integers(1, 3),
})


def net_program(net: dict[str, Any], dtype: torch.dtype, loop: bool) -> Callable[[Any], Any]:
    """A program that trains Linear, LIF, Linear, LI for some iterations, as sequences or in a loop over cells."""
    inputs, hidden, outputs = net["sizes"]
    shape = (net["steps"], net["batch"], inputs)

    def forward(model: Any, x: Tensor) -> tuple[Tensor, Any]:
        if not loop:
            return model(x)
        out, state = [], None
        for step in x:
            y, state = model(step, state)
            out.append(y)
        return torch.stack(out), state

    def program(library: Any) -> tuple[Any, list[Tensor | None]]:
        p = library.LIFParameters(v_th=torch.tensor(0.3), method=net["method"], alpha=net["alpha"])
        spiking, reading = (library.LIFCell, library.LICell) if loop else (library.LIF, library.LI)
        model = library.SequentialState(nn.Linear(inputs, hidden, bias=net["bias"]), spiking(p),
                                        nn.Linear(hidden, outputs, bias=net["bias"]), reading()).to(dtype)
        seen, gradients = [], []
        for _ in range(net["iterations"]):
            x = torch.rand(shape, dtype=dtype) if net["density"] is None else (torch.rand(shape) < net["density"])
            x = (4 * x.to(dtype) if net["density"] is None else x.to(dtype)).requires_grad_(net["input_grad"])
            y, state = forward(model, x)
            loss = (y * torch.randn_like(y)).sum() + (y**2).mean()
            if net["states_in_loss"]:
                loss = loss + (state[1].v * torch.randn(hidden, dtype=dtype)).sum() + state[3].i.sum()
            model.zero_grad()
            loss.backward()
            seen.append((y, state))
            gradients += [t.grad for t in (x, *model.parameters())]
            with torch.no_grad():  # a step that is the same on both sides, so that the next forward is
                for weight in model.parameters():
                    weight.add_(0.1 * torch.randn_like(weight))
        if isinstance(library, Swapped):
            assert sparse.counts["neuron_steps"] == 2 * net["steps"] * net["iterations"]
            assert sparse.counts["neuron_nodes"] == 2 * net["iterations"]
            assert sparse.counts["synapse_steps"] > 0 and sparse.counts["host_steps"] == 0
        return seen, gradients

    return program


@needs("LIF", "LIFCell")
@pytest.mark.parametrize("loop", [False, True], ids=["sequence", "cells"])
@given(net=NETS, dtype=st.sampled_from((torch.float64, torch.float32)))
@often(60)
def test_net(loop: bool, net: dict[str, Any], dtype: torch.dtype) -> None:
    with threshold_cut_at(net["cutoff"]):
        agree(net_program(net, dtype, loop), cutoff=net["cutoff"], crossover=net["crossover"])


@needs("LIF", "LIFCell")
@pytest.mark.parametrize("loop", [False, True], ids=["sequence", "cells"])
@given(net=NETS)
@often(30)
def test_net_with_sparse_currents(loop: bool, net: dict[str, Any]) -> None:
    """Currents summed over the spikes only: another order of summation, hence equal to rounding and not bit by bit."""
    used = []

    def program(library: Any) -> Any:
        result = net_program(net, torch.float64, loop)(library)
        used.append(sparse.counts["forward_sparse"])
        return result

    with threshold_cut_at(net["cutoff"]):
        options = {"cutoff": net["cutoff"], "crossover": net["crossover"], "forward": "sparse"}
        (expected, gradients), (found, others) = both(program, **options)
    for (y, state), (other, other_state) in zip(expected, found, strict=True):
        torch.testing.assert_close(other, y, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other_state, state, rtol=1e-10, atol=1e-12)
    assert_gradients(gradients, others)
    assert used[0] == 0 and (used[1] > 0 or net["crossover"] < 1)
