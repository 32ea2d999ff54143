"""Every kernel against its plain-PyTorch reference, and against itself: steps, threads, instruction sets, storage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from comparisons import (
    DTYPES,
    MODELS,
    SURROGATES,
    TOLERANCE,
    Case,
    backward,
    close,
    compare_backward,
    compare_forward,
    compare_rasters,
    compare_scan,
    compare_synapse,
    cotangents,
    forward,
    identical,
    library,
    make_case,
    plain_recipe,
    same,
    spikes,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import Cotangents

from snn_sparse_backend import build, kernels, native, scans
from snn_sparse_backend.norse_dynamics import LIF
from snn_sparse_backend.surrogate import Surrogate

SIZES = st.one_of(st.sampled_from([1, 63, 64, 65, 127, 128, 129, 192, 200]), st.integers(1, 200))
DENSITIES = st.one_of(st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.floats(0, 1))
SEEDS = st.integers(0, 2**31)
LIMITS = st.integers(0, 2)  # see `instructions`
quick = settings(derandomize=True, deadline=None, database=None, max_examples=60)


# ---- the comparisons, drawn ------------------------------------------------------------------------------------------


@contextmanager
def instructions(limit: int) -> Iterator[None]:
    """0, 1, 2: baseline, AVX2, AVX-512 where the processor has them."""
    try:
        native.instruction_set(limit)
        yield
    finally:
        native.instruction_set(2)


@quick
@given(SIZES, SIZES, DENSITIES, st.sampled_from(DTYPES), st.sampled_from([64, 128, 1024]), SEEDS, LIMITS)
@example(2100, 70, 0.1, torch.float32, 1024, 0, 2)
@example(70000, 3, 0.5, torch.float32, 65536, 1, 2)
def test_rasters(rows: int, cols: int, density: float, dtype: torch.dtype, block_rows: int, seed: int,
                 limit: int) -> None:
    with instructions(limit):
        compare_rasters(rows, cols, density, dtype, block_rows, seed)


@quick
@given(SIZES, SIZES, SIZES, DENSITIES, st.sampled_from(DTYPES), st.sampled_from([64, 128, 1024]), SEEDS, st.booleans(),
       LIMITS)
@example(2100, 70, 65, 0.1, torch.float32, 1024, 0, True, 2)
@example(700, 130, 200, 0.5, torch.float64, 1024, 1, False, 2)
def test_synapses(rows: int, inputs: int, outputs: int, density: float, dtype: torch.dtype, block_rows: int, seed: int,
                  bias: bool, limit: int) -> None:
    with instructions(limit):
        compare_synapse(rows, inputs, outputs, density, dtype, block_rows, seed, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_synapses_of_every_width(limit: int, dtype: torch.dtype) -> None:
    """Each number of vectors that a strip of outputs may have, and a lane more or less."""
    with instructions(limit):
        for outputs in {k + d for k in range(0, 129, 8 if dtype is torch.float32 else 4) for d in (-1, 0, 1)} - {-1, 0}:
            compare_synapse(70, 40, outputs, 0.2, dtype, 64, outputs)


@settings(quick, max_examples=40)
@given(st.integers(1, 90), SIZES, SIZES, DENSITIES, st.sampled_from(DTYPES), SEEDS, st.booleans(), LIMITS,
       st.data())
@example(1100, 130, 200, 0.2, torch.float32, 0, True, 2, None)
def test_forward_in_runs(rows: int, inputs: int, outputs: int, density: float, dtype: torch.dtype, seed: int,
                         bias: bool, limit: int, data: st.DataObject | None) -> None:
    """The order of the additions, bit for bit."""
    inner = data.draw(st.sets(st.integers(1, inputs), max_size=4)) if data is not None else {64, 100}
    ends, dense = sorted(inner | {inputs}), spikes(rows, inputs, density, seed)
    apart = data.draw(st.integers(0, len(ends) - 1)) if data is not None else 2
    weight, offset = torch.randn(outputs, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype) if bias else None
    raster = kernels.pack(dense.to(dtype))
    assert raster is not None
    with instructions(limit):
        found = kernels.SynapseForward(weight, offset, order=kernels.Order(tuple(ends), apart))(raster)
        whole = kernels.SynapseForward(weight, None)(raster)
    identical([found], [reference.synapse_forward_in_runs(dense, weight, offset, ends, apart)])
    identical([whole], [reference.synapse_forward_in_runs(dense, weight, None, [inputs])])


def test_ends_of_runs_rise_to_the_end() -> None:
    for ends in ((3,), (6,), (2, 2, 5), (4, 2, 5), (0, 5)):
        with pytest.raises(ValueError, match="rise to 5"):
            kernels.SynapseForward(torch.ones(3, 5), None, order=kernels.Order(ends))
    for apart in (-1, 2):
        with pytest.raises(ValueError, match="less than 2 runs apart"):
            kernels.SynapseForward(torch.ones(3, 5), None, order=kernels.Order((2, 5), apart))


@pytest.mark.parametrize("name", MODELS)
@settings(quick, max_examples=30)
@given(st.sampled_from(SURROGATES), st.integers(1, 7), st.integers(1, 20), SIZES, st.sampled_from(DTYPES), SEEDS,
       st.sampled_from([0.0, 0.4, 1.0]))
def test_scans(name: str, surrogate: Surrogate, steps: int, rows: int, cols: int, dtype: torch.dtype, seed: int,
               share: float) -> None:
    compare_scan(name, surrogate, steps, rows, cols, dtype, seed, share)


# ---- the kernels against themselves ----------------------------------------------------------------------------------


def test_every_wish_may_be_missing() -> None:
    case = make_case(MODELS["subtract"], SURROGATES[1], 3, 4, 70, torch.float64, 0)
    scan, finals = scans.ForwardScan(case.layer()), [torch.empty_like(s) for s in case.states]
    wishes = len(scan.TABLES) + len(case.states) - 1
    pointers = [*scans.step_pointers(case.inputs, 3), *[None] * 3 * wishes]
    assert scan.run(3, pointers, [case.states[0].data_ptr()], [finals[0].data_ptr()]) == 3
    identical(finals, forward(case).finals)


@settings(quick, max_examples=30)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(SURROGATES[1:5]), st.integers(2, 6), st.integers(1, 6), SIZES,
       st.sampled_from(DTYPES), SEEDS, st.data())
def test_steps_equal_the_sequence(name: str, surrogate: Surrogate, steps: int, rows: int, cols: int,
                                  dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    case = make_case(MODELS[name], surrogate, steps, rows, cols, dtype, seed)
    whole, chunk = forward(case), data.draw(st.integers(1, steps - 1))
    identical(forward(case, chunk=chunk).tensors(), whole.tensors())
    # A part of the sequence hands its carried gradient to the part before, as the gradient of that part's last state.
    arriving, at_active = cotangents(case, whole, 0.7)
    arriving = replace(arriving, states=[[None if t == chunk - 1 else g for t, g in enumerate(table)]
                                         for table in arriving.states])
    grad_input, grad_states, sums = backward(case, whole, arriving, at_active)
    later = backward(case, whole, arriving, at_active, first=chunk)
    for table, grad in zip(arriving.states, later[1], strict=True):
        table[chunk - 1] = grad
    earlier = backward(case, whole, arriving, at_active, last=chunk, sums=later[2])
    assert grad_input is not None and earlier[0] is not None and later[0] is not None
    found = [torch.cat([earlier[0], later[0]]), *earlier[1], *earlier[2]]
    # A neuron without a gradient may differ in the sign of its zero.
    for actual, expected in zip(found, [grad_input, *grad_states, *sums], strict=True):
        assert actual is not None and expected is not None
        same(actual, expected)


@pytest.mark.parametrize("name", ["subtract", "LIF"])
@pytest.mark.parametrize("surrogate", SURROGATES[:3], ids=lambda s: s.kind)
def test_little_room_for_active_values(name: str, surrogate: Surrogate) -> None:
    """A call stops before the step that might not fit; the next one goes on from there."""
    case = make_case(MODELS[name], surrogate, 7, 3, 130, torch.float64, 1)
    whole, step = forward(case), 3 * 3 * 64
    assert whole.calls == 1
    for room in (step, step + 20):
        parts = forward(case, room=room)
        identical(parts.tensors(), whole.tensors())
        assert parts.calls > 1 if surrogate.bounded else parts.calls == 7
    scan = scans.ForwardScan(case.layer())
    tables = [case.inputs, None, None, None, whole.active.clone(), None, None, None, *[None] * len(case.states)]
    pointers = [p for t in tables for p in scans.step_pointers(t, 7)]
    untouched = [torch.full_like(s, 7.0) for s in case.states]
    assert scan.run(7, pointers, [s.data_ptr() for s in case.states], [s.data_ptr() for s in untouched],
                    torch.empty(step).data_ptr(), step - 1) == 0
    identical(untouched, [torch.full_like(s, 7.0) for s in case.states])


def everything(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results of all kernels, on sizes that make several tasks of each: those that are exact, and the products."""
    torch.manual_seed(0)
    exact, products = [], []
    dense = spikes(300, 333, 0.3, 0)
    raster = kernels.pack(dense.to(dtype))
    assert raster is not None and raster.ones == dense.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BLOCK_ROWS", 64)
        events = kernels.columns(raster, ranks=True)
        assert events.rank is not None
        exact += [raster.words, kernels.transpose(raster).words, kernels.unpack(raster, dtype)]
        exact += [events.start, events.row, events.rank]
        for outputs in (20, 200):  # fewer tiles than threads, and more
            weight, grad = torch.randn(outputs, 333, dtype=dtype), torch.randn(300, outputs, dtype=dtype)
            product = kernels.SynapseForward(weight, weight[:, 0])
            exact.append(product.tiles)
            grad_weight, grad_bias = kernels.weight_gradient(grad, events, bias=True)
            assert grad_bias is not None
            products += [product(raster), grad_weight, grad_bias]
            products.append(kernels.input_gradient(grad, events, product.tiles))
    for name in ("subtract-late", "zero", "LIF", "LI"):
        for scalar in (False, True):
            case = make_case(MODELS[name], SURROGATES[1], 5, 37, 700, dtype, 0, scalar)
            record = forward(case)
            grad_input, *others = backward(case, record, *cotangents(case, record, 0.8))
            exact += [*record.tensors(), *[g for g in [grad_input, *sum(others, [])] if g is not None]]
    return exact, products


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "SITES_PER_THREAD", 1)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert native.threads_for(37 * 700) == count
            results.append(sum(everything(dtype), []))
    finally:
        torch.set_num_threads(threads)
    identical(results[1], results[0])
    identical(results[2], results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree(dtype: torch.dtype) -> None:
    try:
        names = [native.instruction_set(0)]
        exact, products = everything(dtype)
        for limit in (1, 2):
            names.append(native.instruction_set(limit))
            again, rounded = everything(dtype)
            identical(again, exact)
            for actual, expected in zip(rounded, products, strict=True):
                close(actual, expected, TOLERANCE[dtype])
    finally:
        native.instruction_set(2)
    assert names[0] == "baseline"


# ---- where numbers end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", (*SURROGATES[:1], *SURROGATES[3:5]), ids=lambda s: s.kind)
def test_membranes_that_are_not_finite(name: str, dtype: torch.dtype, surrogate: Surrogate) -> None:
    """NaN and infinity spread as they do in torch: no neuron infects another."""
    case = make_case(MODELS[name], surrogate, 4, 3, 70, dtype, 3)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        case.inputs[1, i % 3, 5 * i] = value
        case.states[0][i % 3, 5 * i + 1] = value
    record = forward(case)
    compare_forward(case, record)
    compare_backward(case, record, 1.0, 20 * TOLERANCE[dtype])


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 5, 5), (5, 0, 5), (5, 5, 0), (0, 0, 0)])
def test_nothing_to_do(rows: int, inputs: int, outputs: int) -> None:
    """Sizes of zero neither crash nor leave a result unwritten."""
    weight, grad = torch.randn(outputs, inputs), torch.randn(rows, outputs)
    raster = kernels.pack(torch.ones(rows, inputs))
    assert raster is not None and kernels.count(raster) == rows * inputs
    same(kernels.unpack(kernels.transpose(raster), torch.float32), torch.ones(inputs, rows))
    product, events = kernels.SynapseForward(weight, None), kernels.columns(raster, ranks=True)
    close(product(raster), reference.synapse_forward(torch.ones(rows, inputs), weight, None), 1e-5)
    grad_weight, grad_bias = kernels.weight_gradient(grad, events, bias=True)
    assert grad_bias is not None
    close(grad_weight, grad.t() @ torch.ones(rows, inputs), 1e-5)
    close(grad_bias, grad.sum(0), 1e-5)
    close(kernels.input_gradient(grad, events, product.tiles), (grad @ weight).flatten(), 1e-5)
    compare_forward(empty := make_case(LIF, SURROGATES[1], 3, rows, inputs, torch.float32, 0), forward(empty))


