"""Random layers and ways to use them, each played with Norse's classes and with the swapped ones.

A :class:`Case` is plain data and a seed; :func:`assert_same` compares all that a user can see of the two runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import norse.torch as stock
import torch
from hypothesis import strategies as st
from norse_oracle import (
    assert_gradients,
    assert_identical,
    clean_slate,
    mapped,
    tensors_in,
    threshold_cut_at,
    tuple_of,
)
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor

import snn_sparse_backend as sparse

try:
    from norse.torch.functional.reset import reset_subtract
except ImportError:  # Norse 1.0, whose box neurons have one way to reset
    reset_subtract = None

METHODS = ("super", "triangle", "tanh", "circ", "heavi_erfc", "heaviside")


@dataclass(frozen=True)
class Model:
    """A class of Norse: names of its parameters and states, of the tuples they are in; and what reaches the output and
    the membrane within one step, besides the membrane itself.
    """

    parameters: tuple[str, ...]
    states: Sequence[str]
    parameters_class: str
    state_class: str
    at_once: tuple[str, ...]
    scalars: tuple[str, ...] = ()  # must be 0-d, or Norse has no default state

    @property
    def spiking(self) -> bool:
        return "v_th" in self.parameters


# Norse 1.0 has a full default membrane in cells as well.
_filled = stock.LIFBoxCell().initial_state(torch.zeros(2)).v.dim() > 0
_V_LEAK, _V_RESET = (("v_leak",), ("v_reset",)) if _filled else ((), ())
_LIF = ("tau_syn_inv", "tau_mem_inv", "v_leak", "v_th", "v_reset")
_BOX = _LIF[1:]
_EX = (*_LIF, "delta_T")
_ADEX = (*_EX, "tau_ada_inv", "adaptation_current", "adaptation_spike")
_EX_AT_ONCE = ("x", *_BOX[:3], "delta_T")
_LSNN = ("tau_syn_inv", "tau_mem_inv", "tau_adapt_inv", "v_leak", "v_th", "v_reset", "beta")
MODELS = {
    "LIF": Model(_LIF, "vi", "LIFParameters", "LIFFeedForwardState", ("x", *_BOX[:3]), ("v_leak",)),
    "LIFCell": Model(_LIF, "vi", "LIFParameters", "LIFFeedForwardState", ("x", *_BOX[:3])),
    "LI": Model(_LIF[:3], "vi", "LIParameters", "LIState", ("x", "tau_mem_inv", "v_leak"), ("v_leak",)),
    "LICell": Model(_LIF[:3], "vi", "LIParameters", "LIState", ("x", "tau_mem_inv", "v_leak")),
    "LIFBoxCell": Model(_BOX, "v", "LIFBoxParameters", "LIFBoxFeedForwardState", ("x", *_BOX[:3]), _V_LEAK),
    "LIBoxCell": Model(_BOX[:2], "v", "LIBoxParameters", "LIBoxState", ("x", *_BOX[:2])),
    "IAF": Model(_LIF[3:], "v", "IAFParameters", "IAFFeedForwardState", ("x", "v_th")),
    "IAFCell": Model(_LIF[3:], "v", "IAFParameters", "IAFFeedForwardState", ("x", "v_th"), _V_RESET),
    "LSNN": Model(_LSNN, "vib", "LSNNParameters", "LSNNFeedForwardState", _LSNN[1:5], ("v_leak", "v_th")),
    "LSNNCell": Model(_LSNN, "vib", "LSNNParameters", "LSNNFeedForwardState", _LSNN[1:5], ("v_leak",)),
    "LIFEx": Model(_EX, "vi", "LIFExParameters", "LIFExFeedForwardState", _EX_AT_ONCE, ("v_leak",)),
    "LIFExCell": Model(_EX, "vi", "LIFExParameters", "LIFExFeedForwardState", _EX_AT_ONCE, ("v_leak",)),
    "LIFAdEx": Model(_ADEX, "via", "LIFAdExParameters", "LIFAdExFeedForwardState", _EX_AT_ONCE, ("v_leak",)),
    "LIFAdExCell": Model(_ADEX, "via", "LIFAdExParameters", "LIFAdExFeedForwardState", _EX_AT_ONCE),
    "LIFRefracCell": Model((*_LIF, "rho_reset"), ("v", "i", "rho"), "LIFRefracParameters", "LIFRefracFeedForwardState",
                           ("x", *_BOX[:3]), ("v_leak",)),
}
RANGES = {"tau_adapt_inv": (1.0, 100.0), "beta": (0.1, 1.0),
          "tau_syn_inv": (20.0, 400.0), "tau_mem_inv": (50.0, 500.0), "v_leak": (-0.3, 0.3), "v_th": (0.2, 0.9),
          "v_reset": (-0.3, 0.2), "delta_T": (0.3, 1.0), "tau_ada_inv": (1.0, 100.0), "adaptation_current": (0.1, 4.0),
          "adaptation_spike": (0.02, 0.5), "rho_reset": (0.4, 3.0), "rho": (-0.5, 2.5)}


SHAPES = ((1,), (5,), (70,), (1, 1), (2, 7), (3, 63), (2, 64), (2, 65), (1, 130), (2, 3, 3, 2), (2, 2, 6, 7))


@dataclass(frozen=True)
class Value:
    """A parameter or a state: its form (see :func:`shape_of`) and whether it requires grad."""

    form: str
    learnable: bool


@dataclass(frozen=True)
class Case:
    """One layer and how it is used.

    Args:
        name: which class.
        steps, shape: ``[T, B, ...]`` is the input.
        double: float64 or float32.
        method, alpha, dt: as in Norse.
        parameters: one for each parameter.
        states: those before the first step, None for the default.
        by_subtraction: ``reset_method``, where there is one.
        record: ``record_states``.
        kept: what enters the loss: ``"all"``, ``"last"``, ``"some"`` or ``"none"`` of the steps, for output, v and i.
        between: what happens to the state between the two calls of a sequence layer or two steps of a cell.
        input_grad: whether the input requires grad.
        permuted: the input is not contiguous.
        cutoff: option.
    """

    name: str
    steps: int
    shape: tuple[int, ...]
    double: bool
    method: str
    alpha: float
    dt: float
    parameters: tuple[Value, ...]
    states: tuple[Value, ...] | None
    by_subtraction: bool
    record: bool
    kept: tuple[str, str, str]
    between: str
    input_grad: bool
    permuted: bool
    cutoff: float | None
    seed: int

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    @property
    def sequence(self) -> bool:
        return not self.name.endswith("Cell")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.double else torch.float32


def shape_of(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter or a state that broadcasts to one time step."""
    channels = (shape[-3] if len(shape) > 2 else shape[-1], *(1 for _ in shape[-2:] if len(shape) > 2))
    return {"0-d": (), "one": (1,), "(N,)": shape[-1:], "(1, N)": (1, *shape[-1:])[-len(shape):],
            "channels": channels, "full": shape}[form]


