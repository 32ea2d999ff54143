"""Every kernel of the core in a few lines of plain PyTorch, written from the equations and not from the C++.

The neurons' backward is torch's own: their steps are differentiable here, with the surrogate as a custom Function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from snn_sparse_backend.dynamics import Dynamics
from snn_sparse_backend.surrogate import Surrogate

Tensors = Sequence[torch.Tensor]

# ---------------------------------------------------------------------------------------------------- rasters


def pack(dense: torch.Tensor) -> torch.Tensor:
    """Words ``[rows, words]`` of a matrix of zeros and ones."""
    rows, cols = dense.shape
    bits = torch.nn.functional.pad(dense.long(), (0, -cols % 64)).view(rows, (cols + 63) // 64, 64)
    return (bits << torch.arange(64)).sum(-1)


def unpack(words: torch.Tensor, cols: int) -> torch.Tensor:
    """The matrix ``[rows, cols]`` of zeros and ones as bools."""
    return (words.unsqueeze(-1) >> torch.arange(64) & 1).bool().flatten(1)[:, :cols]


def columns(dense: torch.Tensor, block_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Column lists ``(start, row, rank)``: per block of rows the ones, column by column, with their row-major place."""
    ranks = (dense.flatten().long().cumsum(0) - 1).view(dense.shape)
    start, row, rank, events = [torch.empty(0).long()], [torch.empty(0).long()], [torch.empty(0).long()], 0
    for first in range(0, dense.shape[0], block_rows):
        block = dense[first : first + block_rows]
        where = block.t().nonzero()
        start.append(events + torch.cat([torch.zeros(1).long(), block.sum(0).cumsum(0)]))
        row.append(where[:, 1])
        rank.append(ranks[first : first + block_rows][where[:, 1], where[:, 0]])
        events += len(where)
    return torch.cat(start), torch.cat(row), torch.cat(rank)


# ---------------------------------------------------------------------------------------------------- synapses


def pack_weights(weight: torch.Tensor) -> torch.Tensor:
    outputs, inputs = weight.shape
    return torch.nn.functional.pad(weight, (0, 0, 0, -outputs % 64)).view(-1, 64, inputs).transpose(1, 2)


