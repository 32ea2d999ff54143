"""Random layers and ways to use them, each played with Norse's classes and with the swapped ones.

A :class:`Case` is plain data and a seed; :func:`assert_same` compares all that a user can see of the two runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import norse.torch as stock
import torch
from hypothesis import strategies as st
from norse_oracle import assert_gradients, assert_identical, clean_slate, threshold_cut_at
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor

import snn_sparse_backend as sparse

METHODS = ("super", "triangle", "tanh", "circ", "heavi_erfc", "heaviside")
LIF_NAMES = ("tau_syn_inv", "tau_mem_inv", "v_leak", "v_th", "v_reset")
LI_NAMES = LIF_NAMES[:3]
RANGES = {"tau_syn_inv": (20.0, 400.0), "tau_mem_inv": (50.0, 500.0), "v_leak": (-0.3, 0.3), "v_th": (0.2, 0.9),
          "v_reset": (-0.3, 0.2)}


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
        spiking, sequence: which of the four classes.
        steps, shape: ``[T, B, ...]`` is the input.
        double: float64 or float32.
        method, alpha, dt: as in Norse.
        parameters: one for each parameter.
        states: v and i before the first step, None for the default.
        record: ``record_states``.
        kept: what enters the loss: ``"all"``, ``"last"``, ``"some"`` or ``"none"`` of the steps, for output, v and i.
        between: what happens to the state between the two calls of a sequence layer or two steps of a cell.
        input_grad: whether the input requires grad.
        permuted: the input is not contiguous.
        cutoff: option.
    """

    spiking: bool
    sequence: bool
    steps: int
    shape: tuple[int, ...]
    double: bool
    method: str
    alpha: float
    dt: float
    parameters: tuple[Value, ...]
    states: tuple[Value, Value] | None
    record: bool
    kept: tuple[str, str, str]
    between: str
    input_grad: bool
    permuted: bool
    cutoff: float | None
    seed: int

    @property
    def name(self) -> str:
        return ("LIF" if self.spiking else "LI") + ("" if self.sequence else "Cell")

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
def cases(draw: Callable[..., Any], spiking: bool, sequence: bool) -> Case:
    """Everything a layer can be, but for what Norse itself refuses: a default state with ``v_leak`` per neuron."""
    scalar = st.builds(Value, st.just("0-d"), st.booleans())
    value = st.builds(Value, st.sampled_from(FORMS), st.booleans())
    names = LIF_NAMES if spiking else LI_NAMES
    simple = draw(st.booleans())
    parameters = tuple(draw(scalar if simple else value) for _ in names)
    needs_states = sequence and parameters[2].form != "0-d"  # Norse has no default state then
    states = draw(st.tuples(value, value) if needs_states else st.none() | st.tuples(value, value))
    return Case(
        spiking=spiking,
        sequence=sequence,
        steps=draw(st.integers(1, 6)),
        shape=draw(st.sampled_from(SHAPES)),
        double=draw(st.sampled_from((True, True, False))),
        method=draw(st.sampled_from(METHODS)) if spiking else "super",
        alpha=draw(st.sampled_from((0.3, 1.0, 4.0, 20.0, 100.0))),
        dt=draw(st.sampled_from((0.001, 0.002))),
        parameters=parameters,
        states=states,
        record=sequence and draw(st.booleans()),
        kept=tuple(draw(st.sampled_from(STEPS_KEPT)) for _ in range(3)),
        between=draw(st.sampled_from(BETWEEN[: -1 if needs_states else None])),
        input_grad=draw(st.booleans()),
        permuted=draw(st.booleans()),
        cutoff=draw(st.sampled_from((None, None, 0.2, 0.7))) if spiking else None,
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
        kind = stock.LIFFeedForwardState if case.spiking else stock.LIState
        return kind(*(leaf(f"{prefix} {n}", uniform(shape_of(s.form, case.shape), -0.5, 0.9), s.learnable)
                      for n, s in zip("vi", case.states, strict=True)))

    names = LIF_NAMES if case.spiking else LI_NAMES
    values = {}
    for name, form in zip(names, case.parameters, strict=True):
        drawn = uniform(shape_of(form.form, case.shape), *RANGES[name])
        if name == "v_leak":
            drawn = torch.round(drawn * 64) / 64  # the default v is float32 even if v_leak is not: keep that exact
        values[name] = leaf(name, drawn, form.learnable)
    if case.spiking:
        p = stock.LIFParameters(**values, method=case.method, alpha=torch.tensor(case.alpha, dtype=case.dtype))
    else:
        p = stock.LIParameters(**values)
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
            state = type(state)(*(s[-1] for s in state))
        if case.between == "detach":
            return type(state)(*(s.detach() for s in state))
        if case.between == "edit":
            return state._replace(v=state.v * 0.5 + 0.1)
        if case.between == "edit in place":
            state.i.mul_(0.5)
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
        if not case.spiking and not case.sequence:
            assert output is state.v
        keep(0, output, None if case.sequence else call)
        keep(1, state.v, None if case.record else case.steps - 1 if case.sequence else call)
        keep(2, state.i, None if case.record else case.steps - 1 if case.sequence else call)
    if terms and any(t.requires_grad for t in terms):
        result.loss = torch.stack(terms).sum()
    return result


def differentiate(result: Run) -> None:
    wanted = [t for t in result.leaves.values() if t.requires_grad]
    if result.loss is not None and wanted:
        result.gradients = list(torch.autograd.grad(result.loss, wanted, allow_unused=True))


def always_differentiable(case: Case) -> bool:
    """Whether the outputs of every step require grad, so that every step must be fused."""
    _, tau_mem_inv, v_leak, *spiking = (p.learnable for p in case.parameters)
    return case.input_grad or tau_mem_inv or v_leak or (case.method != "heaviside" and any(spiking[:1]))


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
    rounded = "v_leak" if case.sequence and (case.states is None or case.between == "default") else None
    assert_gradients(expected.gradients, found.gradients, names, rounded)
