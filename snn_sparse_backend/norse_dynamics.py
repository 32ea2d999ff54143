"""Norse's neuron models as plain descriptions; the arithmetic is in ``csrc/neurons/``."""

from __future__ import annotations

from dataclasses import replace

from .dynamics import Dynamics, Trace, flow_of, flows_of

LIF = Dynamics(
    name="LIF",
    model="kLif",
    states=("v", "i"),
    parameters=("tau_mem", "tau_syn", "v_leak", "v_th", "v_reset"),
    firing=flow_of("x v i tau_mem v_leak v_th"),
    flows=flows_of("spike", "spike x v i tau_mem v_leak v_reset", "x i tau_syn"),
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
    flows=flows_of("x v i tau_mem v_leak", "x v i tau_mem v_leak", "x i tau_syn"),
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
        firing=flow_of("x v tau_mem v_leak v_th"),
        flows=flows_of("spike", "spike x v tau_mem v_leak " + ("v_reset" if to_value else "v_th")),
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
    flows=flows_of("x v tau_mem v_leak", "x v tau_mem v_leak"),
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
    firing=flow_of("x v v_th"),
    flows=flows_of("spike", "spike x v v_reset"),
    threshold=0,
    attached_reset=True,
)

LSNN = Dynamics(
    name="LSNN",
    model="kLsnn",
    states=("v", "i", "b"),
    parameters=("tau_mem", "tau_syn", "v_leak", "tau_adapt", "v_th", "v_reset", "beta"),
    firing=flow_of("v i b tau_mem v_leak tau_adapt v_th"),
    flows=flows_of("spike", "spike v i tau_mem v_leak v_reset", "x i tau_syn", "spike b tau_adapt v_th beta"),
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
    firing=flow_of("x v i tau_mem v_leak v_th delta_T"),
    flows=flows_of("spike", "spike x v i tau_mem v_leak v_th v_reset delta_T", "x i tau_syn"),
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
    firing=flow_of("x v i a tau_mem v_leak v_th delta_T"),
    flows=flows_of("spike", "spike x v i a tau_mem v_leak v_th v_reset delta_T", "x i tau_syn",
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
    firing=flow_of("x v i z tau_mem v_leak v_th weight"),
    flows=flows_of("spike", "x v i z tau_mem v_leak v_reset weight", "x i z tau_syn weight", "spike"),
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
    flows=flows_of("spike", "v i tau_mem v_leak v_reset", "x i z tau_syn weight", "b tau_adapt v_th beta", "spike"),
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
    firing=LIF_EX.firing | flow_of("z weight"),
    flows=flows_of("spike", "spike x v i z tau_mem v_leak v_th v_reset delta_T weight", "x i z tau_syn weight",
                   "spike"),
    recurrent=True,
)

LIF_ADEX_RECURRENT = replace(
    LIF_ADEX,
    name="LIFAdExRecurrent",
    model="kLifAdexRecurrent",
    states=(*LIF_ADEX.states, "z"),
    firing=LIF_ADEX.firing | flow_of("z weight"),
    flows=flows_of("spike", "spike x v i a z tau_mem v_leak v_th v_reset delta_T weight", "x i z tau_syn weight",
                 "spike v a v_leak tau_ada adaptation_current adaptation_spike", "spike"),
    recurrent=True,
)

LIF_REFRAC = Dynamics(
    name="LIFRefrac",
    model="kLifRefrac",
    states=("v", "i", "rho"),
    parameters=(*LIF.parameters, "rho_reset"),
    firing=flow_of("x v i rho tau_mem v_leak v_th"),
    flows=flows_of("spike", "spike x v i tau_mem v_leak v_reset", "x i tau_syn", "spike rho rho_reset"),
    threshold=3,
    attached_reset=True,
    traces=(*LIF.traces, Trace("v before the step", always=True), Trace("rho before the step", always=True)),
    refractory=flow_of("rho"),
)

LIF_REFRAC_RECURRENT = Dynamics(
    name="LIFRefracRecurrent",
    model="kLifRefracRecurrent",
    states=("v", "i", "rho", "z"),
    parameters=LIF_REFRAC.parameters,
    firing=flow_of("x v i rho z tau_mem v_leak v_th weight"),
    flows=flows_of("spike", "refractory x v i z tau_mem v_leak v_reset weight", "x i z tau_syn weight",
                 "spike rho rho_reset", "spike"),
    threshold=3,
    attached_reset=True,
    traces=LIF_REFRAC.traces,
    refractory=LIF_REFRAC.refractory,
    recurrent=True,
)
