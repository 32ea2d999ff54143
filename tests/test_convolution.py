"""Convolutions and pooling between neurons: each gives what stock snnTorch gives, recorded on one node a sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import devices
import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Side, assert_same, precision, run, train, train_two_streams, weighted
from snntorch import surrogate
from torch import Tensor, nn
from torch.nn import functional as F

import snn_sparse_backend as sparse
from snn_sparse_backend import memory

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
hit: Counter[str] = Counter()  # products of all examples of the property tests
settings.register_profile("backend", deadline=None, derandomize=True, database=None)
settings.load_profile("backend")

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "max": lambda x: F.max_pool2d(x, 2),
    "max module": nn.MaxPool2d(2),
    "max overlapping": nn.MaxPool2d(3, stride=1, padding=1),
    "max wide": nn.MaxPool2d((1, 3), stride=(1, 2)),
    "max dilated": nn.MaxPool2d(2, stride=1, dilation=2),
    "max ceil": nn.MaxPool2d(2, stride=3, ceil_mode=True),
    "average": nn.AvgPool2d(2),
    "average padded": lambda x: F.avg_pool2d(x, kernel_size=3, stride=2, padding=1, count_include_pad=False),
    "dropout in evaluation": nn.Dropout(0.5).eval(),
    "relu": torch.relu,
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 3),
}


@dataclass
class Conv:
    """One convolution, and what stands before and behind its neuron."""

    outputs: int
    kernel: tuple[int, int]
    stride: int
    padding: Any
    dilation: int
    grouped: bool
    bias: bool
    before: str
    after: str
    beta: Any = 0.8
    learn: bool = False
    reset: str = "subtract"


@dataclass
class Case:
    """A stack of convolutions, its input and its loss."""

    layers: list[Conv]
    channels: int
    steps: int
    batch: int
    static: bool
    binary: bool
    x_grad: bool
    frozen: bool
    loss: str
    detach_at: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    padding = draw(st.sampled_from([0, 1, (1, 0), "same", "valid"]))
    return Conv(
        outputs=draw(st.sampled_from([1, 4, 5, 16, 18])),
        kernel=draw(st.sampled_from([(3, 3), (1, 1), (2, 3), (3, 2)])),
        stride=1 if padding == "same" else draw(st.sampled_from([1, 1, 2])),
        padding=padding,
        dilation=draw(st.sampled_from([1, 1, 2])),
        grouped=draw(st.integers(0, 4)) == 0,
        bias=draw(st.booleans()),
        before=draw(st.sampled_from(sorted(POOLS))),
        after=draw(st.sampled_from(["none"] * 4 + ["max", "max overlapping", "average", "relu"])),
        beta=draw(st.sampled_from([0.8, 0.3])),
        learn=draw(st.booleans()),
        reset=draw(st.sampled_from(["subtract", "zero", "none"])),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    options: dict[str, Any] = {"cutoff": draw(st.sampled_from([None, 0.1, 0.4, 2.0])),
                               "forward": draw(st.sampled_from(["host", "host", "sparse"]))}
    if draw(st.booleans()):
        options["crossover"] = draw(st.sampled_from([0.0, 1.0, 1.0]))
    return Case(
        layers=[draw(convs()) for _ in range(draw(st.sampled_from([1, 2, 2])))],
        channels=draw(st.sampled_from([1, 2, 18])),
        steps=draw(st.integers(2, 6)),
        batch=draw(st.integers(1, 3)),
        static=draw(st.booleans()),
        binary=draw(st.booleans()),
        x_grad=draw(st.booleans()),
        frozen=draw(st.integers(0, 5)) == 0,
        loss=draw(st.sampled_from(["all", "spikes", "last", "readout"])),
        detach_at=draw(st.sampled_from([0, 0, 3])),
        seed=draw(st.integers(0, 2**31)),
        options=options,
    )


def build(case: Case, side: Side) -> tuple[nn.ModuleList, nn.ModuleList]:
    convolutions, neurons, channels = nn.ModuleList(), nn.ModuleList(), case.channels
    for layer in case.layers:
        groups = 2 if layer.grouped and channels % 2 == layer.outputs % 2 == 0 else 1
        conv = nn.Conv2d(channels, layer.outputs, layer.kernel, layer.stride, layer.padding, layer.dilation, groups,
                         layer.bias)
        nn.init.uniform_(conv.weight, -0.6, 0.8)
        convolutions.append(conv.requires_grad_(not case.frozen))
        neurons.append(snn.Leaky(layer.beta, learn_beta=layer.learn, threshold=0.7, reset_mechanism=layer.reset,
                                 spike_grad=side.surrogate(surrogate.atan())))
        channels = layer.outputs
    return convolutions, neurons


def unroll(case: Case) -> Callable[[Side], None]:
    """The model of a case, its time loop and its loss, as a user would write them."""

    def program(side: Side) -> None:
        convolutions, neurons = build(case, side)
        x = torch.rand(1 if case.static else case.steps, case.batch, case.channels, 26, 25)
        x = ((x < 0.2).to(x.dtype) if case.binary else x).requires_grad_(case.x_grad)
        frame, loss = x[0], x.new_zeros(())
        mems = [lif.reset_mem() for lif in neurons]
        for t in range(case.steps):
            h = frame if case.static else x[t]
            if case.detach_at and t == case.detach_at:
                mems = [mem.detach() for mem in mems]
            for i, layer in enumerate(case.layers):
                h, mems[i] = neurons[i](POOLS[layer.before](convolutions[i](h)), mems[i])
                side.output(f"spk of {i} at {t}", h)
                side.output(f"mem of {i} at {t}", mems[i])
                wanted = {"all": True, "spikes": True, "last": t == case.steps - 1, "readout": layer is case.layers[-1]}
                if wanted[case.loss]:
                    loss = loss + weighted(h, *([] if case.loss == "spikes" else [mems[i]]))
                h = POOLS[layer.after](h)
                side.output(f"out of {i} at {t}", h)
        loss = loss + weighted(h)
        if loss.requires_grad:
            loss.backward()
        side.collect(convolutions, neurons, x=x)

    return program


def possible(case: Case) -> bool:
    """Whether the images stay larger than the windows: stock snnTorch runs it, with gradients that are numbers."""
    try:
        return all(g is None or bool(g.isfinite().all()) for g in run(unroll(case), on=False).gradients.values())
    except RuntimeError:
        return False


def check(case: Case, dtype: torch.dtype) -> None:
    with precision(dtype):
        if not possible(case):
            return
        learned = case.x_grad or not case.frozen or any(layer.learn for layer in case.layers)
        side = assert_same(unroll(case), seed=case.seed, fused=True if learned else None,
                           bitwise=case.options["forward"] == "host", **case.options)
    hit.update(side.counts)


@settings(max_examples=160)
@given(case=cases())
def test_networks_in_float64(case: Case) -> None:
    check(case, torch.float64)


@settings(max_examples=60)
@given(case=cases())
def test_networks_in_float32(case: Case) -> None:
    case.options["forward"] = "host"
    check(case, torch.float32)


def test_all_products_were_hit() -> None:
    if not hit:
        pytest.skip("counts what the tests above ran")
    dense = ("conv_weight_dense", "conv_input_dense")
    events = ("conv_weight_sparse", "conv_input_sparse", "conv_forward_sparse")
    for product in dense if devices.cuda_kernels() else dense + events:
        assert hit[product] > 20, f"{product}: {hit[product]} times only: {hit}"
    assert hit["conv_steps"] > 2 * hit["conv_nodes"] and hit["pool_steps"] > hit["pool_nodes"], hit


# ---------------------------------------------------------------------------------------------------- one network


class Net(nn.Module):
    """12C5-MP2-64C5-MP2-FC, as in snnTorch's tutorial 6 but smaller; pools the currents, or the spikes."""

    def __init__(self, side: Side | None = None, pool: Callable[[Tensor], Tensor] = POOLS["max module"],
                 spikes: bool = False, **options: Any) -> None:
        super().__init__()
        spike_grad = surrogate.fast_sigmoid(5)
        options = {"beta": 0.8, "threshold": 0.4,
                   "spike_grad": side.surrogate(spike_grad) if side is not None else spike_grad, **options}
        self.conv1, self.lif1 = nn.Conv2d(2, 6, 3, padding=1), snn.Leaky(**options)
        self.conv2, self.lif2 = nn.Conv2d(6, 8, 3), snn.Leaky(**options)
        self.fc, self.lif3 = nn.Linear(8 * 2 * 2, 5), snn.Leaky(**options)
        self.pool, self.spikes = pool, spikes
        for conv in (self.conv1, self.conv2):
            nn.init.uniform_(conv.weight, -0.4, 0.6)

    def start(self) -> list[Tensor]:
        return [lif.reset_mem() for lif in (self.lif1, self.lif2, self.lif3)]

    def layer(self, conv: nn.Module, lif: nn.Module, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        if self.spikes:
            spk, mem = lif(conv(x), mem)
            return self.pool(spk), mem
        spk, mem = lif(self.pool(conv(x)), mem)
        return spk, mem

    def step(self, x: Tensor, mems: list[Tensor]) -> tuple[Tensor, Tensor]:
        spk1, mems[0] = self.layer(self.conv1, self.lif1, x, mems[0])
        spk2, mems[1] = self.layer(self.conv2, self.lif2, spk1, mems[1])
        spk3, mems[2] = self.lif3(self.fc(spk2.flatten(1)), mems[2])
        return spk3, mems[2]

    def forward(self, xs: Tensor, mems: list[Tensor] | None = None) -> Tensor:
        mems = self.start() if mems is None else mems
        return sum((weighted(*self.step(x, mems)) for x in xs), torch.zeros(()))


def frames(steps: int = 6, batch: int = 3) -> Tensor:
    return (torch.rand(steps, batch, 2, 12, 12) < 0.2).to(torch.get_default_dtype())


@DTYPES
@pytest.mark.parametrize("spikes", [False, True], ids=["pooled currents", "pooled spikes"])
@pytest.mark.parametrize("pool", ["max", "average"])
@pytest.mark.parametrize("cutoff", [None, 0.2])
def test_one_node_for_a_sequence(dtype: torch.dtype, spikes: bool, pool: str, cutoff: float | None) -> None:
    def program(side: Side) -> None:
        net = Net(side, POOLS[pool], spikes)
        for batch in range(2):  # in the first one the convolutions are not yet known to feed neurons
            net.zero_grad()
            train(side, net, net(frames()), f"{batch}: ")
            sparse.reset_counts() if batch == 0 else None

    with precision(dtype):
        counts = assert_same(program, synapses=True, cutoff=cutoff, crossover=1.0).counts
    assert counts["conv_steps"] == 12 and counts["conv_nodes"] == 2, counts
    assert counts["pool_steps"] == 12 and counts["pool_nodes"] == 2, counts
    assert counts["neuron_steps"] == 18 and counts["neuron_nodes"] == 3, counts
    if not devices.cuda_kernels():
        # Averages of spikes are no spikes.
        assert counts["conv_weight_sparse"] == 2 - (spikes and pool == "average"), counts
        assert counts["conv_input_sparse" if cutoff and not spikes else "conv_input_dense"] == 1, counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was convolved by the host's own code."""
    seen: list[Tensor] = []
    host = nn.Conv2d._conv_forward

    def counted(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x)
        return host(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)
    return seen


@DTYPES
def test_static_image_is_convolved_and_pooled_once(dtype: torch.dtype, calls: list[Tensor]) -> None:
    def program(side: Side) -> None:
        net, image = Net(side), torch.rand(3, 2, 12, 12).requires_grad_()
        for batch in range(2):
            calls.clear()
            net.zero_grad()
            train(side, net, net(torch.stack([image] * 1).expand(6, *image.shape).unbind(0)), f"{batch}: ", x=image)
            calls.clear()
            mems, loss = net.start(), torch.zeros(())
            for _ in range(6):
                loss = loss + weighted(*net.step(image, mems))
            if side.sparse:
                assert sum(x is image for x in calls) == 1
            net.zero_grad()
            train(side, net, loss, f"{batch}, same: ")

    with precision(dtype):
        assert_same(program, synapses=True)


def test_slices_of_an_expanded_image_are_convolved_once(calls: list[Tensor]) -> None:
    def program(side: Side) -> None:
        net, image = Net(side), torch.rand(3, 2, 12, 12)
        train(side, net, net(image.expand(6, *image.shape)), "first: ")
        calls.clear()
        train(side, net, net(image.expand(6, *image.shape)), "second: ")
        if side.sparse:
            assert sum(x.data_ptr() == image.data_ptr() for x in calls) == 1

    assert_same(program, synapses=True)


@pytest.mark.parametrize("how", ["changed", "other rows", "with a gradient"])
def test_slices_of_an_expanded_image_that_are_not_the_same(how: str) -> None:
    def program(side: Side) -> None:
        net, image, loss, leaves = Net(side), torch.rand(4, 2, 12, 12), torch.zeros(()), {}
        image.requires_grad_(how == "with a gradient")
        mem = net.lif1.reset_mem()
        for t, x in enumerate(image.expand(6, *image.shape)):
            if how == "changed" and t > 2:
                image.mul_(0.5)
            rows = x[1:] if how == "other rows" and t % 2 else x[:-1]
            if image.requires_grad:
                leaves[f"x{t}"] = rows
                rows.retain_grad()
            spk, mem = net.lif1(net.pool(net.conv1(rows)), mem)
            side.output(f"membrane {t}", mem)
            loss = loss + weighted(spk, mem)
        if how != "changed":
            train(side, nn.ModuleList([net.conv1]), loss, **leaves)

    assert_same(program)


def test_static_image_that_learns_from_some_step_on() -> None:
    def program(side: Side) -> None:
        net, image, loss = Net(side), torch.rand(3, 2, 12, 12), torch.zeros(())
        mem = net.lif1.reset_mem()
        for t in range(5):
            image.requires_grad_(t > 1)
            spk, mem = net.lif1(net.pool(net.conv1(image)), mem)
            loss = loss + weighted(spk, mem)
        train(side, nn.ModuleList([net.conv1]), loss, x=image)

    assert_same(program)


def test_static_image_whose_current_is_edited() -> None:
    """Copies must be independent of each other, and an edited current is pooled anew."""
    def program(side: Side) -> None:
        net, image, loss = Net(side), torch.rand(3, 2, 12, 12), torch.zeros(())
        for _ in range(2):
            mem = net.lif1.reset_mem()
            for t in range(5):
                current = net.conv1(image)
                with torch.no_grad():
                    current[:, :, t] += 0.3
                pooled = net.pool(current)
                with torch.no_grad():
                    pooled[:, t % 3] -= 0.1
                spk, mem = net.lif1(pooled, mem)
                side.output(f"{t}: {_}", mem)
                loss = loss + weighted(spk, mem)
        train(side, nn.ModuleList([net.conv1]), loss)

    assert_same(program)


# ---------------------------------------------------------------------------------------------------- patterns


@DTYPES
@pytest.mark.parametrize("together", [True, False])
def test_two_streams_through_one_module(dtype: torch.dtype, together: bool) -> None:
    """Their sequences share a convolution and its pooling, but can be differentiated apart."""
    def program(side: Side) -> None:
        net = Net(side)
        for _ in range(2):
            train_two_streams(net, frames(), frames(), together)
        side.collect(net)

    with precision(dtype):
        assert_same(program, synapses=True)


def test_streams_one_after_the_other_without_backward_between() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        losses = [net(frames()) for _ in range(3)]
        for loss in losses:
            loss.backward()
        side.collect(net)

    assert_same(program, synapses=True)


@pytest.mark.parametrize("pool", ["max", "none"])
def test_weights_shared_between_layers(pool: str) -> None:
    def program(side: Side) -> None:
        conv, pooled = nn.Conv2d(4, 4, 3, padding=1), POOLS[pool]
        lifs = [snn.Leaky(0.7, threshold=0.3, spike_grad=side.surrogate(surrogate.atan())) for _ in range(3)]
        for batch in range(2):
            mems, loss = [lif.reset_mem() for lif in lifs], torch.zeros(())
            for _ in range(5):
                h = (torch.rand(2, 4, 12, 12) < 0.3).float()
                for i, lif in enumerate(lifs):
                    h, mems[i] = lif(pooled(conv(h)), mems[i])
                loss = loss + weighted(h, *mems)
            conv.zero_grad()
            train(side, conv, loss, f"{batch}: ")

    assert_same(program)


def test_feedback_from_the_second_layer_to_the_first() -> None:
    def program(side: Side) -> None:
        forth, back = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        lif1, lif2 = (snn.Leaky(0.7, threshold=0.2, spike_grad=side.surrogate(surrogate.atan())) for _ in range(2))
        for batch in range(2):
            mem1, mem2, fed, loss = lif1.reset_mem(), lif2.reset_mem(), torch.zeros(2, 2, 8, 8), torch.zeros(())
            for x in (torch.rand(5, 2, 2, 8, 8) < 0.3).float():
                spk1, mem1 = lif1(F.max_pool2d(forth(x + fed), 1), mem1)
                fed, mem2 = lif2(back(spk1), mem2)
                loss = loss + weighted(fed, mem2)
            forth.zero_grad()
            back.zero_grad()
            train(side, nn.ModuleList([forth, back]), loss, f"{batch}: ")

    assert_same(program)


def test_one_current_for_two_neurons_and_the_loss() -> None:
    def program(side: Side) -> None:
        net, lif = Net(side), snn.Leaky(0.5, threshold=0.3, spike_grad=side.surrogate(surrogate.atan()))
        for batch in range(2):
            (mem1, _, _), mem, loss = net.start(), lif.reset_mem(), torch.zeros(())
            for x in frames():
                current = net.conv1(x)
                pooled = net.pool(current)
                spk1, mem1 = net.lif1(pooled, mem1)
                spk, mem = lif(current, mem)
                loss = loss + weighted(spk1, mem1, spk, pooled) + weighted(F.max_pool2d(current, 3))
            net.zero_grad()
            train(side, nn.ModuleList([net.conv1]), loss, f"{batch}: ")

    assert_same(program)


def test_truncated_backpropagation_with_optimizer_steps() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        optimizer, mems = torch.optim.Adam(net.parameters(), 0.01), net.start()
        for chunk in range(3):
            train(side, net, net(frames(4), mems), f"{chunk}: ")
            optimizer.step()
            optimizer.zero_grad()
            mems = [m.detach() for m in mems]

    assert_same(program, synapses=True, bitwise=False)


@pytest.mark.parametrize("where", ["current", "pooled", "spikes"])
def test_gradients_that_somebody_looks_at(where: str) -> None:
    def program(side: Side) -> None:
        net = Net(side)
        for batch in range(2):
            (mem1, mem2, _), loss, seen = net.start(), torch.zeros(()), []
            for t, x in enumerate(frames()):
                current = net.conv1(x)
                pooled = net.pool(current)
                spk1, mem1 = net.lif1(pooled, mem1)
                spk2, mem2 = net.lif2(net.pool(net.conv2(spk1)), mem2)
                watched = {"current": current, "pooled": pooled, "spikes": spk1}[where]
                watched.retain_grad() if t % 2 else watched.register_hook(lambda g: g * 0.5)
                seen.append(watched)
                loss = loss + weighted(spk2, mem2)
            net.zero_grad()
            train(side, net, loss, f"{batch}: ")
            for t in (1, 3, 5):
                side.gradient(f"{batch}: {where} at {t}", seen[t].grad)

    assert_same(program)


# ---------------------------------------------------------------------------------------------------- graphs


def test_retained_graph_gives_the_same_again_and_a_second_backward_fails_else() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        net(frames()).backward()
        loss = net(frames())
        net.zero_grad()
        loss.backward(retain_graph=True)
        side.collect(net, prefix="once ")
        loss.backward()
        side.collect(net, prefix="twice ")
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    assert_same(program, synapses=True)


def test_weights_changed_in_place_before_backward_are_refused() -> None:
    net = Net()
    with sparse.enabled("snntorch"):
        net(frames()).backward()
        loss = net(frames())
        with torch.no_grad():
            net.conv2.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_input_changed_in_place_before_backward_is_refused() -> None:
    net, x = Net(), torch.rand(4, 3, 2, 12, 12)
    with sparse.enabled("snntorch"):
        net(x).backward()
        images = list(x.clone().unbind(0))
        loss = net(images)
        images[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.skipif(devices.cuda_kernels(), reason="there the places are torch's own")
def test_memory_kept() -> None:
    """Per site of a pooled current stock keeps eight bytes of its place and four floats; we keep one byte."""
    net, x = Net(threshold=2.0), frames(20, 8)
    host = memory.host_saved_bytes(lambda: net(x), exclude=[x])
    with sparse.enabled("snntorch", cutoff=0.05):
        net(x).backward()
        with memory.layer_outputs() as made:
            loss = net(x)
        kept = memory.saved_by_kind([loss, *made], exclude=[x])
    pooled = 20 * 8 * (6 * 6 * 6 + 8 * 2 * 2)
    assert kept["PoolTape.steps.places"] == pooled, kept
    assert sum(kept.values()) < host / 8, (kept, host)


# ---------------------------------------------------------------------------------------------------- the host's code


@pytest.mark.parametrize("kind", ["padding mode", "one image", "subclass", "transposed", "half", "empty"])
def test_what_is_not_supported_runs_the_hosts_code(kind: str) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    def program(side: Side) -> None:
        make = {"padding mode": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
                "subclass": lambda: Doubled(2, 4, 3), "transposed": lambda: nn.ConvTranspose2d(2, 4, 3)}
        conv = make.get(kind, lambda: nn.Conv2d(2, 4, 3))()
        lif = snn.Leaky(0.7, threshold=0.2, spike_grad=side.surrogate(surrogate.atan()))
        shape = {"one image": (2, 8, 8), "empty": (0, 2, 8, 8)}.get(kind, (3, 2, 8, 8))
        for batch in range(2):
            mem, loss = lif.reset_mem(), torch.zeros(())
            for x in (torch.rand(4, *shape) < 0.4).float():
                if kind == "half":
                    current = conv.to(torch.bfloat16)(x.bfloat16()).float()
                else:
                    current = conv(x)
                spk, mem = lif(current, mem)
                loss = loss + weighted(spk, mem)
            conv.zero_grad()
            train(side, conv, loss, f"{batch}: ")

    side = assert_same(program, fused=None)
    assert not side.counts["conv_steps"], side.counts


def test_functions_are_the_hosts_again_and_others_are_untouched() -> None:
    before = nn.Conv2d.forward, F.max_pool2d, F.avg_pool2d
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    with sparse.enabled("snntorch"):
        sparse.reset_counts()
        assert nn.Conv2d.forward is not before[0]
        F.max_pool2d(nn.Conv2d(3, 2, 3)(x), 2).sum().backward()
        assert not sparse.counts
        with pytest.raises(RuntimeError, match="smaller than|greater than|too small"):
            F.max_pool2d(x, 9)
        scripted = torch.jit.script(nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2)))
        assert scripted(x).shape == (2, 3, 2, 2)
    assert (nn.Conv2d.forward, F.max_pool2d, F.avg_pool2d) == before
