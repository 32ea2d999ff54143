"""What the backend does not support runs snnTorch's own code, with one warning; bad input is refused with a reason."""

from __future__ import annotations

import gc
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch as snn
import torch
from oracle import BATCH, Net, Side, assert_same, differences, frames, run, train, weighted
from snn_sparse_backend.adapters import fallback
from snntorch import surrogate
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import SparseFallbackWarning, build, kernels, neuron_tape

STOCK_LEAKY, STOCK_LINEAR = snn.Leaky.forward, nn.Linear.forward


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Every warning may appear again, and nothing stays enabled."""
    fallback.forget_warnings()
    yield
    assert sparse.config.libraries == {}, "a test left the backend on"
    assert snn.Leaky.forward is STOCK_LEAKY and nn.Linear.forward is STOCK_LINEAR


def warned(program: Callable[[Side], None], expected: int = 1, **options: Any) -> list[str]:
    """Compares with stock while the host's code runs; returns the messages of the warnings, which must be so many."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        side = assert_same(program, fused=False, **options)
    messages = [str(w.message) for w in caught if w.category is SparseFallbackWarning]
    assert len(messages) == expected, messages
    assert side.counts["host_steps"] > 0
    return messages


def one_layer(make: Callable[[], nn.Module], current: Tensor | None = None,
              state: Callable[[], Any] = lambda: None) -> Callable[[Side], None]:
    """A program: a Linear and the neuron that ``make`` gives, over a few steps; or the neuron on a given current."""

    def program(side: Side) -> None:
        fc, lif, loss = nn.Linear(12, 6), make(), torch.zeros(())
        mem = state()
        for t, x in enumerate(frames()):
            drive = 3 * fc(x) if current is None else current.detach().clone().requires_grad_()
            spk, mem = lif(drive, mem)
            side.output(f"spk {t}", spk)
            side.output(f"mem {t}", mem[0] if isinstance(mem, tuple) else mem)
            loss = loss + weighted(spk.float(), (mem[0] if isinstance(mem, tuple) else mem).float())
        train(side, nn.ModuleList([fc, lif]), loss)

    return program


# ---------------------------------------------------------------------------------------------------- settings


class Custom(snn.Leaky):
    """A subclass may do anything."""

    def fire(self, mem: Tensor) -> Tensor:
        return 2 * super().fire(mem)


def replaced_on_instance() -> snn.Leaky:
    lif = snn.Leaky(0.9)
    lif.fire = lambda mem: surrogate.atan()(mem - 0.5)
    return lif


def other_reset(delay: bool) -> snn.Leaky:
    lif = snn.Leaky(0.9, reset_mechanism="subtract", reset_delay=delay)
    lif.reset_mechanism = "zero"
    return lif


SETTINGS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "inhibition": (lambda: snn.Leaky(0.9, inhibition=True, reset_delay=False), "Leaky.*inhibition with reset_delay"),
    "quantised": (lambda: snn.Leaky(0.9, state_quant=lambda m: m + (m.round() - m).detach()), "Leaky.*quantised"),
    "custom surrogate": (lambda: snn.Leaky(0.9, spike_grad=surrogate.custom_surrogate(lambda x, g, s: g * s)),
                         "Leaky.*surrogate custom_surrogate"),
    "lambda": (lambda: snn.Leaky(0.9, spike_grad=lambda x: torch.sigmoid(4 * x)), "Leaky.*surrogate.*lambda"),
    "SSO": (lambda: snn.Leaky(0.9, spike_grad=surrogate.SSO(variance=0.0)), "Leaky.*surrogate SSO"),
    "surrogate_disable": (lambda: snn.Leaky(0.9, surrogate_disable=True), "Leaky.*surrogate.*_surrogate_bypass"),
    "replaced fire": (replaced_on_instance, "Leaky.*fire was replaced"),
    "other reset": (lambda: other_reset(False), "Leaky.*reset_mechanism was changed"),
    "threshold too wide": (lambda: snn.Leaky(0.9, threshold=torch.rand(7, BATCH, 6)), "Leaky.*threshold of shape"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:Inhibition is an unstable")
def test_settings_that_only_the_host_knows(name: str) -> None:
    make, message = SETTINGS[name]
    (found,) = warned(one_layer(make))
    assert re.match(message, found), found


def test_state_chosen_at_construction_with_delayed_reset_is_supported() -> None:
    assert_same(one_layer(lambda: other_reset(True)))


def test_replaced_method_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snn.Leaky, "mem_reset", lambda self, mem: torch.zeros_like(mem))
    (found,) = warned(one_layer(lambda: snn.Leaky(0.9)))
    assert "Leaky" in found and "mem_reset was replaced" in found


