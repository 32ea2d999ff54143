"""A version that is not known is tried before it is trusted: fused if it computes the same, else left alone."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch as snn
import torch
from snn_sparse_backend.adapters import fallback, snntorch_trials, switch
from snn_sparse_backend.adapters import snntorch as adapter
from snn_sparse_backend.adapters.snntorch_neurons import KINDS
from snn_sparse_backend.compat import versions
from snntorch import surrogate
from torch import Tensor

import snn_sparse_backend as sparse
from snn_sparse_backend import SparseFallbackWarning
from snn_sparse_backend.cli import main

norse = pytest.importorskip("norse.torch")
from norse_oracle import OTHER_STEP, clean_slate, mapped, tensors_in  # noqa: E402
from snn_sparse_backend.adapters import norse as swapped  # noqa: E402
from snn_sparse_backend.adapters.norse_neurons import KINDS as NORSE_KINDS  # noqa: E402

SNNTORCH = pytest.mark.parametrize("host", KINDS, ids=lambda host: host.__name__)
NORSE = pytest.mark.parametrize("name", [name for name in swapped.__all__ if name not in OTHER_STEP])


def forget() -> None:
    versions.known.cache_clear()
    fallback.forget_warnings()
    for each in (adapter.probe, swapped.probe):
        each.forget()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    forget()
    yield
    forget()
    assert sparse.config.libraries == {}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes libraries say that they have some version."""
    real = versions.installed

    def now(**pretended: str | None) -> None:
        monkeypatch.setattr(versions, "installed", lambda name: pretended.get(name, real(name)))
        forget()

    return now


# ---------------------------------------------------------------------------------------------------- what runs


def run_snntorch(host: type) -> tuple[list[Tensor], list[str]]:
    """Outputs and gradients of a layer over some steps, and the warnings."""
    torch.manual_seed(0)
    layer = snntorch_trials.LAYERS[host]()
    x = (2 * torch.rand(5, 3, snntorch_trials.NEURONS)).requires_grad_()
    outputs: list[Tensor] = []
    states: tuple[Any, ...] = ()
    sparse.reset_counts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for frame in x:
            if host.__name__ == "DeltaLeaky":  # its states come in a pair
                spk, pair = layer(frame, *states or [(None, None)])
                given, states = (spk, pair[0]), (pair,)
            else:
                given = layer(frame, *states)
                states = given if KINDS[host].recurrent else given[1:]
            outputs += given
    loss = sum((value * torch.randn_like(value)).sum() for value in outputs)
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [*(o.detach() for o in outputs), *gradients], messages(caught)


def run_norse(name: str, library: Any) -> tuple[list[Tensor], list[str]]:
    """The same for a class of Norse, or for the swapped one."""
    torch.manual_seed(0)
    layer = getattr(library, name)(*((4, 6) if NORSE_KINDS[getattr(norse, name)].weights else ()))
    cell = name.endswith("Cell")
    x = (20 * torch.rand(5, 3, 4)).requires_grad_()
    outputs, state = [], None
    sparse.reset_counts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in x if cell else x.chunk(2):
            output, state = layer(part, state)
            outputs += [output, *tensors_in(state)]
    loss = sum((value * torch.randn_like(value)).sum() for value in outputs if value.requires_grad)
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
    return [*(o.detach() for o in outputs), *gradients], messages(caught)


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if w.category is SparseFallbackWarning]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- what is planted