FORMS = ("0-d", "one", "(N,)", "(1, N)", "channels", "full")
BETWEEN = ("carry", "carry", "detach", "edit", "edit in place", "replace", "default")
STEPS_KEPT = ("all", "all", "last", "some", "none")


@st.composite
def cases(draw: Callable[..., Any], name: str) -> Case:
    """Everything a layer can be, but for what Norse itself refuses: a default state with ``v_leak`` per neuron."""
    model, sequence = MODELS[name], not name.endswith("Cell")
    scalar = st.builds(Value, st.just("0-d"), st.booleans())
    value = st.builds(Value, st.sampled_from(FORMS), st.booleans())
    simple = draw(st.booleans())
    parameters = tuple(draw(scalar if simple else value) for _ in model.parameters)
    forms = {name: parameter.form for name, parameter in zip(model.parameters, parameters, strict=True)}
    needs_states = any(forms[scalar] != "0-d" for scalar in model.scalars)
    given = st.tuples(*[value for _ in model.states])
    states = draw(given if needs_states else st.none() | given)
    if states is not None and name.startswith("LSNN"):  # whose first output has the shape of the states
        states = (replace(states[0], form="full"), *states[1:])
    return Case(
        name=name,
        steps=draw(st.integers(1, 6)),
        shape=draw(st.sampled_from(SHAPES)),
        double=draw(st.sampled_from((True, True, False))),
        method=draw(st.sampled_from(METHODS)) if model.spiking else "super",
        alpha=draw(st.sampled_from((0.3, 1.0, 4.0, 20.0, 100.0))),
        dt=draw(st.sampled_from((0.001, 0.002))),
        parameters=parameters,
        states=states,
        by_subtraction=draw(st.booleans()),
        record=sequence and name != "IAF" and draw(st.booleans()),
        kept=tuple(draw(st.sampled_from(STEPS_KEPT)) for _ in range(3)),
        between=draw(st.sampled_from(BETWEEN[: -1 if needs_states else None])),
        input_grad=draw(st.booleans()),
        permuted=draw(st.booleans()),
        cutoff=draw(st.sampled_from((None, None, 0.2, 0.7))) if model.spiking else None,
        seed=draw(st.integers(0, 10**6)),
    )


@dataclass
class Run:
    """What one side gave.

    Attributes:
        seen: every output and state, in order.
        leaves: name -> tensor that may get a gradient.
        loss: of what the case keeps; None if that needs no gradient.
    """

    seen: list[Any] = field(default_factory=list)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    gradients: list[Tensor | None] = field(default_factory=list)
    loss: Tensor | None = None


