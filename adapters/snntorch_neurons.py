"""What each supported class of snnTorch is: its states, its parameters, and the dynamics they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import snntorch as snn
import torch
from torch import Tensor

from ..dynamics import Dynamics
from ..snntorch_dynamics import DELTA_LEAKY, alpha, lapicque, leaky, rleaky, rsynaptic, synaptic
from .plans import values_of

Derived = tuple[Tensor, ...]

_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
_RESET_VALUES = ("subtract", "zero", "none")
_FIRING = ("threshold", "graded_spikes_factor")


@dataclass(frozen=True, eq=False)
class Kind:
    """A class of neurons.

    Args:
        states: names of its buffers that are states, in the order in which it takes and returns them.
        order: where each state of the dynamics is among them.
        parameters: names of the parameters or buffers that its step reads.
        constants: those of them that may not require grad, each with the reason.
        attributes: names of its attributes that are numbers, which its step reads as well.
        describe: ``(reset, late) -> dynamics``.
        derive: the parameters of the dynamics from the tensors by name.
        host: its ``forward``.
        methods: the methods that its step calls, as the library has them.
        delays: whether it has ``reset_delay``.
    """

    states: tuple[str, ...]
    order: tuple[int, ...]
    parameters: tuple[str, ...]
    describe: Callable[[str, bool], Dynamics]
    derive: Callable[[Mapping[str, Tensor]], Derived]
    host: Callable[..., Any]
    methods: Mapping[str, Any]
    delays: bool = True
    constants: Mapping[str, str] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()

    @property
    def recurrent(self) -> bool:
        """Whether its spikes drive its next step: then they are the first of its states."""
        return self.states[0] == "spk"

    @cached_property
    def _in_order(self) -> bool:
        """Whether its states have the order of the dynamics: most do, and this is asked in every step."""
        return self.order == tuple(range(len(self.order)))

    def inner(self, states: Sequence[Any]) -> Sequence[Any]:
        """States in the order of the dynamics."""
        return states if self._in_order else [states[place] for place in self.order]

    def outer(self, states: Sequence[Any]) -> Sequence[Any]:
        """States in the order of the class, from that of the dynamics."""
        return states if self._in_order else [states[self.order.index(place)] for place in range(len(states))]

    def find(self, module: Any, name: str) -> Any:
        """A parameter or buffer."""
        parameters = module._parameters
        return parameters[name] if name in parameters else module._buffers.get(name)

    def late_reset(self, module: Any) -> str:
        """The correction after firing: it asks reset_mechanism_val at run time, the state update was chosen before."""
        if not self.delays or module.reset_delay:
            return "none"
        return _RESET_VALUES[int(values_of(module.reset_mechanism_val))]

    def inhibits(self, module: Any) -> bool:
        """Whether only one neuron of each row may spike."""
        return bool(module.inhibition and self.methods)

    def replaced(self, module: Any) -> str | None:
        """What was replaced of the methods of its step, or None."""
        for name, original in self.methods.items():
            if getattr(type(module), name) is not original or name in module.__dict__:
                return f"its method {name} was replaced"
        if not self.methods:
            return None
        function = module.__dict__["state_function"]
        update: str = getattr(function, "__name__", "")
        if getattr(function, "__self__", None) is not module or update not in _RESETS:
            return "its state_function was replaced"
        if function.__func__ is not self.methods[update]:
            return "its state_function was replaced"
        if self.late_reset(module) not in ("none", _RESETS[update]):
            return "reset_mechanism was changed after construction: the state update and the late reset disagree"
        return None

    def dynamics(self, module: Any) -> Dynamics:
        """The dynamics of a module nothing of which was replaced."""
        if not self.methods:
            return self.describe("none", False)
        return self.describe(_RESETS[module.state_function.__name__], self.late_reset(module) != "none")


def _kind(cls: Any, states: tuple[str, ...], parameters: tuple[str, ...], describe: Any, derive: Any, *,
          methods: tuple[str, ...] = (), delays: bool = True, constants: Mapping[str, str] | None = None) -> Kind:
    called = ("fire", "fire_inhibition", "mem_reset", "_base_state_function", *_RESETS, *methods)
    originals = {name: getattr(cls, name) for name in called}
    inner = (len(states) - 1, *range(len(states) - 1))  # the membrane first
    if states[0] == "spk":  # and the spikes last
        inner = (*inner[:1], *inner[2:], 0)
    return Kind(states, inner, parameters, describe, derive, cls.forward, originals, delays, constants or {})


def _leaky(p: Mapping[str, Tensor]) -> Derived:
    return p["beta"].clamp(0, 1), p["threshold"], p["graded_spikes_factor"]


def _synaptic(p: Mapping[str, Tensor]) -> Derived:
    return *_leaky(p), p["alpha"].clamp(0, 1)


def _lapicque(p: Mapping[str, Tensor]) -> Derived:
    r, c, dt = p["R"], p["C"], p["time_step"]
    return 1 - (dt / (r * c)), p["threshold"], p["graded_spikes_factor"], r, 1 / (r * c), dt


def _alpha(p: Mapping[str, Tensor]) -> Derived:
    a, b = p["alpha"].clamp(0, 1), p["beta"].clamp(0, 1)
    tau = torch.log(a) / (torch.log(b) - torch.log(a)) + 1
    return tau, p["threshold"], p["graded_spikes_factor"], a, b


# Unlike Leaky, it does not clamp beta, has no reset, and ignores inhibition, state_quant and graded spikes.
_DELTA_LEAKY: dict[type, Kind] = {} if not hasattr(snn, "DeltaLeaky") else {
    snn.DeltaLeaky: Kind(("mem",), (0,), ("beta",), lambda *_: DELTA_LEAKY,
                         lambda p: (p["beta"], p["delta_threshold"]), snn.DeltaLeaky.forward, {}, delays=False,
                         attributes=("delta_threshold",))}
_LEARNED_RC = "it is computed from a learnable beta once, when the layer is made"

KINDS: dict[type, Kind] = {
    snn.Leaky: _kind(snn.Leaky, ("mem",), ("beta", *_FIRING), leaky, _leaky),
    snn.Synaptic: _kind(snn.Synaptic, ("syn", "mem"), ("alpha", "beta", *_FIRING), synaptic, _synaptic,
                        methods=("_base_state_reset_zero",)),
    snn.Lapicque: _kind(snn.Lapicque, ("mem",), ("R", "C", "time_step", *_FIRING), lambda reset, _: lapicque(reset),
                        _lapicque, delays=False, constants=dict.fromkeys(("R", "C", "time_step"), _LEARNED_RC)),
    snn.Alpha: _kind(snn.Alpha, ("syn_exc", "syn_inh", "mem"), ("alpha", "beta", *_FIRING),
                     lambda reset, _: alpha(reset), _alpha, methods=("_base_state_reset_sub_function",), delays=False),
    snn.RLeaky: _kind(snn.RLeaky, ("spk", "mem"), ("beta", *_FIRING), rleaky, _leaky),
    snn.RSynaptic: _kind(snn.RSynaptic, ("spk", "syn", "mem"), ("alpha", "beta", *_FIRING),
                         lambda reset, _: rsynaptic(reset), _synaptic, methods=("_base_state_reset_zero",)),
    **_DELTA_LEAKY,
}