def test_out_of_memory_is_an_exception() -> None:
    """In a process of its own: an exception in a thread of OpenMP, or out of a C function, ends the process."""
    script = """if True:
        import torch
        from snn_sparse_backend import native
        for threads in (1, 4):
            try:
                native.call("weight_gradient", "SnnWeightGradient", torch.device("cpu"), rows=0, inputs=1 << 50,
                            outputs=64, block_rows=64, dtype=0, threads=threads)
            except MemoryError as error:
                print(error)
    """
    folder = Path(kernels.__file__).parent.parent
    child = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert child.stdout.count("weight_gradient cannot allocate") == 2, child.stderr


def test_tensors_that_do_not_fit_are_refused() -> None:
    raster = kernels.pack(torch.ones(4, 5))
    assert raster is not None
    events, tiles = kernels.columns(raster), kernels.pack_weights(torch.ones(3, 5))
    for wrong in (torch.ones(5, 3), torch.ones(3, 4).t(), torch.ones(4, 3, device="meta")):
        with pytest.raises(ValueError, match="grad: expected a"):
            kernels.weight_gradient(wrong, events, bias=True)
    with pytest.raises(ValueError, match="with ranks"):
        kernels.input_gradient(torch.ones(4, 3), events, tiles)
    with pytest.raises(ValueError, match="tiles: expected a"):
        kernels.input_gradient(torch.ones(4, 3).double(), kernels.columns(raster, ranks=True), tiles)
    with pytest.raises(ValueError, match="6 columns"):
        kernels.SynapseForward(torch.ones(3, 6), None)(raster)


