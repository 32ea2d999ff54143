"""Checked wrappers of the kernels for rasters and synapses on torch tensors.

Shapes: ``rows`` are (time step, batch) pairs in this order, so that a sequence ``[T, B, N]`` is a matrix of ``T * B``
rows; ``cols`` are neurons. Tensors are contiguous, on the CPU or on CUDA, float32 or float64; rasters are int64 words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from . import workspace
from .abi import CONSTANTS, STRUCTS
from .build import load_core
from .native import DTYPES, call, event_parallel, kernel, threads_for
from .raster import Raster
from .reports import Counter

TILE = CONSTANTS["kTile"]
# CPU: rows of a block in the column lists: a tile of float32 gradients of so many rows is a quarter of a MiB.
BLOCK_ROWS = 1024
# CUDA: blocks of the weight gradient that keep any device busy; fixed, so that the order of its sums is, too.
GRADIENT_BLOCKS = 512


def _check(tensor: torch.Tensor, name: str, shape: Sequence[int], dtype: torch.dtype,
           device: torch.device) -> torch.Tensor:
    if tensor.dtype != dtype or tensor.device != device or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected a tensor of shape {tuple(shape)} and dtype {dtype} on {device}, "
            f"got shape {tuple(tensor.shape)}, dtype {tensor.dtype}, device {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor


# ---------------------------------------------------------------------------------------------------- rasters


def pack(dense: torch.Tensor) -> Raster | None:
    """Packs a matrix ``[rows, cols]`` of zeros and ones; None if it holds any other value.

    The host learns that only on the CPU: for CUDA see :func:`nonzero`.
    """
    raster, ones = _pack(dense, None)
    raster.ones = ones
    return raster if ones >= 0 else None


def nonzero(dense: torch.Tensor, counter: Counter | None = None) -> Raster:
    """CUDA only: the raster of the values of a matrix ``[rows, cols]`` that are not zero.

    Args:
        counter: counts them, and the sites.
    """
    return _pack(dense, counter)[0]


def _pack(dense: torch.Tensor, counter: Counter | None) -> tuple[Raster, int]:
    dense = dense if dense.stride(-1) == 1 or dense.shape[-1] <= 1 else dense.contiguous()
    rows, cols = dense.shape
    raster = Raster.empty(rows, cols, dense.device)
    report = {"report": counter.launch(dense.numel())} if counter is not None else {}
    ones = call("raster_pack", "SnnRasterPack", dense.device, dense=dense, rows=rows, cols=cols,
                row_stride=dense.stride(0), words=raster.words, dtype=DTYPES[dense.dtype],
                threads=threads_for(rows * cols), **report)
    return raster, ones


def unpack(raster: Raster, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix ``[rows, cols]`` of zeros and ones."""
    dense = torch.empty((raster.rows, raster.cols), dtype=dtype, device=raster.device)
    call("raster_unpack", "SnnRasterUnpack", dense.device, words=raster.words, rows=raster.rows, cols=raster.cols,
         dense=dense, dtype=DTYPES[dtype], threads=threads_for(raster.sites))
    return dense


def transpose(raster: Raster) -> Raster:
    """The raster of the transposed matrix."""
    out = Raster.empty(raster.cols, raster.rows, raster.device)
    call("raster_transpose", "SnnRasterTranspose", out.device, words=raster.words, rows=raster.rows,
         cols=raster.cols, transposed=out.words, threads=threads_for(raster.sites))
    return out


def count(raster: Raster) -> int:
    """CPU only: number of ones, counted at most once."""
    if raster.ones is None:
        raster.ones = call("raster_count", "SnnRasterCount", raster.device, words=raster.words,
                           count=raster.words.numel())
    return raster.ones


def density(raster: Raster) -> float | None:
    """The share of ones. On CUDA that of earlier steps or sequences, and None where nothing is known yet."""
    if raster.ones is None and event_parallel(raster.device):
        return raster.densities.for_choice().spikes if raster.densities is not None else None
    return count(raster) / max(raster.sites, 1)


@dataclass(frozen=True)
class Columns:
    """The events of a raster ``[rows, cols]``, column by column, as the gradients of a synapse go through them.

    On the CPU lists, block of rows by block of rows (see ``SnnRasterColumns``); on CUDA the transposed raster, and
    ``factors``: the matrix ``[rows, cols]`` whose values the events stand for, or None if they are all 1.
    """

    rows: int
    cols: int
    device: torch.device
    start: torch.Tensor | None = None
    row: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    events: int = 0
    transposed: torch.Tensor | None = None
    factors: torch.Tensor | None = None


