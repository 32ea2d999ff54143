"""Checked wrappers of the compiled kernels (``csrc/cpu/kernels.h``) on torch tensors.

Shapes: ``rows`` are (time step, batch) pairs in this order, so that a sequence ``[T, B, N]`` is a matrix of ``T * B``
rows; ``cols`` are neurons. Tensors are contiguous, on the CPU, float32 or float64; rasters are int64 words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .abi import CONSTANTS, STRUCTS, SURROGATES
from .build import load_core
from .dynamics import Dynamics
from .raster import Raster, words_of
from .surrogate import Surrogate

DTYPES = {torch.float32: CONSTANTS["kFloat32"], torch.float64: CONSTANTS["kFloat64"]}
TILE = CONSTANTS["kTile"]
MAX_STATES, MAX_PARAMETERS = CONSTANTS["kMaxStates"], CONSTANTS["kMaxParameters"]
# Rows of a block in the column lists: a tile of float32 gradients of so many rows is a quarter of a MiB.
BLOCK_ROWS = 1024
# Below this many sites a thread would cost more than it does.
SITES_PER_THREAD = 16384


@cache
def _function(name: str) -> Callable[[Any], int]:
    """A kernel by name; the library is compiled on the first call of any of them."""
    function = getattr(load_core(), f"snn_{name}")
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    function.errcheck = _checked
    return function


def _checked(result: int, function: Any, arguments: Any) -> int:
    if result == CONSTANTS["kOutOfMemory"]:
        raise MemoryError(f"{function.__name__} cannot allocate its working memory")
    return result


def _call(name: str, struct: str, **fields: Any) -> int:
    arguments = STRUCTS[struct](**{k: v.data_ptr() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
    return _function(name)(ctypes.addressof(arguments))


def instruction_set(limit: int = -1) -> str:
    """Name of the instruction set in force; ``limit`` 0, 1, 2 restricts it to baseline, AVX2, AVX-512."""
    function = load_core().snn_instruction_set
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_int]
    return function(limit).decode()


def threads_for(sites: int) -> int:
    """Threads worth using for so many sites; never more than torch may use."""
    return max(1, min(torch.get_num_threads(), sites // SITES_PER_THREAD))


def _check(tensor: torch.Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype != dtype or tensor.device.type != "cpu" or tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected a CPU tensor of shape {tuple(shape)} and dtype {dtype}, "
            f"got shape {tuple(tensor.shape)}, dtype {tensor.dtype}, device {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor


# ---------------------------------------------------------------------------------------------------- rasters


def pack(dense: torch.Tensor) -> Raster | None:
    """Packs a matrix ``[rows, cols]`` of zeros and ones; None if it holds any other value."""
    dense = dense if dense.stride(-1) == 1 or dense.shape[-1] <= 1 else dense.contiguous()
    rows, cols = dense.shape
    raster = Raster.empty(rows, cols)
    ones = _call("raster_pack", "SnnRasterPack", dense=dense, rows=rows, cols=cols, row_stride=dense.stride(0),
                 words=raster.words, dtype=DTYPES[dense.dtype], threads=threads_for(rows * cols))
    raster.ones = ones
    return raster if ones >= 0 else None


def unpack(raster: Raster, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix ``[rows, cols]`` of zeros and ones."""
    dense = torch.empty((raster.rows, raster.cols), dtype=dtype)
    _call("raster_unpack", "SnnRasterUnpack", words=raster.words, rows=raster.rows, cols=raster.cols, dense=dense,
          dtype=DTYPES[dtype], threads=threads_for(raster.sites))
    return dense


def transpose(raster: Raster) -> Raster:
    """The raster of the transposed matrix."""
    out = Raster.empty(raster.cols, raster.rows)
    _call("raster_transpose", "SnnRasterTranspose", words=raster.words, rows=raster.rows, cols=raster.cols,
          transposed=out.words, threads=threads_for(raster.sites))
    return out


def count(raster: Raster) -> int:
    """Number of ones, counted at most once."""
    if raster.ones is None:
        raster.ones = _call("raster_count", "SnnRasterCount", words=raster.words, count=raster.words.numel())
    return raster.ones


@dataclass(frozen=True)
class Columns:
    """Column lists of a raster, block of rows by block of rows (see ``SnnRasterColumns``)."""

    start: torch.Tensor
    row: torch.Tensor
    rank: torch.Tensor | None
    rows: int
    cols: int
    events: int


