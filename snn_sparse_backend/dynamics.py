"""Plain descriptions of neuron models; their arithmetic is in ``csrc/neurons/``, one struct a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dynamics:
    """A neuron model as the kernels know it.

    Args:
        name: for messages, and the name of the autograd node.
        model: enumerator of ``SnnModel`` in ``csrc/abi.h``.
        states: names of the state variables that a step takes and returns, membrane potential first.
        parameters: names of the parameters, in the order of the struct.
        spikes: whether it has a threshold comparison (an integrator returns its membrane instead).
        threshold: index of the firing threshold among the parameters.
        reset: enumerator of ``SnnReset``.
        late_reset: snnTorch's ``reset_delay=False``.
        attached_reset: whether the reset passes gradients on to the spike, so that the gradient at the spike of one
            step is carried inside the node, like that at its membrane.
        needs_membrane: parameters whose gradient needs the membrane potential of every site and step.
        needs_current: parameters whose gradient needs the synaptic current as well.
    """

    name: str
    model: str
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    spikes: bool = True
    threshold: int = 1
    reset: str = "kSubtract"
    late_reset: bool = False
    attached_reset: bool = False
    needs_membrane: tuple[int, ...] = ()
    needs_current: tuple[int, ...] = ()

    @property
    def fires_from_state(self) -> bool:
        """Whether a step's spikes are computed from the very membrane it returns."""
        return self.model == "kLeaky" and not self.late_reset

    @property
    def reset_is_recorded(self) -> bool:
        """Whether the reset decision is taken from the membrane before the step (it is its own raster then)."""
        return self.model == "kLeaky" and self.reset != "kNone"

    def reached(self, last_output: int, last_states: list[int]) -> tuple[list[bool], list[bool]]:
        """Which parameters and which initial states a gradient reaches at all; the others get None, not zeros.

        Args:
            last_output: last step (from 0) whose output received a gradient, -1 if none did.
            last_states: the same for each state.
        """
        membrane = max(last_output, last_states[0])  # last step whose comparison matters
        if self.model == "kLeaky":
            through_reset = self.reset == "kSubtract" or self.late_reset
            threshold = membrane >= 0 if through_reset else last_output >= 0
            factor = membrane >= 0 if self.late_reset else last_output >= 0
            return [membrane >= 0, threshold, factor], [membrane >= 0]
        carried = max(last_states[0], membrane - 1) >= 0  # the membrane after some reset matters
        synaptic = max(last_states[1], membrane - 1) >= 0
        states = [membrane >= 0, membrane >= 0 or last_states[1] >= 0]
        parameters = [membrane >= 0, synaptic, membrane >= 0]
        return (parameters + [membrane >= 0, carried] if self.spikes else parameters), states


def leaky(reset: str, late_reset: bool) -> Dynamics:
    """snnTorch ``Leaky``. ``reset`` is ``"subtract"``, ``"zero"`` or ``"none"``.

    A late reset "to none" does nothing, so it is described as an ordinary one.
    """
    late = late_reset and reset != "none"
    return Dynamics(
        name="Leaky",
        model="kLeaky",
        states=("mem",),
        parameters=("beta", "threshold", "graded_spikes_factor"),
        reset={"subtract": "kSubtract", "zero": "kZero", "none": "kNone"}[reset],
        late_reset=late,
        needs_membrane=(0,),
    )


LIF = Dynamics(
    name="LIF",
    model="kLif",
    states=("v", "i"),
    parameters=("dt * tau_mem_inv", "-dt * tau_syn_inv", "v_leak", "v_th", "v_reset"),
    threshold=3,
    attached_reset=True,
    needs_membrane=(0,),
    needs_current=(0, 1),
)

LI = Dynamics(
    name="LI",
    model="kLi",
    states=("v", "i"),
    parameters=("dt * tau_mem_inv", "-dt * tau_syn_inv", "v_leak"),
    spikes=False,
    threshold=-1,
    needs_membrane=(0,),
    needs_current=(0, 1),
)
