"""The order of the host's dense product: where one is found, a sum over events gives the very same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from snn_sparse_backend import summation
from snn_sparse_backend.kernels import Order, SynapseForward, pack

Linear = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(summation, "_orders", {})
    monkeypatch.setattr(summation, "_waiting", Counter())
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@settings(derandomize=True, deadline=None, database=None, max_examples=40)
@given(st.integers(1, 80), st.integers(1, 900), st.integers(1, 130), st.sampled_from([torch.float32, torch.float64]),
       st.booleans(), st.sampled_from([1, 2]), st.floats(0, 1), st.integers(0, 9))
def test_an_order_that_was_found_gives_the_bits_of_the_dense_product(
        rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool, threads: int, density: float,
        seed: int) -> None:
    torch.set_num_threads(threads)
    order = summation.order_of(rows, inputs, outputs, dtype, bias)
    if order is None:
        return
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs, dtype=dtype) * torch.exp(3 * torch.randn(outputs, inputs, dtype=dtype))
    b = torch.randn(outputs, dtype=dtype) if bias else None
    frames = torch.rand(3, rows, inputs).lt(density).to(dtype)
    for x in frames:  # slices of a sequence
        raster = pack(x)
        assert raster is not None
        assert same_bits(SynapseForward(weight, b, order=order)(raster), F.linear(x, weight, b))


@pytest.mark.parametrize("shape", [(64, 700, 1000), (64, 200, 200), (256, 784, 200)], ids=str)
def test_usual_shapes_have_an_order_on_processors_with_avx512(shape: tuple[int, int, int]) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        pytest.skip("another BLAS kernel may add otherwise")
    torch.set_num_threads(1)
    assert summation.order_of(*shape, torch.float32, True) is not None


def in_chunks(*ends: int) -> Linear:
    """A dense product that adds like this."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        total = bias.expand(len(x), -1).clone() if bias is not None else x.new_zeros(len(x), len(weight))
        for begin, end in zip((0, *ends[:-1]), ends, strict=True):
            part = torch.zeros_like(total)
            for k in range(begin, end):
                part = part + x[:, k : k + 1] * weight[:, k]
            total = total + part
        return total

    return linear


def in_two_groups(first: tuple[int, ...], second: tuple[int, ...]) -> Linear:
    """As threads do that share the inputs: the chunks of the second are added to each other, then to the first's."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        split = first[-1]
        ends = [end - split for end in second]
        return in_chunks(*first)(x[:, :split], weight[:, :split], bias) + in_chunks(*ends)(x[:, split:],
                                                                                          weight[:, split:])

    return linear


def backwards(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return in_chunks(x.shape[1])(x.flip(1), weight.flip(1), bias)


def pairwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    half = x.shape[1] // 2
    parts = [in_chunks(p.shape[1])(p, w) for p, w in ((x[:, ::2], weight[:, ::2]), (x[:, 1::2], weight[:, 1::2]))]
    assert half
    return parts[0] + parts[1] if bias is None else parts[0] + parts[1] + bias


def bias_last(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    total = in_chunks(30, 70)(x, weight)
    return total if bias is None else total + bias


def other_edge(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The last outputs are added in another order, as by a kernel for what is left of a tile."""
    return torch.cat([in_chunks(40, 70)(x, weight[:-3], None if bias is None else bias[:-3]),
                      in_chunks(20, 70)(x, weight[-3:], None if bias is None else bias[-3:])], 1)


@pytest.mark.parametrize("ends", [(70,), (32, 70), (10, 20, 69, 70), (1, 70)], ids=str)
def test_chunks_are_found(monkeypatch: pytest.MonkeyPatch, ends: tuple[int, ...]) -> None:
    monkeypatch.setattr(F, "linear", in_chunks(*ends))
    assert summation.order_of(8, 70, 80, torch.float32, True) == Order(ends)


@pytest.mark.parametrize(("first", "second"), [((35,), (50, 70)), ((20, 35), (50, 70)), ((2, 5), (7, 9, 70))], ids=str)
def test_groups_of_chunks_are_found(monkeypatch: pytest.MonkeyPatch, first: tuple[int, ...],
                                    second: tuple[int, ...]) -> None:
    monkeypatch.setattr(F, "linear", in_two_groups(first, second))
    assert summation.order_of(8, 70, 80, torch.float32, True) == Order((*first, *second), len(second))


