"""Surrogates of the user's own: functions that a user vouches for, tried out when they are registered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .surrogate import Surrogate

_SPREAD = 1e-9  # relative; a formula written twice differs by rounding
_registered: dict[Any, Surrogate] = {}


def register_surrogate(spike_grad: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor] | None = None, *,
                       low: float = -math.inf, high: float = math.inf) -> None:
    """Lets snnTorch layers with this ``spike_grad`` run on the kernels.

    ::

        spike_grad = snntorch.surrogate.custom_surrogate(my_formula)
        sparse.register_surrogate(spike_grad)
        lif = snn.Leaky(beta=0.9, spike_grad=spike_grad)

    The kernels do not know the formula, so the derivative is evaluated by PyTorch, once at each stored site in each
    backward pass: that costs a pass over these values and one more number a site meanwhile. Without a cutoff or finite
    bounds every site is stored; with them only the active ones are.

    Args:
        spike_grad: the very function that layers are given. It takes ``x = U - threshold`` of any shape, returns 1
            where ``x > 0`` and else 0, and is a function of each element by itself, the same at each call; its gradient
            is the upstream gradient times a derivative at ``x``.
        derivative: computes that derivative at ``x``, a tensor of any shape; by default it is asked of
            ``spike_grad``'s own backward.
        low, high: the derivative is zero outside the open interval ``(low, high)``.

    Raises:
        TypeError: if ``spike_grad`` or ``derivative`` cannot be called, or is a module, or not hashable.
        ValueError: if ``low`` is not below ``high``, or if, tried out on some values, ``spike_grad`` is not such a
            function or ``derivative`` not its derivative. Nothing is registered then.
    """
    for name, function in (("spike_grad", spike_grad), ("derivative", derivative)):
        optional = function is None and name == "derivative"
        if isinstance(function, torch.nn.Module) or not (callable(function) or optional):
            raise TypeError(f"{name}: expected a function of a tensor, got {type(function).__name__}")
    if not low < high:
        raise ValueError(f"low, high: expected an interval, got ({low}, {high})")
    try:
        hash(spike_grad)
    except TypeError:
        raise TypeError(f"spike_grad: expected something hashable, got {type(spike_grad).__name__}") from None
    _try_out(spike_grad, derivative, low, high)
    given = derivative if derivative is not None else own_derivative(spike_grad)
    _registered[spike_grad] = Surrogate("Given", low=low, high=high, given=given)


def registered(spike_grad: Any) -> Surrogate | None:
    """The description of a function that was registered."""
    try:
        return _registered.get(spike_grad)
    except TypeError:  # not hashable
        return None


def own_derivative(spike_grad: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What the backward of a spike function multiplies gradients by."""

    def derivative(x: Tensor) -> Tensor:
        return _backward(spike_grad, x, 1.0)

    return derivative


def _backward(spike_grad: Callable[[Tensor], Tensor], x: Tensor, upstream: float) -> Tensor:
    with torch.enable_grad():
        given = x.detach().requires_grad_()
        spikes = spike_grad(given)
        if not spikes.requires_grad:
            return torch.zeros_like(given)
        (grad,) = torch.autograd.grad(spikes, given, torch.full_like(spikes, upstream), allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def _samples(low: float, high: float) -> Tensor:
    """Points on both sides of the threshold and of the bounds, dense where surrogates are steep."""
    steps = torch.logspace(-6, 3, 91, dtype=torch.float64, device="cpu")
    ends = [side for end in (low, high) if math.isfinite(end) for side in (end - 1e-3, end, end + 1e-3)]
    return torch.cat([-steps, steps.new_tensor([0.0, *ends]), steps])


def _try_out(spike_grad: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor] | None, low: float,
             high: float) -> None:
    x = _samples(low, high)
    with torch.no_grad():
        spikes = spike_grad(x.clone())
    if not isinstance(spikes, Tensor) or spikes.shape != x.shape:
        raise ValueError("spike_grad: expected spikes of the shape of its argument")
    _compare("spike_grad: expected 1 where x > 0 and 0 elsewhere", x, spikes.to(x), (x > 0).to(x), 0.0)
    own = _backward(spike_grad, x, 1.0)
    again = torch.empty_like(own)
    for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).chunk(2):
        again[part] = _backward(spike_grad, x[part], 1.0)
    _compare("spike_grad: expected the same gradient at each call, of each element by itself", x, again, own, _SPREAD)
    for upstream in (-1.0, 1e3):
        _compare("spike_grad: expected a gradient in proportion to the one that arrives", x,
                 _backward(spike_grad, x, upstream), upstream * own, _SPREAD)
    if derivative is not None:
        with torch.no_grad():
            found = derivative(x.clone())
        if not isinstance(found, Tensor) or found.shape != x.shape:
            raise ValueError("derivative: expected a tensor of the shape of its argument")
        _compare("derivative: expected what the backward of spike_grad gives", x, found.to(x), own, _SPREAD)
    outside = (x <= low) | (x >= high)
    _compare("low, high: expected a derivative of zero outside", x[outside], own[outside],
             torch.zeros_like(own[outside]), 0.0)


def _compare(expectation: str, x: Tensor, found: Tensor, expected: Tensor, spread: float) -> None:
    wrong = ~torch.isclose(found, expected, rtol=spread, atol=0.0, equal_nan=True)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(f"{expectation}; at x = {x[first].item():.6g} got {found[first].item():.6g} and not "
                         f"{expected[first].item():.6g}")
