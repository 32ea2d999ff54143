"""The CUDA kernels, compiled for the CPU: against the references, against the CPU's kernels, and against themselves.

A schedule is the order in which the harness runs blocks and threads: "" is their own, a number a random one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference
import test_kernels as with_cpu_kernels
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
    cuda_on_host,
    forward,
    identical,
    make_case,
    same,
    spikes,
)
from cuda_builds import cuda_on_host_library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from snn_sparse_backend import kernels, native, scans
from snn_sparse_backend.abi import CONSTANTS, STRUCTS
from snn_sparse_backend.norse_dynamics import LI, LIF
from snn_sparse_backend.raster import Raster
from snn_sparse_backend.reports import Counter
from snn_sparse_backend.surrogate import Surrogate

CPU = torch.device("cpu")
SIZES = st.one_of(st.sampled_from([1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]), st.integers(1, 200))
ROWS = st.one_of(st.sampled_from([1, 2, 127, 128, 129, 300]), st.integers(1, 300))
LAUNCH = CONSTANTS["kStepsPerLaunch"]
STEPS = st.sampled_from([1, 2, 3, 4, 5, LAUNCH - 1, LAUNCH, LAUNCH + 1, 2 * LAUNCH - 1, 2 * LAUNCH, 2 * LAUNCH + 1])
DENSITIES = st.one_of(st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.floats(0, 1))
SEEDS = st.integers(0, 2**31)
SCHEDULES = st.sampled_from(["", "1", "2", "3"])
quick = settings(derandomize=True, deadline=None, database=None, max_examples=30)


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[ctypes.CDLL]:
    with cuda_on_host(cuda_on_host_library()) as library:
        yield library


@contextmanager
def scheduled(schedule: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNN_CUDA_HOST_SEED", schedule)
        yield


@contextmanager
def cpu_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "cuda_on_host", None)
        yield


# ---- the comparisons, drawn ------------------------------------------------------------------------------------------


@quick
@given(ROWS, SIZES, DENSITIES, st.sampled_from(DTYPES), SEEDS, SCHEDULES)
@example(9000, 3, 0.5, torch.float32, 0, "1")
@example(3, 9000, 0.5, torch.float64, 1, "")
def test_rasters(rows: int, cols: int, density: float, dtype: torch.dtype, seed: int, schedule: str) -> None:
    with scheduled(schedule):
        compare_rasters(rows, cols, density, dtype, 64, seed)


# Beyond 256 inputs the input gradient has more than one block of them; from 1024 rows on the weight gradient is summed
# in parts; a tile is 128 columns of float32 and 64 of float64.
@quick
@given(ROWS, SIZES, SIZES, DENSITIES, st.sampled_from(DTYPES), SEEDS, st.booleans(), SCHEDULES)
@example(1100, 40, 33, 0.3, torch.float32, 0, True, "")
@example(1030, 20, 70, 0.1, torch.float64, 1, False, "1")
@example(130, 300, 300, 0.05, torch.float32, 2, True, "2")
@example(40, 520, 140, 0.3, torch.float64, 3, True, "")
def test_synapses(rows: int, inputs: int, outputs: int, density: float, dtype: torch.dtype, seed: int, bias: bool,
                  schedule: str) -> None:
    with scheduled(schedule):
        compare_synapse(rows, inputs, outputs, density, dtype, 64, seed, bias)


@pytest.mark.parametrize("name", MODELS)
@settings(quick, max_examples=14)
@given(st.sampled_from(SURROGATES), STEPS, st.integers(1, 20), SIZES, st.sampled_from(DTYPES), SEEDS,
       st.sampled_from([0.0, 0.4, 1.0]), SCHEDULES)
def test_scans(name: str, surrogate: Surrogate, steps: int, rows: int, cols: int, dtype: torch.dtype, seed: int,
               share: float, schedule: str) -> None:
    # A gradient that grows over many steps carries float32's rounding beyond any tolerance, torch's own as well.
    with scheduled(schedule):
        compare_scan(name, surrogate, steps, rows, cols, torch.float64 if steps > 5 else dtype, seed, share)


test_membranes_that_are_not_finite = with_cpu_kernels.test_membranes_that_are_not_finite
test_snntorch_surrogates = with_cpu_kernels.test_snntorch_surrogates
test_norse_surrogates = with_cpu_kernels.test_norse_surrogates


# ---- against the kernels of the CPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@settings(quick, max_examples=8)
@given(st.sampled_from(SURROGATES), STEPS, st.integers(1, 12), SIZES, st.sampled_from(DTYPES), SEEDS, st.booleans())
def test_scans_equal_the_cpus(name: str, surrogate: Surrogate, steps: int, rows: int, cols: int, dtype: torch.dtype,
                              seed: int, scalar: bool) -> None:
    """Bit for bit, forward and backward."""
    case = make_case(MODELS[name], surrogate, steps, rows, cols, dtype, seed, scalar)
    record = forward(case)
    arriving = cotangents(case, record, 0.7)
    found = backward(case, record, *arriving)
    with cpu_kernels():
        expected_record = forward(case)
        expected = backward(case, expected_record, *arriving)
    identical(record.tensors(), expected_record.tensors())
    identical(flat(found), flat(expected))


@quick
@given(ROWS, SIZES, SIZES, DENSITIES, st.sampled_from(DTYPES), SEEDS)
def test_products_equal_the_cpus(rows: int, inputs: int, outputs: int, density: float, dtype: torch.dtype,
                                 seed: int) -> None:
    torch.manual_seed(seed)
    dense = spikes(rows, inputs, density, seed)
    weight, bias, grad = (torch.randn(s, dtype=dtype) for s in ((outputs, inputs), (outputs,), (rows, outputs)))

    def run(raster: Raster | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        assert raster is not None
        product, events = kernels.SynapseForward(weight, bias), kernels.columns(raster, ranks=True)
        grad_weight, grad_bias = kernels.weight_gradient(grad, events, bias=True)
        grad_active = kernels.input_gradient(grad, events, product.tiles)
        assert grad_bias is not None
        exact = [raster.words, kernels.transpose(raster).words, kernels.unpack(raster, dtype), product.tiles]
        return exact, [product(raster), grad_weight, grad_bias, grad_active[dense] if grad_active.dim() > 1
                       else grad_active]

    exact, rounded = run(kernels.nonzero(dense.to(dtype)))
    with cpu_kernels():
        expected, right = run(kernels.pack(dense.to(dtype)))
    identical(exact, expected)
    for actual, close_to in zip(rounded, right, strict=True):
        close(actual, close_to, TOLERANCE[dtype])


# ---- against themselves ----------------------------------------------------------------------------------------------

steps_equal_the_sequence = with_cpu_kernels.test_steps_equal_the_sequence.hypothesis.inner_test


@settings(quick, max_examples=30)
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(SURROGATES[1:5]), st.sampled_from([2, 3, 6, 33, 65]),
       st.integers(1, 6), SIZES, st.sampled_from(DTYPES), SEEDS, SCHEDULES, st.data())
def test_steps_equal_the_sequence(name: str, surrogate: Surrogate, steps: int, rows: int, cols: int,
                                  dtype: torch.dtype, seed: int, schedule: str, data: st.DataObject) -> None:
    with scheduled(schedule):
        steps_equal_the_sequence(name, surrogate, steps, rows, cols, dtype, seed, data)


def flat(gradients: Any) -> list[torch.Tensor]:
    grad_input, grad_states, sums = gradients
    return [grad_input, *grad_states, *sums]


def everything(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results of all kernels, on sizes that make several blocks of each; and where the membranes were stored."""
    torch.manual_seed(0)
    dense, results, offsets = spikes(1030, 140, 0.05, 0), [], []
    factors = dense * torch.randn(1030, 140, dtype=dtype)
    raster = kernels.nonzero(factors)
    results += [raster.words, kernels.transpose(raster).words, kernels.unpack(raster, dtype)]
    for outputs in (20, 140):
        weight, grad = torch.randn(outputs, 140, dtype=dtype), torch.randn(1030, outputs, dtype=dtype)
        product, events = kernels.SynapseForward(weight, weight[:, 0]), kernels.columns(raster, factors=factors)
        grad_weight, _ = kernels.weight_gradient(grad, events, bias=False)
        results += [product.tiles, product(raster, factors), product(raster), grad_weight,
                    kernels.input_gradient(grad, events, product.tiles)[dense]]
    for name in ("subtract-late", "zero", "LIF", "LI"):
        case = make_case(MODELS[name], SURROGATES[1], 35, 9, 200, dtype, 0)
        record = forward(case)
        arriving = cotangents(case, record, 0.8)
        results += [*record.tensors(), *flat(backward(case, record, *arriving))]
        if record.offsets is not None and case.model.spikes:
            offsets.append(record.offsets)
            grad_input, *_ = backward(case, record, *arriving, compressed=True, sums=[None] * len(case.parameters))
            results.append(grad_input)
    return results, offsets


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    """In whatever order blocks and threads run, though they then store the membranes in other places."""
    runs = []
    for schedule in ("", "", "1", "2"):
        with scheduled(schedule):
            runs.append(everything(dtype))
    for results, _ in runs[1:]:
        identical(results, runs[0][0])
    identical(runs[1][1], runs[0][1])
    assert not any(torch.equal(a, b) for _, found in runs[2:] for a, b in zip(found, runs[0][1], strict=True))