def test_subclasses_run_their_own_code() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparseFallbackWarning)
        assert_same(one_layer(lambda: Custom(0.9, learn_beta=True)), fused=False)


def test_one_warning_for_a_custom_subclass() -> None:
    (found,) = warned(one_layer(lambda: Custom(0.9)))
    assert found.startswith("Custom:") and "subclass" in found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    current = torch.randn(BATCH, 6).to(dtype)
    (found,) = warned(one_layer(lambda: snn.Leaky(0.9, reset_mechanism="none"), current))
    assert str(dtype) in found


def test_double_precision_with_float_spikes() -> None:
    (found,) = warned(one_layer(lambda: snn.Leaky(0.9), torch.randn(BATCH, 6).double()))
    assert "float32 spikes" in found


def test_parameter_that_changes_the_dtype() -> None:
    first, second = warned(one_layer(lambda: snn.Leaky(torch.rand(6).double())), expected=2)
    assert "beta of dtype torch.float64" in first and "membrane has dtype torch.float64" in second


def test_membrane_of_another_dtype() -> None:
    (found,) = warned(one_layer(lambda: snn.Leaky(0.9), state=lambda: torch.zeros(BATCH, 6).double()))
    assert "membrane has dtype" in found


def test_shapes_that_stop_fitting() -> None:
    def program(side: Side) -> None:
        lif = snn.Leaky(torch.linspace(0.2, 0.9, 4).view(4, 1), learn_beta=True)
        loss = torch.zeros(())
        for rows in (4, 1, 4, 1, 1, 4):
            spk, mem = lif(torch.randn(rows, 6, requires_grad=True))
            side.output(f"{len(side.outputs)}", mem)
            loss = loss + weighted(spk, mem)
        train(side, lif, loss)

    with pytest.warns(SparseFallbackWarning, match="beta of shape"):
        side = assert_same(program, fused=None)
    assert side.counts["neuron_steps"] == side.counts["host_steps"] == 3


def test_core_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise build.BuildError("no compiler")

    monkeypatch.setattr(fallback, "load_core", fail)
    monkeypatch.setattr(build, "load_core", fail)
    monkeypatch.setattr(fallback, "_problems", {})
    (found,) = warned(one_layer(lambda: snn.Leaky(0.9)))
    assert "Leaky" in found and "compiled core is not available: no compiler" in found


def test_other_linear_layers_are_untouched() -> None:
    net, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 5)
    names = [type(net(x).grad_fn).__name__, type(net[0](x).grad_fn).__name__]
    with sparse.enabled("snntorch"):
        run(lambda side: train(side, model := Net(side), model(frames())), on=True)
        for _ in range(3):
            assert [type(net(x).grad_fn).__name__, type(net[0](x).grad_fn).__name__] == names
        assert type(nn.Linear(5, 4)(frames()[0][:, :5]).grad_fn).__name__ == names[1]


def test_binary_input_without_neurons_does_not_count() -> None:
    with sparse.enabled("snntorch"):
        sparse.reset_counts()
        nn.Linear(12, 4)(frames()[0]).sum().backward()
        assert not sparse.counts