# ---- surrogate derivatives against the host libraries' own -----------------------------------------------------------

CORNERS = (0.0, -0.0, 1e-40, 0.3, 1.0, 3.3, 3.42, 3.5, 3.6, 10.2, 1e5, 1e12, 1e19, 1e30, float("inf"), float("nan"))


def compare_surrogate(surrogate: Surrogate, host: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype,
                      skip: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like) -> None:
    """One step of a neuron whose membrane is its input, dense and compressed, against the host's backward."""
    corners = torch.tensor(CORNERS, dtype=dtype)
    edges = torch.tensor([1.0, 0.3], dtype=dtype)
    line = torch.cat([torch.linspace(-4, 4, 2001, dtype=dtype), corners, -corners, edges.nextafter(0 * edges)])
    grad = torch.tensor([1.0, 0.0, -2.5], dtype=dtype).unsqueeze(1).expand(-1, len(line)).contiguous()
    x = line.expand_as(grad).clone().requires_grad_()
    (expected,) = torch.autograd.grad(host(x), x, grad.to(host(x).dtype))
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    case = Case(MODELS["none"], surrogate, [zero, zero, one], x.detach().unsqueeze(0), [torch.zeros_like(grad)])
    record, arriving = forward(case), Cotangents([grad], [[None]])
    same(record.membrane[0], x.detach())
    kept = ~skip(x.detach()).bool()
    assert expected[kept].isfinite().sum() > 5600
    for compressed in (False, True):
        (found, *_) = backward(case, record, arriving, [None], compressed=compressed, sums=[None, None, None])
        assert found is not None
        close(found[0][kept], expected[kept], 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, constants", [
    ("atan", (2.0,)), ("atan", (7,)), ("fast_sigmoid", (25,)), ("fast_sigmoid", (0.5,)), ("sigmoid", (25,)),
    ("sigmoid", (2.0,)), ("straight_through_estimator", ()), ("triangular", (0.75,)), ("heaviside", ()),
    ("spike_rate_escape", (1, 25)), ("SFS", (25, 1)), ("SFS", (10, 0.3)),
])
def test_snntorch_surrogates(name: str, constants: tuple[float, ...], dtype: torch.dtype) -> None:
    factories = pytest.importorskip("snntorch.surrogate")
    from snn_sparse_backend.compat.snntorch import surrogate_of

    spike_grad = getattr(factories, name)(*constants)
    surrogate = surrogate_of(spike_grad)
    assert surrogate is not None
    compare_surrogate(surrogate, spike_grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [100.0, 1.0, 0.3])