def columns(raster: Raster, *, ranks: bool = False) -> Columns:
    """Column lists of a raster; with ``ranks`` also the place of each event in row-major order."""
    blocks = (raster.rows + BLOCK_ROWS - 1) // BLOCK_ROWS
    events = count(raster)
    start = torch.empty(blocks * (raster.cols + 1), dtype=torch.int64)
    row = torch.empty(events, dtype=torch.int16)
    rank = torch.empty(events, dtype=torch.int64) if ranks else None
    _call("raster_columns", "SnnRasterColumns", words=raster.words, rows=raster.rows, cols=raster.cols,
          block_rows=BLOCK_ROWS, start=start, row=row, rank=rank, threads=threads_for(raster.sites))
    return Columns(start, row, rank, raster.rows, raster.cols, events)


# ---------------------------------------------------------------------------------------------------- synapses


def pack_weights(weight: torch.Tensor) -> torch.Tensor:
    """Weight ``[outputs, inputs]`` as tiles ``[ceil(outputs / 64), inputs, 64]``, padded with zeros."""
    outputs, inputs = weight.shape
    weight = weight.contiguous()
    tiles = torch.empty(((outputs + TILE - 1) // TILE, inputs, TILE), dtype=weight.dtype)
    _call("pack_weights", "SnnPackWeights", weight=weight, outputs=outputs, inputs=inputs, tiles=tiles,
          dtype=DTYPES[weight.dtype], threads=threads_for(weight.numel()))
    return tiles


class SynapseForward:
    """The event-driven forward product of a synapse; its argument struct is filled once and reused.

    Args:
        weight: ``[outputs, inputs]``, detached.
        bias: ``[outputs]`` or None, detached.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.outputs, self.inputs = weight.shape
        self.tiles = pack_weights(weight)
        self.bias = bias.contiguous() if bias is not None else None
        self._arguments = STRUCTS["SnnSynapseForward"](
            inputs=self.inputs, outputs=self.outputs, tiles=self.tiles.data_ptr(), dtype=DTYPES[weight.dtype],
            bias=self.bias.data_ptr() if self.bias is not None else None,
        )
        self._address, self._function = ctypes.addressof(self._arguments), _function("synapse_forward")

    def __call__(self, raster: Raster) -> torch.Tensor:
        """Currents ``[rows, outputs]``: the bias plus the weight columns of the inputs that spike."""
        if raster.cols != self.inputs:
            raise ValueError(f"expected a raster of {self.inputs} columns, as the weight has inputs, got {raster.cols}")
        a, rows = self._arguments, raster.rows
        current = torch.empty((rows, self.outputs), dtype=self.tiles.dtype)
        a.raster, a.rows, a.current = raster.words.data_ptr(), rows, current.data_ptr()
        a.threads = threads_for(rows * self.outputs)
        self._function(self._address)
        return current


def weight_gradient(grad: torch.Tensor, spikes: Columns, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of weight ``[outputs, inputs]`` and bias ``[outputs]``.

    Args:
        grad: gradients of the currents ``[rows, outputs]``.
        spikes: column lists of the input spikes ``[rows, inputs]``.
        bias: whether the gradient of the bias is wanted.
    """
    rows, outputs = grad.shape
    _check(grad, "grad", (spikes.rows, outputs), grad.dtype)
    weight = torch.empty((outputs, spikes.cols), dtype=grad.dtype)
    grad_bias = torch.empty(outputs, dtype=grad.dtype) if bias else None
    _call("weight_gradient", "SnnWeightGradient", grad=grad, rows=rows, inputs=spikes.cols, outputs=outputs,
          block_rows=BLOCK_ROWS, start=spikes.start, row=spikes.row, grad_weight=weight, grad_bias=grad_bias,
          dtype=DTYPES[grad.dtype], threads=threads_for(grad.numel()))
    return weight, grad_bias


@cache
def _onednn_linear() -> Callable[..., torch.Tensor] | None:
    """torch's oneDNN product, where it beats the default float32 one by far (measured: 2x on AMD with AVX-512)."""
    wanted = torch.backends.mkldnn.is_available() and load_core().snn_prefers_onednn()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if wanted else None


def dense_product(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``grad @ weight``: ``[rows, outputs]`` times ``[outputs, inputs]``, by torch, under its precision settings."""
    onednn = _onednn_linear() if grad.dtype is torch.float32 else None
    if onednn is None:
        return grad @ weight
    return onednn(grad, weight.t(), None, "none", [], "")


def input_gradient(grad: torch.Tensor, active: Columns, tiles: torch.Tensor) -> torch.Tensor:
    """Gradients of the inputs at the active sites only ``[events]``, in row-major order of the sites."""
    rows, outputs = grad.shape
    _check(grad, "grad", (active.rows, outputs), grad.dtype)
    _check(tiles, "tiles", ((outputs + TILE - 1) // TILE, active.cols, TILE), grad.dtype)
    if active.rank is None:
        raise ValueError("expected column lists with ranks: columns(raster, ranks=True)")
    out = torch.empty(active.events, dtype=grad.dtype)
    _call("input_gradient", "SnnInputGradient", grad=grad, rows=rows, inputs=active.cols, outputs=outputs,
          block_rows=BLOCK_ROWS, tiles=tiles, start=active.start, row=active.row, rank=active.rank,
          grad_active=out, dtype=DTYPES[out.dtype], threads=threads_for(grad.numel()))
    return out


# ---------------------------------------------------------------------------------------------------- neurons


def pointer_table(pointers: Iterable[int | None]) -> Any:
    """A C array of pointers; keep it alive as long as the struct that refers to it."""
    values = list(pointers)
    return (ctypes.c_void_p * len(values))(*values)


def step_pointers(tensor: torch.Tensor | None, steps: int) -> list[int | None]:
    """Addresses of the ``steps`` equal parts of a contiguous tensor, or Nones."""
    if tensor is None:
        return [None] * steps
    size = tensor.numel() // steps * tensor.element_size()
    return [tensor.data_ptr() + size * i for i in range(steps)]


class Layer:
    """A neuron layer bound to its parameter values: what the forward and the backward scan share.

    Args:
        dynamics: the neuron model.
        surrogate: its surrogate derivative, cutoff included.
        parameters: detached tensors, each broadcastable to ``shape``.
        shape: shape of one time step, ``[B, ...]`` (or less); the first dimension gives the rows.
        dtype: float32 or float64.
    """

    def __init__(self, dynamics: Dynamics, surrogate: Surrogate, parameters: Sequence[torch.Tensor],
                 shape: torch.Size, dtype: torch.dtype) -> None:
        self.dynamics, self.surrogate, self.shape, self.dtype = dynamics, surrogate, shape, dtype
        self.rows = shape[0] if len(shape) > 1 else 1
        self.cols = shape.numel() // self.rows if self.rows else int(torch.Size(shape[1:]).numel())
        self.words = words_of(self.cols)
        self.parameters = [self._broadcast(p.to(dtype)) for p in parameters]
        kind = SURROGATES["k" + surrogate.kind]
        self.struct = STRUCTS["SnnLayer"](
            rows=self.rows, cols=self.cols, dtype=DTYPES[dtype], model=CONSTANTS[dynamics.model],
            reset=CONSTANTS[dynamics.reset], late_reset=int(dynamics.late_reset),
            threads=threads_for(self.rows * self.cols),
            surrogate=STRUCTS["SnnSurrogate"](kind=kind, a=surrogate.a, b=surrogate.b, low=surrogate.low,
                                              high=surrogate.high),
        )
        for slot, values in zip(self.struct.parameters, self.parameters, strict=False):
            slot.data = values.data_ptr()
            slot.row_stride, slot.col_stride = (
                stride if size > 1 else 0 for size, stride in zip(values.shape, values.stride(), strict=True)
            )

    def _broadcast(self, value: torch.Tensor) -> torch.Tensor:
        """The parameter as a matrix ``[rows, cols]`` whose strides are zero along the axes it is constant on."""
        if value.numel() == 1:
            return value.reshape(1, 1).clone().expand(self.rows, self.cols)
        if value.dim() == len(self.shape) and value.shape[0] != 1 and len(self.shape) > 1:
            return value.expand(self.shape).reshape(self.rows, self.cols).clone()
        one_row = value.expand(torch.Size([1, *self.shape[1:]]) if len(self.shape) > 1 else self.shape)
        return one_row.reshape(1, self.cols).clone().expand(self.rows, self.cols)

    @property
    def sites(self) -> int:
        return self.rows * self.cols

    def empty(self, *lead: int) -> torch.Tensor:
        return torch.empty((*lead, *self.shape), dtype=self.dtype)

    def raster(self, steps: int = 1) -> Raster:
        return Raster.empty(steps * self.rows, self.cols)


class ForwardScan:
    """The forward scan of a layer; its argument struct is filled once and reused step after step."""

    TABLES = ("input", "output", "raster", "reset", "active", "membrane", "current")

    def __init__(self, layer: Layer) -> None:
        self._layer = layer  # owns the parameters that the struct points to
        self.arguments = STRUCTS["SnnNeuronForward"](layer=layer.struct)
        self._address, self._function = ctypes.addressof(self.arguments), _function("neuron_forward")
        self._states = len(layer.dynamics.states)
        self._state_in, self._state_out = self.arguments.state_in, self.arguments.state_out
        self._scratch = torch.empty(layer.rows * layer.words * TILE, dtype=layer.dtype)
        self.arguments.scratch = self._scratch.data_ptr()
        self.steps = 0

    def _resize(self, steps: int) -> None:
        """Makes pointer tables for so many steps, all in one array: table after table."""
        self.steps = steps
        self.pointers = (ctypes.c_void_p * (steps * (len(self.TABLES) + self._states)))()
        self.active_counts, self.spike_counts = (ctypes.c_int64 * steps)(), (ctypes.c_int64 * steps)()

    def _point(self, first: int) -> None:
        """Lets the struct's tables begin at a step."""
        a, steps, size = self.arguments, self.steps, ctypes.sizeof(ctypes.c_void_p)
        begin = ctypes.addressof(self.pointers) + first * size
        for k, name in enumerate(self.TABLES):
            setattr(a, name, begin + k * steps * size)
        for i in range(self._states):
            a.states[i] = begin + (len(self.TABLES) + i) * steps * size
        a.steps = steps - first
        a.active_counts = ctypes.addressof(self.active_counts) + first * ctypes.sizeof(ctypes.c_int64)
        a.spike_counts = ctypes.addressof(self.spike_counts) + first * ctypes.sizeof(ctypes.c_int64)
        self._first = first

    def run(self, steps: int, pointers: list[Any], state_in: Sequence[int], state_out: Sequence[int],
            values: int | None = None, values_capacity: int = 0, first: int = 0) -> int:
        """Runs the steps from ``first`` on and returns how many were done (see ``SnnNeuronForward``).

        Args:
            steps: number of steps the tables describe.
            pointers: addresses, table after table in the order of ``TABLES`` and then the recorded states, one a step.
            state_in, state_out: addresses of the states before and after.
            values, values_capacity: address of and room for the compressed membranes of the active sites.
        """
        if steps != self.steps:
            self._resize(steps)
            self._point(first)
        elif first != self._first:
            self._point(first)
        self.pointers[:] = pointers
        count = self._states
        self._state_in[:count], self._state_out[:count] = state_in, state_out
        self.arguments.values, self.arguments.values_capacity = values, values_capacity
        return self._function(self._address)


def neuron_backward(layer: Layer, steps: int, *, grad_input: torch.Tensor | None,
                    grad_state_in: Sequence[torch.Tensor | None], grad_parameters: Sequence[torch.Tensor | None],
                    grad_states: Sequence[Any], state_in: Sequence[torch.Tensor | None], **tables: Any) -> None:
    """The backward scan: fills ``grad_input``, ``grad_state_in``, and adds to ``grad_parameters`` (zeroed before).

    ``tables`` are pointer tables (or None) named as in ``SnnNeuronBackward``.
    """
    a = STRUCTS["SnnNeuronBackward"](layer=layer.struct, steps=steps)
    for name, table in tables.items():
        setattr(a, name, ctypes.addressof(table) if table is not None else None)
    for i, table in enumerate(grad_states):
        a.grad_states[i] = ctypes.addressof(table) if table is not None else None
    for slots, tensors in ((a.state_in, state_in), (a.grad_state_in, grad_state_in),
                           (a.grad_parameters, grad_parameters)):
        for i, tensor in enumerate(tensors):
            slots[i] = tensor.data_ptr() if tensor is not None else None
    if grad_input is not None:
        a.grad_input = grad_input.data_ptr()
    _function("neuron_backward")(ctypes.addressof(a))
