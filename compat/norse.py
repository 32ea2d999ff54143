"""What differs between Norse versions, found by probing its behaviour rather than by version numbers."""

from __future__ import annotations

import sys
from functools import cache
from types import FrameType

import torch
from norse.torch.functional import lif
from norse.torch.functional.lif import LIFFeedForwardState, LIFParameters, lif_feed_forward_step
from norse.torch.functional.threshold import threshold
from norse.torch.module.sequential import SequentialState
from torch import nn
from torch.nn.modules import module as calls

from ..surrogate import NO_GRADIENT, Surrogate


@cache
def input_drives_membrane_at_once() -> bool:
    """Whether the feed-forward LIF step adds its input before it updates the membrane (1.1.0) or after (1.0.0)."""
    p = LIFParameters()
    zero = torch.zeros(1, device=p.v_th.device)  # where Norse was imported, in case of a default device
    _, state = lif_feed_forward_step(zero + 0.5, LIFFeedForwardState(v=zero, i=zero), p, 0.001)
    return bool(state.v.item() > 0)


def recurrent_step_is_compiled() -> bool:
    """Whether the recurrent LIF step is TorchScript (1.0.0), whose optimiser changes its rounding after some calls."""
    return isinstance(getattr(lif, "_lif_step_jit", None), torch.jit.ScriptFunction)


@cache
def superspike_uses_alpha() -> bool:
    """Whether ``super`` is 1 / (alpha |x| + 1)^2 or, as in 1.1.0, ignores alpha."""
    x = torch.ones(1, device="cpu", requires_grad=True)
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(threshold(x, "super", torch.tensor(100.0, device="cpu")).sum(), x)
    return bool(grad.item() < 0.1)


def surrogate_of(method: str, alpha: float) -> Surrogate | None:
    """The description of ``p.method``; None if Norse itself does not know it."""
    if method == "super":
        return Surrogate("SuperSpike", alpha if superspike_uses_alpha() else 1.0)
    if method == "heaviside":
        return NO_GRADIENT
    if method == "triangle":
        return Surrogate("Triangle", alpha, low=-1.0, high=1.0)
    kinds = {"tanh": "Tanh", "circ": "Circ", "heavi_erfc": "Erfc"}
    return Surrogate(kinds[method], alpha) if method in kinds else None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hands_over(synapse: nn.Module, neuron: nn.Module) -> bool:
    """Whether a ``SequentialState`` runs ``synapse`` right now and will give its output to ``neuron`` only."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]:
        frame = frame.f_back
    while frame is not None and frame.f_globals is vars(calls):
        frame = frame.f_back
    if frame is None or frame.f_code is not SequentialState.forward.__code__:
        return False
    container, index = frame.f_locals.get("self"), frame.f_locals.get("index")
    if not isinstance(container, SequentialState) or not isinstance(index, int):
        return False
    if getattr(container, "return_hidden", False):  # 1.0.0 has none
        return False
    running = list(container)[index : index + 2]
    if len(running) < 2 or running[0] is not synapse or running[1] is not neuron:
        return False
    return not any(getattr(module, hooks) for module in running for hooks in _HOOKS) and not any(
        getattr(calls, f"_global{hooks}", None) for hooks in _HOOKS)