def synapse_forward(spikes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    current = spikes.double() @ weight.double().t()
    return current if bias is None else current + bias.double()


def synapse_forward_in_runs(spikes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                            ends: Sequence[int], apart: int = 0) -> torch.Tensor:
    """Addition by addition, in the weight's dtype."""
    rows, zero = spikes.shape[0], torch.zeros(weight.shape[0], dtype=weight.dtype)
    current, among = (zero if bias is None else bias).repeat(rows, 1), None
    for i, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        run = zero.repeat(rows, 1)
        for j in range(first, last):
            run = torch.where(spikes[:, j : j + 1].bool(), run + weight[:, j], run)
        if i < len(ends) - apart:
            current = current + run
        else:
            among = run if among is None else among + run
    return current if among is None else current + among


def weight_gradient(grad: torch.Tensor, spikes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return grad.double().t() @ spikes.double(), grad.double().sum(0)


def input_gradient(grad: torch.Tensor, active: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (grad.double() @ weight.double())[active]


# -------------------------------------------------------------------------------------------------- surrogates

DERIVATIVES: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "Atan": lambda x, a, b: a / 2 / (1 + (math.pi / 2 * a * x) ** 2),
    "FastSigmoid": lambda x, a, b: 1 / (a * x.abs() + 1) ** 2,
    "StraightThrough": lambda x, a, b: torch.ones_like(x),
    "Triangular": lambda x, a, b: torch.full_like(x, a).where(~(x >= 0), -a),
    "SpikeRateEscape": lambda x, a, b: b * torch.exp(-a * (x - 1).abs()),
    "SuperSpike": lambda x, a, b: 1 / (a * x.abs() + 1) ** 2,
    "Triangle": lambda x, a, b: a * torch.relu(1 - x.abs()),
    "ZeroDerivative": lambda x, a, b: torch.zeros_like(x),
}


def inside(x: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
    """Where the derivative may differ from zero; a NaN is inside."""
    outside = torch.zeros_like(x, dtype=torch.bool)
    if math.isfinite(surrogate.low):
        outside |= x <= surrogate.low
    if math.isfinite(surrogate.high):
        outside |= x >= surrogate.high
    return ~outside


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,), s = ctx.saved_tensors, ctx.surrogate
        return torch.where(inside(x, s), grad * DERIVATIVES[s.kind](x, s.a, s.b), 0.0), None


# ----------------------------------------------------------------------------------------------------- neurons


@dataclass
class Step:
    """One time step; without a threshold comparison ``spike`` is None.

    ``distance`` is that of u from the threshold, ``traces`` what backward may want besides.
    """

    output: torch.Tensor
    states: list[torch.Tensor]
    u: torch.Tensor
    traces: list[torch.Tensor]
    distance: torch.Tensor | None = None
    spike: torch.Tensor | None = None
    reset: torch.Tensor | None = None


def leaky(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """snnTorch ``Leaky``, see SNNTORCH.md 2.1."""
    (u,), (beta, threshold, gamma) = states, p
    reset = (u - threshold > 0).to(u.dtype).detach()
    if model.reset == "kZero":
        u = (1 - reset) * u
    v = beta * u + x
    if model.reset == "kSubtract":
        v = v - reset * threshold
    return fire(model, surrogate, v, reset, threshold, gamma, [], [])


def fire(model: Dynamics, surrogate: Surrogate, v: torch.Tensor, reset: torch.Tensor, threshold: torch.Tensor,
         gamma: torch.Tensor, others: list[torch.Tensor], traces: list[torch.Tensor]) -> Step:
    """snnTorch's ``fire``, and the late reset; ``others`` are the states behind the membrane."""
    x = v - threshold
    spike = Spike.apply(x, surrogate)
    output = spike * gamma
    after = v
    if model.late_reset:
        d = output / gamma - reset
        after = v - d * (threshold if model.reset == "kSubtract" else v)
    return Step(output, [after, *others], v, traces, x, spike, reset)


def synaptic(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """snnTorch ``Synaptic``, see SNNTORCH.md 2.4."""
    (u, i), (beta, threshold, gamma, alpha) = states, p
    reset = (u - threshold > 0).to(u.dtype).detach()
    i = alpha * i + x
    v = beta * u + i
    v = v - {"kSubtract": reset * threshold, "kZero": v * reset, "kNone": 0}[model.reset]
    return fire(model, surrogate, v, reset, threshold, gamma, [i], [i])


def lapicque(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """snnTorch ``Lapicque``, see SNNTORCH.md 2.3."""
    (u,), (decay, threshold, gamma, resistance, inverse, dt) = states, p
    reset = (u - threshold > 0).to(u.dtype).detach()
    v = x * resistance * inverse * dt + decay * u
    v = v - {"kSubtract": reset * threshold, "kZero": reset * v, "kNone": 0}[model.reset]
    return fire(model, surrogate, v, reset, threshold, gamma, [], [])


def alpha(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """snnTorch ``Alpha``, see SNNTORCH.md 2.6."""
    (u, old_exc, old_inh), (tau, threshold, gamma, a, b) = states, p
    reset = (u - threshold > 0).to(u.dtype).detach()
    exc, inh = a * old_exc + x, b * old_inh - x
    v = tau * (exc + inh)
    if model.reset == "kZero":
        exc, inh, v = exc - exc * reset, inh - inh * reset, v - v * reset
    elif model.reset == "kSubtract":
        exc, inh, v = exc - threshold * reset, inh - inh * reset, v - -old_inh * reset
    return fire(model, surrogate, v, reset, threshold, gamma, [exc, inh], [exc, inh])


def delta_leaky(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """snnTorch ``DeltaLeaky``, see SNNTORCH.md 2.9."""
    (v,), (beta, threshold) = states, p
    moved = beta * v + x
    u = moved - v
    distance = u.abs() - threshold
    z = Spike.apply(distance, surrogate)
    return Step(z, [moved], u, [moved], distance, z, torch.zeros_like(z))


def lif(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """Norse ``LIF``, see NORSE.md 1.5; p[1] is minus the synaptic decay."""
    (v, i), (mem, syn, leak, threshold, reset) = states, p
    c = i + x
    u = v + mem * ((leak - v) + c)
    z = Spike.apply(u - threshold, surrogate)
    return Step(z, [(1 - z) * u + z * reset, c + syn * c], u, [c], u - threshold, z, torch.zeros_like(z))


def li(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    (v, i), (mem, syn, leak) = states, p
    c = i + x
    v = v + mem * ((leak - v) + c)
    return Step(v, [v, c + syn * c], v, [c])


def lif_box(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """Norse ``LIFBoxCell``, see NORSE.md 1.5."""
    (v,), (mem, leak, threshold, reset) = states, p
    u = v + mem * (x + leak - v)
    z = Spike.apply(u - threshold, surrogate)
    after = (1 - z) * u + z * (reset if model.reset == "kValue" else u - threshold)
    return Step(z, [after], u, [x], u - threshold, z, torch.zeros_like(z))


def li_box(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    (v,), (mem, leak) = states, p
    v = v + mem * ((leak - v) + x)
    return Step(v, [v], v, [x])


def iaf(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    (v,), (threshold, reset) = states, p
    u = v + x
    z = Spike.apply(u - threshold, surrogate)
    return Step(z, [(1 - z) * u + z * reset], u, [], u - threshold, z, torch.zeros_like(z))


def lsnn(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """Norse ``LSNN``, see NORSE.md 1.5; the membrane is driven by the old current."""
    (v, i, b), (mem, syn, leak, adapt, threshold, reset, beta) = states, p
    u = v + mem * ((leak - v) + i)
    decayed = b + adapt * (threshold - b)
    z = Spike.apply(u - decayed, surrogate)
    after = [(1 - z) * u + z * reset, i + syn * i + x, decayed + z * beta]
    return Step(z, after, u, [decayed, i], u - decayed, z, torch.zeros_like(z))


def exponential(p: Tensors, v: torch.Tensor) -> torch.Tensor:
    """What drives ``LIFEx`` besides its input."""
    return torch.exp((v - p[3]) / p[5])


def lif_ex(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """Norse ``LIFEx``, see NORSE.md 1.5."""
    (v, i), (mem, syn, leak, threshold, reset, sharpness) = states, p
    c, e = i + x, exponential(p, v)
    u = v + mem * (leak - v + sharpness * e + c)
    z = Spike.apply(u - threshold, surrogate)
    after = [(1 - z) * u + z * reset, c + syn * c]
    return Step(z, after, u, [c, e], u - threshold, z, torch.zeros_like(z))


def lif_adex(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """Norse ``LIFAdEx``, see NORSE.md 1.5."""
    (v, i, a), (mem, syn, leak, threshold, reset, sharpness, ada, coupling, jump) = states, p
    c, e = i + x, exponential(p, v)
    u = v + mem * (leak - v + sharpness * e + c - a)
    z = Spike.apply(u - threshold, surrogate)
    after = [(1 - z) * u + z * reset, c + syn * c, a + ada * (coupling * (v - leak) - a) + z * jump]
    return Step(z, after, u, [c, e, a], u - threshold, z, torch.zeros_like(z))


def lif_refrac(model: Dynamics, surrogate: Surrogate, p: Tensors, x: torch.Tensor, states: Tensors) -> Step:
    """Norse ``LIFRefracCell``, see NORSE.md 1.5; ``reset`` is its LIF step's."""
    (v, i, rho), rho_reset = states, p[5]
    inner = lif(model, surrogate, p[:5], x, (v, i))
    assert inner.spike is not None
    mask = Spike.apply(rho, surrogate)
    z = (1 - mask) * inner.spike
    after = [(1 - mask) * inner.states[0] + mask * v, inner.states[1], (1 - z) * (rho - mask).relu() + z * rho_reset]
    return Step(z, after, inner.u, [*inner.traces, v, rho], inner.distance, z, inner.spike)


GIVEN = {"kLifEx": exponential, "kLifAdex": exponential}  # what the kernels are given, from the membrane before a step

STEPS = {"kLeaky": leaky, "kSynaptic": synaptic, "kLapicque": lapicque, "kAlpha": alpha,
         "kDeltaLeaky": delta_leaky, "kLif": lif, "kLi": li, "kLifBox": lif_box, "kLiBox": li_box, "kIaf": iaf,
         "kLsnn": lsnn, "kLifEx": lif_ex, "kLifAdex": lif_adex, "kLifRefrac": lif_refrac}


def scan(model: Dynamics, surrogate: Surrogate, parameters: Tensors, inputs: Tensors, states: Tensors) -> list[Step]:
    """All time steps; tensors ``[rows, cols]``."""
    steps: list[Step] = []
    for x in inputs:
        steps.append(STEPS[model.model](model, surrogate, parameters, x, states))
        states = steps[-1].states
    return steps


@dataclass
class Cotangents:
    """Gradients that arrive from outside, step by step; None where none does."""

    output: list[torch.Tensor | None]
    states: list[list[torch.Tensor | None]]  # state by state

    def all_states(self, step: int) -> list[torch.Tensor | None]:
        return [table[step] for table in self.states]


def gradients(model: Dynamics, surrogate: Surrogate, parameters: Tensors, inputs: Tensors, states: Tensors,
              arriving: Cotangents) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of the inputs, the states and the parameters, these site by site; zeros where nothing arrives."""
    leaves = [[t.detach().clone().requires_grad_() for t in group] for group in (inputs, states, parameters)]
    steps = scan(model, surrogate, leaves[2], leaves[0], leaves[1])
    pairs = []
    for t, step in enumerate(steps):
        pairs += zip([step.output, *step.states], [arriving.output[t], *arriving.all_states(t)], strict=True)
    wanted = [(value, grad) for value, grad in pairs if grad is not None]
    flat = [leaf for group in leaves for leaf in group]
    if not wanted:
        found = [torch.zeros_like(leaf) for leaf in flat]
    else:
        found = list(torch.autograd.grad([v for v, _ in wanted], flat, [g for _, g in wanted], allow_unused=True,
                                         materialize_grads=True))
    first, second = len(inputs), len(inputs) + len(states)
    return found[:first], found[first:second], found[second:]
