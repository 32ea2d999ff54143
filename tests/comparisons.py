"""Comparisons of the kernels with their references, whatever build of the core the kernels come from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from devices import cuda_kernels, device, down, up
from reference import Cotangents, Tensors

from snn_sparse_backend import build, kernels, native, scans
from snn_sparse_backend.dynamics import Dynamics
from snn_sparse_backend.norse_dynamics import IAF, LI, LI_BOX, LIF, LIF_ADEX, LIF_EX, LIF_REFRAC, LSNN, lif_box
from snn_sparse_backend.recipes import Recipe
from snn_sparse_backend.reports import Counter
from snn_sparse_backend.snntorch_dynamics import DELTA_LEAKY, alpha, lapicque, leaky, synaptic
from snn_sparse_backend.surrogate import NO_GRADIENT, Surrogate

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MODELS = {f"{reset}{'-late' * late}": leaky(reset, late) for reset in ("subtract", "zero", "none") for late in (0, 1)}
MODELS |= {f"Synaptic-{reset}{'-late' * late}": synaptic(reset, bool(late)) for reset, late in
           (("subtract", 0), ("subtract", 1), ("zero", 0), ("zero", 1), ("none", 0))}
MODELS |= {f"{make.__name__.title()}-{reset}": make(reset) for make in (lapicque, alpha)
           for reset in ("subtract", "zero", "none")}
MODELS |= {"LIF": LIF, "LI": LI, "LIFBox-value": lif_box("value"), "LIFBox-subtract": lif_box("subtract"),
           "LIBox": LI_BOX, "IAF": IAF, "LSNN": LSNN, "DeltaLeaky": DELTA_LEAKY, "LIFEx": LIF_EX,
           "LIFAdEx": LIF_ADEX, "LIFRefrac": LIF_REFRAC}
PARAMETERS = {"kLeaky": (0.9, 0.7, 1.3), "kSynaptic": (0.9, 0.7, 1.3, 0.6), "kLapicque": (0.8, 0.7, 1.3, 1.2, 0.7, 1.1),
              "kAlpha": (2.5, 0.5, 1.3, 0.8, 0.6), "kLif": (0.3, -0.2, 0.1, 0.4, -0.1), "kLi": (0.3, -0.2, 0.1),
              "kLifBox": (0.3, 0.1, 0.4, -0.1), "kLiBox": (0.3, 0.1), "kIaf": (0.6, -0.1),
              "kDeltaLeaky": (0.9, 0.6), "kLsnn": (0.3, -0.2, 0.1, 0.2, 0.4, -0.1, 0.3),
              "kLifEx": (0.3, -0.2, 0.1, 0.4, -0.1, 0.7),
              "kLifAdex": (0.3, -0.2, 0.1, 0.4, -0.1, 0.7, 0.2, 0.6, 0.3),
              "kLifRefrac": (0.3, -0.2, 0.1, 0.4, -0.1, 1.2)}
TRACES = len(scans.TRACES)
SURROGATES = (
    Surrogate("Atan", 2.0),
    Surrogate("FastSigmoid", 25.0).within(0.3),
    Surrogate("Triangle", 0.3, low=-1.0, high=1.0),
    Surrogate("StraightThrough", low=0.0),
    Surrogate("SpikeRateEscape", 1.0, 5.0, low=-0.2, high=1.5),
    Surrogate("Triangular", 0.8).within(1e-3),
    NO_GRADIENT,
)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, rounding: float = 0.0) -> None:
    """Relative to the largest finite value; NaN and infinities at the same places. Up to ``rounding`` is no error."""
    scale = expected[expected.isfinite()].abs().max().clamp(min=1e-2).item() if expected.isfinite().any() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale + rounding,
                               equal_nan=True)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same values; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, so that NaN and the two zeros are told apart."""
    return tensor if not tensor.is_floating_point() else tensor.view({4: torch.int32, 8: torch.int64}[tensor.itemsize])


def identical(actual: Tensors, expected: Tensors) -> None:
    for left, right in zip(actual, expected, strict=True):
        same(bits(left), bits(right))