@pytest.mark.parametrize("method", ["super", "triangle", "tanh", "circ", "heavi_erfc"])
def test_norse_surrogates(method: str, alpha: float, dtype: torch.dtype) -> None:
    threshold = pytest.importorskip("norse.torch.functional.threshold").threshold
    from snn_sparse_backend.compat.norse import surrogate_of

    surrogate = surrogate_of(method, alpha)
    assert surrogate is not None
    compare_surrogate(surrogate, lambda x: threshold(x, method, alpha), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cutoff_is_a_window(dtype: torch.dtype) -> None:
    """Exactly 1[|x| < cutoff] times the derivative, at the cutoff itself too."""

    def host(x: torch.Tensor) -> torch.Tensor:
        return reference.Spike.apply(x, Surrogate("Atan", 2.0)) * (x.detach().abs() < 0.3)

    compare_surrogate(Surrogate("Atan", 2.0).within(0.3), host, dtype, skip=torch.isnan)


# ---- the comparisons find planted errors -----------------------------------------------------------------------------


PLANTED = {
    "neurons/firing.h": ("a = a + phi;", "a = a - phi;"),
    "neurons/synaptic.h": ("syn = g.state[1] + updated;", "syn = updated;"),
    "neurons/lapicque.h": ("r.carry[0] = p.decay * updated;", "r.carry[0] = updated;"),
    "neurons/alpha.h": ("r.input = exc - inh;", "r.input = exc + inh;"),
    "neurons/lif_box.h": ("T lu = (p.to_value ? (T(1) - s.spike) * lv : lv) + phi;", "T lu = lv + phi;"),
    "neurons/delta_leaky.h": ("p.beta * moved - phi;", "p.beta * moved;"),
    "neurons/iaf.h": ("g.state[0] * (p.reset - s.u);", "g.state[0] * p.reset;"),
    "neurons/lsnn.h": ("decayed = lb - phi;", "decayed = lb;"),
    "neurons/lif_ex.h": ("return lu + mem * lu * (e - T(1));", "return lu - mem * lu;"),
    "neurons/lif_adex.h": ("r.carry[2] = (la - lh) - lm;", "r.carry[2] = la - lh;"),
    "neurons/lif_refrac.h": ("r.carry[2] = m.counted + refractory;", "r.carry[2] = m.counted;"),
    "cpu/synapse_gradients.cpp": ("odd.add(grad + a.row[e + 1] * columns);", "odd.add(grad + a.row[e] * columns);"),
    "cpu/raster.cpp": ("out_words + band] = block[k];", "out_words + band] = block[63 - k];"),
}


def test_planted_errors_are_found(tmp_path: Path) -> None:
    shutil.copytree(build.csrc_folder(), tmp_path / "csrc")
    for name, (right, wrong) in PLANTED.items():
        source = tmp_path / "csrc" / name
        text = source.read_text()
        assert text.count(right) == 1
        source.write_text(text.replace(right, wrong))
    path = build.provide(plain_recipe(tmp_path / "csrc", ("-O1",)), tmp_path / "cache").path
    with library(path):
        compare_scan("LIF", SURROGATES[1], 4, 3, 70, torch.float64, 0)  # what was left alone still passes
        for name in ("subtract", "Synaptic-none", "Lapicque-zero", "Alpha-none", "LIFBox-value", "IAF", "LSNN",
                     "DeltaLeaky", "LIFEx", "LIFAdEx", "LIFRefrac"):
            with pytest.raises(AssertionError, match="not close"):
                compare_scan(name, SURROGATES[1], 4, 3, 70, torch.float64, 0)
        with pytest.raises(AssertionError, match="not equal"):
            compare_rasters(70, 70, 0.3, torch.float32, 64, 0)
        with pytest.raises(AssertionError, match="not close"):
            compare_synapse(64, 64, 5, 1.0, torch.float64, 64, 0)
    compare_scan("subtract", SURROGATES[1], 4, 3, 70, torch.float64, 0)
