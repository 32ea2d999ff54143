"""What each supported class of Norse is: its states, its parameters, and the dynamics they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..dynamics import Dynamics
from ..norse_dynamics import (
    IAF,
    LI,
    LI_BOX,
    LIF,
    LIF_ADEX,
    LIF_ADEX_RECURRENT,
    LIF_EX,
    LIF_EX_RECURRENT,
    LIF_RECURRENT,
    LIF_REFRAC,
    LIF_REFRAC_RECURRENT,
    LSNN,
    LSNN_RECURRENT,
    lif_box,
)
from ..stepped import Precompute


def _if_there(name: str) -> Any:
    """A module of Norse; None if the installed version has none."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


_lif = import_module("norse.torch.functional.lif")
_refrac = import_module("norse.torch.functional.lif_refrac")
_li = import_module("norse.torch.functional.leaky_integrator")
_box = import_module("norse.torch.functional.lif_box")
_li_box = _if_there("norse.torch.functional.leaky_integrator_box")
_iaf = import_module("norse.torch.functional.iaf")
_lsnn = import_module("norse.torch.functional.lsnn")
_ex = import_module("norse.torch.functional.lif_ex")
_adex = import_module("norse.torch.functional.lif_adex")
_reset = _if_there("norse.torch.functional.reset")  # without it a box neuron resets to v_reset


@dataclass(frozen=True, eq=False)
class Kind:
    """A class of neurons.

    Args:
        state: the named tuple of its states.
        order: their names, in the order of the dynamics.
        parameters: names of the members of ``p`` that are parameters, in the order of the dynamics.
        dynamics: of a module's ``p``; None if there are none for it.
        activation: the step function that the kernels stand for.
        rates: parameters that the step multiplies by ``dt`` (1), by ``-dt`` (-1), or not at all (0).
        differences: pairs of parameter and state that the step subtracts before anything of the input's dtype joins.
        current: the state whose dtype counts beside the input's, as it is not that of the input by default.
        delayed: the input does not reach the output of its own step, so that the states alone give that its shape.
        weights: names of the module's own weights, of the input and of the spikes that drive it.
        initial: its first state for an input, where the module does not tell.
        precompute: of a module's ``p``: what torch computes from the membrane before each step.
    """

    state: Any
    order: tuple[str, ...]
    parameters: tuple[str, ...]
    dynamics: Callable[[Any], Dynamics | None]
    activation: Any
    rates: tuple[int, ...]
    differences: tuple[tuple[str, str], ...] = ()
    current: str | None = None
    delayed: bool = False
    weights: tuple[str, ...] = ()
    initial: Callable[[Any, Tensor], Any] | None = None
    precompute: Callable[[Any], Precompute] | None = None
    counter: ClassVar[str | None] = None  # the state that a refractory neuron counts with

    def core(self, p: Any) -> Any:
        """What has the method among the parameters of a module."""
        return p

    def tensors(self, p: Any) -> list[Any]:
        """The parameters of a module."""
        return [getattr(p, name) for name in self.parameters]

    def states(self, state: Any) -> list[Any]:
        """The states in a tuple, in the order of the dynamics."""
        return [getattr(state, name) for name in self.order]

    def tuple_of(self, states: Sequence[Tensor]) -> Any:
        """The tuple of states in the order of the dynamics."""
        return self.state(**dict(zip(self.order, states, strict=True)))

    def replaced(self, p: Any, values: dict[str, Any]) -> Any:
        """The parameters of a module with other values of some."""
        return p._replace(**values)

    @property
    def recurrent(self) -> bool:
        """Whether its spikes drive its next step."""
        return self.order[-1] == "z"

    def derive(self, tensors: Sequence[Tensor], dt: Any) -> tuple[Tensor, ...]:
        """The parameters of the dynamics."""
        factors = {1: dt, -1: -dt}
        return tuple(factors[rate] * t if rate else t for rate, t in zip(self.rates, tensors, strict=True))


