"""Plans of Norse's layers: how the parameters and states of a module run on the kernels, or why they do not."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch

from ..compat.norse import surrogate_of
from ..config import Options
from ..dynamics import Dynamics
from ..native import DTYPES
from ..neuron_tape import computing_dtype
from ..recorder import Plan
from ..reports import densities_of
from ..surrogate import NO_GRADIENT
from .fallback import tensor_problem
from .norse_neurons import Kind
from .norse_recurrence import recurrence_of
from .plans import PlanCache

_plans = PlanCache()


def plan_of(kind: Kind, module: Any, options: Options, shape: torch.Size, x: torch.Tensor, state: Any,
             given: bool) -> tuple[Plan | None, str | None]:
    """The plan of a module, made anew whenever something it depends on changed; or why there is none.

    Args:
        given: whether the user gave the state, rather than Norse's default.
    """
    p = module.p
    tensors, states, core = kind.tensors(p), kind.states(state), kind.core(p)
    if not all(isinstance(t, torch.Tensor) for t in (*tensors, *states)):
        return None, "its parameters or states are not all tensors"
    dtype = computing_dtype(x, [s for s, name in zip(states, kind.order, strict=True) if name == kind.current])
    problem = (_state_problem(kind, shape, dtype, x, states)
               or _dtype_problem(kind, shape, dtype, x, states, tensors, given))
    if problem is not None:
        return None, problem
    dynamics, reset = kind.dynamics(p), getattr(core, "reset_method", None)
    if dynamics is None:
        return None, "its reset method is not the library's"
    method, alpha = getattr(core, "method", ""), getattr(core, "alpha", 0.0)
    weights = [getattr(module, name) for name in kind.weights]
    watched = [t for t in (*tensors, alpha, module.dt, *weights) if isinstance(t, torch.Tensor)]
    if any(t.is_inference() for t in watched):
        return None, "its parameters were made in inference mode"
    key = (id(options), shape, dtype, x.device, method, reset,
           *((id(t), t._version, t.requires_grad, t.dtype, t.shape) for t in watched),
           *(v for v in (alpha, module.dt) if not isinstance(v, torch.Tensor)))
    return _plans.find(module, key, (options, watched),
                       lambda: _new_plan(kind, dynamics, module, options, shape, dtype, x, tensors, method, alpha))


def _new_plan(kind: Kind, dynamics: Dynamics, module: Any, options: Options, shape: torch.Size, dtype: torch.dtype,
              x: torch.Tensor, tensors: list[torch.Tensor], method: str,
              alpha: Any) -> tuple[Plan | None, str | None]:
    problem = _parameter_problem(shape, dtype, x, tensors, alpha)
    return (None if problem else _make_plan(kind, dynamics, module, options, tensors, method, alpha)), problem


def _state_problem(kind: Kind, shape: torch.Size, dtype: torch.dtype, x: torch.Tensor,
                   states: list[torch.Tensor]) -> str | None:
    problem = tensor_problem(x, *states)
    if problem is not None:
        return f"state: {problem}"
    if dtype not in DTYPES:
        return f"a state of {dtype} is not supported, only float32 and float64"
    for state in states:
        if state.dim() and torch.promote_types(state.dtype, dtype) != dtype:
            return f"states of {state.dtype} and {dtype} mix dtypes"
        if not _broadcasts(state, shape):
            return f"a state of shape {tuple(state.shape)} does not broadcast to the input of shape {tuple(shape)}"
    if kind.delayed and torch.broadcast_shapes(*(state.shape for state in states)) != shape:
        return f"its states have fewer dimensions than the input of shape {tuple(shape)}"
    return None


def _dtype_problem(kind: Kind, shape: torch.Size, dtype: torch.dtype, x: torch.Tensor, states: list[torch.Tensor],
                   tensors: list[torch.Tensor], given: bool) -> str | None:
    """Why mixed dtypes would round otherwise than in Norse, where each operation has the dtype of its operands."""
    if not shape and any(t.dtype is not dtype for t in (x, *states, *tensors)):
        return "a step without dimensions mixes dtypes"
    for parameter_name, state_name in kind.differences:
        parameter, value = tensors[kind.parameters.index(parameter_name)], states[kind.order.index(state_name)]
        if (value.dtype is dtype and parameter.dtype is dtype) or torch.result_type(parameter, value) is dtype:
            continue
        if not given and bool((parameter.double() == value.double()).all()):  # 0 in any dtype
            continue
        return (f"{state_name} of {value.dtype} and {parameter_name} of {parameter.dtype} would be subtracted in "
                f"another dtype than {dtype}")
    for name, state in zip(kind.order, states, strict=True):
        if name == kind.counter and torch.promote_types(state.dtype, dtype) is not dtype:
            return f"its {name} of {state.dtype} would count in another dtype than {dtype}"
    if given and kind.current is None and any(s.dtype is not dtype for s in states):
        return f"its states are not all of the dtype {dtype} of the input"
    return None


def _broadcasts(tensor: torch.Tensor, shape: torch.Size) -> bool:
    if not tensor.dim() or tensor.shape == shape:
        return True
    try:
        return torch.broadcast_shapes(tensor.shape, shape) == shape
    except RuntimeError:
        return False


def _parameter_problem(shape: torch.Size, dtype: torch.dtype, x: torch.Tensor, tensors: list[torch.Tensor],
                       alpha: Any) -> str | None:
    for tensor in tensors:
        problem = tensor_problem(x, tensor)
        if problem is not None:
            return f"parameters: {problem}"
        if not _broadcasts(tensor, shape):
            return f"a parameter of shape {tuple(tensor.shape)} does not broadcast to the input {tuple(shape)}"
        if tensor.dim() and torch.promote_types(tensor.dtype, dtype) != dtype:
            return f"a parameter of dtype {tensor.dtype} would change the dtype {dtype} of the state"
    if isinstance(alpha, torch.Tensor) and alpha.numel() != 1:
        return "alpha differs from neuron to neuron"
    return None


def _make_plan(kind: Kind, dynamics: Dynamics, module: Any, options: Options, tensors: list[torch.Tensor],
               method: str, alpha: Any) -> Plan | None:
    p, dt = module.p, module.dt
    derive = partial(kind.derive, tensors, dt)
    own = module.__dict__
    # A lane looks at p as a whole, so that its members have to stay what they are.
    constant = own.get("p") is p and isinstance(p, tuple) and isinstance(kind.core(p), tuple)
    watched = [t for t in (*tensors, alpha, dt) if isinstance(t, torch.Tensor)]
    guard = (*(("attribute", name, own.get(name)) for name in ("p", "dt", "activation")),
             *(("tensor", t) for t in watched))
    shared: dict[str, Any] = {"densities": densities_of(module), "guard": guard,
                              "module": weakref.ref(module) if constant else None}
    if not dynamics.spikes:
        return Plan(dynamics, NO_GRADIENT, options, tuple(tensors), derive, **shared)
    surrogate = surrogate_of(method, float(alpha.detach() if isinstance(alpha, torch.Tensor) else alpha))
    if surrogate is None:  # Norse raises its own error
        return None
    if kind.recurrent:
        shared |= {"recurrence": recurrence_of(module), "guard": ()}
    if kind.precompute is not None:
        shared |= {"precompute": kind.precompute(p), "module": None}
    return Plan(dynamics, surrogate.within(options.cutoff), options, tuple(tensors), derive,
                differentiable_output=surrogate is not NO_GRADIENT, **shared)
