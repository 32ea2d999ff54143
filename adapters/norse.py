"""Norse: its neurons with sparse, time-fused backward; swap the class, keep the rest.

::

    from snn_sparse_backend.adapters.norse import LIF, LI

The classes subclass Norse's own (constructor, parameters, initial states, ``isinstance`` and NIR export are inherited)
and replace only ``forward``. Sequences are ``[T, B, ...]``, cells take one time step ``[B, ...]``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import norse.torch as stock
import torch
from norse.torch.module.snn import SNN, SNNCell, SNNRecurrent, SNNRecurrentCell
from torch import nn

from ..compat.norse import hands_over, input_drives_membrane_at_once, recurrent_step_is_compiled
from ..compat.probe import Probe
from ..config import Options, config
from ..deferred import settled
from ..lanes import steps as lane_steps
from ..neuron_tape import run_neuron
from ..recorder import Plan
from ..scans import filled
from . import synapses
from .adapter import OPTIONS, Adapter, truncate
from .fallback import mode_problem, report, tensor_problem
from .norse_neurons import KINDS, Kind, host_class
from .norse_plans import plan_of
from .norse_recurrence import input_current, problem_of
from .norse_trials import trials
from .support import Bystanders, OwnForward

LIBRARY = "norse"
probe = Probe(LIBRARY)
# Classes whose step is that of a LIF, or begins with it.
_OF_LIF, _OF_RECURRENT_LIF = (
    tuple(host for name in names if (host := host_class(name)) is not None) for names in (
        ("LIF", "LIFCell", "LIFRefracCell"),
        ("LIFRecurrent", "LIFRecurrentCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell"),
    )
)
_STOCK: dict[type, Any] = {host: host.forward for host in KINDS}  # type: ignore[attr-defined]  # as imported


def options_of(module: Any) -> Options | None:
    """Options in force for a module, None if neither it nor its library is enabled; swapped classes always are."""
    if config.suspended:
        return None
    own = module.__dict__.get(OPTIONS) or config.libraries.get(LIBRARY)
    return own or (config.defaults if isinstance(module, _CLASSES) else None)


def _sequence_forward(self: Any, input_tensor: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    """Sequence ``[T, B, ...]`` -> output ``[T, B, ...]`` and the last state (all states with ``record_states``)."""
    return _forward(self, _stock_sequence, input_tensor, state, sequence=True)


def _cell_forward(self: Any, input_tensor: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    """One time step ``[B, ...]`` -> output and state of the same shape; of a layer with weights, ``[B, inputs]``."""
    return _forward(self, _stock_forward, input_tensor, state, sequence=False)


def _recurrent_sequence_forward(self: Any, input_tensor: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    """Sequence ``[T, B, inputs]`` -> spikes ``[T, B, N]`` and the last state."""
    return _forward(self, _stock_forward, input_tensor, state, sequence=True)


def _stock_sequence(self: Any, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    return _stock_forward(self, settled(x), state)


def _stock_forward(self: Any, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    return _STOCK[_host_of(self)](self, x, state)


def _host_of(module: Any) -> type:
    """Norse's own class of a module."""
    return next(cls for cls in type(module).__mro__ if cls in _STOCK)


def _takes_over(synapse: nn.Module, neuron: Any) -> bool:
    """Whether the sequence that ``synapse`` computes right now reaches ``neuron`` and nobody else."""
    own = type(neuron).forward is _sequence_forward and not {"forward", "initial_state"} & vars(neuron).keys()
    return own and neuron.state_fallback == neuron.initial_state and hands_over(synapse, neuron)


def _forward(self: Any, host: Any, x: torch.Tensor, state: Any, sequence: bool) -> tuple[torch.Tensor, Any]:
    if torch.compiler.is_compiling():
        return host(self, x, state)
    options = options_of(self)
    if options is None or not torch.is_grad_enabled() or not isinstance(x, torch.Tensor):
        return host(self, x, state)
    kind = _KINDS.get(type(self))
    if not (sequence or options.fuse_steps) and spikes(self):
        return host(self, x, state)  # only Norse's own graph has the gradient at a spike with its part from the reset
    if not sequence and kind is not None and not kind.weights and isinstance(state, kind.state):
        done = lane_steps.neuron(self, options, x, *kind.states(state))
        if done is not None:
            return done[0], kind.tuple_of(done[1:])
    problem = _problem(self, kind, x, sequence)
    if problem is not None or kind is None:
        report(self, str(problem))
        return host(self, x, state)
    given = state is not None
    if not given:
        initial = kind.initial(self, x) if kind.initial is not None else self.state_fallback(x)
        state = _on_device(kind, initial, x.device)
    shape = x.shape[1:] if sequence else x.shape
    if kind.weights:
        shape = torch.Size((*shape[:-1], len(self.input_weights)))
    plan, problem = plan_of(kind, self, options, shape, x, state, given)
    if problem is not None:
        report(self, problem)
        return host(self, x, state)
    states = kind.states(state)
    if plan is None or not _differentiable(kind, self, plan, x, states, x.shape[0] if sequence else 1):
        return host(self, x, state)
    if kind.weights:
        x = input_current(self, x, sequence, options)
    if type(self) in _CLASSES:
        synapses.switch("norse classes", True)
    if not kind.weights:
        synapses.learn_source(x, self, options_of, _takes_over if sequence else None)
    lane_steps.prepare()
    record = sequence and self.record_states
    result = run_neuron(plan, x, states, x.shape[0] if sequence else None, record)
    return result.output, kind.tuple_of(result.recorded if record else result.finals)


