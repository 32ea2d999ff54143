"""Small runs of Norse's classes, each with every formula of its step, for versions that are not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.probe import Outcome, Trial
from ..config import Options
from . import synapses
from .adapter import OPTIONS
from .norse_neurons import Kind

INPUTS, NEURONS, BATCH, STEPS = 4, 6, 3, 6
ALPHA = 2.0
VALUES = {"tau_syn_inv": 300.0, "tau_mem_inv": 200.0, "tau_adapt_inv": 50.0, "v_leak": 0.1, "v_th": 0.4,
          "v_reset": -0.1, "beta": 0.5, "delta_T": 0.6, "tau_ada_inv": 60.0, "adaptation_current": 0.7,
          "adaptation_spike": 0.2, "rho_reset": 1.5}
draw = partial(torch.rand, dtype=torch.float64)


def trials(kind: Kind, host: Any, sequence: bool, forward: Callable[..., Any], stock: Callable[..., Any],
           p: Any) -> Iterator[Trial]:
    """The only one there is.

    Args:
        sequence: whether it takes whole sequences.
        forward, stock: the fused one, and Norse's.
        p: parameters that have the method and the reset to try it with.
    """
    yield partial(_play, kind, host, sequence, forward, stock, p)


def _play(kind: Kind, host: Any, sequence: bool, forward: Callable[..., Any], stock: Callable[..., Any], p: Any,
          fused: bool) -> Outcome:
    """A layer, behind a ``Linear`` if it has no weights itself; the loss has every output and state.

    The time steps of a sequence come in two calls.
    """
    core = kind.core(p)
    chosen = {name: getattr(core, name) for name in ("method", "reset_method") if hasattr(core, name)}
    if hasattr(core, "alpha"):
        chosen["alpha"] = torch.tensor(ALPHA)
    sizes = (INPUTS, NEURONS) if kind.weights else ()
    parameters = {name: torch.tensor(VALUES[name], dtype=torch.float64, requires_grad=True)
                  for name in kind.parameters}
    layer = host(*sizes, kind.replaced(host(*sizes).p, {**parameters, **chosen})).double()
    linear = None if kind.weights else nn.Linear(INPUTS, NEURONS).double()
    layer.__dict__[OPTIONS] = Options()
    step, multiply = (forward, synapses.linear_forward) if fused else (stock, synapses.host_forward)
    x = (6 * draw(STEPS, BATCH, INPUTS)).requires_grad_()
    first = {name: draw(BATCH, NEURONS).requires_grad_() for name in kind.order}
    leaves = {"input": x, **parameters, **{f"first {name}": state for name, state in first.items()},
              **dict(layer.named_parameters())}
    if linear is not None:
        leaves |= {f"Linear's {name}": parameter for name, parameter in linear.named_parameters()}
    outputs: dict[str, Tensor] = {}
    state, loss = kind.tuple_of(list(first.values())), torch.zeros((), dtype=torch.float64)
    for call, part in enumerate(x.chunk(2) if sequence else x):
        out, state = step(layer, part if linear is None else multiply(linear, part), state)
        named = {"output": out, **dict(zip(kind.order, kind.states(state), strict=True))}
        outputs |= {f"{name} of call {call}": value.detach() for name, value in named.items()}
        loss = loss + sum((value * (draw(value.shape) - 0.5)).sum() for value in named.values() if value.requires_grad)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return Outcome(outputs, dict(zip(leaves, gradients, strict=True)))
