"""Fixtures of the tests of the sequence node."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from node_cases import BATCH, INPUTS, NEURONS, STEPS, leaf
from torch import Tensor
from toy_cell import ToyCell


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
