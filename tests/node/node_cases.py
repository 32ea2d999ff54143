"""What the tests of the sequence node share."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from toy_cell import ToyCell

STEPS, BATCH, INPUTS, NEURONS = 5, 3, 4, 6
FLOAT = torch.float64


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
