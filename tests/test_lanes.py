"""The lanes of per-step loops: they really run, and whatever happens in a loop, stock's results come out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BATCH, SIZES, STEPS, Net, Side, assert_same, frames, precision, train, weighted
from snntorch import surrogate
from torch import nn

import snn_sparse_backend as sparse
from snn_sparse_backend import summation
from snn_sparse_backend.build import load_node


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    with precision(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def even_tiny_products_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the order of the host's product is known, its bits come from sums over events."""
    monkeypatch.setattr(summation, "FEWEST", 1)


def lane_steps(side: Side) -> int:
    return side.counts["lane_steps"]


# ---------------------------------------------------------------------------------------------------- the sentinel


@pytest.mark.parametrize("options", [{}, {"cutoff": 0.3}, {"forward": "sparse"}], ids=str)
def test_all_steps_but_the_first_go_through_lanes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    def program(side: Side) -> None:
        net = Net(side)
        net(frames())  # teaches which synapse feeds a neuron
        sparse.reset_counts()
        train(side, net, net(frames()))

    side = assert_same(program, bitwise=not options.get("forward"), **options)
    assert lane_steps(side) == 4 * (STEPS - 1)
    assert side.counts["neuron_steps"] == 2 * STEPS and side.counts["synapse_steps"] == 2 * STEPS
    assert side.counts["neuron_nodes"] == 2 and side.counts["synapse_nodes"] == 2


@pytest.mark.parametrize("weights", ["finite", "infinite"])
def test_by_default_currents_are_summed_over_events_to_the_same_bits(dtype: torch.dtype, weights: str) -> None:
    order = summation.order_of(16, 100, 90, dtype, True)

    def program(side: Side) -> None:
        fc, lif = nn.Linear(100, 90), snn.Leaky(0.9, spike_grad=side.surrogate(surrogate.atan()))
        if weights == "infinite":
            with torch.no_grad():
                fc.weight[0, 0] = float("inf")
        for sweep in range(2):
            mem, loss = lif.reset_mem(), torch.zeros(())
            sparse.reset_counts()
            for t, x in enumerate((torch.rand(6, 16, 100) < 0.1).to(torch.get_default_dtype())):
                spk, mem = lif(fc(x), mem)
                side.output(f"{sweep} {t}", mem)
                loss = loss + weighted(spk)
        if weights == "finite":
            train(side, fc, loss)

    side = assert_same(program)
    assert side.counts["forward_sparse"] == (5 if order is not None and weights == "finite" else 0)


def test_nothing_goes_through_lanes_where_steps_have_nodes_of_their_own() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        train(side, net, net(frames()))

    assert not lane_steps(assert_same(program, fuse_steps=False))


def test_the_lane_costs_no_nodes() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        net(frames(2))
        train(side, net, net(frames(200)))

    side = assert_same(program)
    assert side.counts["neuron_nodes"] == 4


# ------------------------------------------------------------------------------------- something happens in the middle


def _replace(name: str, value: Any) -> Callable[[Net], None]:
    return lambda net: setattr(net.lif1, name, value)


def _scaled_weight(net: Net) -> None:
    net.fc2.weight = nn.Parameter(net.fc2.weight.detach() * 0.5)


def _edit(parameter: str, factor: float) -> Callable[[Net], None]:
    def edit(net: Net) -> None:
        with torch.no_grad():
            net.get_parameter(parameter).mul_(factor)

    return edit


def _slope(net: Net) -> None:
    """The closure of the surrogate is the same object, its constant another."""
    net.lif1.spike_grad = surrogate.fast_sigmoid(10.0)