@dataclass(frozen=True, eq=False)
class RefractoryKind(Kind):
    """A class whose states and parameters are a counter's, and in a tuple of their own, ``lif``, those of a LIF.

    Args:
        inner: that tuple of the states.
    """

    inner: Any = None
    counter: ClassVar[str | None] = "rho"
    own: ClassVar[tuple[str, str]] = ("rho", "rho_reset")

    def core(self, p: Any) -> Any:
        return p.lif

    def tensors(self, p: Any) -> list[Any]:
        return [getattr(p if name in self.own else p.lif, name) for name in self.parameters]

    def states(self, state: Any) -> list[Any]:
        return [getattr(state if name in self.own else state.lif, name) for name in self.order]

    def tuple_of(self, states: Sequence[Tensor]) -> Any:
        named = dict(zip(self.order, states, strict=True))
        return self.state(rho=named.pop("rho"), lif=self.inner(**named))

    def replaced(self, p: Any, values: dict[str, Any]) -> Any:
        own = {name: values[name] for name in self.own if name in values}
        return p._replace(**own, lif=p.lif._replace(**{k: v for k, v in values.items() if k not in own}))


def _box_dynamics(p: Any) -> Dynamics | None:
    if _reset is None:
        return lif_box("value")
    method = p.reset_method
    return next((lif_box(name) for name in ("value", "subtract") if method is getattr(_reset, f"reset_{name}")), None)


def _initial_of_linear(module: Any, x: Tensor) -> Any:
    """As in ``LILinearCell.forward``."""
    v = module.p.v_leak.detach()
    v.requires_grad = True
    return _li.LIState(v, torch.zeros((x.shape[0], module.hidden_size), device=x.device, dtype=x.dtype))


def _exponential(p: Any) -> Precompute:
    """As in ``lif_ex_step``."""
    threshold, sharpness = p.v_th.detach(), p.delta_T.detach()
    return lambda v: torch.exp((v - threshold) / sharpness)


_LEAK = (("v_leak", "v"),)
_WEIGHTS = ("input_weights", "recurrent_weights")

_LIF = Kind(_lif.LIFFeedForwardState, ("v", "i"), ("tau_mem_inv", "tau_syn_inv", "v_leak", "v_th", "v_reset"),
            lambda p: LIF, _lif.lif_feed_forward_step, (1, -1, 0, 0, 0), _LEAK, "i")
_LI = Kind(_li.LIState, ("v", "i"), ("tau_mem_inv", "tau_syn_inv", "v_leak"), lambda p: LI,
           _li.li_feed_forward_step, (1, -1, 0), _LEAK, "i")
_LI_LINEAR = replace(_LI, activation=_li.li_step, weights=_WEIGHTS[:1], initial=_initial_of_linear)
_LIF_BOX = Kind(_box.LIFBoxFeedForwardState, ("v",), ("tau_mem_inv", "v_leak", "v_th", "v_reset"), _box_dynamics,
                _box.lif_box_feed_forward_step, (1, 0, 0, 0))
_LI_BOX = Kind(getattr(_li_box, "LIBoxState", None), ("v",), ("tau_mem_inv", "v_leak"), lambda p: LI_BOX,
               getattr(_li_box, "li_box_feed_forward_step", None), (1, 0), _LEAK)
_IAF = Kind(_iaf.IAFFeedForwardState, ("v",), ("v_th", "v_reset"), lambda p: IAF, _iaf.iaf_feed_forward_step, (0, 0))
_LSNN = Kind(_lsnn.LSNNFeedForwardState, ("v", "i", "b"),
             ("tau_mem_inv", "tau_syn_inv", "v_leak", "tau_adapt_inv", "v_th", "v_reset", "beta"), lambda p: LSNN,
             _lsnn.lsnn_feed_forward_step, (1, -1, 0, 1, 0, 0, 0), (("v_leak", "v"), ("v_th", "b")), delayed=True)
_EX = Kind(_ex.LIFExFeedForwardState, ("v", "i"),
           ("tau_mem_inv", "tau_syn_inv", "v_leak", "v_th", "v_reset", "delta_T"), lambda p: LIF_EX,
           _ex.lif_ex_feed_forward_step, (1, -1, 0, 0, 0, 0), (*_LEAK, ("v_th", "v")), precompute=_exponential)
