"""snnTorch's DeltaLeaky, which takes and returns a pair of membranes: bit-identical, the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Side, assert_same, precision
from snntorch import surrogate
from torch import Tensor, nn

from snn_sparse_backend import SparseFallbackWarning

if not hasattr(snn, "DeltaLeaky"):
    pytest.skip("this version of snnTorch has no DeltaLeaky", allow_module_level=True)

SURROGATES: dict[str, Callable[[], Any]] = {
    "atan": surrogate.atan, "fast_sigmoid": surrogate.fast_sigmoid, "heaviside": surrogate.heaviside,
    "straight_through_estimator": surrogate.straight_through_estimator, "triangular": surrogate.triangular,
    "SFS": lambda: surrogate.SFS(slope=10, B=0.3),
}
CASES = st.fixed_dictionaries({
    "shape": st.sampled_from(((), (7,), (3, 5), (2, 130), (2, 3, 4), (4, 64))),
    "steps": st.integers(1, 9),
    "beta": st.sampled_from((0.9, 0.0, 1.0, -0.4, 1.3, 1)),
    "per_neuron": st.booleans(),
    "learn": st.booleans(),
    "delta": st.sampled_from((0.3, 0.0, 1, -0.2, 0.05)),
    "surrogate": st.sampled_from(sorted(SURROGATES)),
    "hidden": st.booleans(),
    "initial": st.sampled_from(("none", "zeros", "learned")),
    "linear": st.booleans(),
    "binary": st.booleans(),
    "x_grad": st.booleans(),
    "between": st.sampled_from(("carry", "carry", "detach", "edit")),
    "loss": st.sampled_from(("all", "spikes", "last")),
    "cutoff": st.sampled_from((None, None, 0.1, 0.7)),
    "fuse_steps": st.sampled_from((True, True, False)),
    "seed": st.integers(0, 10**6),
})


def unroll(case: dict[str, Any]) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        shape, size = case["shape"], case["shape"][-1] if case["shape"] else 1
        beta = case["beta"]
        if case["per_neuron"] and shape:
            beta = torch.as_tensor(float(beta)) + 0.1 * torch.rand(size)
        learn = case["learn"] and not isinstance(beta, int)  # an integer has no gradient
        lif = snn.DeltaLeaky(case["delta"], beta=beta, learn_beta=learn, init_hidden=case["hidden"],
                             spike_grad=side.surrogate(SURROGATES[case["surrogate"]]()))
        linear = nn.Linear(size, size) if case["linear"] and shape else nn.Identity()
        x = torch.randn(case["steps"], *shape)
        x = ((x > 0.5).to(x.dtype) if case["binary"] else x).requires_grad_(case["x_grad"])
        pair: Any = (None, None)
        leaves: dict[str, Tensor] = {}
        if case["initial"] != "none" and not case["hidden"]:
            leaves["start"] = torch.randn(shape).requires_grad_(case["initial"] == "learned")
            pair = (leaves["start"], torch.zeros(shape))
        loss = x.new_zeros(())
        for t in range(case["steps"]):
            h = linear(x[t])
            spk, pair = lif(h) if case["hidden"] else lif(h, pair)
            found = {"spk": spk, "mem": pair[0], "prev": pair[1]}
            for name, value in found.items():
                side.output(f"{name} at {t}", value)
                if case["loss"] == "all" or (case["loss"] == "spikes" and name == "spk") or t == case["steps"] - 1:
                    loss = loss + (value * torch.randn(value.shape)).sum()
            assert lif.mem is pair[0] and lif.mem_prev is pair[1]
            if t == case["steps"] // 2 and not case["hidden"]:
                if case["between"] == "detach":
                    pair = tuple(m.detach() for m in pair)
                elif case["between"] == "edit":
                    pair = (pair[0] * 0.5, pair[1])
        if loss.requires_grad:
            loss.backward()
        side.collect(lif, linear, x=x, **leaves)

    return program


def check(case: dict[str, Any], dtype: torch.dtype) -> None:
    with precision(dtype):
        learned = (case["learn"] and not (case["beta"] == 1 and not (case["per_neuron"] and case["shape"])))
        learned |= case["x_grad"] or bool(case["linear"] and case["shape"])
        assert_same(unroll(case), seed=case["seed"], fused=True if learned else None, cutoff=case["cutoff"],
                    fuse_steps=case["fuse_steps"])


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(case=CASES)
def test_in_float64(case: dict[str, Any]) -> None:
    check(case, torch.float64)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(case=CASES)
def test_in_float32(case: dict[str, Any]) -> None:
    check(case, torch.float32)


def test_a_threshold_that_is_a_tensor_is_left_to_the_host() -> None:
    def program(side: Side) -> None:
        lif = snn.DeltaLeaky(torch.tensor(0.3), beta=0.9)
        x = torch.randn(2, 5, requires_grad=True)
        spk, (mem, _) = lif(x, (None, None))
        side.output("spk", spk)
        (spk.sum() + mem.sum()).backward()
        side.collect(lif, x=x)

    with pytest.warns(SparseFallbackWarning, match="DeltaLeaky: .*delta_threshold is not a number"):
        assert_same(program, fused=False)


def test_inhibition_is_ignored() -> None:
    """As the host does."""

    def program(side: Side) -> None:
        lif, x = snn.DeltaLeaky(0.3, beta=0.9), torch.randn(2, 5, requires_grad=True)
        lif.inhibition = True
        spk, (mem, _) = lif(x, (None, None))
        assert (spk.sum(1) > 1).any()
        side.output("spk", spk)
        (spk * torch.randn(2, 5)).sum().backward()
        side.collect(lif, x=x)

    assert_same(program)


def test_without_states_the_host_raises_its_own_error() -> None:
    def program(side: Side) -> None:
        with pytest.raises(TypeError, match="`mem` must be provided"):
            snn.DeltaLeaky(0.3, beta=0.9)(torch.randn(2, 5, requires_grad=True))
        side.output("nothing", torch.zeros(()))

    assert_same(program, fused=False)