# ---- where numbers end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 5, 5), (5, 0, 5), (5, 5, 0), (0, 0, 0)])
def test_nothing_to_do(rows: int, inputs: int, outputs: int) -> None:
    """Sizes of zero neither fail nor leave a result unwritten."""
    ones, weight, grad = torch.ones(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    raster = kernels.nonzero(ones)
    same(kernels.unpack(kernels.transpose(raster), torch.float32), ones.t())
    with unwritten_is_nan():
        for factors in (None, ones):
            product, events = kernels.SynapseForward(weight, None), kernels.columns(raster, factors=factors)
            close(product(raster, factors), reference.synapse_forward(ones, weight, None), 1e-5)
            grad_weight, grad_bias = kernels.weight_gradient(grad, events, bias=True)
            assert grad_bias is not None
            close(grad_weight, grad.t() @ ones, 1e-5)
            close(grad_bias, grad.sum(0), 1e-5)
            close(kernels.input_gradient(grad, events, product.tiles), grad @ weight, 1e-5)
    if not rows * inputs:
        spiking, silent = (make_case(model, SURROGATES[1], 35, rows, inputs, torch.float64, 0) for model in (LIF, LI))
        assert stored(spiking, 0)[1].tolist() == [0, 0]
        compare_forward(silent, record := forward(silent))
        compare_backward(silent, record, 1.0, 1e-12)


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Lets torch.empty fill its results."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("steps", [1, 3, 35])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ["", "1"])
def test_an_arena_is_not_written_beyond_its_capacity(steps: int, dtype: torch.dtype, schedule: str) -> None:
    """What does not fit is dropped and counted; a caller never lets it come to that."""
    case = make_case(MODELS["subtract"], SURROGATES[1], steps, 7, 200, dtype, 1)
    with scheduled(schedule):
        whole = forward(case)
        total = sum(whole.active_counts)
        for capacity in (0, 1, total // 2, total - 1, total):
            arena, counts = stored(case, capacity)
            assert counts.tolist() == [total, sum(whole.spike_counts)]
            assert not arena[:capacity].isnan().any()
            assert arena[capacity:].isnan().all() and len(arena) > total
            if schedule == "":
                assert whole.arena is not None
                same(arena[:capacity], whole.arena[:capacity])


def stored(case: Case, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The arena, NaN where nothing was written, and the counts."""
    layer, scan, counts = case.layer(), scans.ForwardScan(case.layer()), torch.zeros(2, dtype=torch.int64)
    arena = torch.full((case.steps * layer.sites + 1,), float("nan"), dtype=case.inputs.dtype)
    active = torch.empty((case.steps, layer.rows, layer.words), dtype=torch.int64)
    offsets = torch.empty((case.steps, layer.blocks), dtype=torch.int64)
    tables = [case.inputs, None, None, None, active, None, offsets, *[None] * (len(scans.TRACES) + len(case.states))]
    pointers = [p for t in tables for p in scans.step_pointers(t, case.steps)]
    finals = [torch.empty_like(s) for s in case.states]
    scan.run(case.steps, pointers, [s.data_ptr() for s in case.states], [s.data_ptr() for s in finals],
             arena.data_ptr(), capacity, report=STRUCTS["SnnReport"](counts=counts.data_ptr()))
    return arena, counts


def test_every_wish_may_be_missing() -> None:
    case = make_case(MODELS["subtract"], SURROGATES[1], 3, 4, 70, torch.float64, 0)
    scan, finals = scans.ForwardScan(case.layer()), [torch.empty_like(s) for s in case.states]
    pointers = [*scans.step_pointers(case.inputs, 3), *[None] * 3 * (len(scan.TABLES) + len(case.states) - 1)]
    counter = Counter(CPU)
    for report in (counter.launch(3 * 4 * 70), STRUCTS["SnnReport"]()):
        scan.run(3, pointers, [case.states[0].data_ptr()], [finals[0].data_ptr()], report=report)
        identical(finals, forward(case).finals)


# ---- devices and errors ----------------------------------------------------------------------------------------------


def device_calls(library: ctypes.CDLL) -> list[int]:
    """The devices that were made the current one since the last look."""
    calls = (ctypes.c_int * 8)()
    return calls[: library.cuda_host_device_calls(calls, 8)]


def unpacking(rows: int = 3) -> tuple[Any, torch.Tensor, Any]:
    """Arguments of raster_unpack, and the tensors in them."""
    words, dense = torch.full((3, 1), 0b101), torch.zeros(3, 5)
    arguments = STRUCTS["SnnRasterUnpack"](words=words.data_ptr(), rows=rows, cols=5, dense=dense.data_ptr())
    return arguments, dense, words


def test_the_callers_device_is_the_current_one_again(library: ctypes.CDLL) -> None:
    unpack = native._cuda_function("raster_unpack", library)
    device_calls(library)
    for device, rows, error, calls in ((0, 3, "", []), (1, 3, "", [1, 0]), (1, 1 << 40, "configuration", [1, 0]),
                                       (2, 3, "invalid device ordinal 2", [2]), (1, 3, "", [1, 0])):
        arguments, dense, _words = unpacking(rows)
        if error:
            with pytest.raises(RuntimeError, match=f"^snn_cuda_raster_unpack: CUDA error: .*{error}"):
                unpack(ctypes.addressof(arguments), device, None)
        else:
            unpack(ctypes.addressof(arguments), device, None)
        assert device_calls(library) == calls and library.cuda_host_current_device() == 0
        same(dense, torch.zeros(3, 5) if error else torch.tensor([1.0, 0, 1, 0, 0]).expand(3, 5))


LAYER = {"rows": 1 << 40, "cols": 1, "model": CONSTANTS["kLi"]}


@pytest.mark.parametrize("name, struct, sizes", [
    ("raster_pack", "SnnRasterPack", {"rows": 1 << 40, "cols": 1}),
    ("raster_unpack", "SnnRasterUnpack", {"rows": 1 << 40, "cols": 1}),
    ("raster_transpose", "SnnRasterTranspose", {"rows": 64, "cols": 1 << 42}),
    ("pack_weights", "SnnPackWeights", {"inputs": 1, "outputs": 1 << 22}),
    ("synapse_forward", "SnnSynapseForward", {"rows": 1 << 40, "inputs": 1, "outputs": 1}),
    ("weight_gradient", "SnnWeightGradient", {"rows": 1, "inputs": 1, "outputs": 1, "splits": 1 << 16}),
    ("input_gradient", "SnnInputGradient", {"rows": 1, "inputs": 1 << 25, "outputs": 1}),
    ("neuron_forward", "SnnNeuronForward", {"layer": STRUCTS["SnnLayer"](**LAYER), "steps": 1}),
    ("neuron_backward", "SnnNeuronBackward", {"layer": STRUCTS["SnnLayer"](**LAYER), "steps": 1}),
])
def test_sizes_that_no_grid_can_have(name: str, struct: str, sizes: dict[str, Any]) -> None:
    """They are refused in CUDA's words, before any memory is touched, and the next call works."""
    table = (ctypes.c_void_p * 1)(None)
    tables = {"input": ctypes.addressof(table)} if name == "neuron_forward" else {}
    with pytest.raises(RuntimeError, match=f"^snn_cuda_{name}: CUDA error: invalid configuration argument"):
        native.call(name, struct, CPU, **sizes, **tables)
    compare_rasters(5, 70, 0.3, torch.float32, 64, 0)
