"""Checked wrappers of the compiled kernels (``csrc/cpu/kernels.h``) on torch tensors.

Shapes: ``rows`` are (time step, batch) pairs in this order, so that a sequence ``[T, B, N]`` is a matrix of ``T * B``
rows; ``cols`` are neurons. Tensors are contiguous, on the CPU, float32 or float64; rasters are int64 words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .abi import CONSTANTS, STRUCTS, SURROGATES
from .build import load_core
from .dynamics import Dynamics
from .raster import Raster
from .surrogate import Surrogate

DTYPES = {torch.float32: CONSTANTS["kFloat32"], torch.float64: CONSTANTS["kFloat64"]}
TILE = CONSTANTS["kTile"]
MAX_STATES, MAX_PARAMETERS = CONSTANTS["kMaxStates"], CONSTANTS["kMaxParameters"]
# Rows of a block in the column lists: a tile of float32 gradients of so many rows is a quarter of a MiB.
BLOCK_ROWS = 1024
# Below this many sites a thread would cost more than it does.
SITES_PER_THREAD = 16384


@lru_cache(maxsize=None)
def _function(name: str) -> Callable[[Any], int]:
    """A kernel by name; the library is compiled on the first call of any of them."""
    function = getattr(load_core(), f"snn_{name}")
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    return function


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
    binary = _call("raster_pack", "SnnRasterPack", dense=dense, rows=rows, cols=cols, row_stride=dense.stride(0),
                   words=raster.words, dtype=DTYPES[dense.dtype], threads=threads_for(rows * cols))
    return raster if binary else None


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
    """Number of ones."""
    return _call("raster_count", "SnnRasterCount", words=raster.words, count=raster.words.numel())


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


def synapse_forward(raster: Raster, tiles: torch.Tensor, outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    """Currents ``[rows, outputs]``: the bias plus the weight columns of the inputs that spike."""
    _check(tiles, "tiles", ((outputs + TILE - 1) // TILE, raster.cols, TILE), tiles.dtype)
    current = torch.empty((raster.rows, outputs), dtype=tiles.dtype)
    _call("synapse_forward", "SnnSynapseForward", raster=raster.words, rows=raster.rows, inputs=raster.cols,
          outputs=outputs, tiles=tiles, bias=bias, current=current, dtype=DTYPES[tiles.dtype],
          threads=threads_for(raster.rows * outputs))
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
        self.words = Raster.empty(0, self.cols).words.shape[1]
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
            slot.data, (slot.row_stride, slot.col_stride) = values.data_ptr(), values.stride()

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
    """The forward scan of a layer; the argument struct is filled once and reused step after step."""

    TABLES = ("input", "output", "raster", "reset", "active", "membrane", "current")

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.arguments = STRUCTS["SnnNeuronForward"](layer=layer.struct)
        self.address = ctypes.addressof(self.arguments)
        self.function = _function("neuron_forward")
        self.scratch: torch.Tensor | None = None
        self.steps = 0

    def _resize(self, steps: int) -> None:
        self.steps = self.arguments.steps = steps
        self.tables = {name: (ctypes.c_void_p * steps)() for name in self.TABLES}
        self.state_tables = [(ctypes.c_void_p * steps)() for _ in self.layer.dynamics.states]
        self.counts = (ctypes.c_int64 * steps)()
        self.arguments.counts = ctypes.addressof(self.counts)

    def run(self, *, inputs: Sequence[int | None], state_in: Sequence[torch.Tensor],
            state_out: Sequence[torch.Tensor], values: torch.Tensor | None = None, first: int = 0,
            states: Sequence[Sequence[int | None] | None] = (), **tables: Sequence[int | None] | None) -> int:
        """Runs the steps from ``first`` on and returns how many were done (see ``SnnNeuronForward``).

        Each table is a list of addresses, one a step, or None. ``values`` receives u of the active sites.
        """
        steps = len(inputs)
        if steps != self.steps:
            self._resize(steps)
        a, offset = self.arguments, first * ctypes.sizeof(ctypes.c_void_p)
        a.steps = steps - first
        tables["input"] = inputs
        for name in self.TABLES:
            addresses = tables.get(name)
            if addresses is None:
                setattr(a, name, None)
            else:
                table = self.tables[name]
                table[:] = addresses
                setattr(a, name, ctypes.addressof(table) + offset)
        for i, (before, after) in enumerate(zip(state_in, state_out, strict=True)):
            a.state_in[i], a.state_out[i] = before.data_ptr(), after.data_ptr()
            recorded = states[i] if states else None
            if recorded is not None:
                self.state_tables[i][:] = recorded
            a.states[i] = ctypes.addressof(self.state_tables[i]) + offset if recorded is not None else None
        if tables.get("active") is not None and self.scratch is None:
            self.scratch = torch.empty(self.layer.rows * self.layer.words * TILE, dtype=self.layer.dtype)
            a.scratch = self.scratch.data_ptr()
        a.values = values.data_ptr() if values is not None else None
        a.values_capacity = values.numel() if values is not None else 0
        return self.function(self.address)


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
