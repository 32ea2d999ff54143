"""Norse: ``LIF``, ``LIFCell``, ``LI`` and ``LICell`` with sparse, time-fused backward; swap the class, keep the rest.

::

    from snn_sparse_backend.adapters.norse import LIF, LI

The classes subclass Norse's own (constructor, parameters, initial states, ``isinstance`` and NIR export are inherited)
and replace only ``forward``. Sequences are ``[T, B, ...]``, cells take one time step ``[B, ...]``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import norse.torch as stock
import torch
from norse.torch.functional import lif
from norse.torch.functional.leaky_integrator import LIState, li_feed_forward_step
from norse.torch.functional.lif import LIFFeedForwardState, lif_feed_forward_step
from norse.torch.module.snn import SNN, SNNCell
from torch import nn

from ..compat.norse import hands_over, input_drives_membrane_at_once, surrogate_of
from ..config import Options, config
from ..deferred import settled
from ..dynamics import LI as LI_DYNAMICS
from ..dynamics import LIF as LIF_DYNAMICS
from ..lanes import steps as lane_steps
from ..native import DTYPES
from ..neuron_tape import computing_dtype, run_neuron
from ..recorder import Plan
from ..reports import densities_of
from ..scans import filled
from ..surrogate import NO_GRADIENT
from . import synapses
from .adapter import OPTIONS, Adapter, truncate
from .fallback import mode_problem, report, tensor_problem
from .plans import PlanCache

LIBRARY = "norse"
__all__ = ["LI", "LICell", "LIF", "LIFCell"]

_LIF_NAMES = ("tau_mem_inv", "tau_syn_inv", "v_leak", "v_th", "v_reset")
_LI_NAMES = _LIF_NAMES[:3]


def options_of(module: Any) -> Options | None:
    """Options in force for a module, None if neither it nor its library is enabled; swapped classes always are."""
    if config.suspended:
        return None
    own = module.__dict__.get(OPTIONS) or config.libraries.get(LIBRARY)
    return own or (config.defaults if isinstance(module, _SWAPPED) else None)


def _sequence_forward(self: Any, input_tensor: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    """Sequence ``[T, B, ...]`` -> output ``[T, B, ...]`` and the last state (all states with ``record_states``)."""
    return _forward(self, _stock_sequence, input_tensor, state, sequence=True)


def _cell_forward(self: Any, input_tensor: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    """One time step ``[B, ...]`` -> output and state of the same shape."""
    return _forward(self, SNNCell.forward, input_tensor, state, sequence=False)


def _stock_sequence(self: Any, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    return SNN.forward(self, settled(x), state)


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
    if not (sequence or options.fuse_steps) and _is_lif(self):
        return host(self, x, state)  # only Norse's own graph has the gradient at a spike with its part from the reset
    if not sequence and isinstance(state, (LIFFeedForwardState, LIState)):
        done = lane_steps.neuron(self, options, x, *state)
        if done is not None:
            return done[0], type(state)(*done[1:])
    problem = _problem(self, x, sequence)
    if problem is None:
        given = state is not None
        state = state if given else _on_device(self.state_fallback(x), x.device)
        plan, problem = _plan_of(self, options, x.shape[1:] if sequence else x.shape, x, state, given)
    if problem is not None:
        report(self, problem)
        return host(self, x, state)
    if plan is None or not _differentiable(plan, x, state, x.shape[0] if sequence else 1):
        return host(self, x, state)
    if type(self) in _SWAPPED:
        synapses.switch("norse classes", True)
    synapses.learn_source(x, self, options_of, _takes_over if sequence else None)
    lane_steps.prepare()
    record = sequence and self.record_states
    result = run_neuron(plan, x, [state.v, state.i], x.shape[0] if sequence else None, record)
    v, i = result.recorded if record else result.finals
    kind = LIFFeedForwardState if plan.dynamics is LIF_DYNAMICS else LIState
    return result.output, kind(v=v, i=i)


def _on_device(state: Any, device: torch.device) -> Any:
    """Norse's own initial state. Its membrane may be a scalar on the CPU, whose gradient one would have to wait for."""
    v = state.v
    if v.device == device or v.dim():
        return state
    return state._replace(v=filled(v, v.shape, v.dtype, device).requires_grad_(v.requires_grad))