def _on_device(kind: Kind, state: Any, device: torch.device) -> Any:
    """Norse's own initial state. Its membrane may be a scalar on the CPU, whose gradient one would have to wait for."""
    v, *others = kind.states(state)
    if v.device == device or v.dim():
        return state
    return kind.tuple_of([filled(v, v.shape, v.dtype, device).requires_grad_(v.requires_grad), *others])


def _problem(module: Any, kind: Kind | None, x: torch.Tensor, sequence: bool) -> str | None:
    """Why this call must run the host's code, as far as it does not depend on parameters and state."""
    if kind is None:
        return f"it is a subclass of {type(module).__mro__[1].__name__}"
    if x.is_sparse:
        return "sparse COO inputs have other gradients in Norse"
    problem = tensor_problem(x) or mode_problem(x.device)
    if problem is not None:
        return problem
    if not x.numel() or (sequence and x.dim() == 0):
        return "the input is empty"
    if kind.weights:
        problem = problem_of(module, kind.weights, x, sequence)
        if problem is not None:
            return problem
    if getattr(module, "activation", kind.activation) is not kind.activation:
        return "its activation is not the library's feed-forward step"
    return _version_problem(kind, module)


def _version_problem(kind: Kind, module: Any) -> str | None:
    """Why the step of the installed version is not the one that the kernels compute."""
    if isinstance(module, _OF_LIF) and not input_drives_membrane_at_once():
        return "this version of Norse orders the LIF step differently"
    if isinstance(module, _OF_RECURRENT_LIF) and recurrent_step_is_compiled():
        return "this version of Norse compiles the recurrent LIF step, which then rounds differently from call to call"
    if not probe.wanted:
        return None
    host = _host_of(module)
    core = kind.core(module.p)
    key = host, getattr(core, "method", None), getattr(core, "reset_method", None)
    sequence = issubclass(host, (SNN, SNNRecurrent))
    return probe.problem(key, lambda: trials(KINDS[host], host, sequence, _forward_of(host), _STOCK[host], module.p))


def _differentiable(kind: Kind, module: Any, plan: Plan, x: torch.Tensor, states: list[torch.Tensor],
                    steps: int) -> bool:
    """Whether all outputs require grad; a step without gradients, and the first with them, may be left to Norse."""
    given = [t.requires_grad for t in (x, *states, *plan.parameters)]
    if kind.weights:
        given[0] |= bool(module.input_weights.requires_grad)
    if plan.recurrence is not None:
        given += [plan.recurrence.weight.requires_grad, False]
    output, membrane, *_ = plan.dynamics.attached(given, steps, plan.surrogate.differentiable)
    return membrane and (output or not plan.differentiable_output)


def spikes(module: Any) -> bool:
    """Whether a supported module emits spikes (an integrator does not)."""
    return "v_th" in KINDS[_host_of(module)].parameters


# ---------------------------------------------------------------------------------------------------- classes


class LIF(stock.LIF):
    """Norse's ``LIF``: leaky integrate-and-fire neurons over a sequence ``[T, B, ...]``."""

    forward = _sequence_forward


class LIFCell(stock.LIFCell):
    """Norse's ``LIFCell``: one time step ``[B, ...]`` of leaky integrate-and-fire neurons."""

    forward = _cell_forward


class LI(stock.LI):
    """Norse's ``LI``: leaky integrators over a sequence ``[T, B, ...]``."""

    forward = _sequence_forward


class LICell(stock.LICell):
    """Norse's ``LICell``: one time step ``[B, ...]`` of leaky integrators."""

    forward = _cell_forward


class LILinearCell(stock.LILinearCell):
    """Norse's ``LILinearCell``: one time step ``[B, inputs]`` of leaky integrators with a weight of their own."""

    forward = _cell_forward


