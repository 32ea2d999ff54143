"""register_surrogate: a user's own formula runs on the kernels, and what is not one is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from oracle import Side, assert_fused, assert_same, frames, precision, train
from snn_sparse_backend.adapters.fallback import forget_warnings
from snntorch import surrogate
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import derivatives, registered


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "_registered", {})
    forget_warnings()


class Gauss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.exp(-(x**2))


def own(gradient: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A surrogate of the field's usual form, from ``(x, upstream) -> gradient``."""
    return surrogate.custom_surrogate(lambda x, grad, spikes: gradient(x, grad))


def gauss() -> Callable[[Tensor], Tensor]:
    return own(lambda x, grad: grad * torch.exp(-(x**2)))


def net_of(spike_grad: Any, threshold: Any = 0.6, **options: Any) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        options.setdefault("beta", 0.9)
        net = nn.ModuleList([nn.Linear(7, 70), nn.Linear(70, 9)])
        nn.init.uniform_(net[0].weight, -1, 1)
        of = spike_grad if side.sparse else side.surrogate(spike_grad)
        lifs = nn.ModuleList(snn.Leaky(threshold=threshold, spike_grad=of, **options) for _ in net)
        mems, loss = [lif.reset_mem() for lif in lifs], torch.zeros(())
        for x in frames(steps=6):
            h = torch.nn.functional.pad(x, (0, 7 - x.shape[-1])) if x.shape[-1] < 7 else x[..., :7]
            for i, (fc, lif) in enumerate(zip(net, lifs, strict=True)):
                h, mems[i] = lif(fc(h), mems[i])
            loss = loss + (h * torch.linspace(-1, 1.3, h.numel()).view(h.shape)).sum()
        train(side, nn.ModuleList([net, lifs]), loss)

    return program


@pytest.mark.parametrize("given", [False, True], ids=["own backward", "formula"])
@pytest.mark.parametrize("options", [{}, {"cutoff": 0.4}, {"cutoff": 0.4, "forward": "sparse"}], ids=str)
def test_it_runs_on_the_kernels(given: bool, options: dict[str, Any]) -> None:
    spike_grad = gauss()
    sparse.register_surrogate(spike_grad, (lambda x: torch.exp(-(x**2))) if given else None)
    with precision(torch.float64):
        side = assert_same(net_of(spike_grad, learn_beta=True), bitwise=options.get("forward") != "sparse", **options)
    assert side.counts["derivatives_given"] > 0


def test_an_autograd_function_and_a_threshold_for_each_neuron() -> None:
    sparse.register_surrogate(Gauss.apply)  # another object at each access, and the same function
    with precision(torch.float64):
        side = assert_same(net_of(Gauss.apply, torch.tensor(0.5), learn_threshold=True), cutoff=0.3)
        assert_fused(side.counts)

        def program(side: Side) -> None:
            lif = snn.Leaky(0.9, threshold=torch.linspace(0.2, 1, 9), spike_grad=side.surrogate(Gauss.apply))
            x = torch.randn(5, 3, 9, requires_grad=True)
            mem, loss = lif.reset_mem(), x.new_zeros(())
            for step in x:
                spk, mem = lif(step, mem)
                loss = loss + (spk * torch.randn(spk.shape)).sum()
            train(side, lif, loss, x=x)

        assert_same(program, cutoff=0.3)


def test_only_stored_sites_are_evaluated() -> None:
    seen: list[Tensor] = []
    spike_grad = gauss()
    sparse.register_surrogate(spike_grad, lambda x: seen.append(x) or torch.exp(-(x**2)))
    seen.clear()
    lif, x = snn.Leaky(0.5, threshold=0.5, spike_grad=spike_grad), torch.randn(4, 100, requires_grad=True)
    with sparse.enabled("snntorch"):
        lif(x)[0].sum().backward()
    assert sum(x.numel() for x in seen) == 400


def test_what_was_left_to_the_host_is_not_any_more() -> None:
    spike_grad = gauss()
    lif, x = snn.Leaky(0.5, spike_grad=spike_grad), torch.randn(4, 10, requires_grad=True)
    with sparse.enabled("snntorch"):
        with pytest.warns(sparse.SparseFallbackWarning, match="custom_surrogate.*register_surrogate"):
            lif(x)
        sparse.register_surrogate(spike_grad)
        sparse.reset_counts()
        lif(x)[0].sum().backward()
    assert_fused(sparse.counts)


def test_a_wrong_derivative_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: the comparison above would notice."""
    evaluate = derivatives.Derivatives._evaluate
    monkeypatch.setattr(derivatives.Derivatives, "_evaluate", lambda self, x: evaluate(self, x).mul_(1 + 1e-6))
    spike_grad = gauss()
    sparse.register_surrogate(spike_grad)
    with precision(torch.float64), pytest.raises(AssertionError, match="relative error"):
        assert_same(net_of(spike_grad))


def test_a_derivative_of_another_shape_is_an_error() -> None:
    spike_grad = gauss()
    good = lambda x: torch.exp(-(x**2))  # noqa: E731
    answers = [good]
    sparse.register_surrogate(spike_grad, lambda x: answers[-1](x))
    answers.append(lambda x: x.sum())
    lif, x = snn.Leaky(0.5, spike_grad=spike_grad), torch.randn(4, 10, requires_grad=True)
    with sparse.enabled("snntorch"), pytest.raises(RuntimeError, match="registered surrogate: expected a tensor of"):
        lif(x)[0].sum().backward()


@pytest.mark.parametrize(("spike_grad", "options", "message"), [
    (lambda x: torch.sigmoid(4 * x), {}, "expected 1 where x > 0"),
    (lambda x: (x >= 0).float(), {}, "at x = 0 got 1"),
    (lambda x: (x > 0).float().sum(), {}, "the shape of its argument"),
    (own(lambda x, g: g * torch.rand_like(x)), {}, "the same gradient at each call"),
    (own(lambda x, g: g * x.softmax(0)), {}, "of each element by itself"),
    (own(lambda x, g: g.clamp(-1, 1)), {}, "in proportion"),
    (gauss(), {"derivative": lambda x: torch.exp(-x)}, "derivative: expected what the backward"),
    (gauss(), {"derivative": lambda x: x.sum()}, "derivative: expected a tensor of the shape"),
    (gauss(), {"low": -1, "high": 1}, "zero outside"),
    (gauss(), {"low": 1, "high": 1}, "expected an interval"),
], ids=["soft", "spikes at 0", "sum", "random", "neighbours", "clipped", "wrong formula", "wrong shape", "wrong bounds",
        "no interval"])
def test_what_is_no_surrogate_is_refused(spike_grad: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparse.register_surrogate(spike_grad, **options)
    assert not registered._registered


@pytest.mark.parametrize(("arguments", "message"), [
    (("atan",), "spike_grad: expected a function of a tensor, got str"),
    ((None,), "spike_grad: expected a function"),
    ((nn.ReLU(),), "spike_grad: expected a function of a tensor, got ReLU"),
    ((surrogate.atan(), 3), "derivative: expected a function"),
], ids=["str", "None", "module", "number"])
def test_what_is_no_function_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sparse.register_surrogate(*arguments)