# ---------------------------------------------------------------------------------------------------- odd values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_not_a_number_propagates_as_in_stock(value: float, reset: str, delay: bool) -> None:
    def program(side: Side) -> None:
        lif = snn.Leaky(0.9, learn_beta=True, learn_threshold=True, learn_graded_spikes_factor=True,
                        reset_mechanism=reset, reset_delay=delay)
        fc, x = nn.Linear(6, 5), torch.randn(4, 3, 6)
        x[1, 0, 2] = value
        x.requires_grad_()
        mem, loss = lif.reset_mem(), torch.zeros(())
        for t in range(4):
            spk, mem = lif(x[t], mem)
            side.output(f"spk {t}", spk)
            side.output(f"mem {t}", mem)
            loss = loss + weighted(spk, fc(spk)) + (weighted(mem) if t == 3 else 0)
        train(side, nn.ModuleList([lif, fc]), loss, x=x)

    assert_same(program)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0)])
def test_empty_batch(shape: tuple[int, int]) -> None:
    def program(side: Side) -> None:
        fc, lif, mem = nn.Linear(shape[1], 4), snn.Leaky(0.9, learn_beta=True), None
        for _ in range(3):
            spk, mem = lif(fc(torch.ones(shape)), mem)
        side.output("spk", spk)
        train(side, nn.ModuleList([fc, lif]), weighted(spk, mem))

    assert_same(program, fused=None)


# ---------------------------------------------------------------------------------------------------- enable, disable

BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("snntroch", {}, ValueError, "unknown library 'snntroch': expected 'snntorch' or 'norse'"),
    (7, {}, TypeError, "expected the name of a library or a torch.nn.Module, got int"),
    (None, {}, TypeError, "got NoneType"),
    ("snntorch", {"cutof": 1}, TypeError, "unknown option 'cutof': the options are cutoff, forward"),
    *[("snntorch", {"cutoff": value}, ValueError, f"cutoff: expected a positive finite number .* got {value!r}")
      for value in (0, -1.0, math.nan, math.inf, True, "1")],
    ("snntorch", {"forward": "dense"}, ValueError, "forward: expected one of 'host', 'sparse', got 'dense'"),
    ("snntorch", {"fuse_steps": 1}, ValueError, "fuse_steps: expected True or False, got 1"),
    ("snntorch", {"crossover": 2}, ValueError, "crossover: expected a density between 0 and 1 or None, got 2"),
    (nn.Linear(2, 2), {}, ValueError, "Linear has no spiking layer that can be enabled"),
    (snn.SLSTM(3, 3), {}, ValueError, "SLSTM has no spiking layer"),
]


@pytest.mark.parametrize(("target", "options", "error", "message"), BAD)
@pytest.mark.parametrize("on", [False, True])
def test_bad_input_changes_nothing(target: Any, options: dict[str, Any], error: type[Exception], message: str,
                                   on: bool) -> None:
    if on:
        sparse.enable("snntorch", cutoff=0.5)
    before = dict(sparse.config.libraries)
    forwards = snn.Leaky.forward, nn.Linear.forward
    try:
        with pytest.raises(error, match=message):
            sparse.enable(target, **options)
        assert sparse.config.libraries == before and (snn.Leaky.forward, nn.Linear.forward) == forwards
    finally:
        if on:
            sparse.disable("snntorch")


