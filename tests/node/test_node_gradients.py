"""Gradients through a node that grows, compared with plain torch."""
from __future__ import annotations

import pytest
import torch
from node_cases import BATCH, FLOAT, INPUTS, NEURONS, STEPS, Constant, assert_same, grad, leaf
from torch import Tensor
from toy_cell import ToyCell, loss_of, node, unroll

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