def spikes(rows: int, cols: int, density: float, seed: int) -> torch.Tensor:
    """A matrix of bools whose every fifth row is empty, more or less."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, cols, generator=generator) < density
    return dense & (torch.rand(rows, 1, generator=generator) > 0.2)


# ---- comparisons of rasters and synapses -----------------------------------------------------------------------------


def compare_rasters(rows: int, cols: int, density: float, dtype: torch.dtype, block_rows: int, seed: int) -> None:
    dense = spikes(rows, cols, density, seed)
    wide = torch.zeros(rows, cols + 3, dtype=dtype)
    wide[:, :cols] = dense
    if cuda_kernels():
        return compare_rasters_on_cuda(dense, wide, dtype, seed)
    raster = kernels.pack(wide[:, :cols])
    assert raster is not None
    same(raster.words, reference.pack(dense))
    same(kernels.unpack(raster, dtype), dense.to(dtype))
    turned = kernels.transpose(raster)
    same(turned.words, reference.pack(dense.t()))
    assert (turned.rows, turned.cols) == (cols, rows)
    turned.ones = None
    assert raster.ones == kernels.count(turned) == dense.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK_ROWS", block_rows)
        found = kernels.columns(raster, ranks=True)
    start, row, rank = reference.columns(dense, block_rows)
    same(found.start, start)
    same(found.row.long() & 0xFFFF, row)
    assert found.rank is not None
    same(found.rank, rank)
    wide[rows // 2, cols // 2] = (0.5, -1.0, 2.0, float("nan"))[seed % 4]
    assert kernels.pack(wide[:, :cols]) is None


def compare_rasters_on_cuda(dense: torch.Tensor, wide: torch.Tensor, dtype: torch.dtype, seed: int) -> None:
    """The same; any value that is not zero sets a bit, and counts reach the host some time later."""
    rows, cols = dense.shape
    wide[:, :cols] *= torch.tensor((0.5, -1.0, 2.0, float("nan")))[seed % 4]
    wide[~torch.nn.functional.pad(dense, (0, 3))] = -0.0
    counter = Counter(device)
    raster = kernels.nonzero(up(wide)[:, :cols], counter)
    same(down(raster.words), reference.pack(dense))
    same(down(kernels.unpack(raster, dtype)), dense.to(dtype))
    turned = kernels.transpose(raster)
    same(down(turned.words), reference.pack(dense.t()))
    counter.look()
    assert counter.known == (0, dense.sum()) and counter.done == counter.started == dense.numel()


def compare_synapse(rows: int, inputs: int, outputs: int, density: float, dtype: torch.dtype, block_rows: int,
                    seed: int, bias: bool = True) -> None:
    dense = spikes(rows, inputs, density, seed)
    weight, offset, grad = (torch.randn(n, dtype=dtype) for n in ((outputs, inputs), (outputs,), (rows, outputs)))
    if cuda_kernels():
        return compare_synapse_on_cuda(dense, weight, offset if bias else None, grad)
    raster = kernels.pack(dense.to(dtype))
    assert raster is not None
    product = kernels.SynapseForward(weight, offset if bias else None)
    same(product.tiles, reference.pack_weights(weight))
    close(product(raster), reference.synapse_forward(dense, weight, offset if bias else None), TOLERANCE[dtype])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK_ROWS", block_rows)
        events = kernels.columns(raster, ranks=True)
        grad_weight, grad_bias = kernels.weight_gradient(grad, events, bias=bias)
        grad_active = kernels.input_gradient(grad, events, product.tiles)
    expected_weight, expected_bias = reference.weight_gradient(grad, dense)
    close(grad_weight, expected_weight, TOLERANCE[dtype])
    assert (grad_bias is not None) == bias
    if grad_bias is not None:
        close(grad_bias, expected_bias, TOLERANCE[dtype])
    close(grad_active, reference.input_gradient(grad, dense, weight), TOLERANCE[dtype])


def compare_synapse_on_cuda(dense: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                            grad: torch.Tensor) -> None:
    """The same, with spikes and with the values of a matrix in their place."""
    tolerance = TOLERANCE[grad.dtype]
    product = kernels.SynapseForward(up(weight), up(bias))
    same(down(product.tiles), reference.pack_weights(weight))
    for values in (dense.to(grad.dtype), dense * torch.randn_like(grad[:, :1])):
        factors = None if values.eq(dense).all() else up(values)
        raster = kernels.nonzero(up(values))
        close(down(product(raster, factors)), reference.synapse_forward(values, weight, bias), tolerance)
        events = kernels.columns(raster, factors=factors)
        grad_weight, grad_bias = kernels.weight_gradient(up(grad), events, bias=bias is not None)
        expected_weight, expected_bias = reference.weight_gradient(grad, values)
        close(down(grad_weight), expected_weight, tolerance)
        assert (grad_bias is not None) == (bias is not None)
        if grad_bias is not None:
            close(down(grad_bias), expected_bias, tolerance)
        at_active = down(kernels.input_gradient(up(grad), events, product.tiles))[values != 0]
        close(at_active, reference.input_gradient(grad, values != 0, weight), tolerance)


# ---- comparisons of neurons ------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One sequence of one layer."""

    model: Dynamics
    surrogate: Surrogate
    parameters: Tensors
    inputs: torch.Tensor  # [steps, rows, cols]
    states: Tensors

    @property
    def steps(self) -> int:
        return self.inputs.shape[0]

    @property
    def full_parameters(self) -> list[torch.Tensor]:
        return [p.expand(self.inputs.shape[1:]) for p in self.parameters]

    def layer(self) -> scans.Layer:
        return scans.Layer(self.model, self.surrogate, up(self.parameters), self.inputs.shape[1:], self.inputs.dtype,
                           device)


