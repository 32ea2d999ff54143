"""The order in which the host's dense product adds, so that a sum over events can give the same bits.

``torch.nn.functional.linear`` on rows of zeros and ones adds weights, in an order that its BLAS library chose for the
shape and the number of threads. Often it cuts the inputs into chunks, adds each chunk in the order of the inputs from
zero on, and adds the sums of the chunks to the bias one after another. Leaving out the zeros then changes no bit, and
the kernel that walks the events (``chunk_ends`` of ``SnnSynapseForward``) can take the place of the dense product. With
several threads, the last of the chunks may be added to each other first.

The order is found by asking the product itself, as in *FPRev: Revealing the Order and Precision of Accumulation in
Numerical Software* (Xie et al., 2024): with a huge weight at one place and its negative at another, the result counts
the ones that were not swallowed between the two. Then it is verified, bit by bit and at every output, on random
operands of mixed magnitudes, aligned and not. A product that does anything else has no order here, and runs itself.

What an order was seen to depend on, besides the processor, is part of the key under which it is kept: sizes, dtype,
threads, precision settings. Where tensors lie in memory does not matter, nor the distance of their rows (slices of a
sequence), but a transposed weight does: it is the caller who must have a contiguous one.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn import functional as F

from .build import say
from .compat.precision import full_on_cpu
from .kernels import Order, SynapseForward, pack

# Multiplications of a product. Below, it is over before an order could pay; above, it would take minutes to find.
FEWEST, MOST = 1 << 15, 1 << 38
# Above, it takes seconds: that waits until a product was asked about so often that it has taken as long itself.
MOST_AT_ONCE, PATIENCE = 1 << 33, 20
# Numbers in an operand: probing and verifying take several of that size.
LARGEST_OPERAND = 1 << 27
_HUGE = {torch.float32: 2.0**60, torch.float64: 2.0**120}
_DENSITIES = (0.02, 0.3, 1.0)
_SUBNORMAL = 5e-324

_lock = threading.Lock()
_orders: dict[tuple[object, ...], Order | None] = {}
_waiting: Counter[tuple[object, ...]] = Counter()  # how often a large product was asked about
_patience = PATIENCE


def order_of(rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> Order | None:
    """The order of a dense product, or None where it is not one of those.

    Found once in a process for each shape, dtype, presence of a bias, and number of threads; that takes about as long
    as twenty products, and for large ones it waits for the twentieth call: whoever runs a few sequences only never
    waits for it.

    Args:
        rows, inputs, outputs: of the product ``[rows, inputs] x [inputs, outputs]`` on the CPU.
        dtype: float32 or float64.
        bias: whether there is one.
    """
    multiplications = rows * inputs * outputs
    largest = max(rows * inputs, rows * outputs, inputs * outputs)
    if not FEWEST <= multiplications <= MOST or largest > LARGEST_OPERAND or dtype not in _HUGE:
        return None
    threads = torch.get_num_threads()
    if not full_on_cpu() or not _settled(threads):
        return None
    key = (rows, inputs, outputs, dtype, bias, threads, torch.backends.mkldnn.enabled, _flushes())
    with _lock:
        if key not in _orders:
            if multiplications > MOST_AT_ONCE:
                if _waiting[key] < _patience:
                    _waiting[key] += 1
                    return None
                say(f"finding out how torch adds in products of {rows} x {inputs} x {outputs}, once; takes as long as "
                    "about twenty of them")
            _orders[key] = _find(rows, inputs, outputs, dtype, bias)
        return _orders[key]


@contextmanager
def found_at_once() -> Iterator[None]:
    """Inside, the orders of large products are looked for when they are first asked about."""
    global _patience
    before, _patience = _patience, 0
    try:
        yield
    finally:
        _patience = before


def finite(weight: torch.Tensor) -> bool:
    """Whether a dense product would not turn a zero input into NaN; False also where the weights add up to infinity."""
    return bool(weight.sum().isfinite())


def _flushes() -> bool:
    """Whether subnormal numbers are zero in this thread (``torch.set_flush_denormal``)."""
    return not _SUBNORMAL > 0


def _settled(threads: int) -> bool:
    """Whether all calls in this thread divide their work in the same way.

    Others than torch can tell MKL how many threads it has, and OpenMP that it may start fewer. Workers treat subnormal
    numbers in their own way, whatever the calling thread does.
    """
    blas = _asked("mkl_get_max_threads")
    if blas is not None and blas != threads:
        return False
    return threads == 1 or not (_asked("omp_get_dynamic") or _flushes())


@cache
def _function(name: str) -> Callable[[], int] | None:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # and what it depends on
    except OSError:
        return None
    return getattr(library, name, None)


def _asked(name: str) -> int | None:
    function = _function(name)
    return function() if function is not None else None


@torch.no_grad()
def _find(rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> Order | None:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        order = _probe(rows, inputs, outputs, dtype)
        return order if order is not None and _verified(order, rows, outputs, dtype, bias) else None


def _probe(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Order | None:
    """The order, if the product has one."""
    ends = _chunks(0, rows, inputs, outputs, dtype)
    if ends is None or len(ends) < 2:
        return Order(ends) if ends is not None else None
    # What looks like one chunk from outside may have several inside.
    inner = _chunks(ends[-2], rows, inputs, outputs, dtype)
    return Order((*ends[:-1], *inner), len(inner) if len(inner) > 1 else 0) if inner is not None else None


def _chunks(base: int, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[int, ...] | None:
    """Ends of the chunks from the input ``base`` on, as they are seen from there."""
    x = torch.ones(rows, inputs, dtype=dtype)
    counts = [inputs - 1]  # by place of the negative: how many ones were not swallowed
    for first in range(base + 1, inputs, outputs):
        places = range(first, min(first + outputs, inputs))
        weight = torch.ones(outputs, inputs, dtype=dtype)
        weight[:, base] = _HUGE[dtype]
        for row, place in enumerate(places):
            weight[row, place] = -_HUGE[dtype]
        found = F.linear(x, weight)[:, : len(places)]
        if not torch.equal(found, found[:1].expand_as(found)):
            return None
        counts += [int(count) for count in found[0].tolist()]
    # Inside the first chunk all that comes behind the negative is left; else what comes behind its chunk. (What comes
    # before the base is always left.)
    own = inputs - base
    end = next((place for place in range(1, own) if counts[place] != inputs - 1 - place), own)
    ends = sorted({base + end, *(base + inputs - count for count in counts[end:])})
    return tuple(ends) if ends[0] > base and ends[-1] == inputs else None


def _verified(order: Order, rows: int, outputs: int, dtype: torch.dtype, bias: bool) -> bool:
    inputs = order.ends[-1]
    for offset in (0, 1):  # a slice of a larger tensor need not lie on a cache line
        weight, b = _mixed((outputs, inputs), dtype, offset), _mixed((outputs,), dtype, offset) if bias else None
        by_events = SynapseForward(weight, b, order=order)
        for density in _DENSITIES:
            x = torch.rand(rows, inputs).lt(density).to(dtype)
            x[torch.rand(x.shape).lt(0.05) & (x == 0)] = -0.0
            x[:1] = 0  # with the negative weights: a sum of negative zeros only
            x = _placed(x, offset)
            raster = pack(x)
            if raster is None or not torch.equal(_bits(F.linear(x, weight, b)), _bits(by_events(raster))):
                return False
    return True


def _mixed(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
    """Normal numbers over sixteen binary orders of magnitude, some of them negative zeros; the first row negative."""
    numbers = torch.randn(shape, dtype=dtype) * torch.exp2(torch.randint(-8, 8, shape).to(dtype))
    numbers[:1] = -numbers[:1].abs()
    return _placed(numbers.masked_fill_(torch.rand(shape) < 0.01, -0.0), offset)


def _placed(values: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, so many elements behind the start of an allocation."""
    memory = torch.empty(values.numel() + offset, dtype=values.dtype)
    return memory[offset:].view(values.shape).copy_(values)


_bits = partial(torch.Tensor.view, dtype=torch.int32)
