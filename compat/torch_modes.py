"""Torch's global modes under which the host library's own code has to run. Uses private functions, hence here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def host_only(device: str) -> str | None:
    """Why a fused step may not run right now, or None. Asked at every step: the common case must be cheap."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit is tracing"
    if torch.is_inference_mode_enabled():
        return "inference mode is on"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "saved-tensor hooks are active (activation checkpointing or offloading)"
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def plain_tensor(tensor: object) -> bool:
    """Whether this is a torch.Tensor or Parameter itself, not a subclass with its own behaviour."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def scripts_as(ours: Callable[..., Any], host: Callable[..., Any]) -> None:
    """Lets ``torch.jit.script`` compile the host's function wherever it meets ours in its place."""
    dispatched, builtin = torch._jit_internal.boolean_dispatched, torch.jit._builtins._find_builtin(host)
    if host in dispatched:
        dispatched[ours] = dispatched[host]
    elif builtin is not None:
        torch.jit._builtins._register_builtin(ours, builtin)