def make_case(model: Dynamics, surrogate: Surrogate, steps: int, rows: int, cols: int, dtype: torch.dtype, seed: int,
              scalar: bool = False) -> Case:
    """A layer that spikes now and then; each parameter is a scalar or given by neuron, row or site."""
    torch.manual_seed(seed)
    shapes = [(), (1,), (cols,), (1, cols), (rows, 1), (rows, cols)]
    parameters = []
    for value in PARAMETERS[model.model]:
        shape = shapes[0 if scalar else int(torch.randint(len(shapes), ()))]
        parameters.append(value + (0.1 * torch.rand(shape, dtype=dtype)))
    states = [torch.rand(rows, cols, dtype=dtype) for _ in model.states]
    return Case(model, surrogate, parameters, torch.randn(steps, rows, cols, dtype=dtype), states)


@dataclass
class Record:
    """What the forward scan wrote; ``values``: the membranes of the active sites, step by step.

    Of CUDA kernels ``arena`` holds the values of all steps, in blocks that begin at ``offsets``.
    """

    output: torch.Tensor
    raster: torch.Tensor
    reset: torch.Tensor
    active: torch.Tensor
    membrane: torch.Tensor
    traces: list[torch.Tensor]
    states: list[torch.Tensor]
    finals: list[torch.Tensor]
    values: list[torch.Tensor]
    active_counts: list[int]
    spike_counts: list[int]
    calls: int = 0
    arena: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        return [self.output, self.raster, self.reset, self.active, self.membrane, *self.traces, *self.states,
                *self.finals, *self.values]


