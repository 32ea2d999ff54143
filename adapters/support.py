"""The one table of what is supported: the documentation, the warnings and the tests are made from it.

``python -m snn_sparse_backend info --support`` prints it as Markdown, which is what ``docs/support.md`` has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .fallback import report

HOST_CODE = "the host library's own code"


@dataclass(frozen=True)
class Row:
    """Some classes of a library.

    Args:
        names: of the classes; an installed version may not have them all.
        fused: whether the backend runs them.
        note: what is covered and what is left to the host's code; or why all of it is, as a warning goes on after
            "because".
    """

    library: str
    names: tuple[str, ...]
    fused: bool
    note: str


_RESETS = "every reset; learnable and per-neuron parameters; any trailing shape"
_INHIBITION = "inhibition on [B, N]"
_LEFT = "left to the host: state_quant, surrogates without a known formula that are not registered"
_BROADCAST = "learnable parameters of any broadcast shape; any state"
_METHODS = f"every `method`; {_BROADCAST}"
_WHOLE = "it takes whole sequences in one call, and there is no time loop to fuse"

SUPPORT = (
    Row("snntorch", ("Leaky", "Synaptic"), True,
        f"{_RESETS}; reset_delay; {_INHIBITION}; {_LEFT}, inhibition with reset_delay=False"),
    Row("snntorch", ("Lapicque", "Alpha"), True, f"{_RESETS}; {_INHIBITION}; {_LEFT}; Lapicque: learn_beta"),
    Row("snntorch", ("RLeaky", "RSynaptic"), True,
        f"recurrence by a Linear, a Conv2d or one to one; {_RESETS}; {_INHIBITION}; {_LEFT}; a Linear on more than two "
        "dimensions, other recurrences, inhibition with reset_delay=False; RSynaptic: reset_delay=False"),
    Row("snntorch", ("DeltaLeaky",), True, "any beta; left to the host: a delta_threshold that is not a number, "
        "surrogates without a known formula that are not registered"),
    Row("snntorch", ("SLSTM", "SConv2dLSTM"), False, "its gates are dense products of dense states"),
    Row("snntorch", ("LeakyParallel", "StateLeaky", "LinearLeaky", "AssociativeLeaky"), False, _WHOLE),
    Row("norse", ("LIF", "LIFCell"), True,
        f"{_METHODS}; left to the host: sparse COO input, Norse 1.0's order of the step, an alpha per neuron"),
    Row("norse", ("LI", "LICell", "LILinearCell", "LIBox", "LIBoxCell"), True, _BROADCAST),
    Row("norse", ("LIFBox", "LIFBoxCell"), True,
        f"{_METHODS}; both reset methods; left to the host: other reset methods"),
    Row("norse", ("IAF", "IAFCell"), True, _METHODS),
    Row("norse", ("LSNN", "LSNNCell"), True,
        f"{_METHODS}; left to the host: adjoint=True, states with fewer dimensions than the input"),
    Row("norse", ("LIFRecurrent", "LIFRecurrentCell", "LSNNRecurrent", "LSNNRecurrentCell"), True,
        f"{_METHODS}; autapses and masks; left to the host: sparse COO input, record_states, adjoint=True, steps of "
        "more than two dimensions, LIF of Norse 1.0, which compiles the step"),
    Row("norse", ("LIFEx", "LIFExCell", "LIFAdEx", "LIFAdExCell"), True,
        f"{_METHODS}; the exponential is PyTorch's, step by step; left to the host: sparse COO input"),
    Row("norse", ("LIFExRecurrent", "LIFExRecurrentCell", "LIFAdExRecurrent", "LIFAdExRecurrentCell"), True,
        f"{_METHODS}; autapses and masks; left to the host: sparse COO input, record_states, steps of more than two "
        "dimensions"),
    Row("norse", ("LIFAdExRefracCell", "LIFAdExRefracRecurrentCell", "LIFAdExRefracRecurrent"), False,
        "there is no kernel for an exponential neuron with a refractory period"),
    Row("norse", ("LIFRefracCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell"), True,
        f"{_METHODS}; autapses and masks; membranes are kept at every neuron, since the threshold of the refractory "
        "counter has a derivative there; left to the host: sparse COO input, record_states, an alpha per neuron, the "
        "steps of Norse 1.0, LIFRefracRecurrentCell without a batch"),
    Row("norse", ("Izhikevich", "IzhikevichCell", "IzhikevichRecurrent", "IzhikevichRecurrentCell", "CobaLIFCell",
                  "LIFMCRecurrentCell", "LIFMCRefracRecurrentCell", "LIFCorrelation"), False,
        "there is no kernel for its equations"),
)


def names(library: str, fused: bool = True) -> list[str]:
    """The classes of a library that are, or are not, fused."""
    return [name for row in SUPPORT if row.library == library and row.fused is fused for name in row.names]


def reasons(library: str) -> dict[str, str]:
    """Why classes of a library are left to its own code, by their names."""
    return {name: row.note for row in SUPPORT if row.library == library and not row.fused for name in row.names}


def reporting(host: Callable[..., Any], reason: str, options_of: Callable[[Any], Any]) -> Callable[..., Any]:
    """A ``forward`` that runs the host's and says so where the backend is on."""

    @functools.wraps(host)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and options_of(self) is not None:
            report(self, reason)
        return host(self, *args, **kwargs)

    return forward


class OwnForward:
    """The ``forward`` that a class has as it is imported, its own or one that it inherits.

    Args:
        host: the class.
    """

    def __init__(self, host: Any) -> None:
        self._host, self._own = host, vars(host).get("forward")

    def replace(self, forward: Callable[..., Any] | None) -> None:
        """Puts another in its place; None: it is as it was."""
        if forward is not None or self._own is not None:
            self._host.forward = forward or self._own
        elif "forward" in vars(self._host):
            del self._host.forward  # it inherits it again


class Bystanders:
    """The classes of a library that the backend leaves alone, but for a warning while it is on.

    Args:
        library: its name.
        classes: finds a class by its name; None if the installed version has none.
        options_of: the options in force for a module.
    """

    def __init__(self, library: str, classes: Callable[[str], Any], options_of: Callable[[Any], Any]) -> None:
        found = {name: classes(name) for name in reasons(library)}
        self.reasons = {host: reasons(library)[name] for name, host in found.items() if host is not None}
        self._own = {host: OwnForward(host) for host in self.reasons}
        self._wrapped = {host: reporting(host.forward, reason, options_of) for host, reason in self.reasons.items()}

    def watch(self, on: bool) -> None:
        """Lets them warn, or be as they were."""
        for host, own in self._own.items():
            own.replace(self._wrapped[host] if on else None)

    def within(self, modules: Iterable[Any]) -> list[tuple[Any, str]]:
        """Those among some modules, and why they are left alone."""
        return [(module, self.reasons[type(module)]) for module in modules if type(module) in self.reasons]


def markdown() -> str:
    """The table as Markdown."""
    lines = ["| library | class | runs on | notes |", "|---|---|---|---|"]
    for row in SUPPORT:
        where, note = ("kernels", row.note) if row.fused else (HOST_CODE, f"because {row.note}")
        lines.append(f"| {row.library} | {', '.join(f'`{name}`' for name in row.names)} | {where} | {note} |")
    return "\n".join(lines) + "\n"
