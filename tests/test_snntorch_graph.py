"""What autograd must still do with snnTorch models: graphs, hooks, requests for gradients, errors, as stock does."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import snntorch as snn
import torch
from oracle import BATCH, Net, Side, assert_same, differences, frames, precision, run, train, weighted
from snntorch import surrogate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@pytest.fixture(autouse=True, params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    with precision(request.param):
        yield request.param


# ---------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_live_graphs(order: tuple[int, int]) -> None:
    def program(side: Side) -> None:
        net = Net(side)
        losses = [net(frames()), net(frames())]
        for i in order:
            train(side, net, losses[i], f"after {i}: ")

    assert_same(program, synapses=True)


def test_no_grad_between_and_inside_sequences() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        for epoch in range(2):
            net.train()
            net.zero_grad()
            mems = net.start()
            loss = net(frames(3), mems)
            with torch.no_grad():
                side.output(f"{epoch} inside", net(frames(2), mems))
            loss = loss + net(frames(3), mems)
            train(side, net, loss, f"{epoch}: ")
            net.eval()
            with torch.no_grad():
                side.output(f"{epoch} eval", net(frames()))
            with torch.inference_mode():
                side.output(f"{epoch} inference", net(frames()))

    assert_same(program, synapses=True, fused=None)


def test_retain_graph() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        loss = net(frames())
        for i in range(3):
            loss.backward(retain_graph=i < 2)
            side.collect(net, prefix=f"{i}: ")
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()

    assert_same(program, synapses=True)


@pytest.mark.parametrize("names", [("fc1.weight",), ("fc2.weight",), ("fc2.bias", "lif1.beta"), ("x",), ("spk",),
                                   ("lif2.beta", "spk", "x", "fc1.bias"), ("current",), ("current", "fc1.weight")])
def test_autograd_grad_with_some_inputs(names: tuple[str, ...]) -> None:
    def program(side: Side) -> None:
        net, x, loss = Net(side), frames().requires_grad_(), torch.zeros(())
        mem1, mem2 = net.start()
        for t, frame in enumerate(x):
            current = net.fc1(frame)
            spk1, mem1 = net.lif1(current, mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            loss = loss + weighted(spk2, mem2)
            if t == 3:
                known = {"x": x, "spk": spk1, "current": current, **dict(net.named_parameters())}
        for name, grad in zip(names, torch.autograd.grad(loss, [known[n] for n in names]), strict=True):
            side.gradient(name, grad)
        assert all(p.grad is None for p in net.parameters())

    assert_same(program, synapses=True)


def test_accumulation_over_sequences() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        for i in range(3):
            train(side, net, net(frames()), f"{i}: ")

    assert_same(program, synapses=True)


# ---------------------------------------------------------------------------------------------------- hooks


def unrolled(net: Net, xs: Tensor, see: Callable[[str, Tensor], Any]) -> Tensor:
    """The loop of ``net``, which shows every tensor to ``see`` as soon as it exists."""
    loss = torch.zeros(())
    mem1, mem2 = net.start()
    for t, x in enumerate(xs):
        values: dict[str, Tensor] = {}
        values["current1"] = net.fc1(x)
        see(f"current1 {t}", values["current1"])
        spk1, mem1 = net.lif1(values["current1"], mem1)
        see(f"spk1 {t}", spk1)
        see(f"mem1 {t}", mem1)
        current2 = net.fc2(spk1)
        see(f"current2 {t}", current2)
        spk2, mem2 = net.lif2(current2, mem2)
        see(f"spk2 {t}", spk2)
        loss = loss + weighted(spk2, mem2)
    return loss + weighted(mem1)


SEEN = ["spk1 0", "spk1 3", "current1 0", "current1 2", "current2 1", "current2 4", "spk2 2", "spk1", "current", ""]


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("how", ["register_hook", "changing hook", "retain_grad", "removed hook"])
def test_who_looks_at_spikes_and_currents(seen: str, how: str) -> None:
    def program(side: Side) -> None:
        net, kept = Net(side), {}

        def see(name: str, tensor: Tensor) -> None:
            if not name.startswith(seen) or "mem" in name:
                return
            if how == "retain_grad":
                tensor.retain_grad()
                kept[name] = tensor
            elif how == "register_hook":
                tensor.register_hook(partial(side.gradient, name))
            elif how == "changing hook":
                tensor.register_hook(lambda grad: 0.5 * grad)
            else:
                tensor.register_hook(lambda grad: 0 * grad).remove()

        train(side, net, unrolled(net, frames(), see))
        side.collect(**kept)
        if how in ("register_hook", "retain_grad"):
            assert any(name.startswith(seen or "spk1") for name in side.gradients)

    assert_same(program, synapses=True)
    assert_same(program, synapses=True, cutoff=0.3)


def test_hook_on_spikes_without_a_gradient() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        mem, spikes = net.lif1.reset_mem(), []
        for x in frames():
            spk, mem = net.lif1(net.fc1(x), mem)
            spk.register_hook(lambda grad: 0.5 * grad)
            spikes.append(spk)
        train(side, net, weighted(spikes[2]))

    assert_same(program, synapses=True)


def test_hooks_on_weights() -> None:
    def program(side: Side) -> None:
        net, seen = Net(side), []
        net.fc1.weight.register_hook(lambda grad: 2 * grad)
        net.fc2.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        net.lif1.beta.register_hook(lambda grad: seen.append(grad))
        train(side, net, net(frames()))
        side.gradient("sum of what the hooks saw", sum(g.sum() for g in seen))

    assert_same(program, synapses=True)


@pytest.mark.parametrize("where", ["fc1", "fc2", "lif1", "lif2"])
@pytest.mark.parametrize("kind", ["forward", "forward pre", "full backward", "full backward pre"])
def test_module_hooks(where: str, kind: str) -> None:
    def program(side: Side) -> None:
        net, calls = Net(side), []

        def forward(module: nn.Module, args: Any, output: Any = None) -> None:
            calls.append(args[0] if output is None else output)

        def backward(module: nn.Module, *grads: Any) -> None:
            for group in grads:
                for grad in group:
                    side.gradient(f"{len(side.gradients)}", grad)

        register = {"forward": net.get_submodule(where).register_forward_hook,
                    "forward pre": net.get_submodule(where).register_forward_pre_hook,
                    "full backward": net.get_submodule(where).register_full_backward_hook,
                    "full backward pre": net.get_submodule(where).register_full_backward_pre_hook}[kind]
        register(forward if "forward" in kind else backward)
        train(side, net, net(frames()))
        for i, call in enumerate(calls):
            side.output(f"hook {i}", call[0] if isinstance(call, tuple) else call)
        assert calls or len(side.gradients) > 6

    assert_same(program)


def test_global_module_hook() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        handle = nn.modules.module.register_module_full_backward_hook(
            lambda m, i, o: [side.gradient(str(len(side.gradients)), g) for g in (*i, *o)] and None)
        try:
            train(side, net, net(frames()))
        finally:
            handle.remove()

    assert_same(program)


# ---------------------------------------------------------------------------------------------------- membranes


@pytest.mark.parametrize("step", [0, 2, 5])
@pytest.mark.parametrize("how", ["early hook", "late hook", "retain_grad", "late retain_grad", "autograd.grad"])
@pytest.mark.parametrize("options", [{}, {"reset_delay": False}, {"reset_mechanism": "zero", "learn_threshold": True}],
                         ids=["subtract", "late reset", "zero"])
def test_gradient_at_an_intermediate_membrane(options: dict[str, Any], how: str, step: int) -> None:
    def program(side: Side) -> None:
        net, mems = Net(side, **options), {}

        def see(name: str, tensor: Tensor) -> None:
            if name == f"mem1 {step}":
                mems[name] = tensor
                if how == "early hook":
                    tensor.register_hook(partial(side.gradient, name))
                elif how == "retain_grad":
                    tensor.retain_grad()

        loss = unrolled(net, frames(), see)
        ((name, mem),) = mems.items()
        if how == "autograd.grad":
            return side.gradient(name, torch.autograd.grad(loss, mem)[0])
        if how == "late hook":
            mem.register_hook(partial(side.gradient, name))
        elif how == "late retain_grad":
            mem.retain_grad()
        train(side, net, loss)
        if "retain" in how:
            side.collect(**mems)

    assert_same(program, fuse_steps=False)
    stock = run(program, on=False)
    try:
        backend = run(program, on=True)
    except RuntimeError as error:
        assert "fuse_steps=False" in str(error), error
    else:
        assert not differences(stock, backend, tolerance=1e-5)


def test_one_node_per_step() -> None:
    def program(side: Side) -> None:
        net, x = Net(side), frames().requires_grad_()
        train(side, net, net(x), x=x)

    side = assert_same(program, fuse_steps=False, synapses=True)
    assert side.counts["neuron_nodes"] == side.counts["neuron_steps"] == 24  # a membrane and a spike node each


# ---------------------------------------------------------------------------------------------------- the rest of torch


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("what", ["steps", "sequence"])
def test_activation_checkpointing(what: str, reentrant: bool) -> None:
    def program(side: Side) -> None:
        net, x = Net(side), frames().requires_grad_()
        save = partial(checkpoint, use_reentrant=reentrant)
        if what == "sequence":
            return train(side, net, save(net, x), x=x)

        def step(frame: Tensor, *mems: Tensor) -> tuple[Tensor, ...]:
            spk1, mem1 = net.lif1(net.fc1(frame), mems[0])
            return net.lif2(net.fc2(spk1), mems[1]) + (mem1,)

        loss, mems = torch.zeros(()), (torch.zeros(BATCH, 20), torch.zeros(BATCH, 5))
        for frame in x:
            spk, mem2, mem1 = save(step, frame, *mems)
            mems, loss = (mem1, mem2), loss + weighted(spk, mem2)
        train(side, net, loss, x=x)

    assert_same(program, fused=None)


def test_copies_and_pickles() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        twin = copy.deepcopy(net)
        train(side, net, net(frames()))
        other = Net(side)
        assert other.load_state_dict(net.state_dict()).missing_keys == []
        assert sorted(net.state_dict()) == sorted(other.state_dict()) and "lif1.mem" not in net.state_dict()
        for i, copied in enumerate((twin, other)):
            train(side, copied, copied(frames()), f"copy {i}: ")
        spk, mem = net.lif1(net.fc1(frames()[0]), torch.zeros(BATCH, 20))
        buffer = io.BytesIO()
        torch.save({"spk": spk.detach(), "graph": spk}, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded["spk"], spk) and torch.equal(loaded["graph"], spk)
        again = pickle.loads(pickle.dumps(spk.detach().clone()))
        train(side, nn.ModuleList([net.fc2]), weighted(net.fc2(again)), "pickled: ")
        assert torch.equal(copy.deepcopy(mem.detach()), mem)

    assert_same(program, synapses=True)


@pytest.mark.parametrize("name", ["fc2.weight", "lif1.beta", "lif2.threshold"])
def test_weight_changed_before_backward(name: str) -> None:
    def program(side: Side) -> None:
        net = Net(side, learn_threshold=True)
        loss = net(frames())
        with torch.no_grad():
            net.get_parameter(name).add_(0.1)
        try:
            train(side, net, loss)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            side.outputs["loss"] = torch.ones(())

    assert_same(program)


def test_exceptions() -> None:
    def program(side: Side) -> None:
        net = Net(side)

        def fail(*args: Any) -> None:
            raise KeyError("planted")

        with pytest.raises(KeyError, match="planted"):
            net(frames(), between=fail)
        loss = net(frames(), between=lambda s: s.register_hook(fail) and s)
        with pytest.raises(KeyError, match="planted"):
            loss.backward()
        net.zero_grad()
        loss = net(frames())
        handle = net.fc1.weight.register_hook(fail)
        with pytest.raises(KeyError, match="planted"):
            loss.backward()
        handle.remove()
        net.zero_grad()
        train(side, net, net(frames()))

    assert_same(program, synapses=True)


def test_anomaly_mode() -> None:
    def program(side: Side) -> None:
        net = Net(side)
        with torch.autograd.set_detect_anomaly(True):
            train(side, net, net(frames()))

    assert_same(program, synapses=True)


@pytest.mark.filterwarnings("ignore::snn_sparse_backend.SparseFallbackWarning")
@pytest.mark.parametrize("mode", ["autocast", "offloading"])
def test_modes_in_which_the_host_runs(mode: str) -> None:
    def program(side: Side) -> None:
        net, where = Net(side), torch.get_default_device().type
        with torch.autocast(where, torch.bfloat16) if mode == "autocast" else torch.autograd.graph.save_on_cpu():
            loss = net(frames())
        train(side, net, loss)

    assert_same(program, fused=False)


def test_compiled_step(dtype: torch.dtype) -> None:
    if dtype is torch.float64:
        pytest.skip("dynamo does not know the float64 spikes of the oracle")

    def program(side: Side) -> None:
        net = nn.Sequential(nn.Linear(12, 20), snn.Leaky(beta=0.9, spike_grad=side.surrogate(surrogate.atan())))
        torch._dynamo.reset()
        step = torch.compile(lambda x, mem: net[1](net[0](x), mem), backend="eager", fullgraph=True)
        mem, loss = torch.zeros(BATCH, 20), torch.zeros(())
        for x in frames(3):
            spk, mem = step(x, mem)
            loss = loss + weighted(spk, mem)
        train(side, net, loss)

    assert_same(program, fused=False)