def in_three_groups(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    third = in_chunks(15, 30)(x[:, 40:], weight[:, 40:])
    return in_two_groups((10, 20), (30, 40))(x[:, :40], weight[:, :40], bias) + third


@pytest.mark.parametrize("host", [in_three_groups, backwards, pairwise, bias_last, other_edge])
def test_any_other_order_is_none(monkeypatch: pytest.MonkeyPatch, host: Linear) -> None:
    monkeypatch.setattr(F, "linear", host)
    assert summation.order_of(8, 70, 80, torch.float32, True) is None


def test_asked_once_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    host = in_chunks(35, 70)
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(1) or host(*a))
    torch.set_num_threads(1)
    for _ in range(3):
        assert summation.order_of(8, 70, 80, torch.float32, True) == Order((35, 70))
    once = len(calls)
    torch.set_num_threads(2)
    summation.order_of(8, 70, 80, torch.float32, True)
    assert len(calls) == 2 * once


def test_the_order_of_a_large_product_is_found_once_it_was_needed_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    host = in_chunks(35, 70)
    monkeypatch.setattr(F, "linear", lambda *a: calls.append(1) or host(*a))
    monkeypatch.setattr(summation, "MOST_AT_ONCE", 8 * 70 * 80 - 1)
    for _ in range(summation.PATIENCE):
        assert summation.order_of(8, 70, 80, torch.float32, True) is None
    assert not calls
    assert summation.order_of(8, 70, 80, torch.float32, True) == Order((35, 70))
    assert summation.order_of(8, 70, 81, torch.float32, True) is None
    with summation.found_at_once():
        assert summation.order_of(8, 70, 81, torch.float32, True) == Order((35, 70))
    assert summation.order_of(8, 70, 82, torch.float32, True) is None


@pytest.mark.parametrize("limit", ["MOST", "LARGEST_OPERAND"])
def test_a_product_may_be_too_large(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear", None)
    monkeypatch.setattr(summation, limit, 5599)
    with summation.found_at_once():
        assert summation.order_of(8, 70, 80, torch.float32, True) is None


def test_a_narrower_format_has_no_order() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        assert summation.order_of(64, 200, 200, torch.float32, True) is None
    finally:
        torch.set_float32_matmul_precision("highest")
    assert summation.order_of(1, 3, 3, torch.float32, True) is None
    assert summation.order_of(64, 200, 200, torch.float16, True) is None


def test_finite() -> None:
    assert summation.finite(torch.randn(3, 4))
    assert not summation.finite(torch.tensor([[1.0, float("inf")]]))
    assert not summation.finite(torch.tensor([[float("nan"), 0.0]]))


def test_the_generator_of_the_user_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    summation.order_of(64, 200, 200, torch.float32, True)
    assert torch.equal(torch.rand(4), expected)


def test_precisions_of_the_newer_interface_are_heeded_and_do_not_raise() -> None:
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch has one interface only")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        assert summation.order_of(8, 70, 80, torch.float32, True) is None
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(("name", "answer"), [("mkl_get_max_threads", 3), ("omp_get_dynamic", 1)])
def test_no_order_where_the_threads_are_not_torchs(name: str, answer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(summation, "_asked", {name: answer}.get)
    assert summation.order_of(64, 200, 200, torch.float32, True) is None


def test_flushed_subnormals_are_another_key_and_none_with_workers() -> None:
    torch.set_num_threads(1)
    before = summation.order_of(64, 200, 200, torch.float32, True)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        assert summation.order_of(64, 200, 200, torch.float32, True) == before and len(summation._orders) == 2
        torch.set_num_threads(2)
        assert summation.order_of(64, 200, 200, torch.float32, True) is None
    finally:
        torch.set_flush_denormal(False)


def test_a_transposed_weight_runs_the_hosts_product() -> None:
    """Its dense product may add in another order: (64, 1000, 1000) does on processors with AVX-512."""
    from snn_sparse_backend.config import Options
    from snn_sparse_backend.synapse_tape import SynapseTape

    torch.set_num_threads(1)
    layer = torch.nn.Linear(200, 200)
    if SynapseTape(layer, Options(), None)._order_of_host(64) is None:
        pytest.skip("no order on this processor")
    layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert SynapseTape(layer, Options(), None)._order_of_host(64) is None