def columns(raster: Raster, *, ranks: bool = False, factors: torch.Tensor | None = None) -> Columns:
    """The events of a raster, column by column.

    Args:
        ranks: on the CPU also the place of each event in row-major order.
        factors: CUDA only, see :class:`Columns`.
    """
    if event_parallel(raster.device):
        return Columns(raster.rows, raster.cols, raster.device, transposed=transpose(raster).words, factors=factors)
    blocks = (raster.rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    events = count(raster)
    start = torch.empty(blocks * (raster.cols + 1), dtype=torch.int64, device=raster.device)
    row = torch.empty(events, dtype=torch.int16, device=raster.device)
    rank = torch.empty(events, dtype=torch.int64, device=raster.device) if ranks else None
    call("raster_columns", "SnnRasterColumns", start.device, words=raster.words, rows=raster.rows, cols=raster.cols,
         block_rows=BLOCK_ROWS, start=start, row=row, rank=rank, threads=threads_for(raster.sites))
    return Columns(raster.rows, raster.cols, raster.device, start, row, rank, events)


# ---------------------------------------------------------------------------------------------------- synapses


def pack_weights(weight: torch.Tensor, tiles: torch.Tensor | None = None) -> torch.Tensor:
    """Weight ``[outputs, inputs]`` as tiles ``[ceil(outputs / 64), inputs, 64]``, padded with zeros.

    Args:
        tiles: memory to use, if it fits.
    """
    outputs, inputs = weight.shape
    weight = weight.contiguous()
    shape = ((outputs + TILE - 1) // TILE, inputs, TILE)
    if tiles is None or tiles.shape != shape or tiles.dtype is not weight.dtype or tiles.device != weight.device:
        tiles = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    call("pack_weights", "SnnPackWeights", weight.device, weight=weight, outputs=outputs, inputs=inputs, tiles=tiles,
         dtype=DTYPES[weight.dtype], threads=threads_for(weight.numel()))
    return tiles


class Order(NamedTuple):
    """In which order a product of a synapse adds.

    Attributes:
        ends: of runs of inputs, each of which is summed from zero on; the bias and the sums of the runs are then added
            in this order. Empty: one sum that starts from the bias.
        apart: how many of the last runs are added to each other first, and their sum then to the rest.
    """

    ends: tuple[int, ...] = ()
    apart: int = 0


IN_ONE_RUN = Order()


class SynapseForward:
    """The event-driven forward product of a synapse; its argument struct is filled once and reused.

    Args:
        weight: ``[outputs, inputs]``, detached.
        bias: ``[outputs]`` or None, detached.
        tiles: memory for the packed weights, if it fits.
        order: CPU only: in which it adds.

    Raises:
        ValueError: there is no such order of so many inputs.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, tiles: torch.Tensor | None = None,
                 order: Order = IN_ONE_RUN) -> None:
        self.outputs, self.inputs = weight.shape
        self.tiles = pack_weights(weight, tiles)
        self.bias = bias.contiguous() if bias is not None else None
        self.arguments = STRUCTS["SnnSynapseForward"](
            inputs=self.inputs, outputs=self.outputs, tiles=self.tiles.data_ptr(), dtype=DTYPES[weight.dtype],
            bias=self.bias.data_ptr() if self.bias is not None else None,
        )
        self.add_in(order)
        self._address, self._kernel = ctypes.addressof(self.arguments), kernel("synapse_forward", weight.device)

    def add_in(self, order: Order) -> None:
        """From now on, adds in this order.

        Raises:
            ValueError: there is no such order of so many inputs.
        """
        ends = list(order.ends)
        if ends and (ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != self.inputs):
            raise ValueError(f"order: expected ends that rise to {self.inputs}, got {order.ends}")
        if not 0 <= order.apart < max(len(ends), 1):
            raise ValueError(f"order: expected less than {len(ends)} runs apart, got {order.apart}")
        self._chunk_ends = (ctypes.c_int64 * len(ends))(*ends)
        self.arguments.chunks, self.arguments.apart = len(ends), order.apart
        self.arguments.chunk_ends = ctypes.addressof(self._chunk_ends) if ends else None

    def __call__(self, raster: Raster, factors: torch.Tensor | None = None,
                 out: torch.Tensor | None = None) -> torch.Tensor:
        """Currents ``[rows, outputs]``: the bias plus the weight columns of the inputs that spike.

        Args:
            raster: who spikes ``[rows, inputs]``.
            factors: CUDA only: contiguous ``[rows, inputs]``, what each spike is multiplied by; None: 1.
            out: where the currents go, contiguous.
        """
        if raster.cols != self.inputs:
            raise ValueError(f"expected a raster of {self.inputs} columns, as the weight has inputs, got {raster.cols}")
        a, rows = self.arguments, raster.rows
        shape, like = (rows, self.outputs), self.tiles
        current = like.new_empty(shape) if out is None else _check(out, "out", shape, like.dtype, like.device)
        a.raster, a.rows, a.current = raster.address, rows, current.data_ptr()
        a.inputs_dense = factors.data_ptr() if factors is not None else None
        a.threads = threads_for(rows * self.outputs)
        self._kernel(self._address)
        return current


def weight_gradient(grad: torch.Tensor, spikes: Columns, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of weight ``[outputs, inputs]`` and bias ``[outputs]``.

    Args:
        grad: gradients of the currents ``[rows, outputs]``.
        spikes: the input spikes ``[rows, inputs]``, column by column.
        bias: whether the gradient of the bias is wanted.
    """
    rows, outputs = grad.shape
    _check(grad, "grad", (spikes.rows, outputs), grad.dtype, spikes.device)
    weight = torch.empty((outputs, spikes.cols), dtype=grad.dtype, device=grad.device)
    shape = {"rows": rows, "inputs": spikes.cols, "outputs": outputs, "dtype": DTYPES[grad.dtype]}
    if spikes.transposed is not None:
        partial = torch.empty((_splits(rows, spikes.cols, outputs), spikes.cols, outputs), dtype=grad.dtype,
                              device=grad.device)
        call("weight_gradient", "SnnWeightGradient", grad.device, grad=grad, transposed=spikes.transposed,
             inputs_dense=spikes.factors, partial=partial, splits=len(partial), grad_weight=weight, **shape)
        return weight, grad.sum(0) if bias else None
    grad_bias = torch.empty(outputs, dtype=grad.dtype, device=grad.device) if bias else None
    call("weight_gradient", "SnnWeightGradient", grad.device, grad=grad, block_rows=BLOCK_ROWS, start=spikes.start,
         row=spikes.row, grad_weight=weight, grad_bias=grad_bias, threads=threads_for(grad.numel()), **shape)
    return weight, grad_bias


def _splits(rows: int, inputs: int, outputs: int) -> int:
    """Parts into which the rows of a weight gradient are cut on CUDA: enough blocks, and enough rows in each."""
    tiles = -(-inputs // CONSTANTS["kInputsPerBlock"]) * -(-outputs // (2 * TILE))
    stages = -(-rows // CONSTANTS["kRowsPerStage"])
    return max(1, min(GRADIENT_BLOCKS // max(tiles, 1), stages // 4))


@cache
def _onednn_linear() -> Callable[..., torch.Tensor] | None:
    """torch's oneDNN product, where it beats the default float32 one by far (measured: 2x on AMD with AVX-512)."""
    wanted = torch.backends.mkldnn.is_available() and load_core().snn_prefers_onednn()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if wanted else None


def dense_product(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``grad @ weight``: ``[rows, outputs]`` times ``[outputs, inputs]``, by torch, under its precision settings."""
    onednn = _onednn_linear() if grad.dtype is torch.float32 and grad.is_cpu else None
    if onednn is None:
        if not grad.is_cpu:
            return grad @ weight
        return torch.mm(grad, weight, out=workspace.take(len(grad), weight.shape[1], grad.dtype, grad.device))
    return onednn(grad, weight.t(), None, "none", [], "")


def input_gradient(grad: torch.Tensor, active: Columns, tiles: torch.Tensor) -> torch.Tensor:
    """Gradients of the inputs at the active sites only.

    Args:
        grad: gradients of the currents ``[rows, outputs]``.
        active: the active sites ``[rows, inputs]``, column by column.
        tiles: the packed weight.

    Returns:
        CPU: ``[events]``, in row-major order of the sites. CUDA: ``[rows, inputs]``, of which all but the active
        sites is undefined.
    """
    rows, outputs = grad.shape
    _check(grad, "grad", (active.rows, outputs), grad.dtype, active.device)
    _check(tiles, "tiles", ((outputs + TILE - 1) // TILE, active.cols, TILE), grad.dtype, active.device)
    if active.transposed is not None:
        # Without outputs there is no product, and nothing would be written.
        make = torch.empty if outputs else torch.zeros
        out = make((rows, active.cols), dtype=grad.dtype, device=grad.device)
    elif active.rank is not None:
        out = torch.empty(active.events, dtype=grad.dtype, device=grad.device)
    else:
        raise ValueError("expected column lists with ranks: columns(raster, ranks=True)")
    call("input_gradient", "SnnInputGradient", grad.device, grad=grad, rows=rows, inputs=active.cols, outputs=outputs,
         block_rows=BLOCK_ROWS, tiles=tiles, start=active.start, row=active.row, rank=active.rank,
         transposed=active.transposed, grad_active=out, dtype=DTYPES[out.dtype], threads=threads_for(grad.numel()))
    return out