_ADEX = replace(_EX, state=_adex.LIFAdExFeedForwardState, order=("v", "i", "a"),
                parameters=(*_EX.parameters, "tau_ada_inv", "adaptation_current", "adaptation_spike"),
                dynamics=lambda p: LIF_ADEX, activation=_adex.lif_adex_feed_forward_step, rates=(*_EX.rates, 1, 0, 0))

_LIF_RECURRENT = replace(_LIF, state=_lif.LIFState, order=("v", "i", "z"), dynamics=lambda p: LIF_RECURRENT,
                         activation=_lif.lif_step, weights=_WEIGHTS)
_LSNN_RECURRENT = replace(_LSNN, state=_lsnn.LSNNState, order=("v", "i", "b", "z"), dynamics=lambda p: LSNN_RECURRENT,
                          activation=_lsnn.lsnn_step, weights=_WEIGHTS)
_EX_RECURRENT = replace(_EX, state=_ex.LIFExState, order=("v", "i", "z"), dynamics=lambda p: LIF_EX_RECURRENT,
                        activation=_ex.lif_ex_step, weights=_WEIGHTS)
_ADEX_RECURRENT = replace(_ADEX, state=_adex.LIFAdExState, order=("v", "i", "a", "z"),
                          dynamics=lambda p: LIF_ADEX_RECURRENT, activation=_adex.lif_adex_step, weights=_WEIGHTS)
_LIF_REFRAC = RefractoryKind(_refrac.LIFRefracFeedForwardState, (*_LIF.order, "rho"), (*_LIF.parameters, "rho_reset"),
                             lambda p: LIF_REFRAC, _refrac.lif_refrac_feed_forward_step, (*_LIF.rates, 0), _LEAK, "i",
                             inner=_LIF.state)
_LIF_REFRAC_RECURRENT = replace(_LIF_REFRAC, state=_refrac.LIFRefracState, inner=_LIF_RECURRENT.state,
                                order=(*_LIF_REFRAC.order, "z"), dynamics=lambda p: LIF_REFRAC_RECURRENT,
                                activation=_refrac.lif_refrac_step, weights=_WEIGHTS)


def host_class(name: str) -> Any:
    """A class of the installed version, None if it has none: some are not exported."""
    for place in ("norse.torch", "norse.torch.module.lif_box", "norse.torch.module.leaky_integrator_box"):
        try:
            found = getattr(import_module(place), name, None)
        except ImportError:
            continue
        if found is not None:
            return found
    return None


_NAMES = {
    "LIF": _LIF, "LIFCell": _LIF, "LI": _LI, "LICell": _LI, "LILinearCell": _LI_LINEAR, "LIFBox": _LIF_BOX,
    "LIFBoxCell": _LIF_BOX, "LIBox": _LI_BOX, "LIBoxCell": _LI_BOX, "IAF": _IAF, "IAFCell": _IAF, "LSNN": _LSNN,
    "LSNNCell": _LSNN, "LIFRecurrent": _LIF_RECURRENT, "LIFRecurrentCell": _LIF_RECURRENT,
    "LSNNRecurrent": _LSNN_RECURRENT, "LSNNRecurrentCell": _LSNN_RECURRENT, "LIFEx": _EX, "LIFExCell": _EX,
    "LIFAdEx": _ADEX, "LIFAdExCell": _ADEX, "LIFExRecurrent": _EX_RECURRENT, "LIFExRecurrentCell": _EX_RECURRENT,
    "LIFAdExRecurrent": _ADEX_RECURRENT, "LIFAdExRecurrentCell": _ADEX_RECURRENT,
    "LIFRefracCell": _LIF_REFRAC, "LIFRefracRecurrent": _LIF_REFRAC_RECURRENT,
    "LIFRefracRecurrentCell": _LIF_REFRAC_RECURRENT,
}
KINDS: dict[type, Kind] = {host: kind for name, kind in _NAMES.items() if (host := host_class(name)) is not None}