def forward(case: Case, *, chunk: int | None = None, room: int | None = None) -> Record:
    """Runs the forward scan, ``chunk`` steps a call, with ``room`` for active values; what is not written stays NaN."""
    if cuda_kernels():
        return forward_on_cuda(case, chunk_of(case, chunk))
    layer, steps, dtype = case.layer(), case.steps, case.inputs.dtype
    chunk, room = chunk_of(case, chunk), room or steps * layer.rows * layer.words * 64
    dense = [torch.full_like(case.inputs, float("nan")) for _ in range(2 + TRACES + len(case.states))]
    words = [torch.full((steps, layer.rows, layer.words), -1) for _ in range(3)]
    finals = [torch.full_like(s, float("nan")) for s in case.states]
    record = Record(dense[0], *words, dense[1], dense[2 : 2 + TRACES], dense[2 + TRACES :], finals, [], [], [])
    scan, before = scans.ForwardScan(layer), [s.data_ptr() for s in case.states]
    spiking = (record.raster, record.reset, record.active) if case.model.spikes else (None, None, None)
    tables = (case.inputs, record.output, *spiking, record.membrane, None, *record.traces, *record.states)
    for first in range(0, steps, chunk):
        count = min(chunk, steps - first)
        pointers = [p for t in tables for p in scans.step_pointers(t, steps)[first : first + count]]
        give(case, record.traces, first, finals if first else case.states)
        done = 0
        while done < count:
            arena = torch.full((room,), float("nan"), dtype=dtype)
            ran = scan.run(count, pointers, before, [s.data_ptr() for s in finals], arena.data_ptr(), room, done)
            assert ran > 0
            if case.model.spikes:
                counts = scan.active_counts[done : done + ran]
                record.values += arena[: sum(counts)].split(counts)
                record.active_counts += counts
                record.spike_counts += scan.spike_counts[done : done + ran]
            done, before, record.calls = done + ran, [s.data_ptr() for s in finals], record.calls + 1
    return record


def chunk_of(case: Case, wanted: int | None) -> int:
    """Steps a call: one where something has to be computed before each."""
    return 1 if case.model.model in reference.GIVEN else wanted or case.steps


def give(case: Case, traces: Tensors, step: int, states: Tensors) -> None:
    """Fills in the trace that the kernels are given."""
    for i, trace in enumerate(case.model.traces):
        if trace.given:
            traces[i][step] = reference.GIVEN[case.model.model](up(case.parameters), states[0])


def forward_on_cuda(case: Case, chunk: int) -> Record:
    """The same, with tensors on the device and counts that come back in reports."""
    layer, steps, inputs = case.layer(), case.steps, up(case.inputs)
    dense = [torch.full_like(inputs, float("nan")) for _ in range(2 + TRACES + len(case.states))]
    words = [torch.full((steps, layer.rows, layer.words), -1, device=device) for _ in range(3)]
    finals, before = [torch.empty_like(inputs[0]) for _ in case.states], up(case.states)
    arena = torch.full((max(steps * layer.sites, 1),), float("nan"), dtype=inputs.dtype, device=device)
    offsets = torch.full((steps, layer.blocks), -1, device=device)
    scan, counter = scans.ForwardScan(layer), Counter(device)
    spiking = words if case.model.spikes else [None] * 3
    tables = (inputs, dense[0], *spiking, dense[1], offsets if case.model.spikes else None, *dense[2:])
    for first in range(0, steps, chunk):
        count = min(chunk, steps - first)
        pointers = [p for t in tables for p in scans.step_pointers(t, steps)[first : first + count]]
        give(case, dense[2 : 2 + TRACES], first, before)
        assert scan.run(count, pointers, [s.data_ptr() for s in before], [s.data_ptr() for s in finals],
                        arena.data_ptr(), arena.numel(), report=counter.launch(count * layer.sites)) == count
        before = finals
    dense, words, finals = down(dense), down(words), down(finals)
    record = Record(dense[0], *words, dense[1], dense[2 : 2 + TRACES], dense[2 + TRACES :], finals, [], [], [],
                    arena=arena, offsets=offsets)
    if case.model.spikes:
        for t, active in enumerate(record.active):
            record.values.append(values_in_order(active, down(offsets[t]), down(arena)))
            record.active_counts.append(len(record.values[-1]))
            record.spike_counts.append(int(reference.unpack(record.raster[t], layer.cols).sum()))
        if layer.sites:
            counter.look()
            assert counter.known == (sum(record.active_counts), sum(record.spike_counts))
            assert counter.done == steps * layer.sites
    return record


def values_in_order(active: torch.Tensor, offsets: torch.Tensor, arena: torch.Tensor) -> torch.Tensor:
    """The values of a step's active sites in their order, gathered block by block."""
    found, words = [], active.flatten().split(scans.SITES_PER_BLOCK // 64)
    for block, offset in zip(words[: len(offsets)], offsets, strict=True):
        number = int(reference.unpack(block.unsqueeze(0), 64 * len(block)).sum())
        found.append(arena[offset : offset + number])
    return torch.cat(found) if found else arena[:0]


Gradients = tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]