CHANGES: dict[str, Callable[[Net], None]] = {
    "another weight": _scaled_weight,
    "another surrogate": _slope,
    "another reset": lambda net: setattr(net.lif1, "state_function", net.lif1._base_zero),
    "late reset": _replace("reset_delay", False),
    "inhibition": _replace("inhibition", True),
    "another threshold": lambda net: setattr(net.lif1, "threshold", torch.tensor(0.4)),
    "another factor": lambda net: setattr(net.lif1, "graded_spikes_factor", torch.tensor(2.0)),
    "frozen weight": lambda net: net.fc1.weight.requires_grad_(False),
    "state moved on": lambda net: setattr(net.lif1, "mem", net.lif1.mem * 0.5),
    "state detached": lambda net: setattr(net.lif1, "mem", net.lif1.mem.detach()),
    "state edited in place": lambda net: net.lif1.mem.mul_(0.5),
    "reset": lambda net: net.lif1.reset_mem(),
    "subclass": lambda net: setattr(net.lif1, "__class__", type("Mine", (snn.Leaky,), {})),
    "a hook on the synapse": lambda net: net.fc2.register_forward_hook(lambda m, a, out: out * 0.9),
    "a pre-hook on the neuron": lambda net: net.lif2.register_forward_pre_hook(lambda m, a: (a[0] * 0.9, *a[1:])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_the_middle(change: str) -> None:
    def program(side: Side) -> None:
        net, loss = Net(side, learn_beta=False), torch.zeros(())
        net(frames(2))
        net.start()
        sparse.reset_counts()
        for t, x in enumerate(frames(9)):
            if t == 4:
                CHANGES[change](net)
            spk, mem = net.step(x)
            loss = loss + weighted(spk, mem)
        train(side, net, loss)

    side = assert_same(program, fused=None)
    assert lane_steps(side) > 8


@pytest.mark.parametrize("parameter", ["lif1.beta", "lif2.beta", "fc1.bias"])
def test_an_edit_of_a_parameter_in_the_middle_fails_or_counts(parameter: str) -> None:
    """Stock's backward refuses weights that were edited; what it does not need it takes as it was in each step."""

    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        net(frames(2))
        net.start()
        for t, x in enumerate(frames(9)):
            if t == 4:
                _edit(parameter, 0.5)(net)
            loss = loss + weighted(*net.step(x))
        side.output("loss", loss)

    assert lane_steps(assert_same(program)) > 8


def _modes() -> dict[str, Callable[[], Any]]:
    return {
        "no_grad": torch.no_grad,
        "autocast off": lambda: torch.autocast("cpu", enabled=False),
        "saved-tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        "anomaly": torch.autograd.detect_anomaly,
        "default device": lambda: torch.device("cpu"),
    }


@pytest.mark.filterwarnings("ignore:Anomaly")
@pytest.mark.parametrize("mode", _modes())
def test_a_mode_in_the_middle(mode: str) -> None:
    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        net(frames(2))
        mems = net.start()
        for t, x in enumerate(frames(9)):
            with _modes()[mode]() if t in (4, 5) else nullcontext():
                loss = loss + weighted(*net.step(x, mems))
        train(side, net, loss)

    assert lane_steps(assert_same(program, fused=None)) > 8


@pytest.mark.parametrize("what", ["batch", "dtype of the input", "strides", "requires grad", "a view", "not binary"])
def test_another_input_in_the_middle(what: str) -> None:
    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        net(frames(2))
        net.start()
        for t, x in enumerate(frames(9)):
            if t in (4, 5):
                x = {"batch": lambda x: x[:2], "dtype of the input": lambda x: x.double().float(),
                     "strides": lambda x: x.t().contiguous().t(), "requires grad": lambda x: x.clone().requires_grad_(),
                     "a view": lambda x: x.view(BATCH, 3, -1).flatten(1), "not binary": lambda x: 0.5 * x}[what](x)
            loss = loss + weighted(*net.step(x))
        train(side, net, loss)

    assert lane_steps(assert_same(program, fused=None)) > 8


def test_other_options_in_the_middle() -> None:
    """What is enabled when a step runs is what counts for it."""
    net, x = Net(Side(True, None)), frames(9)
    with sparse.enabled("snntorch"):
        net(x)
        mems = net.start()
        sparse.reset_counts()
        for t, frame in enumerate(x):
            if t == 5:
                sparse.enable("snntorch", cutoff=0.1)
            net.step(frame, mems)
        assert sparse.counts["neuron_nodes"] == 4
        sparse.disable("snntorch")
        sparse.reset_counts()
        net.step(x[0], mems)
        assert not sparse.counts
        sparse.enable("snntorch")


def test_threads_in_the_middle() -> None:
    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        net(frames(2))
        mems = net.start()
        for t, x in enumerate(frames(9)):
            torch.set_num_threads(1 if t < 5 else 2)
            loss = loss + weighted(*net.step(x, mems))
        train(side, net, loss)

    assert lane_steps(assert_same(program)) > 8


# ---------------------------------------------------------------------------------------------------- who feeds whom


def test_two_streams_through_one_net() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        net(frames(2))
        first, second, losses = net.start(), net.start(), [torch.zeros(()), torch.zeros(())]
        for x, y in zip(frames(8), frames(8), strict=True):
            losses[0] = losses[0] + weighted(*net.step(x, first))
            losses[1] = losses[1] + weighted(*net.step(y, second))
        losses[0].backward()
        train(side, net, losses[1])

    assert lane_steps(assert_same(program)) > 8


def test_feedback_between_layers() -> None:
    def program(side: Side) -> None:
        net, back = Net(side), nn.Linear(SIZES[2], SIZES[1])
        for _ in range(2):
            mems, loss, spikes = net.start(), torch.zeros(()), torch.zeros(BATCH, SIZES[2])
            for x in frames(6):
                spk1, mems[0] = net.lif1(net.fc1(x) + back(spikes), mems[0])
                spikes, mems[1] = net.lif2(net.fc2(spk1), mems[1])
                loss = loss + weighted(spikes, mems[1])
        train(side, net, loss)
        side.collect(back, prefix="back")

    assert_same(program)


@pytest.mark.parametrize("same", ["static", "static twice", "changed in place"])
def test_a_static_input_is_multiplied_once(same: str) -> None:
    def program(side: Side) -> None:
        net, x, loss = Net(side), torch.rand(BATCH, SIZES[0]), torch.zeros(())
        net(frames(2))
        net.start()
        other = torch.rand(BATCH, SIZES[0])
        for t in range(8):
            if same == "changed in place" and t == 4:
                x = x.clone()
                x.mul_(2)
            loss = loss + weighted(*net.step(other if same == "static twice" and t > 3 else x))
        train(side, net, loss)

    assert lane_steps(assert_same(program)) > 8


def test_slices_of_an_expanded_input_are_multiplied_once() -> None:
    multiplied: list[int] = []

    def program(side: Side) -> None:
        image = torch.rand(BATCH, SIZES[0]).round()
        for name, x in (("slices", list(image.expand(8, *image.shape))), ("the same", [image] * 8)):
            net = Net(side)
            net(frames(2))
            mems, loss, before = net.start(), torch.zeros(()), sparse.counts["forward_sparse"]
            for x_t in x:
                spk, mems[0] = net.lif1(net.fc1(x_t), mems[0])
                loss = loss + weighted(spk, mems[0])
            multiplied.append(sparse.counts["forward_sparse"] - before)
            train(side, net.fc1, loss, f"{name}: ")

    assert_same(program, bitwise=False, forward="sparse", crossover=1.0)
    fused = multiplied[-2:]
    assert 0 < fused[0] == fused[1] < 4, multiplied


@pytest.mark.parametrize("how", ["changed", "with a gradient", "some with a gradient", "other rows"])
def test_slices_of_an_expanded_input_that_are_not_the_same(how: str) -> None:
    def program(side: Side) -> None:
        net, image = Net(side), torch.rand(BATCH + 1, SIZES[0])
        image.requires_grad_("gradient" in how)
        net(frames(2))
        mems, loss, leaves = net.start(), torch.zeros(()), {}
        for t, x in enumerate(image.expand(8, *image.shape)):
            if how == "changed" and t > 4:
                image.mul_(0.5)
            rows = x[1:] if how == "other rows" and t % 2 else x[:-1]
            if image.requires_grad:
                leaves[f"x{t}"] = rows
                rows.retain_grad()
            current = net.fc1(rows.detach() if how.startswith("some") and t % 3 else rows)
            spk, mems[0] = net.lif1(current, mems[0])
            side.output(f"spikes {t}", spk)
            loss = loss + weighted(spk, mems[0])
        if how != "changed":
            train(side, net.fc1, loss, **leaves)

    assert_same(program)


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("learns", [True, False])
def test_a_static_input_that_learns_from_some_step_on(first: int, learns: bool) -> None:
    def program(side: Side) -> None:
        net, x = Net(side), torch.rand(BATCH, SIZES[0]).requires_grad_(not learns)
        net(frames(2))
        mems, loss = net.start(), torch.zeros(())
        for t in range(8):
            if t == first:
                x.requires_grad_(learns)
            spk, mems[0] = net.lif1(net.fc1(x), mems[0])
            loss = loss + weighted(spk, mems[0])
        x.requires_grad_()
        train(side, net.fc1, loss, x=x)

    assert_same(program)


def test_an_input_that_changes_in_place_is_refused_as_by_autograd() -> None:
    def program(side: Side) -> None:
        net, x, loss = Net(side), torch.rand(BATCH, SIZES[0]), torch.zeros(())
        net(frames(2))
        net.start()
        for _ in range(6):
            loss = loss + weighted(*net.step(x))
            x.mul_(0.9)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        side.output("loss", loss)

    assert_same(program)


def test_a_bias_with_gaps() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        for fc in (net.fc1, net.fc2):
            fc.bias = nn.Parameter(torch.randn(2 * fc.out_features)[::2])
        net(frames(2))
        train(side, net, net(frames()))

    assert_same(program)


def test_flattened_spikes_keep_their_raster() -> None:
    def program(side: Side) -> None:
        lif = snn.Leaky(0.9, spike_grad=side.surrogate(surrogate.atan()))
        fc, out = nn.Linear(24, 5), snn.Leaky(0.9)
        for _ in range(2):
            mem, last, loss = lif.reset_mem(), out.reset_mem(), torch.zeros(())
            for x in 2 * torch.rand(7, 3, 4, 6):
                spk, mem = lif(x.requires_grad_(), mem)
                spk2, last = out(fc(spk.flatten(1)), last)
                loss = loss + weighted(spk2, last)
        train(side, fc, loss)

    side = assert_same(program)
    assert side.counts["weight_gradient_sparse"] + side.counts["weight_gradient_dense"] == 1
    assert lane_steps(side) == 3 * 12


def test_spikes_of_a_lane_have_their_raster_on_the_long_way() -> None:
    with sparse.enabled("snntorch"):
        net = Net(Side(True, None))
        net(frames(2))
        mems = net.start()
        for x in frames(5):
            spk, mems[0] = net.lif1(net.fc1(x), mems[0])
        tape, block = load_node().spikes_at(spk)
        assert block == 4 and tape.blocks[block].raster.ones == int(spk.sum())
        assert load_node().spikes_at(mems[0]) is None and load_node().spikes_at(x) is None


# ---------------------------------------------------------------------------------------------------- drawn


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(st.lists(st.sampled_from(["step", "step", "step", "static", "no grad", "detach", "clone", "backward", "retain",
                                 "look", "second stream"]), min_size=4, max_size=14),
       st.sampled_from([None, 0.3]), st.booleans(), st.integers(0, 1000))
def test_any_course_of_a_loop(course: list[str], cutoff: float | None, passed: bool, seed: int) -> None:
    def program(side: Side) -> None:
        net, other = Net(side), Net(side)
        net(frames(2))
        mems, others, loss = net.start(), other.start(), torch.zeros(())
        static = frames(1)[0]
        for i, (what, x) in enumerate(zip(course, frames(len(course)), strict=True)):
            if what == "detach":
                mems = [m.detach() for m in mems]
            elif what == "clone":
                mems = [m.clone() for m in mems]
            elif what == "look":
                side.output(f"{i}", mems[0])
            elif what == "second stream":
                loss = loss + weighted(*other.step(x, others))
            elif what in ("backward", "retain") and loss.requires_grad:
                loss.backward(retain_graph=what == "retain")
                if what == "backward":
                    mems, others, loss = [m.detach() for m in mems], [m.detach() for m in others], torch.zeros(())
            elif what == "no grad":
                with torch.no_grad():
                    net.step(x, mems)
            else:
                given = static if what == "static" else x
                if passed:
                    loss = loss + weighted(*net.step(given, mems))
                else:
                    net.lif1.mem, net.lif2.mem = mems
                    loss = loss + weighted(*net.step(given))
                    mems = [net.lif1.mem, net.lif2.mem]
        if loss.requires_grad:
            train(side, net, loss)
        side.collect(other, prefix="other")

    with precision(torch.float64):
        assert_same(program, fused=None, cutoff=cutoff, seed=seed)


# ---------------------------------------------------------------------------------------------------- memory


def test_nothing_is_left_of_a_loop_that_is_dropped() -> None:
    with sparse.enabled("snntorch"):
        net = Net(Side(True, None))
        net(frames(2))
        gc.collect()
        gc.disable()
        try:
            tapes = []
            for backward in (True, False):
                mems = net.start()
                loss = net(frames(6), mems)
                tapes += [weakref.ref(load_node().tape_of(m)) for m in mems]
                if backward:
                    loss.backward()
                del loss
                mems.clear()
                net.start()
            assert [tape() for tape in tapes] == [None] * 4
        finally:
            gc.enable()


def test_a_module_that_is_gone_leaves_no_lane_behind() -> None:
    with sparse.enabled("snntorch"):
        for _ in range(20):  # addresses come again
            net = Net(Side(True, None))
            net(frames(2))
            net(frames(4)).backward()
            del net
            gc.collect()
