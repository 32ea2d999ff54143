"""What autograd, torch's modes and ``enable`` do with the swapped classes: the same as with Norse's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

import norse.torch as stock
from norse_oracle import (
    agree,
    assert_gradients,
    assert_identical,
    clean_slate,
    data,
    each_class,
    each_lif,
    fused,
    grads,
    layer_input,
    net,
    nodes,
    unroll,
    weighted,
)
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snn_sparse_backend as sparse


@pytest.fixture(autouse=True)
def slate() -> Iterator[None]:
    torch.manual_seed(0)
    with clean_slate():
        yield


# ------------------------------------------------------------------------------------------------ the graph


@pytest.mark.parametrize("steps", [3, 30])
def test_one_node_per_sequence_however_long(steps: int) -> None:
    """Norse's backward is quadratic in time for inputs that require grad: one ``x[t]`` each, with a full-size zero."""
    x = data(steps, 2, 7)
    z, state = swapped.LIF()(x)
    leaves = {"torch::autograd::AccumulateGrad": 2}  # the input and the default v
    assert nodes(z, state.v, state.i) == {"SparseLIFBackward": 1, **leaves}
    assert nodes(stock.LIF()(x)[0]).total() > 10 * steps
    outputs, states = unroll(swapped.LIFCell(), x)  # iterating over x makes the node that unbinds it
    assert nodes(*outputs, *states[-1]) == {"SparseLIFBackward": 1, "UnbindBackward0": 1, **leaves}
    outputs, states = unroll(swapped.LICell(), x)
    assert nodes(*outputs, states[-1].i)["SparseLIBackward"] == 1
    z2, _ = swapped.LIF()(x)
    y, _ = swapped.LI()(z2)
    assert nodes(y)["SparseLIBackward"] == nodes(y)["SparseLIFBackward"] == 1


@each_class
def test_retained_graphs_and_accumulation(name: str) -> None:
    def program(library: Any) -> Any:
        x, layer = layer_input(name), getattr(library, name)()
        y, state = layer(x)
        loss, other = weighted(y), weighted(state.v)
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward(retain_graph=True)
        other.backward()
        with pytest.raises(RuntimeError, match="second time"):
            other.backward()
        layer(x)[0].sum().backward()
        return (y, state), [once, x.grad]

    agree(program)


@each_class
def test_hooks_on_inputs_and_outputs_of_one_call(name: str) -> None:
    def program(library: Any) -> Any:
        seen: list[Tensor] = []
        x = layer_input(name)
        shifted = x * 1.0
        shifted.register_hook(seen.append)
        shifted.retain_grad()
        y, state = getattr(library, name)()(shifted)
        if not name.endswith("Cell"):  # of a cell, these are gradients in the middle of a loop
            y.register_hook(lambda grad: seen.append(grad) or 2 * grad)
            y.retain_grad()
        loss = weighted(y, *state)
        loss.backward(retain_graph=True)
        return (y, state), [*seen, shifted.grad, x.grad, *grads(loss, shifted, *([] if "Cell" in name else [y]))]

    agree(program)


@each_class
def test_hooks_on_the_last_states(name: str) -> None:
    """Nothing is carried inside the node behind them, so autograd sees their whole gradient."""

    def program(library: Any) -> Any:
        seen: dict[str, Tensor] = {}
        x = layer_input(name)
        y, state = getattr(library, name)()(x)
        for member in state._fields[1:] if name == "LI" else state._fields:
            getattr(state, member).register_hook(lambda grad, member=member: seen.update({member: grad}) or 2 * grad)
        weighted(y, *state).backward()
        return (y, state), [*(seen[member] for member in sorted(seen)), x.grad]

    agree(program)


def test_a_hook_on_the_last_membrane_of_an_integrator_is_refused() -> None:
    """It is part of the sequence of membranes, too, and that gradient stays inside the node."""
    y, state = swapped.LI()(layer_input("LI"))
    state.v.register_hook(lambda grad: 2 * grad)
    with pytest.raises(RuntimeError, match="fuse_steps=False"):
        weighted(y, *state).backward()


