"""Who looks at the gradients of a node, and what is refused."""
from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from node_cases import INPUTS, NEURONS, STEPS, Scaling, assert_same, grad
from torch import Tensor
from toy_cell import ToyCell, loss_of, node, unroll

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
