"""snnTorch: ``snn.Leaky`` with its own semantics, its steps recorded on time-fused tapes.

The state protocol follows ``snntorch/_neurons/leaky.py``: a state that is passed replaces the stored one, a state of
another shape is replaced by zeros, the returned membrane is the very tensor kept in ``lif.mem``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import snntorch as snn
import torch
from torch import nn

from ..compat.snntorch import constants, emits, surrogate_of
from ..config import Options, config
from ..dynamics import leaky
from ..lanes import steps as lane_steps
from ..native import DTYPES
from ..neuron_tape import run_neuron
from ..recorder import Plan
from ..reports import densities_of
from . import synapses
from .adapter import OPTIONS, Adapter, truncate
from .fallback import mode_problem, report, tensor_problem
from .plans import PlanCache, values_of

LIBRARY = "snntorch"
host_forward = snn.Leaky.forward

_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
_RESET_VALUES = ("subtract", "zero", "none")
_STEP_METHODS = ("fire", "mem_reset", "_base_state_function", *_RESETS)
_HOST_METHODS = {name: getattr(snn.Leaky, name) for name in _STEP_METHODS}


def options_of(module: Any) -> Options | None:
    """Options in force for a module, None if neither it nor its library is enabled."""
    return None if config.suspended else module.__dict__.get(OPTIONS) or config.libraries.get(LIBRARY)


def leaky_forward(self: Any, input_: torch.Tensor, mem: torch.Tensor | None = None) -> Any:
    """Replaces ``snn.Leaky.forward``: input ``[B, ...]``, membrane of the same shape; returns what Leaky returns."""
    if torch.compiler.is_compiling():
        return host_forward(self, input_, mem)
    options = options_of(self)
    if options is None or not torch.is_grad_enabled() or (self.init_hidden and mem is not None):
        return host_forward(self, input_, mem)
    state = self._buffers.get("mem") if mem is None else mem
    done = lane_steps.neuron(self, options, input_, state)
    if done is not None:
        self._buffers["mem"] = done[1]
        return done if self.output or not self.init_hidden else done[0]
    if type(state) is not torch.Tensor:  # the host raises its own error
        return host_forward(self, input_, mem)
    plan, problem = None, _problem(self, input_, state)
    if problem is None:
        plan, problem = _plan_of(self, options, input_)
    if problem is not None:
        report(self, problem)
        return host_forward(self, input_, mem)
    assert plan is not None
    if state.shape != input_.shape:
        state = torch.zeros_like(input_, device=state.device)
    if not (input_.requires_grad or state.requires_grad or any(p.requires_grad for p in plan.parameters)):
        return host_forward(self, input_, mem)
    synapses.learn_source(input_, self, options_of)
    lane_steps.prepare()
    result = run_neuron(plan, input_, [state])
    spk, new = result.output, result.finals[0]
    if not options.fuse_steps and not plan.dynamics.late_reset:
        # Who asks for the gradient at the membrane wants the part through its spikes too: they get a node of their own.
        spk = run_neuron(_firing(plan), new, [torch.zeros_like(new)]).output
    self._buffers["mem"] = new
    if self.output or not self.init_hidden:
        return spk, new
    return spk


def _problem(module: Any, x: torch.Tensor, state: torch.Tensor) -> str | None:
    """Why this call must run the host's code, as far as it does not depend on the module's settings."""
    if type(module) is not snn.Leaky:
        return "it is a subclass of snntorch.Leaky"
    problem = tensor_problem(x) or mode_problem(x.device)
    if problem is not None:
        return problem
    if x.dtype not in DTYPES:
        return f"inputs of {x.dtype} are not supported, only float32 and float64"
    if x.dtype is torch.float64 and emits(x.dtype) is not x.dtype:
        return "snnTorch emits float32 spikes for a float64 membrane"
    if state.shape == x.shape:
        if state.dtype != x.dtype:
            return f"the membrane has dtype {state.dtype} and the input {x.dtype}"
        return tensor_problem(x, state) if x.numel() else "the input is empty"
    return None if x.numel() else "the input is empty"


# ---------------------------------------------------------------------------------------------------- plans

_plans = PlanCache()


def _plan_of(module: Any, options: Options, x: torch.Tensor) -> tuple[Plan | None, str | None]:
    """The plan of a module, made anew whenever something it depends on changed; or why there is none."""
    own, buffers, parameters = module.__dict__, module._buffers, module._parameters
    beta, threshold, factor = [
        parameters[n] if n in parameters else buffers.get(n) for n in ("beta", "threshold", "graded_spikes_factor")
    ]
    reset_value = buffers.get("reset_mechanism_val")
    if reset_value is None or beta is None or threshold is None or factor is None:
        return None, "one of its parameters is not an ordinary parameter or buffer"
    spike_grad, update = own.get("spike_grad"), own["state_function"]
    key = (
        id(options), x.dtype, x.shape, x.device, id(beta), beta._version, beta.requires_grad, id(threshold),
        threshold._version, threshold.requires_grad, id(factor), factor._version, factor.requires_grad, id(spike_grad),
        constants(spike_grad), getattr(update, "__func__", None), getattr(update, "__self__", None) is module,
        own["reset_delay"],
        id(reset_value), reset_value._version, own["inhibition"], bool(own["state_quant"]),
    )
    alive = (options, beta, threshold, factor, spike_grad, reset_value)
    return _plans.find(module, key, alive, lambda: _new_plan(module, options, x, [beta, threshold, factor]))


def _new_plan(module: Any, options: Options, x: torch.Tensor,
              tensors: list[torch.Tensor]) -> tuple[Plan | None, str | None]:
    problem = _settings_problem(module, x, tensors)
    return (None if problem else _make_plan(module, options, tensors)), problem


def _settings_problem(module: Any, x: torch.Tensor, tensors: list[torch.Tensor]) -> str | None:
    if module.inhibition:
        return "inhibition is not supported"
    if module.state_quant:
        return "quantised states are not supported"
    if surrogate_of(module.spike_grad) is None:
        name = getattr(module.spike_grad, "__qualname__", type(module.spike_grad).__name__)
        return f"the surrogate {name} has no known formula"
    for name, original in _HOST_METHODS.items():
        if getattr(snn.Leaky, name) is not original or name in module.__dict__:
            return f"its method {name} was replaced"
    function = module.__dict__["state_function"]
    update: str = getattr(function, "__name__", "")
    if getattr(function, "__self__", None) is not module or function.__func__ is not _HOST_METHODS.get(update):
        return "its state_function was replaced"
    if _late_reset(module) not in ("none", _RESETS[update]):
        return "reset_mechanism was changed after construction: the state update and the late reset disagree"
    for name, tensor in zip(("beta", "threshold", "graded_spikes_factor"), tensors, strict=True):
        problem = tensor_problem(x, tensor)
        if problem is not None:
            return f"{name}: {problem}"
        try:
            same = torch.broadcast_shapes(tensor.shape, x.shape) == x.shape
        except RuntimeError:
            same = False
        if not same:
            return f"{name} of shape {tuple(tensor.shape)} does not broadcast to the input of shape {tuple(x.shape)}"
        if tensor.dim() and torch.promote_types(tensor.dtype, x.dtype) != x.dtype:
            return f"{name} of dtype {tensor.dtype} would change the dtype {x.dtype} of the membrane"
    return None


def _late_reset(module: Any) -> str:
    """The correction after firing: it asks reset_mechanism_val at run time, the state update was chosen in __init__."""
    return "none" if module.reset_delay else _RESET_VALUES[int(values_of(module.reset_mechanism_val))]


def _make_plan(module: Any, options: Options, tensors: list[torch.Tensor]) -> Plan:
    beta, threshold, factor = tensors
    surrogate = surrogate_of(module.spike_grad)
    assert surrogate is not None
    return Plan(
        dynamics=leaky(_RESETS[module.state_function.__name__], _late_reset(module) != "none"),
        surrogate=surrogate.within(options.cutoff),
        options=options,
        parameters=(beta, threshold, factor),
        derive=lambda: (beta.clamp(0, 1), threshold, factor),
        unit_spikes=not factor.requires_grad and bool((values_of(factor) == 1).all()),
        densities=densities_of(module),
        module=weakref.ref(module),
        guard=_guard(module, tensors),
    )


def _guard(module: Any, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], ...]:
    """What :func:`_plan_of` has in its key, but for options and input."""
    own = module.__dict__
    names = ("beta", "threshold", "graded_spikes_factor", "reset_mechanism_val")
    held = zip(names, [*tensors, module.reset_mechanism_val], strict=True)
    closure = getattr(module.spike_grad, "__closure__", None) or ()
    return (
        *(("parameter", name, tensor) for name, tensor in held),
        *(("attribute", name, own.get(name)) for name in ("spike_grad", "reset_delay", "inhibition", "state_quant")),
        *(("cell", cell, cell.cell_contents) for cell in closure),
        ("method", "state_function", module.state_function.__func__),
    )


def _firing(plan: Plan) -> Plan:
    """Spikes as a function of the membrane alone: a neuron without a past, whose input it is."""
    _, threshold, factor = plan.parameters
    return replace(plan, dynamics=leaky("none", False), derive=lambda: (torch.zeros(()), threshold, factor),
                   module=None)


# ---------------------------------------------------------------------------------------------------- switching

_models: weakref.WeakSet[Any] = weakref.WeakSet()  # layers of models that are enabled on their own


def _refresh() -> None:
    """Installs the patch if the library or some model is enabled, else removes it."""
    wanted = LIBRARY in config.libraries or len(_models) > 0
    snn.Leaky.forward = leaky_forward if wanted else host_forward
    synapses.switch(LIBRARY, wanted)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) is snn.Leaky]


def _truncated_spikes(spike_grad: Any, cutoff: float, x: torch.Tensor) -> torch.Tensor:
    return truncate(spike_grad, x, cutoff)


@contextmanager
def _truncated(model: nn.Module, cutoff: float) -> Iterator[None]:
    """The host's surrogate derivatives multiplied by 1[|U - threshold| < cutoff], for comparisons."""
    layers = [(layer, layer.spike_grad) for layer in _layers(model)]
    for layer, spike_grad in layers:
        layer.__dict__["spike_grad"] = partial(_truncated_spikes, spike_grad, cutoff)
    try:
        yield
    finally:
        for layer, spike_grad in layers:
            del layer.__dict__["spike_grad"]  # a surrogate that is a module lies elsewhere
            layer.spike_grad = spike_grad


adapter = Adapter(LIBRARY, _refresh, _layers, _models, _truncated, lambda layer: True)