def _problem(module: Any, x: torch.Tensor, sequence: bool) -> str | None:
    """Why this call must run the host's code, as far as it does not depend on parameters and state."""
    if type(module) not in _KINDS:
        return f"it is a subclass of {type(module).__mro__[1].__name__}"
    if x.is_sparse:
        return "sparse COO inputs have other gradients in Norse"
    problem = tensor_problem(x) or mode_problem(x.device)
    if problem is not None:
        return problem
    if not x.numel() or (sequence and x.dim() == 0):
        return "the input is empty"
    if module.activation is not _KINDS[type(module)]:
        return "its activation is not the library's feed-forward step"
    if _is_lif(module) and not input_drives_membrane_at_once():
        return "this version of Norse orders the LIF step differently"
    return None


def _differentiable(plan: Plan, x: torch.Tensor, state: Any, steps: int) -> bool:
    """Whether all outputs require grad; a step without gradients, and the first with them, may be left to Norse."""
    tau_mem_inv, tau_syn_inv, v_leak, *spiking = plan.parameters
    at_once = [x, state.v, state.i, tau_mem_inv, v_leak, *spiking[: int(plan.differentiable_output)]]
    if any(t.requires_grad for t in at_once):
        return True
    # The synaptic time constant and the reset act on the next step only.
    return steps > 1 and any(t.requires_grad for t in (tau_syn_inv, *spiking[1:]))


def _is_lif(module: Any) -> bool:
    return isinstance(module, (stock.LIF, stock.LIFCell))


# ---------------------------------------------------------------------------------------------------- plans

_plans = PlanCache()


def _plan_of(module: Any, options: Options, shape: torch.Size, x: torch.Tensor, state: Any,
             given: bool) -> tuple[Plan | None, str | None]:
    """The plan of a module, made anew whenever something it depends on changed; or why there is none.

    Args:
        given: whether the user gave the state, rather than Norse's default.
    """
    p = module.p
    tensors = [getattr(p, name) for name in (_LIF_NAMES if _is_lif(module) else _LI_NAMES)]
    if not all(isinstance(t, torch.Tensor) for t in (*tensors, state.v, state.i)):
        return None, "its parameters or states are not all tensors"
    dtype = computing_dtype(x, [state.i])
    problem = _state_problem(shape, dtype, x, state) or _dtype_problem(shape, dtype, x, state, tensors, given)
    if problem is not None:
        return None, problem
    method, alpha = getattr(p, "method", ""), getattr(p, "alpha", 0.0)
    watched = [t for t in (*tensors, alpha, module.dt) if isinstance(t, torch.Tensor)]
    if any(t.is_inference() for t in watched):
        return None, "its parameters were made in inference mode"
    key = (id(options), shape, dtype, x.device, method,
           *((id(t), t._version, t.requires_grad, t.dtype, t.shape) for t in watched),
           *(v for v in (alpha, module.dt) if not isinstance(v, torch.Tensor)))
    return _plans.find(module, key, (options, watched),
                       lambda: _new_plan(module, options, shape, dtype, x, tensors, method, alpha))


def _new_plan(module: Any, options: Options, shape: torch.Size, dtype: torch.dtype, x: torch.Tensor,
              tensors: list[torch.Tensor], method: str, alpha: Any) -> tuple[Plan | None, str | None]:
    problem = _parameter_problem(shape, dtype, x, tensors, alpha)
    return (None if problem else _make_plan(module, options, tensors, method, alpha)), problem


