"""The table of support says what is so, and the documents say what the table says."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from snn_sparse_backend.adapters import fallback, support
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import SparseFallbackWarning
from snn_sparse_backend.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh() -> None:
    fallback.forget_warnings()


def test_the_documents_have_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--support"]) == 0
    printed = capsys.readouterr().out
    assert printed == support.markdown() and printed in (ROOT / "docs" / "support.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for library in ("snntorch", "norse"):
        missing = [name for name in support.names(library) if f"`{name}`" not in readme]
        assert set(missing) <= {"LIFBox", "LIBox"}, missing  # which the released Norse does not export


def test_every_class_is_in_the_table_once() -> None:
    for library in ("snntorch", "norse"):
        both = support.names(library) + support.names(library, fused=False)
        assert len(both) == len(set(both))
    exported = {name for name in dir(snn) if isinstance(getattr(snn, name), type)
                and issubclass(getattr(snn, name), (snn.SpikingNeuron, snn.LeakyParallel))}
    assert exported - {"LIF", "SpikingNeuron"} <= {*support.names("snntorch"), *support.names("snntorch", False)}


def test_every_class_of_norse_is_in_the_table() -> None:
    stock = pytest.importorskip("norse.torch")
    from norse.torch.module import snn as base

    kinds = (base.SNN, base.SNNCell, base.SNNRecurrent, base.SNNRecurrentCell)
    exported = {name for name, found in vars(stock).items() if isinstance(found, type) and issubclass(found, kinds)}
    assert exported - {kind.__name__ for kind in kinds} <= {*support.names("norse"), *support.names("norse", False)}


def test_swapped_classes_are_those_of_the_table() -> None:
    pytest.importorskip("norse")
    from snn_sparse_backend.adapters import norse, norse_neurons

    assert set(norse.__all__) <= set(support.names("norse"))
    missing = set(support.names("norse")) - set(norse.__all__)
    assert missing == {name for name in support.names("norse") if norse_neurons.host_class(name) is None}
    assert missing <= {"LIFBox", "LIBox", "IAF", "LIBoxCell"}  # not exported by the released Norse, or not yet in 1.0


def snntorch_layers() -> dict[str, tuple[nn.Module, Tensor]]:
    x = torch.rand(2, 5, requires_grad=True)
    return {"SLSTM": (snn.SLSTM(5, 5), x), "LeakyParallel": (snn.LeakyParallel(5, 5), torch.rand(3, 2, 5))}


@pytest.mark.parametrize("name", ["SLSTM", "LeakyParallel"])
def test_what_is_not_fused_says_so_once_and_runs(name: str) -> None:
    torch.manual_seed(0)
    layer, x = snntorch_layers()[name]
    host, reason = type(layer).forward, support.reasons("snntorch")[name]
    expected = layer(x)
    for state in ("spk", "syn", "mem"):
        if hasattr(layer, state):
            setattr(layer, state, torch.zeros(0))
    with warnings.catch_warnings(record=True) as caught, sparse.enabled("snntorch"):
        warnings.simplefilter("always")
        assert inspect.signature(layer.forward) == inspect.signature(host.__get__(layer))
        found = layer(x)
        layer(x)
    assert [str(w.message) for w in caught if w.category is SparseFallbackWarning] == [
        f"{name}: running the host library's own code, because {reason}"]
    for a, b in zip(expected if isinstance(expected, tuple) else (expected,),
                    found if isinstance(found, tuple) else (found,), strict=True):
        assert torch.equal(a, b)
    assert type(layer).forward is host


def test_a_model_tells_which_of_its_layers_are_left_alone() -> None:
    model: Any = nn.Sequential(snn.Leaky(0.9, init_hidden=True), snn.SLSTM(5, 5, init_hidden=True))
    with pytest.warns(SparseFallbackWarning, match="SLSTM: .* because its gates are dense products"):
        sparse.enable(model)
    sparse.disable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="snntorch: Leaky, Synaptic"):
            sparse.enable(nn.Sequential(snn.SLSTM(5, 5)))


def test_norses_classes_are_as_they_were() -> None:
    stock = pytest.importorskip("norse.torch")
    layer = stock.LIFAdExRefracRecurrent(3, 4)
    before = layer.forward.__func__
    with sparse.enabled("norse"):
        assert "state" in inspect.signature(layer.forward).parameters  # what SequentialState asks for
        with pytest.warns(SparseFallbackWarning, match="LIFAdExRefracRecurrent: "):
            layer(torch.rand(2, 3, 3))
    assert layer.forward.__func__ is before and "forward" not in vars(stock.LIFAdExRefracRecurrent)