@pytest.mark.parametrize(("target", "error", "message"), [
    ("snntorch", ValueError, r"'snntorch' is not enabled \(enabled: none\)"),
    ("brian", ValueError, "unknown library 'brian'"),
    (snn.Leaky(0.9), ValueError, "this Leaky is not enabled"),
    (3.0, TypeError, "got float"),
])
def test_disabling_what_is_not_enabled(target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparse.disable(target)


def test_enabling_twice_changes_the_options() -> None:
    sparse.enable("snntorch", cutoff=0.5)
    sparse.enable("snntorch", forward="sparse")
    assert sparse.config.libraries["snntorch"] == sparse.Options(forward="sparse")
    sparse.disable("snntorch")


def test_scopes_nest_and_restore() -> None:
    with sparse.enabled("snntorch", cutoff=0.5):
        with sparse.enabled("snntorch"):
            assert sparse.config.of("snntorch").cutoff is None
        assert sparse.config.of("snntorch").cutoff == 0.5
        with pytest.raises(KeyError), sparse.enabled("snntorch", cutoff=0.1):
            raise KeyError
        assert sparse.config.of("snntorch").cutoff == 0.5


def test_one_model_only() -> None:
    def loss_of(net: Net) -> None:
        net(frames()).backward()

    net, other = Net(Side(True, None)), Net(Side(True, None))
    sparse.enable(net, cutoff=0.5)
    try:
        for model, fused in ((net, True), (other, False)):
            sparse.reset_counts()
            loss_of(model)
            assert (sparse.counts["neuron_steps"] > 0) is fused
            assert (sparse.counts["synapse_steps"] > 0) is fused
        with sparse.enabled(net, cutoff=0.25):
            assert net.lif1._snn_sparse_options.cutoff == 0.25
        assert net.lif1._snn_sparse_options.cutoff == 0.5, "the scope ended: as it was before"
    finally:
        sparse.disable(net)
    sparse.reset_counts()
    loss_of(net)
    assert not sparse.counts


def test_graphs_stay_valid_after_disable() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        loss = net(frames())
        if side.sparse:
            sparse.disable("snntorch")
        train(side, net, loss)
        net.zero_grad()
        train(side, net, net(frames()), "after: ")
        if side.sparse:
            sparse.enable("snntorch")

    assert_same(program, synapses=True)


def test_switching_in_the_middle_of_a_sequence() -> None:
    def program(side: Side) -> None:
        net, x = Net(side), frames()
        mems = net.start()
        loss = net(x, mems)
        if side.sparse:
            sparse.disable("snntorch")
        loss = loss + net(x, mems)
        if side.sparse:
            sparse.enable("snntorch")
        train(side, net, loss + net(x, mems))

    assert_same(program, synapses=True)


# ---------------------------------------------------------------------------------------------------- planted errors

PLANTED: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "neuron gradients off by 1 %": (neuron_tape, "neuron_backward", lambda real: lambda *args, **kw: (
        real(*args, **kw), kw["grad_input"].mul_(1.01))),
    "parameter gradients off by 1 %": (neuron_tape, "neuron_backward", lambda real: lambda *args, **kw: (
        real(*args, **kw), [g.mul_(1.01) for g in kw["grad_parameters"] if g is not None])),
    "weight gradients off by 1 %": (kernels, "weight_gradient", lambda real: lambda *args, **kw: tuple(
        g * 1.01 for g in real(*args, **kw))),
    "one weight gradient missing": (kernels, "weight_gradient", lambda real: lambda *args, **kw: (
        None, real(*args, **kw)[1])),
    "input gradients off by 1 %": (kernels, "input_gradient", lambda real: lambda *args, **kw: (
        real(*args, **kw) * 1.01)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(side: Side) -> None:
        net, x = Net(side), frames(density=0.1)
        train(side, net, net(x))

    options = {"cutoff": 0.1, "crossover": 1.0}
    stock = run(program, on=False, **options)
    assert not differences(stock, run(program, on=True, **options), tolerance=1e-5)
    module, function, plant = PLANTED[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    assert differences(stock, run(program, on=True, **options), tolerance=1e-5), "the comparison missed it"


def test_plans_do_not_keep_modules_alive() -> None:
    lif = snn.Leaky(0.9)
    with sparse.enabled("snntorch"):
        lif(torch.rand(2, 3, requires_grad=True))
    snn.SpikingNeuron.instances.remove(lif)  # snnTorch's own list of every layer ever made
    gone = weakref.ref(lif)
    del lif
    gc.collect()
    assert gone() is None


def test_tensors_on_another_device_do_what_the_host_does() -> None:
    def outcome(on_meta: str) -> str:
        here = torch.get_default_device().type
        lif, device = snn.Leaky(0.9), {"input": here, "membrane": here, on_meta: "meta"}
        x = torch.rand(2, 3, device=device["input"], requires_grad=True)
        try:
            spk, mem = lif(x, torch.rand(2, 3, device=device["membrane"]))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return f"{spk.device} {mem.device}"

    for on_meta, reason in (("input", "tensors on meta are not supported"), ("membrane", "are on .* and meta")):
        fallback.forget_warnings()
        stock = outcome(on_meta)
        with sparse.enabled("snntorch"), pytest.warns(SparseFallbackWarning, match=reason):
            assert outcome(on_meta) == stock
