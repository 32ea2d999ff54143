"""The kernels of convolutions and of pooling against torch, and against themselves: threads, instruction sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from convolution_cases import Case, close, compare_max_pool, compare_products
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from snn_sparse_backend import conv_summation, kernels, native
from snn_sparse_backend.conv_summation import adds_alike
from snn_sparse_backend.convolution import Convolution, dense_gradients, event_forward, pack_weight
from snn_sparse_backend.pooling import AvgPool, MaxPool, Window

DTYPES = st.sampled_from([torch.float32, torch.float64])
quick = settings(derandomize=True, deadline=None, database=None, max_examples=150)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
windows = st.builds(Window, pairs, st.tuples(st.integers(1, 3), st.integers(1, 3)),
                    st.tuples(st.integers(0, 3), st.integers(0, 3)), st.tuples(st.integers(1, 2), st.integers(1, 2)))
convolutions = st.builds(
    Case, st.integers(1, 7), st.tuples(st.sampled_from([1, 2, 3, 16, 17, 40]), st.integers(1, 11), st.integers(1, 9)),
    st.sampled_from([1, 3, 8, 16, 17, 33, 64, 65, 100]), windows, st.sampled_from([0.0, 0.03, 0.3, 1.0]), st.booleans(),
    DTYPES, st.integers(0, 2**31))


@quick
@given(convolutions)
@example(Case(300, (2, 6, 5), 5, Window((3, 3), (1, 1), (1, 1)), 0.2, True, torch.float32, 0))  # rows in parts
def test_products_of_a_convolution(case: Case) -> None:
    compare_products(case)


@settings(quick, max_examples=40)
@given(convolutions)
@example(Case(700, (3, 8, 8), 20, Window((3, 3), (1, 1), (1, 1)), 0.1, True, torch.float32, 0))
def test_results_depend_neither_on_threads_nor_much_on_the_instruction_set(case: Case) -> None:
    if not case.make():
        return
    before = case.products()
    try:
        torch.set_num_threads(3)
        native.SITES_PER_THREAD, sites = 1, native.SITES_PER_THREAD
        assert all(torch.equal(a, b) for a, b in zip(before, case.products(), strict=True))
    finally:
        torch.set_num_threads(2)
        native.SITES_PER_THREAD = sites
    for level in (0, 1):
        try:
            native.instruction_set(level)
            assert all(close(a, b) for a, b in zip(before, case.products(), strict=True))
        finally:
            native.instruction_set(2)


@quick
@given(convolutions, st.booleans(), st.booleans())
def test_dense_gradients_piece_by_piece(case: Case, weight: bool, inputs: bool) -> None:
    if not case.make():
        return
    total = torch.full((case.rows, case.x[0].numel()), torch.nan, dtype=case.dtype) if inputs else None
    images = (lambda first, end: case.x[first:end]) if weight else None
    if not (weight or inputs):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("snn_sparse_backend.convolution._CPU_BYTES", 3 * case.image.numel() * 8)
        found = dense_gradients(case.convolution, case.grad, case.weight, images, torch.Size(case.shape), total)
    _, expected, _, _ = case.expected()
    assert close(found, expected) if weight else found is None
    if total is not None:
        assert total.isfinite().all() and close(total.view_as(case.x)[case.x > 0], case.expected()[2])


# ---------------------------------------------------------------------------------------------------- pooling


@quick
@given(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 17), st.integers(1, 20)), windows, st.booleans(),
       st.sampled_from(["normal", "spikes", "special"]), DTYPES, st.integers(0, 2**31))
@example((2, 300, 2, 2), Window((2, 2), (2, 2), (0, 0)), False, "normal", torch.float32, 0)
@example((1, 1, 200, 40), Window((2, 2), (2, 2), (0, 0)), False, "special", torch.float64, 0)
def test_max_pooling_finds_what_torch_finds(shape: tuple[int, int, int, int], window: Window, ceil_mode: bool,
                                            values: str, dtype: torch.dtype, seed: int) -> None:
    compare_max_pool(shape, window, ceil_mode, values, dtype, seed)


def test_average_pooling_and_large_windows_are_torchs() -> None:
    x = torch.randn(2, 3, 20, 20).requires_grad_()
    for pool, host in ((AvgPool(Window((3, 2), (2, 2), (1, 0)), True, False, 5),
                        lambda: F.avg_pool2d(x, (3, 2), 2, (1, 0), True, False, 5)),
                       (MaxPool(Window((17, 17), (1, 1), (0, 0))), lambda: F.max_pool2d(x, 17, 1))):
        x.grad, expected = None, host()
        pooled, places = pool(x.detach())
        expected.backward(grad := torch.randn_like(expected))
        assert torch.equal(pooled, expected) and torch.equal(pool.backward(grad, x.shape[1:], places), x.grad)


# ---------------------------------------------------------------------------------------------------- summation


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", [(64, 1, 12, 28, 5, 0), (64, 12, 64, 12, 5, 0), (8, 40, 24, 10, 3, 1)])
def test_where_the_hosts_order_is_ours_the_bits_are_its(case: tuple[int, ...], bias: bool) -> None:
    rows, channels, outputs, size, kernel, pad = case
    convolution = Convolution(Window((kernel, kernel), (1, 1), (pad, pad)), 1)
    torch.manual_seed(1)
    weight, b = torch.randn(outputs, channels, kernel, kernel), torch.randn(outputs) if bias else None
    shape = torch.Size((rows, channels, size, size))
    if not adds_alike(convolution, shape, weight, bias):
        if "AVX-512" in native.instruction_set():
            pytest.fail("oneDNN was seen to add in this order on every processor with AVX-512")
        pytest.skip("this processor's convolution adds in another order")
    for density in (0.01, 0.1, 0.6):
        x = torch.rand(shape).lt(density).float()
        host = F.conv2d(x, weight, b, padding=pad)
        raster, packed = kernels.pack(x.flatten(1)), pack_weight(weight)
        found = event_forward(convolution, raster, packed, b, shape[1:], host.shape[1:])
        assert torch.equal(host.view(torch.int32), found.view(torch.int32))


@pytest.mark.parametrize("other", ["order", "not finite", "transposed", "float64", "tiny"])
def test_where_it_is_not_the_host_computes(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_summation, "_verified", {})
    convolution, shape = Convolution(Window((3, 3), (1, 1), (0, 0)), 1), torch.Size((16, 20, 12, 12))
    weight = torch.randn(30, 20, 3, 3)
    if other == "order":
        host = F.conv2d
        monkeypatch.setattr(F, "conv2d", lambda x, w, b, *rest: host(x.flip(1), w.flip(1), b, *rest))
    elif other == "not finite":
        weight[0, 0, 0, 0] = torch.inf
    elif other == "transposed":
        weight = weight.to(memory_format=torch.channels_last)
    elif other == "float64":
        weight = weight.double()
    else:
        shape = torch.Size((1, 20, 4, 4))
    assert not adds_alike(convolution, shape, weight, True)
