"""Norse's recurrent layers and the swapped ones: bit-identical, the same gradients."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

import norse.torch as stock
from devices import cuda_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from norse_oracle import (
    OTHER_STEP,
    assert_gradients,
    assert_identical,
    clean_slate,
    mapped,
    needs,
    tensors_in,
    threshold_cut_at,
    tuple_of,
)
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor

import snn_sparse_backend as sparse
from snn_sparse_backend import SparseFallbackWarning
from snn_sparse_backend.memory import saved_bytes

METHODS = ("super", "triangle", "tanh", "circ", "heavi_erfc", "heaviside")
RANGES = {"tau_syn_inv": (20.0, 400.0), "tau_mem_inv": (50.0, 500.0), "v_leak": (-0.3, 0.3), "v_th": (0.2, 0.9),
          "v_reset": (-0.3, 0.2), "tau_adapt_inv": (1.0, 100.0), "beta": (0.1, 1.0), "delta_T": (0.3, 1.0),
          "tau_ada_inv": (1.0, 100.0), "adaptation_current": (0.1, 4.0), "adaptation_spike": (0.02, 0.5),
          "rho_reset": (0.4, 3.0)}
KINDS = {"LIF": ("tau_syn_inv", "tau_mem_inv", "v_leak", "v_th", "v_reset"),
         "LSNN": ("tau_syn_inv", "tau_mem_inv", "tau_adapt_inv", "v_leak", "v_th", "v_reset", "beta")}
KINDS["LIFRefrac"] = (*KINDS["LIF"], "rho_reset")
KINDS["LIFEx"] = (*KINDS["LIF"], "delta_T")
KINDS["LIFAdEx"] = (*KINDS["LIFEx"], "tau_ada_inv", "adaptation_current", "adaptation_spike")
FUSED = tuple(kind for kind in KINDS if f"{kind}Recurrent" not in OTHER_STEP)
FIELDS = {"LIF": "zvi", "LSNN": "zvib", "LIFEx": "zvi", "LIFAdEx": "zvia", "LIFRefrac": ("z", "v", "i", "rho")}
hit: Counter[str] = Counter()

CASES = st.fixed_dictionaries({
    "kind": st.sampled_from(FUSED),
    "cell": st.booleans(),
    "steps": st.integers(1, 8),
    "batch": st.sampled_from((None, 1, 3, 12)),
    "sizes": st.sampled_from(((5, 7), (20, 64), (30, 70), (12, 65), (3, 130))),
    "double": st.sampled_from((True, True, False)),
    "method": st.sampled_from(METHODS),
    "alpha": st.sampled_from((1.0, 4.0, 20.0)),
    "learnable": st.sets(st.sampled_from(("x", "input_weights", "state", "parameters"))),
    "per_neuron": st.booleans(),
    "states": st.booleans(),
    "autapses": st.booleans(),
    "binary": st.booleans(),
    "kept": st.sampled_from(("all", "outputs", "last", "states")),
    "between": st.sampled_from(("carry", "carry", "detach", "edit")),
    "cutoff": st.sampled_from((None, None, 0.2, 0.7)),
    "crossover": st.sampled_from((None, 0.0, 1.0)),
    "forward": st.sampled_from(("host", "host", "host", "sparse")),
    "seed": st.integers(0, 10**6),
})


def has_states(case: dict[str, Any]) -> bool:
    """Whether the first states are given; without a batch, those of LIFRefracRecurrentCell have a wrong shape."""
    return case["states"] or (case["kind"] == "LIFRefrac" and case["cell"] and case["batch"] is None)


def play(case: dict[str, Any], library: Any) -> tuple[list[Any], dict[str, Tensor], Tensor | None]:
    """Outputs and states, the leaves, and the loss; the same for either library from the same seed."""
    torch.manual_seed(case["seed"])
    dtype = torch.float64 if case["double"] else torch.float32
    inputs, hidden = case["sizes"]
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, values: Tensor, group: str) -> Tensor:
        leaves[name] = values.to(dtype).requires_grad_(group in case["learnable"])
        return leaves[name]

    names = KINDS[case["kind"]]
    shape = (hidden,) if case["per_neuron"] and has_states(case) else ()
    values = {}
    for name in names:
        low, high = RANGES[name]
        drawn = low + (high - low) * torch.rand(shape, dtype=torch.float64)
        values[name] = leaf(name, torch.round(drawn * 64) / 64 if name == "v_leak" else drawn, "parameters")
    p = tuple_of(f"{case['kind']}Parameters",
                 {**values, "method": case["method"], "alpha": torch.tensor(case["alpha"])})
    w_in = leaf("w_in", torch.randn(hidden, inputs) * (6 / inputs) ** 0.5, "input_weights")
    w_rec = torch.randn(hidden, hidden, dtype=torch.float64).to(dtype) * (2 / hidden) ** 0.5
    leaves["w_rec"] = w_rec
    name = f"{case['kind']}Recurrent{'Cell' if case['cell'] else ''}"
    layer = getattr(library, name)(inputs, hidden, p, input_weights=w_in, recurrent_weights=w_rec,
                                   autapses=case["autapses"], dt=0.001)
    if case["autapses"]:
        w_rec.requires_grad_("input_weights" in case["learnable"])
    batch = () if case["batch"] is None else (case["batch"],)
    state, terms, seen = None, [], []
    if has_states(case):
        given = {n: leaf(f"{n} 0", torch.randn(*batch, hidden).abs().round() if n == "z" else
                         0.5 * torch.randn(*batch, hidden), "state") for n in FIELDS[case["kind"]]}
        state = tuple_of(f"{case['kind']}State", given)

    def keep(value: Tensor, what: str, last: bool) -> None:
        if value.requires_grad and (case["kept"] in ("all", what) or (case["kept"] == "last" and last)):
            terms.append((value * torch.randn_like(value)).sum())

    calls = case["steps"] if case["cell"] else 2
    for call in range(calls):
        lead = () if case["cell"] else (case["steps"],)
        x = 2 * torch.randn(*lead, *batch, inputs)
        x = leaf(f"x {call}", (x > 2).to(x.dtype) if case["binary"] else x, "x")
        out, state = layer(x, state)
        seen += [out, state]
        last = call == calls - 1
        keep(out, "outputs", last)
        for n, value in zip(FIELDS[case["kind"]], tensors_in(state), strict=True):
            if n != "z" or not case["cell"]:
                keep(value, "states", last)
        if call == calls // 2 and case["between"] == "detach":
            state = mapped(state, lambda _, s: s.detach())
        elif call == calls // 2 and case["between"] == "edit":
            state = mapped(state, lambda n, s: s * 0.5 + 0.1 * (n == "v") if n in ("v", "z") else s)
    return seen, leaves, torch.stack(terms).sum() if terms else None


def gradients(leaves: dict[str, Tensor], loss: Tensor | None) -> list[Tensor | None]:
    wanted = [t for t in leaves.values() if t.requires_grad]
    if loss is None or not wanted:
        return []
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


@given(case=CASES)
@settings(max_examples=1100, derandomize=True, deadline=None, database=None)
def test_recurrent_layers(case: dict[str, Any]) -> None:
    with clean_slate(), threshold_cut_at(case["cutoff"]):
        seen, leaves, loss = play(case, stock)
        expected = gradients(leaves, loss)
    options = {name: case[name] for name in ("cutoff", "crossover", "forward") if case[name] is not None}
    if case["kind"] == "LSNN" and case["forward"] == "sparse":
        options.pop("forward")
    with clean_slate(**options), warnings.catch_warnings():
        warnings.simplefilter("error", SparseFallbackWarning)
        found, others, other_loss = play(case, swapped)
        assert sparse.counts["host_steps"] == 0
        actual = gradients(others, other_loss)
        hit.update(sparse.counts)
    if options.get("forward") == "sparse":
        torch.testing.assert_close(list(tensors_in(found)), list(tensors_in(seen)),
                                   rtol=1e-10 if case["double"] else 1e-4, atol=1e-10 if case["double"] else 1e-4)
    else:
        assert_identical(seen, found)
    names = [n for n, t in leaves.items() if t.requires_grad]
    # The default v is float32, and so is Norse's v_leak - v in the first step, whatever the dtype of the input.
    rounded = "v_leak" if case["kind"] in ("LIF", "LIFRefrac") and not has_states(case) else None
    for i, name in enumerate(names if expected else ()):
        # Norse's hook against autapses cannot stand None: what does not reach the weight is zero.
        if name == "w_rec" and expected[i] is None and actual[i] is not None and not case["autapses"]:
            assert not actual[i].any()
            expected[i] = actual[i]
    assert_gradients(expected, actual, names, rounded, seen)


def test_every_way_was_hit() -> None:
    if not hit:
        pytest.skip("counts what the test above ran")
    on_the_cpu = ("recurrent_gradient_sparse", "recurrent_sparse", "weight_gradient_sparse")
    for way in ("recurrent_gradient_dense", "weight_gradient_dense", "neuron_nodes",
                *(() if cuda_kernels() else on_the_cpu)):
        assert hit[way] > 20, (way, hit)


def both(program: Callable[[Any], Any]) -> tuple[Any, Any]:
    results = []
    for library in (stock, swapped):
        with clean_slate():
            torch.manual_seed(0)
            results.append(program(library))
    return results[0], results[1]


@pytest.mark.parametrize("kind", FUSED)
def test_spikes_that_are_not_aligned_are_multiplied_to_the_same_bits(kind: str) -> None:
    """A product of one row may round by the address of its operands: Norse's spikes are a tensor of their own."""
    case = {"kind": kind, "cell": False, "steps": 7, "batch": None, "sizes": (12, 65), "double": True, "alpha": 1.0,
            "method": "super", "learnable": set(), "per_neuron": False, "states": False, "autapses": False,
            "binary": False, "kept": "all", "between": "carry"}
    for seed in range(10):
        runs = []
        for library in (stock, swapped):
            with clean_slate():
                runs.append(play({**case, "seed": seed}, library)[0])
        assert_identical(*runs)