def run(case: Case, library: Any) -> Run:
    """Plays a case with the classes of ``library`` (``norse.torch`` or the adapter)."""
    random = torch.Generator(torch.get_default_device()).manual_seed(case.seed)
    result = Run()

    def leaf(name: str, values: Tensor, learnable: bool) -> Tensor:
        result.leaves[name] = values.clone().requires_grad_(learnable)
        return result.leaves[name]

    def uniform(shape: Sequence[int], low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=random, dtype=torch.float64)).to(case.dtype)

    def new_states(prefix: str) -> Any:
        assert case.states is not None
        return tuple_of(model.state_class, {
            n: leaf(f"{prefix} {n}", uniform(shape_of(s.form, case.shape), *RANGES.get(n, (-0.5, 0.9))), s.learnable)
            for n, s in zip(model.states, case.states, strict=True)})

    model, values = case.model, {}
    for name, form in zip(model.parameters, case.parameters, strict=True):
        drawn = uniform(shape_of(form.form, case.shape), *RANGES[name])
        if name == "v_leak":
            drawn = torch.round(drawn * 64) / 64  # the default v is float32 even if v_leak is not: keep that exact
        values[name] = leaf(name, drawn, form.learnable)
    if model.spiking:
        values |= {"method": case.method, "alpha": torch.tensor(case.alpha, dtype=case.dtype)}
    if case.name == "LIFBoxCell" and case.by_subtraction and reset_subtract is not None:
        values["reset_method"] = reset_subtract
    p = tuple_of(model.parameters_class, values)
    layer = getattr(library, case.name)(p, dt=case.dt, **({"record_states": True} if case.record else {}))
    terms: list[Tensor] = []

    def keep(which: int, tensor: Tensor, step: int | None) -> None:
        """Adds a tensor to the loss; ``step`` None means that its first axis is time."""
        choice, weights = case.kept[which], uniform(tensor.shape, -1.0, 1.0)
        if choice == "none" or not tensor.requires_grad:
            return
        if step is None:
            chosen = {"all": slice(None), "last": slice(-1, None), "some": slice(0, None, 2)}[choice]
            terms.append((tensor[chosen] * weights[chosen]).sum())
        elif choice == "all" or (choice == "last" and step == case.steps - 1) or (choice == "some" and step % 2 == 0):
            terms.append((tensor * weights).sum())

    def between(state: Any, index: int) -> Any:
        if case.record:
            state = mapped(state, lambda _, s: s[-1])
        if case.between == "detach":
            return mapped(state, lambda _, s: s.detach())
        if case.between == "edit":
            return mapped(state, lambda n, s: s * 0.5 + 0.1 if n == "v" else s)
        if case.between == "edit in place":
            dict(zip(model.states, tensors_in(state), strict=True)).get("i", next(tensors_in(state))).mul_(0.5)
        if case.between == "replace" and case.states is not None:
            return new_states(f"replaced {index}")
        return None if case.between == "default" else state

    state = new_states("initial") if case.states is not None else None
    lead = (case.steps,) if case.sequence else ()
    for call in range(2 if case.sequence else case.steps):
        x = uniform((*lead, *case.shape), -2.0, 4.0)
        x = leaf(f"x {call}", x.transpose(0, -1).contiguous() if case.permuted else x, case.input_grad)
        if call and (case.sequence or call == case.steps // 2):
            state = between(state, call)
        output, state = layer(x.transpose(0, -1) if case.permuted else x, state)
        result.seen += [output, state]
        if not model.spiking and not case.sequence:
            assert output is state.v
        keep(0, output, None if case.sequence else call)
        for name, value in zip(model.states, tensors_in(state), strict=True):
            keep(1 + (name != "v"), value, None if case.record else case.steps - 1 if case.sequence else call)
    if terms and any(t.requires_grad for t in terms):
        result.loss = torch.stack(terms).sum()
    return result


def differentiate(result: Run) -> None:
    wanted = [t for t in result.leaves.values() if t.requires_grad]
    if result.loss is not None and wanted:
        result.gradients = list(torch.autograd.grad(result.loss, wanted, allow_unused=True))


def always_differentiable(case: Case) -> bool:
    """Whether the outputs of every step require grad, so that every step must be fused."""
    learnable = {name for name, p in zip(case.model.parameters, case.parameters, strict=True) if p.learnable}
    learnable |= {"x"} if case.input_grad else set()
    learnable -= {"v_th", "tau_adapt_inv"} if case.method == "heaviside" else set()
    return bool(learnable & set(case.model.at_once))


def assert_same(case: Case) -> None:
    """Stock and swapped agree on a case, and the swapped side really was fused."""
    with clean_slate(), threshold_cut_at(case.cutoff):
        expected = run(case, stock)
        differentiate(expected)
    options = {} if case.cutoff is None else {"cutoff": case.cutoff}
    with clean_slate(**options), warnings.catch_warnings():
        warnings.simplefilter("error", sparse.SparseFallbackWarning)
        found = run(case, swapped)
        if always_differentiable(case):
            assert sparse.counts["neuron_steps"] == (2 if case.sequence else 1) * case.steps
            assert sparse.counts["host_steps"] == 0
        differentiate(found)
    assert_identical(expected.seen, found.seen)
    assert (expected.loss is None) == (found.loss is None)
    names = [n for n, t in expected.leaves.items() if t.requires_grad]
    # The default v is float32, and so is Norse's v_leak - v in the first step, whatever the dtype of the input.
    rounded = "v_leak" if case.name in ("LIF", "LI") and (case.states is None or case.between == "default") else None
    assert_gradients(expected.gradients, found.gradients, names, rounded, expected.seen)
