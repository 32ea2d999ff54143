"""snnTorch's neuron models as plain descriptions; the arithmetic is in ``csrc/neurons/``."""

from __future__ import annotations

from .dynamics import Dynamics, Trace, flow_of, flows_of

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
        firing=flow_of("x mem beta threshold"),
        flows=flows_of(f"spike {_FACTOR}", f"x mem beta {_membrane_flow(reset, late_reset)}"),
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
        firing=flow_of("x mem syn alpha beta threshold"),
        flows=flows_of(f"spike {_FACTOR}", f"x mem syn alpha beta {_membrane_flow(reset, late_reset)}", "x syn alpha"),
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
        firing=flow_of("x mem spk beta threshold weight bias"),
        flows=flows_of(f"spike {_FACTOR}", f"x mem spk beta weight bias {_membrane_flow(reset, late_reset)}",
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
        firing=flow_of("x mem syn spk alpha beta threshold weight bias"),
        flows=flows_of(f"spike {_FACTOR}", f"x mem syn spk alpha beta weight bias {_membrane_flow(reset, False)}",
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
        firing=flow_of("x mem threshold"),
        flows=flows_of(f"spike {_FACTOR}", f"x mem {_membrane_flow(reset, False)}"),
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
        firing=flow_of("x syn_exc syn_inh alpha beta tau threshold"),
        flows=flows_of(f"spike {_FACTOR}", "x syn_exc syn_inh alpha beta tau",
                     f"x syn_exc alpha {_membrane_flow(reset, False)}", "x syn_inh beta"),
        traces=(Trace("syn_exc", (0, 3)), Trace("syn_inh", (0, 4))),
        **_reset_options(reset, False),  # type: ignore[arg-type]
    )


DELTA_LEAKY = Dynamics(
    name="DeltaLeaky",
    model="kDeltaLeaky",
    states=("mem",),
    parameters=("beta", "delta_threshold"),
    firing=flow_of("x mem beta"),
    flows=flows_of("spike", "x mem beta"),
    reset="kNone",
    traces=(Trace("mem", (0,)),),
    constants=(1,),
)