def gradient_at(kind: str, what: str, how: str, library: Any) -> Any:
    """The gradient at a spike or a state in the middle of a loop over cells."""
    seen: list[Tensor] = []
    x = data(4, 3, 7)
    cell = getattr(library, kind)()
    _, first = cell(x[0])
    output, state = cell(x[1], first)
    target = {"output": output, "v": state.v, "i": state.i}[what]
    outputs, states = unroll(cell, x[2:], state)
    loss = weighted(output, *outputs, states[-1].v)
    if how == "hook":
        target.register_hook(seen.append)
        loss.backward()
    elif how == "retain_grad":
        target.retain_grad()
        loss.backward()
        seen.append(target.grad)
    else:
        seen += torch.autograd.grad(loss, [target], retain_graph=True)
    return (outputs, states), [*seen, *grads(loss, x)] if how == "grad" else [*seen, x.grad]


@pytest.mark.parametrize("how", ["hook", "retain_grad", "grad"])
@pytest.mark.parametrize("what", ["output", "v", "i"])
@pytest.mark.parametrize("kind", ["LIFCell", "LICell"])
def test_gradients_in_the_middle_of_a_loop(kind: str, what: str, how: str) -> None:
    """They are carried inside the fused node, so they cannot be had without ``fuse_steps=False``: never wrong."""
    with pytest.raises(RuntimeError, match="fuse_steps=False"):
        gradient_at(kind, what, how, swapped)
    agree(lambda library: gradient_at(kind, what, how, library), fuse_steps=False)


@pytest.mark.parametrize("what", ["v", "i"])
@pytest.mark.parametrize("kind", ["LIFCell", "LICell"])
def test_a_hook_on_a_state_before_the_next_step_sees_its_gradient(kind: str, what: str) -> None:
    def program(library: Any) -> Any:
        seen: list[Tensor] = []
        x, cell = data(4, 3, 7), getattr(library, kind)()
        outputs, states = unroll(cell, x[:2])
        getattr(states[-1], what).register_hook(lambda grad: seen.append(grad) or 0.5 * grad)
        more, last = unroll(cell, x[2:], states[-1])
        weighted(*outputs, *more).backward()
        return (outputs, more, last), [*seen, x.grad]

    agree(program)


@each_class
def test_one_module_twice_in_one_graph_and_feedback(name: str) -> None:
    def program(library: Any) -> Any:
        layer, linear, x = getattr(library, name)(), nn.Linear(7, 7).double(), layer_input(name)
        a, first = layer(linear(x))
        b, second = layer(linear(a), first)
        c, third = layer(linear(a * b))
        return (a, b, c, first, second, third), grads(weighted(a, b, c, *second), x, *linear.parameters())

    agree(program)


