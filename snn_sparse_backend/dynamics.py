"""What a plain description of a neuron model says; their arithmetic is in ``csrc/neurons/``, one struct a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def flows_of(*flows: str) -> tuple[frozenset[str], ...]:
    return tuple(flow_of(flow) for flow in flows)


def flow_of(names: str) -> frozenset[str]:
    return frozenset(names.split())
