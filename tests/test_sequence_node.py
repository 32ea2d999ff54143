"""What autograd must still do with a node that grows: every test compares with plain torch, or pins an error."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from toy_cell import ToyCell, ToyTape, loss_of, node, unroll

STEPS, BATCH, INPUTS, NEURONS = 5, 3, 4, 6
FLOAT = torch.float64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are tiny: on a busy machine more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cell(seed: None) -> ToyCell:
    return ToyCell(INPUTS, NEURONS)


@pytest.fixture
def x(seed: None) -> Tensor:
    return leaf(STEPS, BATCH, INPUTS)


@pytest.fixture
def v0(seed: None) -> Tensor:
    return leaf(BATCH, NEURONS)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=FLOAT, requires_grad=True)


def assert_same(program: Callable[[], object], *cells: ToyCell) -> None:
    """Runs the program with the fused cells and with plain torch; what it returns must agree."""
    outcomes = []
    for fused in (True, False):
        for cell in cells:
            cell.fused = fused
        outcomes.append(program())
    for cell in cells:
        cell.fused = True
    torch.testing.assert_close(*outcomes)


def grad(loss: Tensor, *wanted: Tensor, **options: object) -> list[Tensor]:
    return list(torch.autograd.grad(loss, wanted, **options))


class Constant:
    """A tape that returns what it was told and keeps what it was given."""

    def __init__(self, *results: Tensor | None) -> None:
        self.results = results
        self.given: list[tuple[Tensor | None, ...]] = []
        self.needs: list[tuple[bool, ...]] = []

    def __call__(self, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        self.given.append(grads)
        self.needs.append(needs)
        return self.results


class Scaling(Constant):
    """The tape of outputs = factor * w."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def __call__(self, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        super().__call__(grads, needs)
        return (sum((self.factor * g for g in grads if g is not None), torch.zeros(2)),)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_one_node_for_the_sequence(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    assert_same(lambda: grad(loss_of(*unroll(cell, x, v0)), cell.weight, x, v0), cell)
    assert (cell.created, cell.extended) == (1, STEPS - 1)


def test_gradcheck(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    assert torch.autograd.gradcheck(lambda x, v: loss_of(*unroll(cell, x, v)), (x, v0))
    assert cell.extended == (STEPS - 1) * cell.created


def test_outputs_are_consumed_before_the_node_grows(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        total, v = torch.zeros((), dtype=FLOAT), v0
        for step in range(STEPS):
            s, v = cell(x[step] * 2, v)
            total = total + (s.cos() * (step + 1)).sum()
        return grad(total, cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 1


def test_stacked_layers_have_one_node_each(x: Tensor, v0: Tensor) -> None:
    first, second = ToyCell(INPUTS, NEURONS), ToyCell(NEURONS, NEURONS)

    def program() -> list[Tensor]:
        v = w = v0
        total = torch.zeros((), dtype=FLOAT)
        for step in range(STEPS):
            s, v = first(x[step], v)
            s, w = second(s * 1.5, w)
            total = total + (s * (step + 1)).sum()
        return grad(total, first.weight, second.weight, x, v0)

    assert_same(program, first, second)
    assert (first.created, second.created) == (1, 1)


def test_outputs_that_nobody_uses_give_none(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    assert_same(lambda: grad(unroll(cell, x, v0)[0][2].sum(), cell.weight, x, v0), cell)
    spikes, _ = unroll(cell, x, v0)
    tape = node.tape_of(spikes[0])
    spikes[2].sum().backward()
    assert [g is None for g in tape.given[0]] == [output != 4 for output in range(2 * STEPS)]


def test_tape_runs_when_no_gradient_arrives() -> None:
    # Fused neighbours hand gradients over beside the engine; the engine still has to call them in order.
    w = torch.ones(2, requires_grad=True)
    current, spikes = torch.ones(2), torch.ones(2)
    below = Constant(torch.full((2,), 3.0))
    node.create(below, [w], [current])
    node.create(Constant(None), [current], [spikes])
    assert grad(spikes.sum(), w, retain_graph=True)[0].tolist() == [3, 3]
    spikes.sum().backward()
    assert below.given == [(None,), (None,)] and below.needs == [(True,), (True,)]
    assert w.grad.tolist() == [3, 3]


def test_absent_inputs_keep_their_index() -> None:
    w = torch.ones(2, requires_grad=True)
    out, later = torch.ones(2), torch.ones(2)
    tape = Constant(None, None, torch.full((2,), 2.0), None, torch.full((2,), 5.0))
    handle = node.create(tape, [None, torch.ones(2), w], [out])
    assert node.extend(handle, [None, w], [later])
    (out + later).sum().backward()
    assert tape.needs == [(False, False, True, False, True)]
    assert w.grad.tolist() == [7, 7]


def test_mixed_inputs(x: Tensor, v0: Tensor) -> None:
    cell = ToyCell(INPUTS, NEURONS, slack=8)  # the first input is a constant, the next lies deeper

    def program() -> list[Tensor]:
        xs = [row if step % 2 else row.detach() for step, row in enumerate(x)]
        return grad(loss_of(*unroll(cell, xs, v0)), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 1


def test_gradient_is_cast_to_the_input_dtype() -> None:
    w, out = torch.ones(2, requires_grad=True), torch.ones(2)
    node.create(Constant(torch.ones(2, dtype=torch.float64)), [w], [out])
    out.sum().backward()
    assert w.grad.dtype == torch.float32


def test_the_node_as_python_sees_it(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    grad_fn = spikes[0].grad_fn
    assert grad_fn is states[-1].grad_fn and grad_fn.name() == "ToyBackward"
    assert len(grad_fn.next_functions) == 2 + STEPS and grad_fn.next_functions[0][0].variable is cell.weight
    handle = node.handle_of(spikes[3])
    assert (handle.num_inputs, handle.num_outputs) == (2 + STEPS, 2 * STEPS)
    assert handle.open and handle.alive and handle.topological_nr > 0
    assert handle.tape is node.tape_of(spikes[3]) is node.tape_of(states[0])
    assert [t.output_nr for t in (spikes[0], states[0], spikes[1], states[1])] == [0, 1, 2, 3]


def test_tensors_of_other_origin_have_no_tape(x: Tensor) -> None:
    for tensor in (x, x.detach(), x * 2, x[0], torch.ones(2, dtype=torch.int32)):
        assert node.tape_of(tensor) is None and node.handle_of(tensor) is None


# ---- some inputs only ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["weight", "state", "all steps", "one step", "last step"])
def test_only_the_wanted_inputs_are_needed(which: str, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    xs = [row.detach().requires_grad_() for row in x]
    wanted, positions = {
        "weight": ([cell.weight], [0]),
        "state": ([v0], [1]),
        "all steps": (xs, list(range(2, 2 + STEPS))),
        "one step": ([xs[2]], [4]),
        "last step": ([xs[-1]], [1 + STEPS]),
    }[which]
    assert_same(lambda: grad(loss_of(*unroll(cell, xs, v0)), *wanted), cell)
    outputs = unroll(cell, xs, v0)
    tape = node.tape_of(outputs[0][0])
    grad(loss_of(*outputs), *wanted)
    assert [position for position, needed in enumerate(tape.needs[0]) if needed] == positions


def test_leaf_below_a_late_edge_is_not_pruned(v0: Tensor) -> None:
    # The engine prunes by topological_nr: an edge that came late and deep must still be found.
    cell, deep = ToyCell(INPUTS, NEURONS, slack=1000), leaf(BATCH, INPUTS)

    def program() -> list[Tensor]:
        late = deep
        for _ in range(7):
            late = late.sin()
        return grad(loss_of(*unroll(cell, [torch.ones_like(deep), torch.ones_like(deep), late], v0.detach())), deep)

    assert_same(program, cell)
    assert cell.created == 1


def test_backward_inputs_fills_only_those(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    loss_of(*unroll(cell, x, v0)).backward(inputs=[cell.weight])
    assert cell.weight.grad is not None and x.grad is None and v0.grad is None


# ---- several backward passes -----------------------------------------------------------------------------------------


def test_retain_graph_and_then_the_error_of_a_freed_graph(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    loss = torch.stack(unroll(cell, x, v0)[0]).sum()  # whose own nodes save nothing
    first = grad(loss, cell.weight, x, retain_graph=True)
    torch.testing.assert_close(first, grad(loss, cell.weight, x))
    with pytest.raises(RuntimeError, match=r"backward through the graph a second time.*ToyBackward.*retain_graph=True"):
        loss.backward()


def test_backward_midway_retained(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        spikes, states = unroll(cell, x[:3], v0)
        early = loss_of(spikes, states)
        gradients = grad(early, cell.weight, retain_graph=True)
        return gradients + grad(early + loss_of(*unroll(cell, x[3:], states[-1])), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 1


def test_backward_midway_freed(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        spikes, states = unroll(cell, x[:3], v0)
        gradients = grad(loss_of(spikes, states), cell.weight, x)
        return gradients + grad(loss_of(*unroll(cell, x[3:], states[-1].detach())), cell.weight, x)

    assert_same(program, cell)
    spikes, states = unroll(cell, x[:3], v0)
    loss_of(spikes, states).backward()
    assert node.tape_of(states[-1]) is None and not node.handle_of(states[-1]).open
    later, _ = unroll(cell, x[3:], states[-1])
    with pytest.raises(RuntimeError, match="second time"):
        later[-1].sum().backward()


def test_create_graph_gives_right_gradients(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        found = grad(loss_of(*unroll(cell, x, v0)), cell.weight, x, v0, create_graph=True)
        assert all(gradient.requires_grad for gradient in found)
        return [gradient.detach() for gradient in found]

    assert_same(program, cell)


def test_second_order_is_refused(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    # `above` reaches the gradients only through what comes in: the error must not be pruned away there either.
    above = leaf()
    loss = above * loss_of(*unroll(cell, x, v0))
    gradients = grad(loss, cell.weight, x, create_graph=True)
    for wanted in (cell.weight, x, v0, above):
        with pytest.raises(RuntimeError, match="ToyBackward does not support double backward"):
            grad(gradients[0].square().sum() + above.square(), wanted, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="ToyBackward does not support double backward"):
        (gradients[1].sum() + cell.weight.square().sum()).backward()


def test_second_order_is_refused_where_only_the_tape_knows(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    # What comes in is constant here; the gradients depend on the inputs by what was recorded.
    for wanted in (cell.weight, x, v0):
        gradients = grad(torch.stack(unroll(cell, x, v0)[0]).sum(), cell.weight, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad(gradients[0].sum(), wanted, allow_unused=True)


def test_gradgradcheck_sees_the_error(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.gradgradcheck(lambda x: loss_of(*unroll(cell, x, v0)), (x,))


# ---- hooks and requests on outputs -----------------------------------------------------------------------------------


def test_hook_on_a_spike_changes_the_gradient(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        spikes, states = unroll(cell, x, v0)
        spikes[1].register_hook(lambda g: g * 3)
        return grad(loss_of(spikes, states), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 1


def test_retain_grad_and_autograd_grad_on_spikes(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        x.grad = None
        spikes, states = unroll(cell, x, v0)
        spikes[1].retain_grad()
        loss = loss_of(spikes, states)
        found = grad(loss, spikes[0], spikes[-1], cell.weight, retain_graph=True)
        loss.backward(inputs=[spikes[2], x], retain_graph=True)
        loss.backward()
        return found + [spikes[1].grad, spikes[2].grad, x.grad]

    assert_same(program, cell)


REFUSAL = (
    r"ToyBackward: .* output \d+, a membrane state or what is computed from it\. "
    r"The gradient at this state is carried inside the fused node.*`enable\(\.\.\., fuse_steps=False\)`"
)


def ask_for_the_gradient(how: str, loss: Tensor, tensor: Tensor) -> None:
    if how == "hook":
        tensor.register_hook(lambda g: g * 2)
        loss.backward()
    elif how == "retain_grad":
        tensor.retain_grad()
        loss.backward()
    elif how == "autograd.grad":
        torch.autograd.grad(loss, tensor)
    else:
        loss.backward(inputs=[tensor])


@pytest.mark.parametrize("step", [1, STEPS - 1])
@pytest.mark.parametrize("how", ["hook", "retain_grad", "autograd.grad", "inputs="])
def test_request_on_a_state_is_refused(how: str, step: int, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    with pytest.raises(RuntimeError, match=REFUSAL) as error:
        ask_for_the_gradient(how, loss_of(spikes, states) + states[step].sum(), states[step])
    assert f"output {2 * step + 1}," in str(error.value)


@pytest.mark.parametrize("how", ["hook", "retain_grad", "autograd.grad", "inputs="])
def test_request_on_a_state_that_nothing_outside_uses(how: str, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    with pytest.raises(RuntimeError, match=REFUSAL):
        ask_for_the_gradient(how, spikes[-1].sum(), states[1])


def test_after_a_refusal_the_graph_still_works(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    hook = states[1].register_hook(lambda g: g * 2)
    loss = loss_of(spikes, states)
    with pytest.raises(RuntimeError, match=REFUSAL):
        loss.backward(retain_graph=True)
    hook.remove()
    found = grad(loss, cell.weight)
    cell.fused = False
    torch.testing.assert_close(found, grad(loss_of(*unroll(cell, x, v0)), cell.weight))


@pytest.mark.parametrize("how", ["hook", "retain_grad", "autograd.grad", "inputs="])
def test_states_passed_as_outputs_are_not_guarded(how: str, x: Tensor, v0: Tensor) -> None:
    cell = ToyCell(INPUTS, NEURONS, fuse_steps=False)
    spikes, states = unroll(cell, x, v0)
    ask_for_the_gradient(how, loss_of(spikes, states), states[1])
    assert cell.created == STEPS
    # with ordinary edges between the steps, the gradient of a state that only the next step uses is complete
    assert_same(lambda: grad(unroll(cell, x, v0)[1][-1].square().sum(), cell.weight, x, v0), cell)


def test_weight_hooks_fire_once_a_sequence(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    fired = []
    cell.weight.register_hook(lambda g: fired.append("hook"))
    cell.weight.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    loss_of(*unroll(cell, x, v0)).backward()
    assert fired == ["hook", "accumulated"]


def test_hooks_on_the_node(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, _ = unroll(cell, x, v0)
    seen = []
    spikes[0].grad_fn.register_prehook(lambda grads: tuple(None if g is None else 2 * g for g in grads))
    spikes[0].grad_fn.register_hook(lambda grads_in, grads_out: seen.append((len(grads_in), len(grads_out))))
    found = grad(spikes[2].sum(), cell.weight)
    assert seen == [(2 + STEPS, 2 * STEPS)]
    torch.testing.assert_close(found, grad(2 * unroll(cell, x, v0)[0][2].sum(), cell.weight))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_full_backward_hook_of_the_module(register: str, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    # It wraps what the module returns, so a state no longer comes from our node: one node a step, and exact.
    calls = []

    def program() -> list[Tensor]:
        hook = getattr(cell, register)(lambda module, *grads: calls.append(len(grads)))
        try:
            return grad(loss_of(*unroll(cell, x, v0)), cell.weight, x, v0)
        finally:
            hook.remove()

    assert_same(program, cell)
    assert cell.created == STEPS and len(calls) == 2 * STEPS


def test_forward_hook_keeps_one_node(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    calls = []
    cell.register_forward_hook(lambda module, args, outputs: calls.append(1))
    assert_same(lambda: grad(loss_of(*unroll(cell, x, v0)), cell.weight), cell)
    assert cell.created == 1 and len(calls) == 2 * STEPS


# ---- has_requests: may a gradient bypass the engine? -----------------------------------------------------------------


def test_has_requests_sees_every_kind_of_hook() -> None:
    out = torch.ones(2)
    handle = node.create(Scaling(), [torch.ones(2, requires_grad=True)], [torch.ones(2)], [out])
    assert not node.has_requests(handle)  # the guard of the state is our own
    for register in (out.register_hook, out.grad_fn.register_prehook, out.grad_fn.register_hook):
        hook = register(lambda *grads: None)
        assert node.has_requests(handle)
        hook.remove()
        assert not node.has_requests(handle)
    out.retain_grad()
    assert node.has_requests(handle)
    del out, register, hook
    assert not handle.alive and node.has_requests(handle)


class Synapse:
    """current = w * x at every step; takes gradients from the engine and those that the neuron hands over."""

    def __init__(self, xs: Tensor) -> None:
        self.xs = xs
        self.handed: dict[int, Tensor] = {}

    def __call__(self, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]) -> list[Tensor]:
        arrived = list(zip(self.xs, grads, strict=True)) + [(self.xs[step], g) for step, g in self.handed.items()]
        self.handed = {}
        return [sum((x * g for x, g in arrived if g is not None), torch.zeros(2))]


class Neuron:
    """spike = 3 * current; hands gradients to the synapse unless somebody looks at them."""

    def __init__(self, synapse: Synapse, below: object) -> None:
        self.synapse = synapse
        self.below = below
        self.asked: list[bool] = []

    def __call__(self, grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
        self.asked.append(node.has_requests(self.below))
        currents = [3 * g for g in grads]
        if self.asked[-1]:
            return currents
        self.synapse.handed = dict(enumerate(currents))
        return [None] * len(grads)


# what somebody does with the current of step 2: what the neuron is told, in each backward pass
REQUESTS = {
    "nothing": [False],
    "register_hook": [True],
    "retain_grad": [True],
    "register_prehook": [True],
    "register_posthook": [True],
    "grad of the weight": [False],
    "grad of the current": [True, False],
    "inputs=": [True],
    "create_graph": [True],
}


@pytest.mark.parametrize("how", REQUESTS)
def test_gradients_bypass_the_engine_only_unseen(how: str) -> None:
    xs = torch.randn(STEPS, 2)

    def program(fused: bool) -> list[Tensor]:
        w = torch.ones(2, requires_grad=True)
        seen: list[Tensor] = []
        if fused:
            synapse = Synapse(xs)
            currents = [w.detach() * x for x in xs]
            below = node.create(synapse, [w], currents)
            neuron = Neuron(synapse, below)
            spikes = [3 * current.detach() for current in currents]
            node.create(neuron, currents, spikes)
        else:
            currents = [w * x for x in xs]
            spikes = [3 * current for current in currents]
        loss, watched = torch.stack(spikes).square().sum(), currents[2]
        number = watched.output_nr

        if how == "register_hook":
            watched.register_hook(lambda g: 2 * g)
        elif how == "register_prehook":
            watched.grad_fn.register_prehook(lambda grads: seen.append(grads[number]))
        elif how == "register_posthook":
            watched.grad_fn.register_hook(lambda grads_in, grads_out: seen.append(grads_out[number]))
        elif how == "grad of the current":
            seen += grad(loss, watched, retain_graph=True)
        elif how == "retain_grad":
            watched.retain_grad()

        if how == "create_graph":
            w.grad = grad(loss, w, create_graph=True)[0].detach()
            assert not (fused and node.has_requests(below))  # only while it ran
        elif how == "grad of the weight":
            w.grad = grad(loss, w)[0]
        else:
            loss.backward(inputs=[watched, w] if how == "inputs=" else None)
        if fused:
            assert neuron.asked == REQUESTS[how]
        if how in ("retain_grad", "inputs="):
            seen += [watched.grad]
        return [w.grad, *seen]

    torch.testing.assert_close(program(True), program(False))


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_anomaly_mode_names_the_node_and_the_forward_line(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    with torch.no_grad():
        cell.weight[0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(RuntimeError, match="ToyBackward.*nan"):
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly():
            torch.stack(unroll(cell, x, v0)[0]).sum().backward()
    assert any("toy_cell.py" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("open_before", [True, False])
def test_checkpoint(reentrant: bool, open_before: bool, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def segment(part: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        spikes, states = unroll(cell, part, v)
        return torch.stack(spikes).sin(), states[-1]  # sin saves a tensor, which makes the recomputation necessary

    def program() -> list[Tensor]:
        total, v = torch.zeros((), dtype=FLOAT), v0
        for tensor in (cell.weight, x, v0):
            tensor.grad = None
        if open_before:
            s, v = cell(x[0], v)
            total = s.sum()
        for part in (x[1:3], x[3:]):
            s, v = checkpoint(segment, part, v, use_reentrant=reentrant) if cell.fused else segment(part, v)
            total = total + s.square().sum()
        (total + v.sum()).backward()
        return [cell.weight.grad, x.grad, v0.grad]

    assert_same(program, cell)


def test_a_node_does_not_grow_during_backward(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x[:3], v0)
    handle = node.handle_of(states[-1])
    before = handle.num_inputs, handle.num_outputs
    found = []

    def step_in_backward(_: Tensor) -> None:
        assert node.task_id() >= 0 and not handle.open and node.tape_of(states[-1]) is None
        assert not node.extend(handle, [], [torch.ones(2, dtype=FLOAT)])
        with torch.enable_grad():
            s, v = cell(x[3], states[-1])
            assert node.tape_of(v) is not None
            s, v = cell(x[4], v)
            found.extend(grad(s.sum(), cell.weight, x, retain_graph=True))

    loss = loss_of(spikes, states)
    loss.register_hook(step_in_backward)
    assert node.task_id() == -1
    loss.backward(retain_graph=True)
    assert node.task_id() == -1 and handle.open
    assert (handle.num_inputs, handle.num_outputs) == before and cell.created == 2 and cell.extended == 3
    cell.fused = False
    torch.testing.assert_close(found, grad(unroll(cell, x, v0)[0][-1].sum(), cell.weight, x))


def test_no_grad_in_the_middle(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        s1, v = cell(x[0], v0)
        with torch.no_grad():
            s2, v = cell(x[1], v)
        assert not (s2.requires_grad or v.requires_grad)
        s3, v = cell(x[2], v)
        return grad(s1.sum() + s3.square().sum(), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 2


def test_inference_mode(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    with torch.inference_mode():
        s, v = cell(x[0], v0)
        assert s.is_inference() and cell.created == 0
        with pytest.raises(RuntimeError, match="inference"):
            node.create(Constant(None), [cell.weight], [torch.ones(2)])
    assert_same(lambda: grad(loss_of(*unroll(cell, x.detach(), v.clone())), cell.weight), cell)


def test_frozen_cell_makes_no_node(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    cell.weight.requires_grad_(False)
    spikes, _ = unroll(cell, x.detach(), v0.detach())
    assert cell.created == 0 and not spikes[-1].requires_grad


def test_detach_in_place(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        s1, v = cell(x[0], v0)
        s2, v = cell(x[1], v)
        s1.detach_()
        v.detach_()
        s3, v = cell(x[2], v)
        return grad((s1 * s2).sum() + s3.square().sum(), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 2


def test_autocast_around_backward(x: Tensor) -> None:
    cell = ToyCell(INPUTS, NEURONS, dtype=torch.float32)
    x, v0 = x.detach().float().requires_grad_(), torch.zeros(BATCH, NEURONS)

    def program() -> list[Tensor]:
        loss = loss_of(*unroll(cell, x, v0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cell.fused):
            return grad(loss, cell.weight, x)

    assert_same(program, cell)


def test_saved_tensor_hooks_do_not_see_the_tape(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        spikes, _ = unroll(cell, x.unbind(), v0)
    assert packed == []
    spikes[-1].sum().backward()
    assert cell.weight.grad.abs().sum() > 0


# ---- edits in place, views, state paths ------------------------------------------------------------------------------


def test_edit_of_outputs_in_place(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        spikes, states = unroll(cell, x, v0)
        spikes = [s if cell.fused else s.clone() for s in spikes]
        spikes[1].mul_(3)
        spikes[2].view(-1)[1:4].add_(1).mul_(2)
        spikes[3][0] = 0
        return grad(loss_of(spikes, states), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 1


@pytest.mark.parametrize("what", ["state", "weight"])
def test_edit_of_recorded_data_is_found(what: str, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    loss = loss_of(spikes, states)
    with torch.no_grad():
        (states[1] if what == "state" else cell.weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def reset_first_row(v: Tensor) -> Tensor:
    v = v.clone()
    v[0] = 0
    return v


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * 0.5,
        lambda v: v.clone(),
        lambda v: v.detach(),
        lambda v: torch.where(v > 0, 0.0, v),
        lambda v: v.view(-1).view_as(v),
        reset_first_row,
    ],
)
def test_changed_state_begins_a_new_node(
    change: Callable[[Tensor], Tensor], cell: ToyCell, x: Tensor, v0: Tensor
) -> None:
    def program() -> list[Tensor]:
        return grad(loss_of(*unroll(cell, x, v0, lambda step, v: change(v) if step == 2 else v)), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 2


def test_branches_from_one_state(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> list[Tensor]:
        s1, v = cell(x[0], v0)
        left, _ = cell(x[1], v)
        right, _ = cell(x[2], v)
        return grad((left * right).sum() + s1.sum(), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == 2


def test_feedback_into_the_same_layer(v0: Tensor) -> None:
    cell, start = ToyCell(NEURONS, NEURONS), leaf(BATCH, NEURONS)

    def program() -> list[Tensor]:
        s, v, total = start, v0, torch.zeros((), dtype=FLOAT)
        for step in range(4):
            s, v = cell(s if step % 2 else s * 0.9, v)
            total = total + (step + 1) * s.sum()
        return grad(total, cell.weight, start, v0)

    assert_same(program, cell)
    assert cell.created == 4


def test_feedback_through_another_layer(x: Tensor, v0: Tensor) -> None:
    # Plenty of slack must not let a cycle in.
    forth, back = ToyCell(INPUTS, NEURONS, slack=1 << 20), ToyCell(NEURONS, INPUTS, slack=1 << 20)

    def program() -> list[Tensor]:
        v, w = v0, torch.zeros(BATCH, INPUTS, dtype=FLOAT)
        fed, total = torch.zeros(BATCH, INPUTS, dtype=FLOAT), torch.zeros((), dtype=FLOAT)
        for step in range(STEPS):
            s, v = forth(x[step] + fed, v)
            fed, w = back(s, w)
            total = total + fed.square().sum()
        return grad(total, forth.weight, back.weight, x, v0)

    assert_same(program, forth, back)
    assert forth.created > 1


@pytest.mark.parametrize(("slack", "nodes"), [(0, 3), (1 << 20, 1)])
def test_slack_lets_deeper_inputs_join(slack: int, nodes: int, x: Tensor, v0: Tensor) -> None:
    cell = ToyCell(INPUTS, NEURONS, slack=slack)

    def program() -> list[Tensor]:
        xs = [x[0], x[1].sin(), x[2].sin().cos().tanh()]
        return grad(loss_of(*unroll(cell, xs, v0)), cell.weight, x, v0)

    assert_same(program, cell)
    assert cell.created == nodes


# ---- moving an output to another node --------------------------------------------------------------------------------


def two_currents() -> tuple[Tensor, Scaling, Tensor, Tensor]:
    w = torch.ones(2, requires_grad=True)
    first, second = torch.full((2,), 3.0), torch.full((2,), 3.0)
    tape = Scaling(3)
    node.create(tape, [w], [first, second])
    return w, tape, first, second


def test_moved_output_goes_through_the_new_node() -> None:
    w, old, first, second = two_currents()
    new = Scaling(3)
    handle = node.create(new, [w], [second], repoint=True)
    assert node.tape_of(second) is new and node.tape_of(first) is old
    assert (second.output_nr, handle.num_outputs, node.handle_of(first).num_outputs) == (0, 1, 2)
    (2 * first + 5 * second).sum().backward()
    assert old.given[0][0].tolist() == [2, 2] and old.given[0][1] is None
    assert new.given[0][0].tolist() == [5, 5]
    assert w.grad.tolist() == [21, 21]


def test_consumer_from_before_the_move_keeps_the_old_node() -> None:
    w, old, _, second = two_currents()
    before = 2 * second
    new = Scaling(3)
    node.create(new, [w], [second], repoint=True)
    (before + 5 * second).sum().backward()
    assert old.given[0][0] is None and old.given[0][1].tolist() == [2, 2]
    assert new.given[0][0].tolist() == [5, 5]
    assert w.grad.tolist() == [21, 21]


def test_moved_output_can_be_a_state_and_the_new_node_grows() -> None:
    w, _, _, second = two_currents()
    third = torch.full((2,), 3.0)
    new = Scaling(3)
    handle = node.create(new, [w], [], [second], repoint=True)
    assert node.extend(handle, [], [third])
    with pytest.raises(RuntimeError, match="membrane state"):
        torch.autograd.grad(second.sum() + third.sum(), second, retain_graph=True)
    (second + third).sum().backward()
    assert w.grad.tolist() == [6, 6]


def test_moved_output_of_an_ordinary_operation() -> None:
    w = torch.ones(2, requires_grad=True)
    current = w * 3
    node.create(Scaling(3), [w], [current], repoint=True, name="Moved")
    assert current.grad_fn.name() == "Moved"
    current.sum().backward()
    assert w.grad.tolist() == [3, 3]


def test_a_tensor_with_hooks_does_not_move() -> None:
    for observe in (lambda t: t.register_hook(lambda g: g), lambda t: t.retain_grad()):
        w, old, first, second = two_currents()
        observe(second)
        with pytest.raises(RuntimeError, match="cannot move to another node"):
            node.create(Scaling(3), [w], [second], repoint=True)
        assert node.tape_of(second) is old and second.output_nr == 1
        node.create(Scaling(3), [w], [first], repoint=True)  # its neighbour may
        (first + second).sum().backward()
        assert w.grad.tolist() == [6, 6]


def test_hooks_after_the_move_see_the_gradient() -> None:
    w, _, _, second = two_currents()
    second.register_hook(lambda g: g * 100).remove()
    node.create(Scaling(3), [w], [second], repoint=True)
    seen: list[Tensor] = []
    second.register_hook(seen.append)
    second.retain_grad()
    (5 * second).sum().backward()
    assert seen[0].tolist() == second.grad.tolist() == [5, 5]
    assert w.grad.tolist() == [15, 15]


# ---- wrong arguments, wrong answers ----------------------------------------------------------------------------------

BASE = torch.ones(4)
BAD_OUTPUTS = {
    "must not be a view": lambda: BASE[:2],
    "must be floating point": lambda: torch.ones(2, dtype=torch.int64),
    "has a history already": lambda: torch.ones(2, requires_grad=True) * 1,
    "expected a tensor, got int": lambda: 3,
}


@pytest.mark.parametrize("message", BAD_OUTPUTS)
@pytest.mark.parametrize("role", ["outputs", "states"])
def test_a_bad_output_changes_nothing(message: str, role: str) -> None:
    w, good, fine = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2)
    handle = node.create(Constant(None), [w], [good])
    arguments = {"outputs": [fine], "states": []}
    arguments[role] = arguments[role] + [BAD_OUTPUTS[message]()]
    with pytest.raises((RuntimeError, TypeError), match=message):
        node.extend(handle, [w], **arguments)
    with pytest.raises((RuntimeError, TypeError), match=message):
        node.create(Constant(None), [w], **arguments)
    assert (handle.num_inputs, handle.num_outputs) == (1, 1) and not fine.requires_grad


def test_an_input_that_is_too_deep_changes_nothing() -> None:
    w, fine = torch.ones(2, requires_grad=True), torch.ones(2)
    handle = node.create(Constant(None), [w], [torch.ones(2)], [kept := torch.ones(2)])
    for deep in (w.sin().cos(), kept, kept * 2):
        assert node.extend(handle, [w, deep], [fine]) is False
        assert (handle.num_inputs, handle.num_outputs) == (1, 2) and not fine.requires_grad
    assert node.extend(handle, [w], [fine]) is True


def test_a_leaf_and_a_view_cannot_be_moved() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf that requires grad"):
        node.create(Scaling(), [w], [torch.ones(2, requires_grad=True)], repoint=True)
    with pytest.raises(RuntimeError, match="must not be a view"):
        node.create(Scaling(), [w], [(w * 1).view(2, 1)], repoint=True)


def test_a_detached_slice_is_a_good_output() -> None:
    buffer, w = torch.zeros(3, 2), torch.ones(2, requires_grad=True)
    part = buffer[1].detach()
    node.create(Scaling(), [w], [part])
    buffer[2] = 1
    assert part.grad_fn.name() == "SequenceBackward"
    part.sum().backward()
    assert w.grad.tolist() == [1, 1]


def test_tensor_subclasses_are_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    with FakeTensorMode():
        fake = torch.ones(2)
    for inputs, outputs in (([w], [fake]), ([fake], [torch.ones(2)])):
        with pytest.raises(NotImplementedError, match="tensor subclasses"):
            node.create(Constant(None), inputs, outputs)


def test_wrong_types() -> None:
    w, out, good = torch.ones(2, requires_grad=True), torch.ones(2), torch.ones(2)
    handle = node.create(Constant(None), [w], [good])
    for call in (
        lambda: node.create(3, [w], [out]),
        lambda: node.create(Constant(None), w.item, [out]),
        lambda: node.create(Constant(None), [w, "w"], [out]),
        lambda: node.create(Constant(None), [w], [out], [], "name"),
        lambda: node.extend(None, [w], [out]),
        lambda: node.extend(handle, [w], [None]),
        lambda: node.tape_of(3),
        lambda: node.handle_of(None),
        lambda: node.has_requests(out),
        lambda: type(handle)(),
    ):
        with pytest.raises(TypeError):
            call()
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([torch.ones(2)], "returned 1 gradients for 2 inputs"),
        ([torch.ones(5), None], "invalid gradient at index 0"),
        ([3.0, None], "gradient 0 is a float, not a tensor"),
        (7, "must return a sequence"),
    ],
)
def test_bad_answers_of_a_tape(answer: object, message: str) -> None:
    w, out = torch.ones(2, requires_grad=True), torch.ones(2)
    node.create(lambda grads, needs: answer, [w, w], [out])
    with pytest.raises((RuntimeError, TypeError), match=message):
        out.sum().backward()


@pytest.mark.parametrize(
    "error", [ValueError("v"), KeyError("k"), KeyboardInterrupt("c"), type("Odd", (Exception,), {})()]
)
def test_exceptions_keep_type_and_traceback(error: BaseException, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    tape = node.tape_of(spikes[0])
    tape.error = error
    loss = loss_of(spikes, states)
    with pytest.raises(type(error)) as caught:
        loss.backward(retain_graph=True)
    assert caught.value is error and any(entry.name == "__call__" for entry in caught.traceback)
    tape.error = None  # nothing was freed: the same graph works once the cause is gone
    cell.weight.grad = None
    loss.backward()
    assert cell.weight.grad.isfinite().all()


# ---- torch.func and forward mode -------------------------------------------------------------------------------------


def test_torch_func_is_refused_clearly(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    x, v0 = x[0].detach(), v0.detach()

    def summed(weight: Tensor) -> Tensor:
        return torch.func.functional_call(cell, {"weight": weight}, (x, v0))[0].sum()

    for call in (
        lambda: torch.func.grad(summed)(cell.weight.detach()),
        lambda: torch.func.vmap(lambda row: cell(row, v0[0])[0])(x),
        lambda: torch.func.jacrev(lambda x: cell(x, v0)[0])(x),
    ):
        with pytest.raises(NotImplementedError, match="torch.func transforms"):
            call()
    with pytest.raises(NotImplementedError, match="torch.func transforms|forward-mode"):
        torch.func.jvp(lambda x: cell(x, v0)[0], (x,), (x,))


def test_forward_mode_is_refused_clearly(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        cell(torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0])), v0)


def test_batched_gradients_reach_the_tape(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    def program() -> Tensor:
        s, _ = cell(x[0], v0)
        directions = torch.eye(s.numel(), dtype=FLOAT).view(-1, *s.shape)
        return torch.autograd.grad(s, x, directions, is_grads_batched=True)[0]

    assert_same(program, cell)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_tapes_are_freed_by_reference_counting_alone(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    before = len(ToyTape.alive)
    outputs = unroll(cell, x, v0)
    assert len(ToyTape.alive) == before + 1
    del outputs  # a forward pass without backward
    assert len(ToyTape.alive) == before
    outputs = unroll(cell, x, v0)
    loss_of(*outputs).backward()
    assert len(ToyTape.alive) == before  # though the outputs are still here
    outputs = unroll(cell, x, v0)
    loss_of(*outputs).backward(retain_graph=True)
    assert len(ToyTape.alive) == before + 1
    del outputs
    assert len(ToyTape.alive) == before


def test_a_handle_is_weak(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    outputs = unroll(cell, x, v0)
    handle = node.handle_of(outputs[0][0])
    tape = weakref.ref(handle.tape)
    del outputs
    assert tape() is None and handle.tape is None and not handle.alive and not handle.open
    assert (handle.num_inputs, handle.num_outputs, handle.topological_nr) == (0, 0, 0)
    assert node.extend(handle, [cell.weight], [torch.ones(2)]) is False


def test_a_tape_that_holds_an_output_is_freed_by_backward_only() -> None:
    # Why tapes must not do so: Python's collector cannot see through the node.
    tape, out = Constant(None), torch.ones(2)
    node.create(tape, [torch.ones(2, requires_grad=True)], [out])
    tape.out = out
    alive = weakref.ref(tape)
    del tape, out
    gc.collect()
    assert alive() is not None
    alive().out.sum().backward()
    gc.collect()
    assert alive() is None


def test_release_is_called_when_the_graph_is_freed(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    tape = node.tape_of(spikes[0])  # somebody else holds the tape
    loss = loss_of(spikes, states)
    loss.backward(retain_graph=True)
    assert tape.releases == 0 and len(tape.steps) == STEPS
    loss.backward()
    assert tape.releases == 1 and tape.steps == []
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert tape.releases == 1


@pytest.mark.parametrize("hold_handle", [True, False])
def test_a_node_that_dies_unused_does_not_release(hold_handle: bool, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    outputs = unroll(cell, x, v0)
    tape = node.tape_of(outputs[0][0])
    if not hold_handle:
        tape.handle = None
    del outputs
    assert tape.releases == 0 and len(tape.steps) == STEPS


@pytest.mark.parametrize("error", [ValueError("in release"), AttributeError("in release")])
def test_errors_of_release_are_reported(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Scaling):
        def release(self) -> None:
            raise error

    reports: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reports.append((report.exc_value, report.object)))
    w, out = torch.ones(2, requires_grad=True), torch.ones(2)
    tape = Failing()
    node.create(tape, [w], [out])
    out.sum().backward()
    assert w.grad.tolist() == [1, 1] and reports == [(error, tape)]


@pytest.mark.usefixtures("no_collector")
def test_a_node_may_die_while_an_exception_travels() -> None:
    # list() drops what it has collected so far, nodes included, with the KeyError already set
    gone: list[str] = []

    def make(number: int) -> Tensor:
        if number == 3:
            raise KeyError("travelling")
        out, tape = torch.ones(2), Constant(None)
        weakref.finalize(tape, gone.append, number)
        node.create(tape, [torch.ones(2, requires_grad=True)], [out])
        return out

    with pytest.raises(KeyError, match="travelling"):
        list(map(make, range(5)))
    assert sorted(gone) == [0, 1, 2]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_stable() -> None:
    cell, x, v0 = ToyCell(64, 64), leaf(20, 8, 64), torch.zeros(8, 64, dtype=FLOAT)

    def train(times: int) -> None:
        for _ in range(times):
            loss_of(*unroll(cell, x, v0)).backward()
            unroll(cell, x, v0)

    train(40)
    before = resident_bytes()
    train(200)
    assert resident_bytes() - before < 8 << 20  # one leaked sequence of 400 would be 200 KB


@pytest.mark.parametrize("hold_handles", [True, False])
def test_a_long_chain_ends_without_stack_overflow(hold_handles: bool) -> None:
    out, tape, handles = torch.zeros(1, requires_grad=True), Constant(None), []
    for _ in range(100_000):
        previous, out = out, torch.zeros(1)
        handle = node.create(tape, [previous], [out])
        if hold_handles:
            handles.append(handle)
    alive = weakref.ref(tape)
    del previous, out, handle, tape
    assert alive() is None and not any(handle.alive for handle in handles)


def test_many_edges_on_one_node() -> None:
    steps = 20_000
    w, outs = torch.ones(1, requires_grad=True), [torch.zeros(1) for _ in range(steps)]
    handle = node.create(Constant(*[torch.ones(1)] * steps), [w], outs[:1])
    assert all(node.extend(handle, [w], [out]) for out in outs[1:])
    torch.stack(outs).sum().backward()
    assert w.grad.item() == steps


# ---- copies, threads, processes --------------------------------------------------------------------------------------


def test_copies_of_a_handle_are_none(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, _ = unroll(cell, x, v0)
    cell.handle = node.handle_of(spikes[0])
    assert copy.deepcopy(cell).handle is None and copy.copy(cell.handle) is None
    assert pickle.loads(pickle.dumps(cell.handle)) is None
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(spikes[0])


def run_in_threads(work: Callable[[], None], threads: int = 6) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            for _ in range(30):
                work()
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=guarded, daemon=True) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(60)
    assert not any(thread.is_alive() for thread in pool), "a thread hangs"
    assert errors == []


def test_threads_with_their_own_graphs(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    x, v0 = x.detach(), v0.detach()
    expected = grad(loss_of(*unroll(cell, x, v0)), cell.weight)
    run_in_threads(lambda: torch.testing.assert_close(grad(loss_of(*unroll(cell, x, v0)), cell.weight), expected))


def test_threads_on_one_retained_graph(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    loss = loss_of(*unroll(cell, x, v0))
    expected = grad(loss, cell.weight, x, retain_graph=True)
    run_in_threads(lambda: torch.testing.assert_close(grad(loss, cell.weight, x, retain_graph=True), expected))


@pytest.mark.usefixtures("no_collector")
def test_the_last_reference_dies_in_a_thread(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    before = len(ToyTape.alive)
    for _ in range(30):
        thread = threading.Thread(target=loss_of(*unroll(cell, x, v0)).backward, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    del thread
    assert len(ToyTape.alive) == before


def test_reentrant_backward_in_a_tape(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    w, out = torch.ones((), dtype=FLOAT, requires_grad=True), torch.ones((), dtype=FLOAT)
    tasks: list[int] = []

    def tape(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor]:
        tasks.append(node.task_id())
        with torch.enable_grad():
            inner = grad(loss_of(*unroll(cell, x, v0)), cell.weight)[0]
        tasks.append(node.task_id())
        return [grads[0] * inner.sum()]

    node.create(tape, [w], [out])
    out.backward()
    torch.testing.assert_close(w.grad, grad(loss_of(*unroll(cell, x, v0)), cell.weight)[0].sum())
    assert tasks[0] == tasks[1] >= 0


def test_a_forked_child_may_drop_a_node(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    outputs = unroll(cell, x, v0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of threads
        child = os.fork()
    if child == 0:
        del outputs
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    loss_of(*outputs).backward()
    assert cell.weight.grad.abs().sum() > 0


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


AT_EXIT = """
import sys, torch
from toy_cell import *
cell, x, v0 = ToyCell(4, 6), torch.randn(5, 3, 4, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
outputs = unroll(cell, x, v0)
if sys.argv[1] == "alive":
    sys.modules["kept until the very end"] = torch.kept = outputs
elif sys.argv[1] == "exit in the tape":
    node.tape_of(outputs[0][0]).error = SystemExit(0)
    loss_of(*outputs).backward()
    sys.exit("backward returned")
"""


def test_the_interpreter_exits_cleanly() -> None:
    children = [python(AT_EXIT, how) for how in ("alive", "exit in the tape")]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output


DDP = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy_cell import *

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = ToyCell(4, 6), ToyCell(6, 2)
        self.unused = nn.Parameter(torch.zeros(3))
    def forward(self, x):
        v, w, spikes = x.new_zeros(x.shape[1], 6), x.new_zeros(x.shape[1], 2), []
        for step in x:
            s, v = self.first(step, v)
            s, w = self.second(s, w)
            spikes.append(s)
        return torch.stack(spikes)

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(7)
batches = torch.randn(2, 5, 3, 4, dtype=torch.float64)
plain = Net()
plain.first.fused = plain.second.fused = False
sum(plain(batch).square().sum() / 2 for batch in batches).backward()
expected = [plain.first.weight.grad, plain.second.weight.grad]
for options in ({}, {"bucket_cap_mb": 1e-5}):
    net = DistributedDataParallel(Net(), find_unused_parameters=True, **options)
    cells = [net.module.first, net.module.second]
    for iteration in range(2):
        net.zero_grad()
        net(batches[rank]).square().sum().backward()
        torch.testing.assert_close([cell.weight.grad for cell in cells], expected)
        assert [cell.created for cell in cells] == [iteration + 1] * 2
    with net.no_sync():
        net(batches[rank]).square().sum().backward()
dist.destroy_process_group()
print("agreed")
"""


def test_distributed_data_parallel(tmp_path: Path) -> None:
    ranks = [python(DDP, str(rank), str(tmp_path / "store")) for rank in range(2)]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0 and "agreed" in output, output


# ---- ends and zeros for hooks ---------------------------------------------------------------------------------------
def doubling_tape(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Input i gets twice the gradient of output i."""
    return [None if g is None else 2 * g for g in grads]


def test_an_end_may_be_watched_until_a_step_follows() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    end = torch.zeros(3, dtype=torch.float64)
    handle = node.create(doubling_tape, [x], [], [], [end])
    seen: list[Tensor] = []
    end.register_hook(seen.append)
    end.sum().backward(retain_graph=True)
    assert len(seen) == 1 and torch.equal(x.grad, torch.full_like(x, 2))

    following = torch.zeros(3, dtype=torch.float64)
    assert node.extend(handle, [x], [], [], [following])
    with pytest.raises(RuntimeError, match="membrane state"):
        end.sum().backward(retain_graph=True)


def test_a_hook_on_an_output_without_a_gradient_sees_zeros_and_the_tape_none() -> None:
    given: list[Sequence[Tensor | None]] = []

    def tape(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        given.append(grads)
        return doubling_tape(grads, needs)

    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    used, unused = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    node.create(tape, [x, x], [used, unused])
    seen: list[Tensor] = []
    unused.register_hook(lambda grad: seen.append(0.5 * grad))
    used.sum().backward()
    assert torch.equal(seen[0], torch.zeros_like(x)) and given[0][1] is None
    assert torch.equal(x.grad, torch.full_like(x, 2))
