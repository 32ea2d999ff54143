"""The kernels of convolutions and of pooling against torch, and against themselves: threads, instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from snn_sparse_backend import conv_summation, kernels, native
from snn_sparse_backend.conv_summation import adds_alike
from snn_sparse_backend.convolution import (
    Convolution,
    ImageGradient,
    dense_gradients,
    event_forward,
    event_input_gradient,
    event_weight_gradient,
    pack_weight,
)
from snn_sparse_backend.pooling import AvgPool, MaxPool, Window

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = st.sampled_from([torch.float32, torch.float64])
quick = settings(derandomize=True, deadline=None, database=None, max_examples=150)


@dataclass
class Case:
    """A convolution of random spikes, and gradients of its currents."""

    rows: int
    shape: tuple[int, int, int]
    outputs: int
    window: Window
    density: float
    pooled: bool
    dtype: torch.dtype
    seed: int

    def make(self) -> bool:
        """Draws everything; False if the window is larger than the images."""
        torch.manual_seed(self.seed)
        self.convolution = Convolution(self.window, 1)
        self.x = torch.rand(self.rows, *self.shape).lt(self.density).to(self.dtype)
        self.raster = kernels.pack(self.x.flatten(1))
        self.weight = torch.randn(self.outputs, self.shape[0], *self.window.kernel, dtype=self.dtype)
        self.bias = torch.randn(self.outputs, dtype=self.dtype)
        stops = self.window.stops(self.shape)
        if min(stops) < 1 or (self.pooled and min(stops) < 2):
            return False
        self.image = torch.Size((self.outputs, *stops))
        if self.pooled:
            pool = MaxPool(Window((2, 2), (1, 2), (0, 0)))
            pooled, places = pool(torch.randn(self.rows, *self.image, dtype=self.dtype))
            self.grad = ImageGradient(torch.randn_like(pooled).flatten(1), pooled.shape[1:], self.image, pool, places)
        else:
            grad = torch.randn(self.rows, self.image.numel(), dtype=self.dtype)
            self.grad = ImageGradient(grad, self.image, self.image)
        return True

    def products(self) -> list[Tensor]:
        """By our kernels: forward, gradient of the weight, gradients of the inputs where they spike, of the bias."""
        packed, shape = pack_weight(self.weight), torch.Size(self.shape)
        return [event_forward(self.convolution, self.raster, packed, self.bias, shape, self.image),
                event_weight_gradient(self.convolution, self.grad, self.raster, shape),
                event_input_gradient(self.convolution, self.grad, self.raster, packed, shape), self.grad.bias()]

    def expected(self) -> list[Tensor]:
        """The same by torch."""
        w = self.window
        x, weight, bias = (t.clone().requires_grad_() for t in (self.x, self.weight, self.bias))
        out = F.conv2d(x, weight, bias, w.stride, w.padding, w.dilation)
        out.backward(self.grad.part(0, self.rows))
        return [out.detach(), weight.grad, x.grad[self.x > 0], bias.grad]


def close(found: Tensor, expected: Tensor) -> bool:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found - expected).norm()) <= TOLERANCE[found.dtype] * max(float(expected.norm()), 1e-3)


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
    if not case.make():
        return
    for name, found, expected in zip(("forward", "weight", "input", "bias"), case.products(), case.expected(),
                                     strict=True):
        assert close(found, expected), name


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
    torch.manual_seed(seed)
    x = torch.randn(shape, dtype=dtype)
    if values == "spikes":
        x = (x > 0.8).to(dtype)
    elif values == "special":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], dtype=dtype)
        x = special[torch.randint(0, 5, shape)]
    (most_h, most_w), (down, right), (every_h, every_w) = window.kernel, window.stride, window.dilation
    top, left = min(window.padding[0], most_h // 2), min(window.padding[1], most_w // 2)
    if max(every_h, every_w) > 1:  # a window may lie outside its image altogether, which is not supported
        top = left = 0
    window = replace(window, padding=(top, left))
    geometry = window.kernel, window.stride, window.padding, window.dilation, ceil_mode
    try:
        expected, index = F.max_pool2d(x, *geometry, return_indices=True)
    except RuntimeError:
        assert min(window.stops(shape, ceil_mode)) < 1
        return
    pool = MaxPool(window, ceil_mode)
    pooled, places = pool(x)
    assert pooled.shape == expected.shape and places.dtype is torch.uint8
    bits = torch.int32 if dtype is torch.float32 else torch.int64
    assert torch.equal(pooled.view(bits), expected.view(bits))
    y = torch.arange(pooled.shape[2]).view(-1, 1) * down - top + places.long() // window.kernel[1] * every_h
    x_at = torch.arange(pooled.shape[3]) * right - left + places.long() % window.kernel[1] * every_w
    assert torch.equal(y * shape[3] + x_at, index)
    grad = torch.randn_like(pooled)
    spread = torch.ops.aten.max_pool2d_with_indices_backward(grad, x, *geometry, index)
    assert close(pool.backward(grad, torch.Size(shape[1:]), places), spread)


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