@pytest.mark.parametrize("name", [f"{kind}Recurrent" for kind in FUSED])
def test_a_network_of_recurrent_layers_trains(name: str) -> None:
    """Spikes of one layer into the next, without autapses, over some steps of an optimizer."""

    def program(library: Any) -> Any:
        model = stock.SequentialState(getattr(library, name)(20, 64), getattr(library, name)(64, 70)).double()
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.05), []
        for _ in range(3):
            x = (torch.rand(9, 4, 20) < 0.4).double()
            out, _ = model(20 * x)
            loss = (out * torch.randn_like(out)).sum() + out.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if library is swapped:
            assert sparse.counts["neuron_nodes"] == 6 and sparse.counts["host_steps"] == 0
        for layer in model:
            assert not layer.recurrent_weights.diagonal().any() and not layer.recurrent_weights.grad.diagonal().any()
        return losses, [p.detach() for p in model.parameters()]

    (losses, weights), (others, other_weights) = both(program)
    torch.testing.assert_close(others, losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other_weights, weights, rtol=1e-10, atol=1e-12)


@needs("LIFRecurrent")
@pytest.mark.parametrize(("change", "reason"), [
    ("record", "record_states is not supported with a recurrence"),
    ("dims", "only those of one step"),
    ("coo", "sparse COO inputs"),
    ("dtype", "different dtypes"),
])
def test_what_is_left_to_norse(change: str, reason: str) -> None:
    def program(library: Any) -> Any:
        layer = library.LIFRecurrent(5, 6, **({"record_states": True} if change == "record" else {}))
        x = torch.rand(4, 3, 5)
        x = {"dims": torch.rand(4, 2, 3, 5), "coo": x.to_sparse()}.get(change, x)
        if change == "dtype":
            x = x.double()
            layer.input_weights = torch.nn.Parameter(layer.input_weights.detach().double())
            with pytest.raises(RuntimeError):
                layer(x)
            return None
        return [t.to_dense() if t.is_sparse else t for t in (layer(x)[0],)]

    with pytest.warns(SparseFallbackWarning, match=reason):
        expected, found = both(program)
    if expected is not None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs("LIFRecurrent")
def test_weights_changed_between_forward_and_backward_are_noticed() -> None:
    with clean_slate():
        layer = swapped.LIFRecurrent(5, 6)
        out, _ = layer(torch.rand(4, 3, 5))
        with torch.no_grad():
            layer.recurrent_weights.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_copy_works() -> None:
    with clean_slate():
        layer = swapped.LIFRecurrent(5, 6)
        x = torch.rand(4, 3, 5)
        twin = copy.deepcopy(layer)
        assert torch.equal(layer(x)[0], twin(x)[0]) and isinstance(twin, stock.LIFRecurrent)


@needs("LIFRecurrent")
@pytest.mark.skipif(cuda_kernels(), reason="arenas have room for what was not heard of yet")
def test_spikes_are_kept_as_bits() -> None:
    layer, x = swapped.LIFRecurrent(20, 64), (torch.rand(40, 16, 20) < 0.2).float()
    with clean_slate(cutoff=0.05):
        out, state = layer(x)
        kept = saved_bytes([out, *state], exclude=[x, *layer.parameters()])
    assert 0 < kept < out.nbytes / 2, (kept, out.nbytes)