@each_class
def test_double_backward_is_refused(name: str) -> None:
    x = layer_input(name)
    (grad,) = grads(getattr(swapped, name)()(x)[0].pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        grad.sum().backward()


@each_lif
@pytest.mark.parametrize("changed", ["tau_mem_inv", "v_leak", "v_th", "v_reset"])
def test_parameters_changed_before_backward(name: str, changed: str) -> None:
    """Gradients are those of the forward that ran, or autograd's error: never those of the new values."""
    def program(library: Any, change: bool) -> list[Tensor | None]:
        torch.manual_seed(1)
        values = {"tau_mem_inv": 100.0, "v_leak": 0.1, "v_th": 0.4, "v_reset": -0.1}
        p = {k: torch.full((7,), v, dtype=torch.float64, requires_grad=True) for k, v in values.items()}
        x, v = layer_input(name), torch.zeros(3, 7, dtype=torch.float64)
        z, state = getattr(library, name)(stock.LIFParameters(**p))(x, stock.LIFFeedForwardState(v, v))
        loss = weighted(z, *state)
        if change:
            with torch.no_grad():
                p[changed].mul_(3)
        return grads(loss, x, *p.values())

    try:
        found = program(swapped, True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_gradients(program(stock, False), found)


@each_class
def test_inputs_and_outputs_changed_in_place(name: str) -> None:
    def program(library: Any) -> Any:
        x = layer_input(name)
        current = x * 2
        y, state = getattr(library, name)()(current)
        current.mul_(0)
        kept = y.clone()
        if name != "LICell":
            y.mul_(3)
        return (kept, y, state), grads(weighted(y, *state), x)

    agree(program)


# ------------------------------------------------------------------------------------------------ modes of torch


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    def program(library: Any) -> Any:
        model, x = net(library), data(5, 3, 6)
        y = checkpoint(lambda x: model(x)[0], x, use_reentrant=reentrant)
        y2, state = model(x)
        return (y, y2, state), grads(weighted(y2), x, *model.parameters()) if reentrant else grads(
            weighted(y, y2), x, *model.parameters())

    agree(program)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_class
def test_without_gradients(name: str, mode: Any) -> None:
    def program(library: Any) -> Any:
        layer, x = getattr(library, name)(), layer_input(name)
        with mode():
            outputs = layer(x)
            assert outputs[0].is_inference() == (mode is torch.inference_mode)
        assert not outputs[0].requires_grad
        return outputs, []

    agree(program)
    assert sparse.counts["neuron_steps"] == 0


@each_class
@pytest.mark.filterwarnings("ignore::snn_sparse_backend.SparseFallbackWarning")
def test_tensors_made_in_inference_mode(name: str) -> None:
    def program(library: Any) -> Any:
        with torch.inference_mode():
            p = (library.LIFParameters if "LIF" in name else library.LIParameters)(tau_mem_inv=torch.tensor(90.0))
            x = layer_input(name, grad=False)
            state = getattr(library, name)(p)(x)[1]
        layer = getattr(library, name)
        return [layer(p)(torch.ones(x.shape)), layer()(x), layer()(torch.ones(x.shape), state)], []

    agree(program)


@pytest.mark.parametrize("given", [False, True])
@each_class
def test_compiled(name: str, given: bool) -> None:
    def program(library: Any) -> Any:
        torch._dynamo.reset()
        layer, x = getattr(library, name)(), layer_input(name)
        state = layer.initial_state(x) if given else None
        y, state = torch.compile(layer, backend="eager")(x, state)
        return (y, state.v.detach(), state.i.detach()), grads(weighted(y), x)

    agree(program)
    assert sparse.counts["neuron_steps"] == 0


@each_class
@pytest.mark.filterwarnings("ignore::snn_sparse_backend.SparseFallbackWarning")
def test_autocast(name: str) -> None:
    def program(library: Any) -> Any:
        model, x = nn.Linear(7, 7), layer_input(name, dtype=torch.float32)
        layer = getattr(library, name)()
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            y, state = layer(model(x))
        return (y, state), grads(weighted(y), *model.parameters())

    agree(program)


# ------------------------------------------------------------------------------------------------ enable


def test_enable_and_disable_norse() -> None:
    x, hosts = layer_input("LIF"), [getattr(stock, name) for name in swapped.__all__]
    layer, expected = stock.LIF(), stock.LIF()(x)
    before, own = nn.Linear.forward, [vars(host).get("forward") for host in hosts]
    sparse.enable("norse", cutoff=0.5)
    assert all("forward" in vars(host) for host in hosts) and nn.Linear.forward is not before
    z, _ = layer(x)
    assert fused() and z.grad_fn.name() == "SparseLIFBackward"
    assert_identical(expected, layer(x))
    sparse.disable("norse")
    assert [vars(host).get("forward") for host in hosts] == own and nn.Linear.forward is before
    sparse.reset_counts()
    assert_identical(expected, layer(x))
    assert not sparse.counts and stock.LIF.forward is stock.LIF.__mro__[1].forward


def test_enable_one_model() -> None:
    model, other, x = net(stock), net(stock), data(5, 3, 6)
    expected = model(x)[0]
    gradients = grads(expected.pow(2).sum(), x, *model.parameters())
    sparse.enable(model)
    other(x)
    assert sparse.counts["neuron_steps"] == 0
    for _ in range(2):
        y, _ = model(x)
        assert fused()
        assert_identical(expected, y)
        assert_gradients(gradients, grads(y.pow(2).sum(), x, *model.parameters()))
    sparse.disable(model)
    assert "forward" not in vars(stock.LIF)
    with pytest.raises(ValueError, match="not enabled"):
        sparse.disable(model)
    with pytest.raises(ValueError, match="no spiking layer"):
        sparse.enable(nn.Linear(2, 2))


def test_every_fallback_warns_once() -> None:
    class Mine(stock.LIF):
        pass

    sparse.enable("norse")
    coo = (torch.rand(3, 2, 7) < 0.5).float().to_sparse()
    for layer, x, reason in ((swapped.LIF(), coo, "COO"), (Mine(), data(3, 2, 7), "subclass of LIF")):
        with pytest.warns(sparse.SparseFallbackWarning, match=reason) as caught:
            layer(x)
            layer(x)
            type(layer)()(x)
        assert len(caught) == 1 and type(layer).__name__ in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sparse.SparseFallbackWarning)
        swapped.LIF()(data(3, 2, 7))
        with torch.no_grad():
            swapped.LIF()(coo)
        checkpoint(lambda x: swapped.LIF()(x)[0], data(3, 2, 7), use_reentrant=False)
