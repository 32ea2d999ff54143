"""Autograd's modes, edits in place, wrong arguments."""
from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from node_cases import BATCH, FLOAT, INPUTS, NEURONS, STEPS, Constant, Scaling, assert_same, grad, leaf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from toy_cell import ToyCell, loss_of, node, unroll

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
