"""Norse 1.0 beside 1.1: what it lacks is absent, and a step that it takes otherwise runs its own code."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

import norse.torch as stock
from norse_oracle import (
    OTHER_STEP,
    assert_gradients,
    assert_identical,
    clean_slate,
    data,
    grads,
    tensors_in,
    weighted,
)
from snn_sparse_backend.adapters import norse as swapped
from snn_sparse_backend.adapters import norse_neurons
from snn_sparse_backend.compat import versions

import snn_sparse_backend as sparse
from snn_sparse_backend import SparseFallbackWarning


def train(library: Any, name: str) -> tuple[Any, Any, list[str]]:
    """Outputs, gradients and warnings of two calls of a layer."""
    torch.manual_seed(0)
    layer = getattr(library, name)(*((7, 7) if "Recurrent" in name else ())).double()
    x = data(*(() if name.endswith("Cell") else (5,)), 3, 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out, state = layer(x)
        out, state = layer(2 * x, state)
    found = grads(weighted(*tensors_in([out, state])), x, *layer.parameters())
    return (out, *state), found, [str(w.message) for w in caught if w.category is SparseFallbackWarning]


@pytest.mark.parametrize(("probed", "answer", "names", "words"), [
    ("input_drives_membrane_at_once", False, ("LIF", "LIFCell", "LIFRefracCell"), "orders the LIF step differently"),
    ("recurrent_step_is_compiled", True,
     ("LIFRecurrent", "LIFRecurrentCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell"),
     "compiles the recurrent LIF step"),
])
def test_the_step_of_norse_1_0_is_left_to_it(probed: str, answer: bool, names: tuple[str, ...], words: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """On Norse 1.0 as it is; on others it is said to be so."""
    monkeypatch.setattr(swapped, probed, lambda: answer)
    for name in names:
        with clean_slate():
            expected, gradients, _ = train(stock, name)
        with clean_slate():
            found, others, (warned,) = train(swapped, name)
            assert warned.startswith(f"{name}: running the host library's own code, because this version of Norse")
            assert words in warned and sparse.counts["host_steps"] == 2 and not sparse.counts["neuron_steps"]
        assert_identical(expected, found)
        assert_gradients(gradients, others)


def test_only_norse_1_0_has_another_step() -> None:
    old = ("LIF", "LIFCell", "LIFRefracCell", "LIFRecurrent", "LIFRecurrentCell", "LIFRefracRecurrent",
           "LIFRefracRecurrentCell")
    assert OTHER_STEP == (old if versions.installed("norse") == "1.0.0" else ())


def test_what_a_version_lacks_is_absent() -> None:
    for name in ("IAF", "LIBoxCell", "LIFBox", "LIBox"):
        assert (name in swapped.__all__) is hasattr(swapped, name) is (norse_neurons.host_class(name) is not None)
    assert norse_neurons._if_there("norse.torch.functional.lif") is not None
    assert norse_neurons._if_there("norse.torch.functional.nowhere") is None


def test_without_reset_methods_a_box_neuron_resets_to_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norse_neurons, "_reset", None)
    p = stock.LIFBoxParameters(v_th=torch.tensor(0.2), v_reset=torch.tensor(-0.4))
    runs = []
    for library in (stock, swapped):
        with clean_slate():
            torch.manual_seed(0)
            x, state = data(3, 7), stock.LIFBoxFeedForwardState(data(3, 7))
            out, after = library.LIFBoxCell(p)(x, state)
            runs.append(((out, after), grads(weighted(out, after.v), x, state.v)))
            assert out.any() and (sparse.counts["neuron_steps"] == 1) is (library is swapped)
    assert_identical(runs[0][0], runs[1][0])
    assert_gradients(runs[0][1], runs[1][1])
