"""One test per way of calling snnTorch: each gives what stock snnTorch gives, in float32 and in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch as snn
import torch
from oracle import BATCH, STEPS, Net, Side, assert_same, frames, precision, train, train_two_streams, weighted
from snntorch import surrogate, utils
from torch import Tensor, nn


@pytest.fixture(autouse=True, params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    with precision(request.param):
        yield request.param


# ---------------------------------------------------------------------------------------------------- states


def test_state_passed() -> None:
    def program(side: Side) -> None:
        net, x = Net(side), frames().requires_grad_()
        train(side, net, net(x), x=x)

    assert_same(program, synapses=True)
    assert_same(program, synapses=True, cutoff=0.3)


def test_state_kept_in_the_module_and_reset_midway() -> None:
    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        net.start()
        for t, x in enumerate(frames()):
            if t == 3:
                net.lif1.reset_mem()
            loss = loss + weighted(*net.step(x))
        assert net.lif1.mem is net._modules["lif1"]._buffers["mem"]
        train(side, net, loss)

    assert_same(program, synapses=True)


def test_init_hidden_in_sequential_with_utils_reset() -> None:
    def program(side: Side) -> None:
        options: dict[str, Any] = {"beta": 0.8, "init_hidden": True, "spike_grad": side.surrogate(surrogate.atan())}
        net = nn.Sequential(nn.Linear(12, 20), snn.Leaky(**options), nn.Linear(20, 5),
                            snn.Leaky(**options, output=True))
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for batch in range(3):
            utils.reset(net)
            loss = sum(weighted(*net(3 * x)) for x in frames())
            optimizer.zero_grad()
            train(side, net, loss, f"{batch}: ")
            optimizer.step()

    assert_same(program, synapses=True, bitwise=False)  # weights differ by rounding after a step


@pytest.mark.parametrize("how", ["out of place", "in place", "class-wide"])
def test_truncated_backpropagation_with_optimizer_steps(how: str) -> None:
    def program(side: Side) -> None:
        net = Net(side)
        optimizer, mems = torch.optim.Adam(net.parameters(), 0.01), net.start()
        for chunk in range(3):
            train(side, net, net(frames(4), mems), f"{chunk}: ")
            optimizer.step()
            optimizer.zero_grad()
            if how == "out of place":
                mems = [m.detach() for m in mems]
            elif how == "in place":
                snn.Leaky.detach(*mems)
            else:
                snn.Leaky.detach_hidden()

    assert_same(program, synapses=True, bitwise=False)


def test_detach_in_place_before_backward() -> None:
    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        mems = net.start()
        for t, x in enumerate(frames()):
            loss = loss + weighted(*net.step(x, mems))
            if t == 2:
                mems[0].detach_()
        train(side, net, loss)

    assert_same(program)


EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "clone": torch.clone,
    "detached": torch.detach,
    "masked": lambda m: m.masked_fill(m > 0.5, 0.1),
    "scaled": lambda m: m * 0.5,
    "in place": lambda m: m.mul_(0.5),
    "columns in place": lambda m: m[:, ::2].zero_() is None or m,
    "half new": lambda m: torch.cat([m[:2], torch.ones_like(m[2:])]),
    "transposed twice": lambda m: m.t().contiguous().t(),
    "wrong shape": lambda m: torch.ones(3),
}


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("edit", EDITS)
def test_state_edited_between_steps(edit: str, reset: str) -> None:
    def program(side: Side) -> None:
        net, loss = Net(side, reset_mechanism=reset), torch.zeros(())
        mems = net.start()
        for t, x in enumerate(frames()):
            loss = loss + weighted(*net.step(x, mems))
            if t in (1, 2, 4):
                mems[0] = EDITS[edit](mems[0])
        train(side, net, loss)

    assert_same(program, bitwise=edit != "transposed twice")  # stock keeps these strides, and so sums in another order


def test_initial_state_shared_and_learned() -> None:
    def program(side: Side) -> None:
        net, mem0 = Net(side), torch.rand(20).requires_grad_()
        mems = [mem0.expand(BATCH, 20), torch.full((BATCH, 5), 0.3)]
        train(side, net, net(frames(), mems), mem0=mem0)

    assert_same(program)


# ---------------------------------------------------------------------------------------------------- loops


def test_skipped_steps() -> None:
    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        mem1, mem2 = net.start()
        for t, x in enumerate(frames(8)):
            spk1, mem1 = net.lif1(net.fc1(x), mem1)
            if t % 3 == 1:
                spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
                loss = loss + weighted(spk2, mem2)
        train(side, net, loss)

    assert_same(program, synapses=True)


@pytest.mark.parametrize("together", [True, False])
def test_two_streams_through_one_module(together: bool) -> None:
    def program(side: Side) -> None:
        net = Net(side)
        train_two_streams(net, frames(), frames(), together)
        side.collect(net)

    assert_same(program, synapses=True)


def test_one_leaky_after_two_linears() -> None:
    def program(side: Side) -> None:  # as in tutorial_regression_1
        fc1, fc2 = nn.Linear(12, 20), nn.Linear(20, 1)
        lif = snn.Leaky(beta=0.7, learn_beta=True, threshold=0.3, spike_grad=side.surrogate(surrogate.atan()))
        mem1 = mem2 = lif.init_leaky()
        loss = torch.zeros(())
        for x in frames():
            spk1, mem1 = lif(3 * fc1(x), mem1)
            _, mem2 = lif(fc2(spk1), mem2)
            loss = loss + weighted(mem2)
        train(side, nn.ModuleList([fc1, fc2, lif]), loss)

    assert_same(program, synapses=True)


def test_layer_by_layer() -> None:
    def program(side: Side) -> None:
        net, x = Net(side), frames()
        mem1, mem2 = net.start()
        hidden, out = [], []
        for current in net.fc1(x):
            spk, mem1 = net.lif1(current, mem1)
            hidden.append(spk)
        for spk in hidden:
            spk2, mem2 = net.lif2(net.fc2(spk), mem2)
            out += [spk2, mem2]
        train(side, net, weighted(torch.stack(out)))

    assert_same(program, synapses=True)


@pytest.mark.parametrize("what", ["spikes", "membrane"])
def test_feedback_of_the_second_layer_to_the_first(what: str) -> None:
    def program(side: Side) -> None:
        net, back, loss = Net(side), nn.Linear(5, 20), torch.zeros(())
        mem1, mem2 = net.start()
        fed = torch.zeros(BATCH, 5)
        for x in frames():
            spk1, mem1 = net.lif1(net.fc1(x) + back(fed), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            fed = spk2 if what == "spikes" else mem2
            loss = loss + weighted(spk2, mem2)
        train(side, nn.ModuleList([net, back]), loss)

    assert_same(program, synapses=True)


def test_recurrence_onto_itself() -> None:
    def program(side: Side) -> None:
        net, back, loss = Net(side), nn.Linear(20, 20), torch.zeros(())
        spk, mem = torch.zeros(BATCH, 20), net.lif1.reset_mem()
        for x in frames():
            spk, mem = net.lif1(net.fc1(x) + back(spk), mem)
            loss = loss + weighted(spk)
        train(side, nn.ModuleList([net, back]), loss)

    assert_same(program)


@pytest.mark.parametrize("share", ["module", "parameter"])
def test_shared_weights(share: str) -> None:
    def program(side: Side) -> None:
        net, loss = Net(side), torch.zeros(())
        first, second, third = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        if share == "module":
            third = second
        else:
            third.weight = second.weight
        lif3 = snn.Leaky(beta=0.5, spike_grad=side.surrogate(surrogate.atan()))
        mem1, mem2, mem3 = net.lif1.reset_mem(), net.lif2.reset_mem(), lif3.reset_mem()
        for x in frames():
            spk1, mem1 = net.lif1(4 * first(x), mem1)
            spk2, mem2 = net.lif2(second(spk1), mem2)
            spk3, mem3 = lif3(third(spk2), mem3)
            loss = loss + weighted(spk3, mem3)
        train(side, nn.ModuleList([net, first, second, third]), loss)

    assert_same(program, synapses=True)


# ---------------------------------------------------------------------------------------------------- spikes

MASK = torch.arange(20) % 3 > 0
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda s: s.mul_(MASK),
    "filled in place": lambda s: s[:, :4].fill_(1.0) is None or s,
    "masked": lambda s: s * MASK,
    "scaled": lambda s: s * 0.5,
    "viewed": lambda s: s.view(BATCH, 2, 10).flatten(1),
    "unsqueezed": lambda s: s.unsqueeze(1).reshape(BATCH, 1, 20).squeeze(1),
    "flipped": lambda s: s.flip(1),
    "rows swapped": lambda s: s[torch.tensor([1, 0, 3, 2])],
    "other rows": lambda s: s.view(-1, BATCH).t().reshape(BATCH, 20),
    "cloned": torch.clone,
    "detached": torch.detach,
    "dropout": nn.Dropout(0.4),
    "normalised": lambda s: nn.functional.batch_norm(s, None, None, training=True),
    "pooled": lambda s: nn.functional.max_pool1d(s.unsqueeze(1), 2).repeat(1, 2, 1).flatten(1),
}


@pytest.mark.parametrize("use", USES)
def test_spikes_between_layers(use: str) -> None:
    def program(side: Side) -> None:
        net = Net(side)
        train(side, net, net(frames(), between=USES[use]))

    assert_same(program, cutoff=0.4)


def test_convolutional_spikes_flattened_and_batch_norm_module() -> None:
    def program(side: Side) -> None:
        conv, norm, fc = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3 * 4 * 4, 5)
        lif = snn.Leaky(beta=torch.rand(3, 1, 1), learn_beta=True, spike_grad=side.surrogate(surrogate.atan()))
        out, loss = snn.Leaky(beta=0.5), torch.zeros(())
        mem, mem_out = lif.reset_mem(), out.reset_mem()
        for _ in range(STEPS):
            spk, mem = lif(norm(conv(torch.rand(BATCH, 1, 6, 6))), mem)
            _, mem_out = out(fc(spk.flatten(1)), mem_out)
            loss = loss + weighted(mem_out)
        net = nn.ModuleList([conv, norm, fc, lif])
        side.output("running mean", norm.running_mean)
        train(side, net, loss)

    assert_same(program, synapses=True)
    assert_same(program, synapses=True, cutoff=0.2)


def test_spike_rate_regulariser() -> None:
    def program(side: Side) -> None:
        net, rates = Net(side), []

        def note(spk: Tensor) -> Tensor:
            rates.append(spk)
            return spk

        loss = net(frames(), between=note) + 3 * (torch.stack(rates).mean((0, 1)) - 0.1).pow(2).sum()
        train(side, net, loss)

    assert_same(program, synapses=True, cutoff=0.5)