def other_membrane(host: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snnTorch whose state update is another one, and has always been."""
    if host.__name__ == "DeltaLeaky":  # whose update is all of its step
        forward = KINDS[host].host
        step = types.FunctionType(forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__)
        replace_body(forward, lambda self, input_, mem: step(self, 1.01 * input_, mem), monkeypatch)
        return
    original = host._base_state_function  # type: ignore[attr-defined]

    def update(self: Any, *args: Any) -> Any:
        done = original(self, *args)
        return tuple(1.01 * each for each in done) if isinstance(done, tuple) else 1.01 * done

    monkeypatch.setattr(host, "_base_state_function", update)
    monkeypatch.setitem(KINDS[host].methods, "_base_state_function", update)


def other_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Norse whose step function has another body."""
    step = NORSE_KINDS[getattr(norse, name)].activation
    original = types.FunctionType(step.__code__, step.__globals__, step.__name__, step.__defaults__)

    def changed(*args: Any, **options: Any) -> Any:
        output, state = original(*args, **options)
        state = mapped(state, lambda n, s: 1.01 * s if n == "v" else s)
        return (state.v if name.startswith("LI") and not name.startswith("LIF") else output), state

    replace_body(step, changed, monkeypatch)


def replace_body(function: Any, changed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a function do something else, whoever has it."""
    monkeypatch.setitem(function.__globals__, "_changed", changed)
    monkeypatch.setattr(function, "__defaults__", None)
    monkeypatch.setattr(function, "__code__", (lambda *args, **options: _changed(*args, **options)).__code__)  # type: ignore[name-defined]  # noqa: F821


# ---------------------------------------------------------------------------------------------------- snnTorch


@SNNTORCH
def test_snntorch_that_computes_the_same_is_fused(host: type, pretend: Callable[..., None]) -> None:
    expected, _ = run_snntorch(host)
    pretend(snntorch="9.9")
    with sparse.enabled("snntorch"):
        found, warned = run_snntorch(host)
    assert not warned and sparse.counts["neuron_steps"] == 5 and not sparse.counts["host_steps"]
    assert_close(found, expected)


@SNNTORCH
def test_snntorch_with_another_step_is_left_alone(host: type, pretend: Callable[..., None],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    other_membrane(host, monkeypatch)
    expected, _ = run_snntorch(host)
    pretend(snntorch="9.9")
    with sparse.enabled("snntorch"):
        found, (warned,) = run_snntorch(host)
        assert warned.startswith(f"{host.__name__}: running the host library's own code, because this package does not "
                                 "know snntorch 9.9, and its ") and "differs by" in warned
        assert sparse.counts["host_steps"] == 5 and not sparse.counts["neuron_steps"]
        _, again = run_snntorch(host)
    assert not again, "one warning is enough"
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_planted_step_would_go_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a known version nothing is tried: this is what an unknown one is protected from."""
    other_membrane(snn.Leaky, monkeypatch)
    expected, _ = run_snntorch(snn.Leaky)
    with sparse.enabled("snntorch"):
        found, warned = run_snntorch(snn.Leaky)
    assert not warned and not torch.allclose(found[-1], expected[-1], rtol=1e-3)


def test_a_surrogate_with_another_derivative(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    original = surrogate.ATan.backward
    other = staticmethod(lambda ctx, grad: (0.9 * original(ctx, grad)[0], None))
    monkeypatch.setattr(surrogate.ATan, "backward", other)
    pretend(snntorch="9.9")
    with sparse.enabled("snntorch"):
        _, (warned,) = run_snntorch(snn.Leaky)
        assert "the gradient of its" in warned
        sparse.reset_counts()
        layer = snn.Leaky(0.9, spike_grad=surrogate.fast_sigmoid())
        layer(torch.rand(2, 3, requires_grad=True))
        assert sparse.counts["neuron_steps"] == 1, "with another surrogate it computes the same"


# ---------------------------------------------------------------------------------------------------- Norse


@NORSE
def test_norse_that_computes_the_same_is_fused(name: str, pretend: Callable[..., None]) -> None:
    with clean_slate():
        expected, _ = run_norse(name, norse)
    pretend(norse="9.9")
    with clean_slate():
        found, warned = run_norse(name, swapped)
        assert not warned and sparse.counts["neuron_steps"] >= 4 and not sparse.counts["host_steps"]
    assert_close(found, expected)


@NORSE
def test_norse_with_another_step_is_left_alone(name: str, pretend: Callable[..., None],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    other_step(name, monkeypatch)
    with clean_slate():
        expected, _ = run_norse(name, norse)
    pretend(norse="9.9")
    with clean_slate():
        found, (warned,) = run_norse(name, swapped)
        assert warned.startswith(f"{name}: running the host library's own code, because this package does not know "
                                 "norse 9.9, and its ") and "differs by" in warned
        assert sparse.counts["host_steps"] and not sparse.counts["neuron_steps"]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_norses_own_classes_are_tried_as_well(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    other_step("LICell", monkeypatch)
    pretend(norse="9.9")
    with clean_slate(), sparse.enabled("norse"):
        assert len(run_norse("LICell", norse)[1]) == 1
        assert not run_norse("LSNNCell", norse)[1] and sparse.counts["neuron_steps"] == 5


# ---------------------------------------------------------------------------------------------------- when and what


def test_known_versions_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("tried")

    for module in (adapter, swapped):
        monkeypatch.setattr(module, "trials", never)
    assert all(map(versions.known, versions.KNOWN)), "the tests run with known versions"
    with sparse.enabled("snntorch"), clean_slate():
        assert not run_snntorch(snn.Leaky)[1] and sparse.counts["neuron_steps"] == 5
    with clean_slate():
        assert not run_norse("LSNNCell", swapped)[1] and sparse.counts["neuron_steps"] == 5


def test_each_class_is_tried_once(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tried, real = [], adapter.trials
    monkeypatch.setattr(adapter, "trials", lambda kind, host, *rest: tried.append(host) or real(kind, host, *rest))
    pretend(snntorch="9.9")
    with sparse.enabled("snntorch"):
        assert not tried
        for host in (snn.Leaky, snn.Leaky, snn.RLeaky, snn.Leaky):
            run_snntorch(host)
    assert tried == [snn.Leaky, snn.RLeaky]


def test_what_cannot_be_tried_is_left_alone(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise TypeError("no such option")

    monkeypatch.setattr(adapter, "trials", broken)
    pretend(snntorch="9.9", torch="9.8.0+cpu")
    with sparse.enabled("snntorch"):
        _, (warned,) = run_snntorch(snn.Leaky)
    assert warned.endswith("because this package does not know snntorch 9.9 and torch 9.8.0+cpu, and trying it failed: "
                           "TypeError: no such option")


def test_an_interrupted_trial_is_no_trial(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    other_membrane(snn.Leaky, monkeypatch)
    pretend(snntorch="9.9")
    with sparse.enabled("snntorch"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(adapter, "trials", interrupted)
            run_snntorch(snn.Leaky)
        _, (warned,) = run_snntorch(snn.Leaky)
    assert "differs by" in warned


def test_an_unknown_torch_is_tried_too(pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(torch="9.9.0")
    other_membrane(snn.Leaky, monkeypatch)
    with sparse.enabled("snntorch"):
        _, (warned,) = run_snntorch(snn.Leaky)
    assert "because this package does not know torch 9.9.0, and its " in warned


def test_the_user_notices_nothing(pretend: Callable[..., None]) -> None:
    pretend(snntorch="9.9", norse="9.9")
    instances, random, cell = list(snn.SpikingNeuron.instances), torch.get_rng_state(), swapped.LSNNCell()
    with sparse.enabled("snntorch", cutoff=1e-6), clean_slate(cutoff=1e-6), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = snn.Leaky(0.9)
        layer(torch.ones(2, 3, requires_grad=True))
        cell(torch.ones(2, 3, requires_grad=True))
        assert sparse.counts == {"neuron_steps": 2, "neuron_nodes": 2}
    assert snn.SpikingNeuron.instances == [*instances, layer] and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("error", [ImportError("no LIFBox"), AttributeError("no LIFBox"),
                                   ModuleNotFoundError("no LIFBox", name="norse.torch.functional.lif")])
def test_a_version_that_lacks_something(error: Exception, pretend: Callable[..., None],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    real = switch.import_module

    def fails(name: str, package: str) -> Any:
        if name == "..norse":
            raise error
        return real(name, package)

    monkeypatch.setattr(switch, "import_module", fails)
    with pytest.raises(type(error), match="^no LIFBox"):
        sparse.enable("norse")
    pretend(norse="9.9")
    message = "this package does not know norse 9.9 and cannot use it: no LIFBox"
    with pytest.raises(ImportError, match=message):
        sparse.enable("norse")
    model = torch.nn.Sequential(snn.Leaky(0.9))
    with pytest.warns(SparseFallbackWarning, match=message), sparse.enabled(model):
        assert len(sparse.config.libraries) == 0 and snn.Leaky.forward is adapter.leaky_forward


def test_info_tells_which_version_is_not_known(pretend: Callable[..., None], capsys: Any) -> None:
    pretend(norse="9.9")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "9.9 (not a known version" in printed and printed.count("not a known version") == 1


@pytest.mark.parametrize(("library", "version", "expected"), [
    ("snntorch", "1.0.0", True), ("snntorch", "0.9.4", True), ("snntorch", "1.0.1", False), ("snntorch", None, False),
    ("norse", "1.1.0", True), ("norse", "1.1.0+g065a3b4", False), ("norse", "1.0.0", True),
    ("torch", "2.13.0+cpu", True), ("torch", "2.15.1", True), ("torch", "2.16.0", False), ("torch", "2.1.5", False),
])
def test_what_is_known(library: str, version: str | None, expected: bool, pretend: Callable[..., None]) -> None:
    pretend(**{library: version})
    assert versions.known(library) is expected