class LIFBoxCell(stock.LIFBoxCell):
    """Norse's ``LIFBoxCell``: one time step ``[B, ...]`` of LIF neurons without a synaptic current."""

    forward = _cell_forward


class LSNN(stock.LSNN):
    """Norse's ``LSNN``: neurons with an adaptive threshold over a sequence ``[T, B, ...]``."""

    forward = _sequence_forward


class LSNNCell(stock.LSNNCell):
    """Norse's ``LSNNCell``: one time step ``[B, ...]`` of neurons with an adaptive threshold."""

    forward = _cell_forward


class LIFRecurrent(stock.LIFRecurrent):
    """Norse's ``LIFRecurrent``: recurrent leaky integrate-and-fire neurons over a sequence ``[T, B, inputs]``."""

    forward = _recurrent_sequence_forward


class LIFRecurrentCell(stock.LIFRecurrentCell):
    """Norse's ``LIFRecurrentCell``: one time step ``[B, inputs]`` of recurrent leaky integrate-and-fire neurons."""

    forward = _cell_forward


class LSNNRecurrent(stock.LSNNRecurrent):
    """Norse's ``LSNNRecurrent``: recurrent neurons with an adaptive threshold over a sequence ``[T, B, inputs]``."""

    forward = _recurrent_sequence_forward


class LSNNRecurrentCell(stock.LSNNRecurrentCell):
    """Norse's ``LSNNRecurrentCell``: one time step ``[B, inputs]`` of recurrent neurons with an adaptive threshold."""

    forward = _cell_forward


_SWAPPED: dict[type, type] = {cls.__bases__[0]: cls for cls in (
    LIF, LIFCell, LI, LICell, LILinearCell, LIFBoxCell, LSNN, LSNNCell, LIFRecurrent, LIFRecurrentCell, LSNNRecurrent,
    LSNNRecurrentCell,
)}


def _swap_in(name: str) -> None:
    """The swapped class for one that not every version of Norse has."""
    host = host_class(name)
    if host is not None:
        body = {"forward": _forward_of(host), "__module__": __name__, "__doc__": f"Norse's ``{name}``."}
        _SWAPPED[host] = globals()[name] = type(name, (host,), body)


def _forward_of(host: type) -> Any:
    forwards = {SNN: _sequence_forward, SNNCell: _cell_forward, SNNRecurrent: _recurrent_sequence_forward,
                SNNRecurrentCell: _cell_forward, stock.LILinearCell: _cell_forward}
    return next(forward for base, forward in forwards.items() if issubclass(host, base))


for _name in ("IAF", "IAFCell", "LIBoxCell", "LIFBox", "LIBox", "LIFEx", "LIFExCell", "LIFExRecurrent",
              "LIFExRecurrentCell", "LIFAdEx", "LIFAdExCell", "LIFAdExRecurrent", "LIFAdExRecurrentCell",
              "LIFRefracCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell"):
    _swap_in(_name)

__all__ = sorted(cls.__name__ for cls in _SWAPPED.values())
_CLASSES = tuple(_SWAPPED.values())
_KINDS: dict[type, Kind] = {**KINDS, **{swapped: KINDS[host] for host, swapped in _SWAPPED.items()}}

_forwards = {host: OwnForward(host) for host in _SWAPPED}
_bystanders = Bystanders(LIBRARY, host_class, options_of)
_models: weakref.WeakSet[Any] = weakref.WeakSet()  # layers of models that are enabled on their own


def _refresh() -> None:
    """Patches Norse's own classes if the library or some model is enabled, else restores them."""
    wanted = LIBRARY in config.libraries or len(_models) > 0
    for host, own in _forwards.items():
        own.replace(_forward_of(host) if wanted else None)
    _bystanders.watch(LIBRARY in config.libraries)
    synapses.switch(LIBRARY, wanted)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in _KINDS]


@contextmanager
def _truncated(_model: nn.Module, cutoff: float) -> Iterator[None]:
    """Norse's threshold derivatives multiplied by 1[|U - v_th| < cutoff], for comparisons; for the whole process."""
    modules: set[Any] = {sys.modules[kind.activation.__module__] for kind in KINDS.values()}
    originals = {module: module.threshold for module in modules if hasattr(module, "threshold")}
    for module, original in originals.items():
        module.threshold = partial(_truncated_threshold, original, cutoff)
    try:
        yield
    finally:
        for module, original in originals.items():
            module.threshold = original


def _truncated_threshold(threshold: Any, cutoff: float, x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return truncate(lambda y: threshold(y, *rest), x, cutoff)


adapter = Adapter(LIBRARY, _refresh, _layers, _models, _truncated, spikes, _bystanders)
