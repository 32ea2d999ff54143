"""Plain descriptions of neuron models; their arithmetic is in ``csrc/neurons/``, one struct a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

INPUT, SPIKE, REFRACTORY = "x", "spike", "refractory"
WEIGHT, BIAS = "weight", "bias"  # of the recurrence


@dataclass(frozen=True)
class Trace:
    """A value of every site and step that the struct can record besides the membrane potential.

    Args:
        name: for the reader.
        parameters: indices of the parameters whose gradient needs it.
        always: backward needs it whatever the parameters.
        given: torch computes it before the step, and the struct reads it.
    """

    name: str
    parameters: tuple[int, ...] = ()
    always: bool = False
    given: bool = False


@dataclass(frozen=True)
class Dynamics:
    """A neuron model as the kernels know it.

    Args:
        name: for messages, and the name of the autograd node.
        model: enumerator of ``SnnModel`` in ``csrc/abi.h``.
        states: names of the state variables that a step takes and returns, membrane potential first.
        parameters: names of the parameters, in the order of the struct.
        firing: what the spike of a step is computed from as autograd sees it: the input ``INPUT``, states before the
            step, parameters, ``WEIGHT`` and ``BIAS``.
        flows: the same of the output, and of each state after a step; these may depend on the spike as well, ``SPIKE``,
            or on who is refractory, ``REFRACTORY``.
        spikes: whether it has a threshold comparison (an integrator returns its membrane instead).
        threshold: index of the firing threshold among the parameters.
        reset: enumerator of ``SnnReset``.
        late_reset: snnTorch's ``reset_delay=False``.
        attached_reset: whether the reset passes gradients on to the spike, so that the gradient at the spike of one
            step is carried inside the node, like that at its membrane.
        fires_from_state: a step's spikes are computed from the very membrane it returns.
        reset_is_recorded: the reset decision is taken from the membrane before the step (it is its own raster then).
        needs_membrane: parameters whose gradient needs the membrane potential of every site and step.
        traces: in the order of the struct.
        constants: parameters that have no gradient.
        refractory: what it is computed from who is refractory, by a threshold whose surrogate derivative is wanted at
            every site, as is the membrane then; empty where nobody ever is.
        recurrent: the spikes of a step are multiplied by a weight and drive the next. Then they are the last of the
            states, which the kernels do not have among theirs.
    """

    name: str
    model: str
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    firing: frozenset[str]
    flows: tuple[frozenset[str], ...]
    spikes: bool = True
    threshold: int = 1
    reset: str = "kSubtract"
    late_reset: bool = False
    attached_reset: bool = False
    fires_from_state: bool = False
    reset_is_recorded: bool = False
    needs_membrane: tuple[int, ...] = ()
    traces: tuple[Trace, ...] = ()
    constants: tuple[int, ...] = ()
    refractory: frozenset[str] = frozenset()
    recurrent: bool = False

    @property
    def carried(self) -> tuple[str, ...]:
        """The states that the kernels carry from step to step."""
        return self.states[:-1] if self.recurrent else self.states

    @property
    def inputs_of_node(self) -> tuple[str, ...]:
        """What the autograd node of a sequence has as its inputs, before those of the steps."""
        return (*self.states, *self.parameters, *((WEIGHT, BIAS) if self.recurrent else ()))

    def _flows(self, differentiable: bool) -> list[frozenset[str]]:
        """What output and states are computed from, thresholds resolved; these may have no gradient at all."""
        flows = _resolved(self.flows, SPIKE, self.firing if differentiable else frozenset())
        if not self.refractory:
            return flows
        return _resolved(flows, REFRACTORY, self.refractory if differentiable else frozenset())

    def reached(self, last_output: int, last_states: Sequence[int],
                differentiable: bool = True) -> tuple[set[str], int]:
        """Which of the node's inputs a gradient reaches at all, and of how many steps the input; the others get None,
        not zeros.

        Args:
            last_output: last step (from 0) whose output received a gradient, -1 if none did.
            last_states: the same for each state.
            differentiable: whether spikes pass gradients on.
        """
        flows = self._flows(differentiable)
        lasts = _brought_together([last_output, *last_states], len(self.states) + 1)
        found: set[str] = set()
        live: frozenset[str] = frozenset()
        without = 0  # last steps whose input is not reached
        for step in range(max(lasts), -1, -1):
            named = zip(("", *self.states), lasts, flows, strict=True)
            live = frozenset().union(*(flow for name, last, flow in named if last == step or name in live))
            without += INPUT not in found | live
            found |= live
        steps = max(last_output, *last_states) + 1
        return (found - set(self.states)) | (live & set(self.states)), steps - without

    def attached(self, given: Sequence[bool], steps: int = 1, differentiable: bool = True) -> list[bool]:
        """Whether the output and each state require grad after some steps.

        Args:
            given: whether the input and each of ``inputs_of_node`` do.
            steps: after how many steps; the output counts if it does after any of them.
            differentiable: whether spikes pass gradients on.
        """
        flows = self._flows(differentiable)
        requiring = {name for name, requires in zip((INPUT, *self.inputs_of_node), given, strict=True)
                     if requires}
        constant = requiring - set(self.states)
        output = False
        for _ in range(min(steps, len(self.states) + 1)):
            after = [bool(flow & requiring) for flow in flows]
            output |= after[0]
            requiring = constant | {name for name, requires in zip(self.states, after[1:], strict=True) if requires}
        return [output, *after[1:]]


def _resolved(flows: Sequence[frozenset[str]], name: str, through: frozenset[str]) -> list[frozenset[str]]:
    """Flows with something else in the place of a name."""
    return [(flow - {name}) | through if name in flow else flow for flow in flows]


def _brought_together(lasts: list[int], gap: int) -> list[int]:
    """The same order of steps with at most ``gap`` between two of them: what reaches further, reaches everything."""
    steps = sorted({last for last in lasts if last >= 0})
    moved, before, now = {-1: -1}, -1, -1
    for step in steps:
        now += min(step - before, gap)
        moved[step], before = now, step
    return [moved[last] for last in lasts]


def _flows(*flows: str) -> tuple[frozenset[str], ...]:
    return tuple(_flow(flow) for flow in flows)


def _flow(names: str) -> frozenset[str]:
    return frozenset(names.split())


# ---------------------------------------------------------------------------------------------------- snnTorch

_FACTOR = "graded_spikes_factor"
RESETS = {"subtract": "kSubtract", "zero": "kZero", "none": "kNone"}


def _reset_options(reset: str, late_reset: bool) -> dict[str, object]:
    """A late reset "to none" does nothing, so it is described as an ordinary one."""
    late = late_reset and reset != "none"
    return {"reset": RESETS[reset], "late_reset": late, "fires_from_state": not late,
            "reset_is_recorded": reset != "none"}


def _membrane_flow(reset: str, late_reset: bool) -> str:
    """What the membrane that a step returns depends on because of its reset."""
    late = late_reset and reset != "none"
    return "threshold " * (reset == "subtract") + f"spike {_FACTOR}" * late


def leaky(reset: str, late_reset: bool) -> Dynamics:
    """snnTorch ``Leaky``. ``reset`` is ``"subtract"``, ``"zero"`` or ``"none"``."""
    return Dynamics(
        name="Leaky",
        model="kLeaky",
        states=("mem",),
        parameters=("beta", "threshold", _FACTOR),
        firing=_flow("x mem beta threshold"),
        flows=_flows(f"spike {_FACTOR}", f"x mem beta {_membrane_flow(reset, late_reset)}"),
        needs_membrane=(0,),
        **_reset_options(reset, late_reset),  # type: ignore[arg-type]
    )


def synaptic(reset: str, late_reset: bool) -> Dynamics:
    """snnTorch ``Synaptic``."""
    return Dynamics(
        name="Synaptic",
        model="kSynaptic",
        states=("mem", "syn"),
        parameters=("beta", "threshold", _FACTOR, "alpha"),
        firing=_flow("x mem syn alpha beta threshold"),
        flows=_flows(f"spike {_FACTOR}", f"x mem syn alpha beta {_membrane_flow(reset, late_reset)}", "x syn alpha"),
        needs_membrane=(0,),
        traces=(Trace("syn", (3,)),),
        **_reset_options(reset, late_reset),  # type: ignore[arg-type]
    )


def rleaky(reset: str, late_reset: bool) -> Dynamics:
    """snnTorch ``RLeaky`` with a recurrence from all neurons to all."""
    return Dynamics(
        name="RLeaky",
        model="kRLeaky",
        states=("mem", "spk"),
        parameters=("beta", "threshold", _FACTOR),
        firing=_flow("x mem spk beta threshold weight bias"),
        flows=_flows(f"spike {_FACTOR}", f"x mem spk beta weight bias {_membrane_flow(reset, late_reset)}",
                     f"spike {_FACTOR}"),
        needs_membrane=(0,),
        recurrent=True,
        **_reset_options(reset, late_reset),  # type: ignore[arg-type]
    )


def rsynaptic(reset: str) -> Dynamics:
    """snnTorch ``RSynaptic`` with a recurrence from all neurons to all."""
    return Dynamics(
        name="RSynaptic",
        model="kRSynaptic",
        states=("mem", "syn", "spk"),
        parameters=("beta", "threshold", _FACTOR, "alpha"),
        firing=_flow("x mem syn spk alpha beta threshold weight bias"),
        flows=_flows(f"spike {_FACTOR}", f"x mem syn spk alpha beta weight bias {_membrane_flow(reset, False)}",
                     "x syn spk alpha weight bias", f"spike {_FACTOR}"),
        needs_membrane=(0,),
        traces=(Trace("syn", (3,)),),
        recurrent=True,
        **_reset_options(reset, False),  # type: ignore[arg-type]
    )


def lapicque(reset: str) -> Dynamics:
    """snnTorch ``Lapicque``."""
    return Dynamics(
        name="Lapicque",
        model="kLapicque",
        states=("mem",),
        parameters=("1 - time_step / (R * C)", "threshold", _FACTOR, "R", "1 / (R * C)", "time_step"),
        firing=_flow("x mem threshold"),
        flows=_flows(f"spike {_FACTOR}", f"x mem {_membrane_flow(reset, False)}"),
        constants=(0, 3, 4, 5),
        **_reset_options(reset, False),  # type: ignore[arg-type]
    )


def alpha(reset: str) -> Dynamics:
    """snnTorch ``Alpha``."""
    return Dynamics(
        name="Alpha",
        model="kAlpha",
        states=("mem", "syn_exc", "syn_inh"),
        parameters=("tau", "threshold", _FACTOR, "alpha", "beta"),
        firing=_flow("x syn_exc syn_inh alpha beta tau threshold"),
        flows=_flows(f"spike {_FACTOR}", "x syn_exc syn_inh alpha beta tau",
                     f"x syn_exc alpha {_membrane_flow(reset, False)}", "x syn_inh beta"),
        traces=(Trace("syn_exc", (0, 3)), Trace("syn_inh", (0, 4))),
        **_reset_options(reset, False),  # type: ignore[arg-type]
    )


DELTA_LEAKY = Dynamics(
    name="DeltaLeaky",
    model="kDeltaLeaky",
    states=("mem",),
    parameters=("beta", "delta_threshold"),
    firing=_flow("x mem beta"),
    flows=_flows("spike", "x mem beta"),
    reset="kNone",
    traces=(Trace("mem", (0,)),),
    constants=(1,),
)

# ------------------------------------------------------------------------------------------------------- Norse

LIF = Dynamics(
    name="LIF",
    model="kLif",
    states=("v", "i"),
    parameters=("tau_mem", "tau_syn", "v_leak", "v_th", "v_reset"),
    firing=_flow("x v i tau_mem v_leak v_th"),
    flows=_flows("spike", "spike x v i tau_mem v_leak v_reset", "x i tau_syn"),
    threshold=3,
    attached_reset=True,
    needs_membrane=(0,),
    traces=(Trace("i before its decay", (0, 1)),),
)

LI = Dynamics(
    name="LI",
    model="kLi",
    states=("v", "i"),
    parameters=("tau_mem", "tau_syn", "v_leak"),
    firing=frozenset(),
    flows=_flows("x v i tau_mem v_leak", "x v i tau_mem v_leak", "x i tau_syn"),
    spikes=False,
    threshold=-1,
    needs_membrane=(0,),
    traces=(Trace("i before its decay", (0, 1)),),
)


def lif_box(reset: str) -> Dynamics:
    """Norse ``LIFBoxCell``. ``reset`` is ``"value"`` or ``"subtract"``."""
    to_value = reset == "value"
    return Dynamics(
        name="LIFBox",
        model="kLifBox",
        states=("v",),
        parameters=("tau_mem", "v_leak", "v_th", "v_reset"),
        firing=_flow("x v tau_mem v_leak v_th"),
        flows=_flows("spike", "spike x v tau_mem v_leak " + ("v_reset" if to_value else "v_th")),
        threshold=2,
        reset="kValue" if to_value else "kSubtract",
        attached_reset=True,
        needs_membrane=(0,),
        traces=(Trace("x", (0,)),),
    )


LI_BOX = Dynamics(
    name="LIBox",
    model="kLiBox",
    states=("v",),
    parameters=("tau_mem", "v_leak"),
    firing=frozenset(),
    flows=_flows("x v tau_mem v_leak", "x v tau_mem v_leak"),
    spikes=False,
    threshold=-1,
    needs_membrane=(0,),
    traces=(Trace("x", (0,)),),
)

IAF = Dynamics(
    name="IAF",
    model="kIaf",
    states=("v",),
    parameters=("v_th", "v_reset"),
    firing=_flow("x v v_th"),
    flows=_flows("spike", "spike x v v_reset"),
    threshold=0,
    attached_reset=True,
)

LSNN = Dynamics(
    name="LSNN",
    model="kLsnn",
    states=("v", "i", "b"),
    parameters=("tau_mem", "tau_syn", "v_leak", "tau_adapt", "v_th", "v_reset", "beta"),
    firing=_flow("v i b tau_mem v_leak tau_adapt v_th"),
    flows=_flows("spike", "spike v i tau_mem v_leak v_reset", "x i tau_syn", "spike b tau_adapt v_th beta"),
    threshold=4,
    attached_reset=True,
    needs_membrane=(0,),
    traces=(Trace("b after its decay", always=True), Trace("i before its decay", (0, 1))),
)

LIF_EX = Dynamics(
    name="LIFEx",
    model="kLifEx",
    states=("v", "i"),
    parameters=("tau_mem", "tau_syn", "v_leak", "v_th", "v_reset", "delta_T"),
    firing=_flow("x v i tau_mem v_leak v_th delta_T"),
    flows=_flows("spike", "spike x v i tau_mem v_leak v_th v_reset delta_T", "x i tau_syn"),
    threshold=3,
    attached_reset=True,
    needs_membrane=(0, 5),
    traces=(Trace("i before its decay", (0, 1)), Trace("exponential", always=True, given=True)),
)

LIF_ADEX = Dynamics(
    name="LIFAdEx",
    model="kLifAdex",
    states=("v", "i", "a"),
    parameters=(*LIF_EX.parameters, "tau_ada", "adaptation_current", "adaptation_spike"),
    firing=_flow("x v i a tau_mem v_leak v_th delta_T"),
    flows=_flows("spike", "spike x v i a tau_mem v_leak v_th v_reset delta_T", "x i tau_syn",
                 "spike v a v_leak tau_ada adaptation_current adaptation_spike"),
    threshold=3,
    attached_reset=True,
    needs_membrane=(0, 5, 6, 7),
    traces=(*LIF_EX.traces, Trace("a before the step", (0, 6))),
)

LIF_RECURRENT = Dynamics(
    name="LIFRecurrent",
    model="kLifRecurrent",
    states=("v", "i", "z"),
    parameters=LIF.parameters,
    firing=_flow("x v i z tau_mem v_leak v_th weight"),
    flows=_flows("spike", "x v i z tau_mem v_leak v_reset weight", "x i z tau_syn weight", "spike"),
    threshold=3,
    needs_membrane=(0,),
    traces=LIF.traces,
    recurrent=True,
)

LSNN_RECURRENT = Dynamics(
    name="LSNNRecurrent",
    model="kLsnnRecurrent",
    states=("v", "i", "b", "z"),
    parameters=LSNN.parameters,
    firing=LSNN.firing,
    flows=_flows("spike", "v i tau_mem v_leak v_reset", "x i z tau_syn weight", "b tau_adapt v_th beta", "spike"),
    threshold=4,
    needs_membrane=(0,),
    traces=LSNN.traces,
    recurrent=True,
)

LIF_EX_RECURRENT = replace(
    LIF_EX,
    name="LIFExRecurrent",
    model="kLifExRecurrent",
    states=(*LIF_EX.states, "z"),
    firing=LIF_EX.firing | _flow("z weight"),
    flows=_flows("spike", "spike x v i z tau_mem v_leak v_th v_reset delta_T weight", "x i z tau_syn weight", "spike"),
    recurrent=True,
)

LIF_ADEX_RECURRENT = replace(
    LIF_ADEX,
    name="LIFAdExRecurrent",
    model="kLifAdexRecurrent",
    states=(*LIF_ADEX.states, "z"),
    firing=LIF_ADEX.firing | _flow("z weight"),
    flows=_flows("spike", "spike x v i a z tau_mem v_leak v_th v_reset delta_T weight", "x i z tau_syn weight",
                 "spike v a v_leak tau_ada adaptation_current adaptation_spike", "spike"),
    recurrent=True,
)

LIF_REFRAC = Dynamics(
    name="LIFRefrac",
    model="kLifRefrac",
    states=("v", "i", "rho"),
    parameters=(*LIF.parameters, "rho_reset"),
    firing=_flow("x v i rho tau_mem v_leak v_th"),
    flows=_flows("spike", "spike x v i tau_mem v_leak v_reset", "x i tau_syn", "spike rho rho_reset"),
    threshold=3,
    attached_reset=True,
    traces=(*LIF.traces, Trace("v before the step", always=True), Trace("rho before the step", always=True)),
    refractory=_flow("rho"),
)

LIF_REFRAC_RECURRENT = Dynamics(
    name="LIFRefracRecurrent",
    model="kLifRefracRecurrent",
    states=("v", "i", "rho", "z"),
    parameters=LIF_REFRAC.parameters,
    firing=_flow("x v i rho z tau_mem v_leak v_th weight"),
    flows=_flows("spike", "refractory x v i z tau_mem v_leak v_reset weight", "x i z tau_syn weight",
                 "spike rho rho_reset", "spike"),
    threshold=3,
    attached_reset=True,
    traces=LIF_REFRAC.traces,
    refractory=LIF_REFRAC.refractory,
    recurrent=True,
)