def backward(case: Case, record: Record, arriving: Cotangents, at_active: list[torch.Tensor | None], *,
             compressed: bool = False, first: int = 0, last: int | None = None,
             sums: list[torch.Tensor | None] | None = None, wanted: Callable[[], bool] = lambda: True) -> Gradients:
    """Runs the backward scan over the steps ``[first, last)``; ``wanted`` decides about each result."""
    last, keep = case.steps if last is None else last, []

    def table(tensors: Any) -> Any:
        chosen = up(list(tensors)[first:last])
        keep.extend(chosen)
        return scans.pointer_table(t.data_ptr() if t is not None else None for t in chosen)

    def result(like: torch.Tensor) -> torch.Tensor | None:
        return torch.full_like(like, float("nan"), device=device) if wanted() else None

    grad_input, grad_states = result(case.inputs[first:last]), [result(s) for s in case.states]
    if sums is None:
        sums = [torch.zeros_like(case.inputs[0]) if wanted() else None for _ in case.parameters]
    sums = up(sums)
    before = up(case.states if first == 0 else [s[first - 1] for s in record.states])
    stored: dict[str, Any] = {name: table(record.traces[i])
                              for i, name in enumerate(scans.TRACES[: len(case.model.traces)])}
    if case.model.spikes:
        stored |= {name: table(getattr(record, name)) for name in ("raster", "reset", "active")}
    if not compressed:
        stored["membrane"] = table(record.membrane)
    elif record.arena is None or record.offsets is None:
        stored["values"] = table(record.values)
    else:
        stored["values"] = scans.pointer_table([record.arena.data_ptr()] * (last - first))
        stored["offsets"] = table(record.offsets)
    if cuda_kernels():
        at_active = [spread(grad, record.active[t], case) for t, grad in enumerate(at_active)]
    scans.neuron_backward(
        case.layer(), last - first, grad_input=grad_input, grad_state_in=grad_states, grad_parameters=sums,
        grad_states=[table(t) for t in arriving.states], state_in=before, grad_output=table(arriving.output),
        grad_active=table(at_active), **stored,
    )
    return down(grad_input), down(grad_states), down(sums)


def spread(grad: torch.Tensor | None, active: torch.Tensor, case: Case) -> torch.Tensor | None:
    """Gradients at active sites as CUDA's kernels take them: in their places, with anything in between."""
    if grad is None:
        return None
    dense = torch.full(case.inputs.shape[1:], float("nan"), dtype=grad.dtype)
    dense[reference.unpack(active, dense.shape[1])] = grad
    return dense


def cotangents(case: Case, record: Record, share: float) -> tuple[Cotangents, list[torch.Tensor | None]]:
    """Random gradients for a share of the outputs, states and, at the active sites only, outputs again."""

    def drawn(like: torch.Tensor) -> torch.Tensor | None:
        return torch.randn_like(like) if torch.rand(()) < share else None

    arriving = Cotangents([drawn(o) for o in record.output], [[drawn(s) for s in t] for t in record.states])
    return arriving, [drawn(v) for v in record.values] if record.values else [None] * case.steps


def compare_forward(case: Case, record: Record) -> None:
    """Bit for bit: the host library's order of operations."""
    expected = reference.scan(case.model, case.surrogate, case.full_parameters, case.inputs, case.states)
    for t, step in enumerate(expected):
        same(record.output[t], step.output)
        same(record.membrane[t], step.u)
        for table, state in zip(record.states, step.states, strict=True):
            same(table[t], state)
        for table, trace in zip(record.traces, step.traces, strict=False):
            same(table[t], trace)
        assert len(step.traces) == len(case.model.traces)
        if step.spike is None or step.reset is None:
            continue
        same(record.raster[t], reference.pack(step.spike))
        same(record.reset[t], reference.pack(step.reset))
        active = reference.inside(step.distance, case.surrogate)
        if case.model.refractory:
            active |= step.reset.bool()
        same(record.active[t], reference.pack(active))
        same(record.values[t], step.u[active])
        assert record.active_counts[t] == active.sum() and record.spike_counts[t] == step.spike.sum()
    for final, table in zip(record.finals, record.states, strict=True):
        same(final, table[-1])


