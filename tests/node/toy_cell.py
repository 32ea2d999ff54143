"""A small leaky cell on the sequence node, beside its plain torch form: v' = decay v + x W^T and s = tanh(v').

The tape works in any dtype and only with torch operations, so that what fails in a test is the node.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from snn_sparse_backend.build import load_node

node = load_node()
Gradients = Sequence[Tensor | None]


class ToyTape:
    """What one node recorded. It holds no output of its node: that would be a cycle which nothing can free."""

    alive: weakref.WeakSet[ToyTape] = weakref.WeakSet()

    def __init__(self, weight: Tensor, decay: float) -> None:
        self.weight = weight
        self.decay = decay
        self.steps: list[tuple[Tensor, Tensor]] = []
        self.versions: list[tuple[Tensor, int]] = []
        self.handle = None
        self.given: list[Gradients] = []
        self.needs: list[tuple[bool, ...]] = []
        self.releases = 0
        self.error: BaseException | None = None
        self.keep(weight.detach())
        ToyTape.alive.add(self)

    def keep(self, tensor: Tensor) -> Tensor:
        self.versions.append((tensor, tensor._version))
        return tensor

    def record(self, x: Tensor, v: Tensor) -> None:
        self.steps.append((self.keep(x.detach()), self.keep(v.detach())))

    def release(self) -> None:
        self.releases += 1
        self.steps.clear()
        self.versions.clear()

    def __call__(self, grads: Gradients, needs: tuple[bool, ...]) -> list[Tensor | None]:
        assert not torch.is_grad_enabled()
        self.given.append(grads)
        self.needs.append(needs)
        if self.error is not None:
            raise self.error
        if any(tensor._version != version for tensor, version in self.versions):
            raise RuntimeError("a recorded tensor was modified by an inplace operation")
        with torch.autocast("cpu", enabled=False):
            return self.gradients(grads, needs)

    def gradients(self, grads: Gradients, needs: tuple[bool, ...]) -> list[Tensor | None]:
        weight = self.weight.detach()
        carried = torch.zeros_like(self.steps[-1][1])
        weight_grad = torch.zeros_like(weight)
        inputs: list[Tensor | None] = []
        for step, (x, v) in reversed(list(enumerate(self.steps))):
            of_s, of_v = grads[2 * step], grads[2 * step + 1]
            carried = carried * self.decay
            if of_v is not None:
                carried = carried + of_v
            if of_s is not None:
                carried = carried + of_s * (1 - v.tanh().square())
            weight_grad = weight_grad + carried.transpose(-1, -2) @ x
            inputs.append(carried @ weight if needs[2 + step] else None)
        first = [weight_grad if needs[0] else None, carried * self.decay if needs[1] else None]
        return first + inputs[::-1]


class ToyCell(nn.Module):
    """One node a sequence if `fused`, plain torch if not. `created` and `extended` count what the node did."""

    def __init__(
        self, inputs: int, neurons: int, *, slack: int = 0, fuse_steps: bool = True, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(neurons, inputs, dtype=dtype) * 0.6)
        self.decay = 0.8
        self.slack = slack
        self.fuse_steps = fuse_steps
        self.fused = True
        self.created = self.extended = 0

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fused:
            v = self.decay * v + x @ self.weight.T
            return v.tanh(), v
        with torch.no_grad():
            new = self.decay * v + x @ self.weight.T
            s = new.tanh()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, v, self.weight)):
            self.put_on_a_node(x, v, s, new)
        return s, new

    def put_on_a_node(self, x: Tensor, v: Tensor, s: Tensor, new: Tensor) -> None:
        tape = node.tape_of(v) if self.fuse_steps else None
        if (
            isinstance(tape, ToyTape)
            and tape.weight is self.weight
            and v.output_nr == tape.handle.num_outputs - 1
            and node.extend(tape.handle, [x], [s], [new])
        ):
            self.extended += 1
        else:
            tape = ToyTape(self.weight, self.decay)
            outputs, states = ([s], [new]) if self.fuse_steps else ([s, new], [])
            inputs = [self.weight, v, x]
            tape.handle = node.create(tape, inputs, outputs, states, name="ToyBackward", slack=self.slack)
            self.created += 1
        tape.record(x, new)


Between = Callable[[int, Tensor], Tensor]


def unroll(
    cell: ToyCell, xs: Iterable[Tensor], v: Tensor, between: Between = lambda step, v: v
) -> tuple[list[Tensor], list[Tensor]]:
    """The user's time loop: spikes and membrane states of every step. `between` changes the state on its way."""
    spikes, states = [], []
    for step, x in enumerate(xs):
        s, v = cell(x, between(step, v))
        spikes.append(s)
        states.append(v)
    return spikes, states


def loss_of(spikes: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
    """Weighs every spike differently, and uses the last state too."""
    return sum(((step + 1) * s).sin().sum() for step, s in enumerate(spikes)) + states[-1].square().sum()
