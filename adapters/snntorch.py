"""snnTorch: its neurons with their own semantics, their steps recorded on time-fused tapes.

The state protocol follows ``snntorch/_neurons/*.py``: a state that is passed replaces the stored one, a state of
another shape is replaced by zeros, the returned states are the very tensors kept in the layer's buffers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

from ..compat.probe import Probe
from ..compat.snntorch import constants, emits, surrogate_of
from ..config import Options, config
from ..lanes import steps as lane_steps
from ..native import DTYPES
from ..neuron_tape import run_neuron
from ..recorder import Plan
from ..registered import registered
from ..reports import densities_of
from ..snntorch_dynamics import leaky
from . import snntorch_recurrence as recurrence
from . import synapses
from .adapter import OPTIONS, Adapter, truncate
from .fallback import mode_problem, report, tensor_problem
from .plans import PlanCache, values_of
from .snntorch_neurons import KINDS, Kind
from .snntorch_trials import trials
from .support import Bystanders

LIBRARY = "snntorch"


def options_of(module: Any) -> Options | None:
    """Options in force for a module, None if neither it nor its library is enabled."""
    return None if config.suspended else module.__dict__.get(OPTIONS) or config.libraries.get(LIBRARY)


def leaky_forward(self: Any, input_: Tensor, mem: Tensor | None = None) -> Any:
    """Replaces ``snn.Leaky.forward``: input ``[B, ...]``, membrane of the same shape; returns what Leaky returns."""
    return _forward(_LEAKY, self, input_, (mem,))


def lapicque_forward(self: Any, input_: Tensor, mem: Tensor | None = None) -> Any:
    """Replaces ``snn.Lapicque.forward``, see :func:`leaky_forward`."""
    return _forward(_LAPICQUE, self, input_, (mem,))


def synaptic_forward(self: Any, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None) -> Any:
    """Replaces ``snn.Synaptic.forward``, see :func:`leaky_forward`."""
    return _forward(_SYNAPTIC, self, input_, (syn, mem))


def alpha_forward(self: Any, input_: Tensor, syn_exc: Tensor | None = None, syn_inh: Tensor | None = None,
                  mem: Tensor | None = None) -> Any:
    """Replaces ``snn.Alpha.forward``, see :func:`leaky_forward`."""
    return _forward(_ALPHA, self, input_, (syn_exc, syn_inh, mem))


def rleaky_forward(self: Any, input_: Tensor, spk: Tensor | None = None, mem: Tensor | None = None) -> Any:
    """Replaces ``snn.RLeaky.forward``, see :func:`leaky_forward`."""
    return _forward(_RLEAKY, self, input_, (spk, mem))


def rsynaptic_forward(self: Any, input_: Tensor, spk: Tensor | None = None, syn: Tensor | None = None,
                      mem: Tensor | None = None) -> Any:
    """Replaces ``snn.RSynaptic.forward``, see :func:`leaky_forward`."""
    return _forward(_RSYNAPTIC, self, input_, (spk, syn, mem))


def delta_leaky_forward(self: Any, input_: Tensor, mem: Any = None) -> Any:
    """Replaces ``snn.DeltaLeaky.forward``: ``mem`` is the membrane and that of the step before, both ``[B, ...]``."""
    kind = KINDS[snn.DeltaLeaky]
    options = None if torch.compiler.is_compiling() else options_of(self)
    if options is None or not torch.is_grad_enabled():
        return kind.host(self, input_, mem)
    state = self._buffers.get("mem")
    if not self.init_hidden:
        if not isinstance(mem, (tuple, list)) or len(mem) != 2:  # the host raises its own error
            return kind.host(self, input_, mem)
        state = mem[0]
    if state is None:
        state = torch.zeros_like(input_)
    fits = isinstance(state, Tensor) and state.shape == input_.shape
    done = _step(kind, self, options, input_, [state]) if fits else None
    if done is None:
        return kind.host(self, input_, mem)
    spk, (new,) = done
    self.mem_prev, self.mem = state, new
    return spk, (new, state)


_FORWARDS: dict[Any, Any] = {
    snn.Leaky: leaky_forward, snn.Synaptic: synaptic_forward, snn.Lapicque: lapicque_forward, snn.Alpha: alpha_forward,
    snn.RLeaky: rleaky_forward, snn.RSynaptic: rsynaptic_forward,
}
_LEAKY, _SYNAPTIC, _LAPICQUE, _ALPHA, _RLEAKY, _RSYNAPTIC = (KINDS[host] for host in _FORWARDS)
if hasattr(snn, "DeltaLeaky"):  # not in snnTorch 0.9
    _FORWARDS[snn.DeltaLeaky] = delta_leaky_forward


def _forward(kind: Kind, module: Any, x: Tensor, given: tuple[Tensor | None, ...]) -> Any:
    if torch.compiler.is_compiling():
        return kind.host(module, x, *given)
    options = options_of(module)
    missing = 0
    for state in given:  # not a generator, whose start costs more than all of this
        missing += state is None
    if options is None or not torch.is_grad_enabled() or (module.init_hidden and missing < len(given)):
        return kind.host(module, x, *given)
    states: Sequence[Any] = given
    if missing:
        buffers = module._buffers
        states = [buffers.get(name) if state is None else state
                  for name, state in zip(kind.states, given, strict=True)]
    done = _step(kind, module, options, x, kind.inner(states))
    return kind.host(module, x, *given) if done is None else _hand_out(kind, module, *done)


def _step(kind: Kind, module: Any, options: Options, x: Tensor,
          states: Sequence[Any]) -> tuple[Tensor, Sequence[Tensor]] | None:
    """Spikes and new states, in the order of the dynamics; None if the host has to compute them."""
    done = lane_steps.neuron(module, options, x, *states)
    if done is not None:
        return done[0], done[1:]
    if any(type(state) is not Tensor for state in states):  # the host raises its own error
        return None
    plan, problem = None, _problem(kind, module, x, states)
    if problem is None:
        plan, problem = _plan_of(kind, module, options, x)
    if problem is not None:
        report(module, problem)
        return None
    assert plan is not None
    states = [s if s.shape == x.shape else torch.zeros_like(x, device=s.device) for s in states]
    if not any(t.requires_grad for t in (x, *states, *plan.leaves)):
        return None
    synapses.learn_source(x, module, options_of)
    lane_steps.prepare()
    result = run_neuron(plan, x, states)
    spk, membrane = result.output, result.finals[0]
    if not options.fuse_steps and plan.dynamics.fires_from_state:
        # Who asks for the gradient at the membrane wants the part through its spikes too: they get a node of their own.
        spk = run_neuron(_firing(plan), membrane, [torch.zeros_like(membrane)]).output
    return spk, result.finals


def _hand_out(kind: Kind, module: Any, spk: Tensor, states: Sequence[Tensor]) -> Any:
    """Keeps the states in the module and returns what the host returns."""
    buffers = module._buffers
    if len(states) == 1:
        buffers["mem"] = states[0]
    else:
        states = kind.outer(states)
        for name, state in zip(kind.states, states, strict=True):
            buffers[name] = state
    if module.init_hidden and not module.output:
        return spk
    return tuple(states) if kind.recurrent else (spk, *states)


def _problem(kind: Kind, module: Any, x: Tensor, states: Sequence[Tensor]) -> str | None:
    """Why this call must run the host's code, as far as it does not depend on the module's settings."""
    if KINDS.get(type(module)) is not kind:
        return f"it is a subclass of snntorch.{type(module).__mro__[1].__name__}"
    problem = tensor_problem(x) or mode_problem(x.device)
    if problem is not None:
        return problem
    if x.dtype not in DTYPES:
        return f"inputs of {x.dtype} are not supported, only float32 and float64"
    if x.dtype is torch.float64 and emits(x.dtype) is not x.dtype:
        return "snnTorch emits float32 spikes for a float64 membrane"
    if not x.numel():
        return "the input is empty"
    for name, state in zip(kind.inner(kind.states), states, strict=True):
        if state.shape != x.shape:
            continue
        if state.dtype != x.dtype:
            what = "the membrane" if name == "mem" else f"the state {name}"
            return f"{what} has dtype {state.dtype} and the input {x.dtype}"
        problem = tensor_problem(x, state)
        if problem is not None:
            return problem
    return None


# ---------------------------------------------------------------------------------------------------- plans

_plans = PlanCache()
probe = Probe(LIBRARY)


def _plan_of(kind: Kind, module: Any, options: Options, x: Tensor) -> tuple[Plan | None, str | None]:
    """The plan of a module, made anew whenever something it depends on changed; or why there is none."""
    own = module.__dict__
    tensors = {name: kind.find(module, name) for name in (*kind.parameters, "reset_mechanism_val")}
    if kind.recurrent:
        weights, problem = recurrence.tensors_of(module)
        if problem is not None:
            return None, problem
        tensors |= weights
    settings = recurrence.settings_of(module) if kind.recurrent else None
    if any(tensor is None for tensor in tensors.values()):
        return None, "one of its parameters is not an ordinary parameter or buffer"
    spike_grad, update = own.get("spike_grad"), own["state_function"]
    users = registered(spike_grad)
    key = (
        id(options), x.dtype, x.shape, x.device, id(spike_grad), constants(spike_grad),
        getattr(update, "__func__", None), getattr(update, "__self__", None) is module,
        own["reset_delay"] if kind.delays else None, own["inhibition"], bool(own["state_quant"]), settings,
        id(users), *(own.get(name) for name in kind.attributes),
        *((id(t), t._version, t.requires_grad) for t in tensors.values()),
    )
    alive = (options, spike_grad, users, *tensors.values())
    return _plans.find(module, key, alive, lambda: _new_plan(kind, module, options, x, tensors))


def _new_plan(kind: Kind, module: Any, options: Options, x: Tensor,
              tensors: dict[str, Tensor]) -> tuple[Plan | None, str | None]:
    problem = _settings_problem(kind, module, x, tensors)
    return (None if problem else _make_plan(kind, module, options, tensors)), problem


def _settings_problem(kind: Kind, module: Any, x: Tensor, tensors: dict[str, Tensor]) -> str | None:
    if kind.inhibits(module) and x.dim() != 2:
        return f"inhibition works on inputs [B, N], and this one has {x.dim()} dimensions"
    if module.state_quant:
        return "quantised states are not supported"
    if surrogate_of(module.spike_grad) is None:
        name = getattr(module.spike_grad, "__qualname__", type(module.spike_grad).__name__)
        return f"the surrogate {name} has no known formula; register_surrogate() would let it run on the kernels"
    problem = kind.replaced(module)
    if problem is not None:
        return problem
    if kind.inhibits(module) and kind.late_reset(module) != "none":
        return "inhibition with reset_delay=False is not supported"
    if kind.recurrent:
        if not module.reset_delay and not isinstance(module, snn.RLeaky):
            return "its late reset works on the states that were passed in, and not on its own"
        problem = recurrence.problem_of(module, x, tensors)
        if problem is not None:
            return problem
    for name in kind.attributes:
        if not isinstance(module.__dict__.get(name), (int, float)):
            return f"{name} is not a number"
    for name in kind.parameters:
        problem = _parameter_problem(name, tensors[name], x)
        if problem is None and name in kind.constants and tensors[name].requires_grad:
            problem = f"{name} requires grad: {kind.constants[name]}"
        if problem is not None:
            return problem
    return _version_problem(kind, module)


def _version_problem(kind: Kind, module: Any) -> str | None:
    """Why the class of the installed version, with this surrogate, is not what the kernels compute."""
    if not probe.wanted:
        return None
    host, spike_grad = type(module), module.spike_grad
    key = host, getattr(spike_grad, "__code__", spike_grad)
    return probe.problem(key, lambda: trials(kind, host, _FORWARDS[host], spike_grad))


def _parameter_problem(name: str, tensor: Tensor, x: Tensor) -> str | None:
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


def _make_plan(kind: Kind, module: Any, options: Options, tensors: dict[str, Tensor]) -> Plan:
    surrogate = surrogate_of(module.spike_grad)
    assert surrogate is not None
    numbers = {name: torch.tensor(module.__dict__[name], dtype=torch.float64, device="cpu") for name in kind.attributes}
    inhibition, reads = kind.inhibits(module), kind.parameters
    if inhibition:  # the factor is not asked for
        reads = tuple(name for name in reads if name != "graded_spikes_factor")
        tensors = {**tensors, "graded_spikes_factor": torch.ones((), device="cpu")}
    factor = tensors.get("graded_spikes_factor")
    return Plan(
        dynamics=kind.dynamics(module),
        surrogate=surrogate.within(options.cutoff),
        options=options,
        parameters=tuple(tensors[name] for name in reads),
        recurrence=recurrence.recurrence_of(module, tensors) if kind.recurrent else None,
        derive=lambda: kind.derive({**tensors, **numbers}),
        unit_spikes=factor is None or (not factor.requires_grad and bool((values_of(factor) == 1).all())),
        densities=densities_of(module),
        module=None if inhibition else weakref.ref(module),
        inhibition=inhibition,
        guard=_guard(kind, module, tensors),
    )


def _guard(kind: Kind, module: Any, tensors: dict[str, Tensor]) -> tuple[tuple[Any, ...], ...]:
    """What :func:`_plan_of` has in its key, but for options and input."""
    own = module.__dict__
    attributes = ("spike_grad", "inhibition", "state_quant", *(("reset_delay",) if kind.delays else ()),
                  *kind.attributes)
    closure = getattr(module.spike_grad, "__closure__", None) or ()
    return (
        *(("parameter", name, tensor) for name, tensor in tensors.items() if "." not in name),
        *(("part", *name.split("."), tensor) for name, tensor in tensors.items() if "." in name),
        *(("attribute", name, own.get(name)) for name in attributes),
        *(("cell", cell, cell.cell_contents) for cell in closure),
        ("method", "state_function", module.state_function.__func__),
    )


def _firing(plan: Plan) -> Plan:
    """Spikes as a function of the membrane alone: a neuron without a past, whose input it is."""
    names, derived = plan.dynamics.parameters, plan.derive
    threshold, factor = names.index("threshold"), names.index("graded_spikes_factor")

    def derive() -> tuple[Tensor, ...]:
        values = derived()
        return torch.zeros(()), values[threshold], values[factor]

    return replace(plan, dynamics=leaky("none", False), derive=derive, module=None, recurrence=None)


# ---------------------------------------------------------------------------------------------------- switching

_bystanders = Bystanders(LIBRARY, lambda name: getattr(snn, name, None), options_of)
_models: weakref.WeakSet[Any] = weakref.WeakSet()  # layers of models that are enabled on their own


def _refresh() -> None:
    """Installs the patch if the library or some model is enabled, else removes it."""
    wanted = LIBRARY in config.libraries or len(_models) > 0
    for kind, forward in _FORWARDS.items():
        kind.forward = forward if wanted else KINDS[kind].host
    _bystanders.watch(LIBRARY in config.libraries)
    synapses.switch(LIBRARY, wanted)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in KINDS]


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


adapter = Adapter(LIBRARY, _refresh, _layers, _models, _truncated, lambda layer: True, _bystanders)