def compare_backward(case: Case, record: Record, share: float, tolerance: float) -> None:
    """Dense membranes against autograd; compressed ones, and gradients only some of which are wanted, against these."""
    arriving, at_active = cotangents(case, record, share)
    found = backward(case, record, arriving, at_active)
    total = replace(arriving, output=list(arriving.output))
    for t, grad in enumerate(at_active):
        if grad is not None:
            dense = torch.zeros_like(case.inputs[t])
            dense[reference.unpack(record.active[t], dense.shape[1])] = grad
            total.output[t] = dense if arriving.output[t] is None else dense + arriving.output[t]
    expected = reference.gradients(case.model, case.surrogate, case.full_parameters, case.inputs, case.states, total)
    assert found[0] is not None
    for i in case.model.constants:
        expected[2][i].zero_()
    # A gradient that grew on its way and then cancelled has the rounding errors of its largest terms.
    largest = max((float(g[g.isfinite()].abs().max()) for g in sum(expected, []) if g.isfinite().any()), default=0.0)
    rounding = 10 * torch.finfo(case.inputs.dtype).eps * largest
    for actual, right in zip([*found[0], *found[1], *found[2]], sum(expected, []), strict=True):
        assert actual is not None
        close(actual, right, tolerance, rounding)
    nothing: list[torch.Tensor | None] = [None for _ in case.parameters]
    others = [backward(case, record, arriving, at_active, wanted=lambda: bool(torch.rand(()) < 0.5)),
              backward(case, record, arriving, at_active, sums=nothing)]
    if case.model.spikes and not case.model.refractory:
        # Without the dense membrane only the gradient of a decay is out of reach.
        reachable = [torch.zeros_like(case.inputs[0]) if i not in case.model.needs_membrane else None
                     for i in range(len(case.parameters))]
        others += [backward(case, record, arriving, at_active, compressed=True, sums=s) for s in (nothing, reachable)]
    for grad_input, grad_states, sums in others:
        for actual, whole in zip([grad_input, *grad_states], [found[0], *found[1]], strict=True):
            if actual is not None:
                same(actual, whole)
        for actual, whole in zip(sums, found[2], strict=True):
            if actual is not None:
                close(actual, whole, tolerance, rounding)


def compare_scan(name: str, surrogate: Surrogate, steps: int, rows: int, cols: int, dtype: torch.dtype, seed: int,
                 share: float = 0.7) -> None:
    case = make_case(MODELS[name], surrogate, steps, rows, cols, dtype, seed)
    record = forward(case)
    compare_forward(case, record)
    compare_backward(case, record, share, 20 * TOLERANCE[dtype])


# ---- other builds of the core ----------------------------------------------------------------------------------------


def plain_recipe(csrc: Path | None = None, flags: tuple[str, ...] = (), link: tuple[str, ...] = ()) -> Recipe:
    """The core for the plain instruction set only, without optimisation but that in ``flags``."""
    recipe = build.core_recipe(csrc)
    units = [replace(unit, flags=(*(f for f in unit.flags if f not in ("-O3", "-DSSB_X86=1")), *flags))
             for unit in recipe.units if ".v3." not in unit.object and ".v4." not in unit.object]
    return replace(recipe, units=tuple(units), link=(*recipe.link, *link))


@contextmanager
def library(path: Path) -> Iterator[ctypes.CDLL]:
    """Lets ``kernels`` call another build of the core."""
    with pytest.MonkeyPatch.context() as patch:
        core = ctypes.CDLL(str(path))
        patch.setattr(native, "load_core", lambda: core)
        native._cpu_function.cache_clear()
        try:
            yield core
        finally:
            native._cpu_function.cache_clear()


@contextmanager
def cuda_on_host(path: Path) -> Iterator[ctypes.CDLL]:
    """Lets a build of the CUDA kernels for the CPU serve CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda_on_host", ctypes.CDLL(str(path)))
        yield native.cuda_on_host