def _state_problem(shape: torch.Size, dtype: torch.dtype, x: torch.Tensor, state: Any) -> str | None:
    problem = tensor_problem(x, state.v, state.i)
    if problem is not None:
        return f"state: {problem}"
    if dtype not in DTYPES:
        return f"a state of {dtype} is not supported, only float32 and float64"
    if state.v.dim() and torch.promote_types(state.v.dtype, dtype) != dtype:
        return f"v of {state.v.dtype} and i of {dtype} mix dtypes"
    if not all(_broadcasts(s, shape) for s in state):
        return f"a state of shape {tuple(state.v.shape)} does not broadcast to the input of shape {tuple(shape)}"
    return None


def _dtype_problem(shape: torch.Size, dtype: torch.dtype, x: torch.Tensor, state: Any, tensors: list[torch.Tensor],
                   given: bool) -> str | None:
    """Why mixed dtypes would round otherwise than in Norse, where each operation has the dtype of its operands."""
    v, v_leak = state.v, tensors[2]
    if not shape and any(t.dtype is not dtype for t in (x, *state, *tensors)):
        return "a step without dimensions mixes dtypes"
    if v.dtype is dtype and v_leak.dtype is dtype:
        return None
    exact = torch.result_type(v_leak, v) is dtype  # the dtype of v_leak - v
    if exact or (not given and bool((v_leak.double() == v.double()).all())):  # 0 in any dtype
        return None
    return f"v of {v.dtype} and v_leak of {v_leak.dtype} would be subtracted in another dtype than {dtype}"


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


def _make_plan(module: Any, options: Options, tensors: list[torch.Tensor], method: str, alpha: Any) -> Plan | None:
    dt = module.dt

    def derive() -> tuple[torch.Tensor, ...]:
        return dt * tensors[0], -dt * tensors[1], *tensors[2:]

    own = module.__dict__
    watched = [t for t in (*tensors, alpha, dt) if isinstance(t, torch.Tensor)]
    guard = (*(("attribute", name, own.get(name)) for name in ("p", "dt", "activation")),
             *(("tensor", t) for t in watched))
    shared: dict[str, Any] = {"densities": densities_of(module), "guard": guard,
                              "module": weakref.ref(module) if own.get("p") is module.p else None}
    if not _is_lif(module):
        return Plan(LI_DYNAMICS, NO_GRADIENT, options, tuple(tensors), derive, **shared)
    surrogate = surrogate_of(method, float(alpha.detach() if isinstance(alpha, torch.Tensor) else alpha))
    if surrogate is None:  # Norse raises its own error
        return None
    return Plan(LIF_DYNAMICS, surrogate.within(options.cutoff), options, tuple(tensors), derive,
                differentiable_output=surrogate is not NO_GRADIENT, **shared)


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


_SWAPPED = (LIF, LIFCell, LI, LICell)
_FORWARDS = {stock.LIF: _sequence_forward, stock.LIFCell: _cell_forward, stock.LI: _sequence_forward,
             stock.LICell: _cell_forward}
# The step function each class must have for the kernels to be the same thing.
_KINDS = {kind: lif_feed_forward_step if issubclass(kind, (stock.LIF, stock.LIFCell)) else li_feed_forward_step
          for kind in (*_FORWARDS, *_SWAPPED)}

_models: weakref.WeakSet[Any] = weakref.WeakSet()  # layers of models that are enabled on their own


def _refresh() -> None:
    """Patches Norse's own classes if the library or some model is enabled, else restores them."""
    wanted = LIBRARY in config.libraries or len(_models) > 0
    for kind, forward in _FORWARDS.items():
        if wanted:
            kind.forward = forward
        elif "forward" in vars(kind):
            del kind.forward  # inherited from SNN or SNNCell again
    synapses.switch(LIBRARY, wanted)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in _KINDS]


@contextmanager
def _truncated(_model: nn.Module, cutoff: float) -> Iterator[None]:
    """Norse's threshold derivatives multiplied by 1[|U - v_th| < cutoff], for comparisons; for the whole process."""
    original = lif.threshold
    lif.threshold = lambda x, *rest: truncate(lambda y: original(y, *rest), x, cutoff)
    try:
        yield
    finally:
        lif.threshold = original


adapter = Adapter(LIBRARY, _refresh, _layers, _models, _truncated, _is_lif)
