"""Memory for gradients is used again, but never while anybody still has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import snntorch as snn
import torch
from torch import nn

import snn_sparse_backend as sparse
from snn_sparse_backend import workspace

CPU, ROWS = torch.device("cpu"), 1 << 14


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    workspace.clear()
    yield
    workspace.clear()


def matrix(cols: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return workspace.take(ROWS, cols, dtype, CPU)


def test_what_nobody_has_is_used_again() -> None:
    first = matrix()
    address = first.data_ptr()
    assert matrix().data_ptr() != address  # it is still there
    del first
    assert matrix().data_ptr() == address


@pytest.mark.parametrize("hold", [lambda m: m[3:5], lambda m: m.detach(), lambda m: m.view(-1), lambda m: [m]])
def test_what_somebody_has_is_not(hold) -> None:  # type: ignore[no-untyped-def]
    first = matrix()
    held, address = hold(first), first.data_ptr()
    del first
    assert matrix().data_ptr() != address and held is not None


def test_only_what_fits() -> None:
    address = matrix().data_ptr()
    assert matrix(33).data_ptr() != address and matrix(15).data_ptr() != address
    assert matrix(32, torch.float64).data_ptr() != address
    assert workspace.take(4, 4, torch.float32, CPU).shape == (4, 4)


def test_gradients_that_were_handed_out_stay() -> None:
    lif, x = snn.Leaky(0.9, spike_grad=snn.surrogate.atan()), torch.rand(4, 512, 1024)

    def gradients(scale: float) -> list[torch.Tensor]:
        inputs, mem, loss = [(scale * x_t).requires_grad_() for x_t in x], lif.reset_mem(), torch.zeros(())
        with sparse.enabled("snntorch"):
            for x_t in inputs:
                spk, mem = lif(x_t, mem)
                loss = loss + (scale * spk).sum() + mem.sum()
            loss.backward()
        return [x_t.grad for x_t in inputs if x_t.grad is not None]

    first = gradients(1.0)
    copies = [g.clone() for g in first]
    gradients(3.0)
    assert len(first) == 4 and all(map(torch.equal, first, copies))


def test_dense_products_in_one_sequence_do_not_share() -> None:
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(300, 600), nn.Linear(600, 600), nn.Linear(600, 10)])
    neurons = [snn.Leaky(0.9, spike_grad=snn.surrogate.atan()) for _ in net]
    x = (torch.rand(20, 64, 300) < 0.3).float()

    def gradients() -> list[torch.Tensor]:
        mems, loss = [n.reset_mem() for n in neurons], torch.zeros(())
        for x_t in x:
            for i, (fc, neuron) in enumerate(zip(net, neurons, strict=True)):
                x_t, mems[i] = neuron(fc(x_t), mems[i])
            loss = loss + mems[-1].square().sum()
        found: list[torch.Tensor] = list(torch.autograd.grad(loss, list(net.parameters())))
        return found

    stock = gradients()
    with sparse.enabled("snntorch"):
        gradients()
        for expected, found in zip(stock, gradients(), strict=True):
            assert (found - expected).norm() <= 1e-5 * expected.norm()
