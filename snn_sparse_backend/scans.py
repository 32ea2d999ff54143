"""Checked wrappers of the neuron scans on torch tensors; the layout is that of kernels.py."""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .abi import CONSTANTS, STRUCTS, SURROGATES
from .dynamics import Dynamics
from .native import DTYPES, event_parallel, kernel, threads_for
from .raster import Raster, words_of
from .surrogate import Surrogate

TILE = CONSTANTS["kTile"]
SITES_PER_BLOCK = CONSTANTS["kSitesPerBlock"]
# The tables of traces, by their names here and their places in the structs.
TRACES = tuple(f"trace {i}" for i in range(CONSTANTS["kMaxTraces"]))


Table = array  # of addresses, one a step, 0 where there is nothing; keep it alive as long as a struct refers to it


def pointer_table(pointers: Iterable[int | None]) -> Table[int]:
    """A table of addresses."""
    return array("Q", [pointer or 0 for pointer in pointers])


def step_pointers(tensor: torch.Tensor | None, steps: int) -> Sequence[int]:
    """Addresses of the ``steps`` equal parts of a contiguous tensor, or zeros."""
    if tensor is None:
        return (0,) * steps
    start = tensor.data_ptr()
    if steps == 1:
        return (start,)
    size = tensor.numel() // steps * tensor.element_size()
    return range(start, start + size * steps, size) if size else (start,) * steps


def filled(scalar: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A scalar of the CPU on another device. It is filled in, because copying it would wait for the device."""
    return torch.full(shape, scalar.item(), dtype=dtype, device=device)


def uniform(values: torch.Tensor) -> bool:
    """Whether a parameter of a :class:`Layer` is the same at all its sites."""
    return all(size == 1 or stride == 0 for size, stride in zip(values.shape, values.stride(), strict=True))


def _set_table(struct: Any, name: str, address: int | None) -> None:
    if name in TRACES:
        struct.traces[TRACES.index(name)] = address
    else:
        setattr(struct, name, address)


def _address(table: Table[int] | None) -> int | None:
    return table.buffer_info()[0] if table is not None else None


class Layer:
    """A neuron layer bound to its parameter values: what the forward and the backward scan share.

    Args:
        dynamics: the neuron model.
        surrogate: its surrogate derivative, cutoff included.
        parameters: detached tensors, each broadcastable to ``shape``.
        shape: shape of one time step, ``[B, ...]`` (or less); the first dimension gives the rows.
        dtype: float32 or float64.
        device: where the tensors of the layer are; its parameters may also be scalars on the CPU.
    """

    def __init__(self, dynamics: Dynamics, surrogate: Surrogate, parameters: Sequence[torch.Tensor],
                 shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dynamics, self.surrogate, self.shape, self.dtype = dynamics, surrogate, shape, dtype
        self.device = torch.device(device)
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
        if value.device != self.device:
            value = filled(value, torch.Size(), self.dtype, self.device)
        if value.numel() == 1:
            return value.reshape(1, 1).clone().expand(self.rows, self.cols)
        if value.dim() == len(self.shape) and value.shape[0] != 1 and len(self.shape) > 1:
            return value.expand(self.shape).reshape(self.rows, self.cols).clone()
        one_row = value.expand(torch.Size([1, *self.shape[1:]]) if len(self.shape) > 1 else self.shape)
        return one_row.reshape(1, self.cols).clone().expand(self.rows, self.cols)

    @property
    def sites(self) -> int:
        return self.rows * self.cols

    @property
    def rows_shape(self) -> torch.Size:
        """The shape of any number of rows, -1 in its place: ``[-1, ...]``."""
        return torch.Size((-1, *(self.shape[1:] if len(self.shape) > 1 else self.shape)))

    def empty(self, *lead: int) -> torch.Tensor:
        return torch.empty((*lead, *self.shape), dtype=self.dtype, device=self.device)

    def raster(self, steps: int = 1) -> Raster:
        return Raster.empty(steps * self.rows, self.cols, self.device)

    @property
    def blocks(self) -> int:
        """CUDA: blocks of sites, each of which stores the membranes of its active sites together."""
        return -(-self.rows * self.words * TILE // SITES_PER_BLOCK)


class ForwardScan:
    """The forward scan of a layer; its argument struct is filled once and reused step after step."""

    TABLES = ("input", "output", "raster", "reset", "active", "membrane", "offsets", *TRACES)

    def __init__(self, layer: Layer) -> None:
        self._layer = layer  # owns the parameters that the struct points to
        self.arguments = STRUCTS["SnnNeuronForward"](layer=layer.struct)
        self._address, self._kernel = ctypes.addressof(self.arguments), kernel("neuron_forward", layer.device)
        self._states = len(layer.dynamics.carried)
        self._state_in, self._state_out = self.arguments.state_in, self.arguments.state_out
        self._scratch: torch.Tensor | None = None
        self.needs_scratch = not event_parallel(layer.device)  # if active sites are recorded
        self.steps = 0

    def drop_scratch(self) -> None:
        """Frees the working memory until it is needed again."""
        self._scratch = None

    def _resize(self, steps: int) -> None:
        """Makes pointer tables for so many steps, all in one array: table after table."""
        self.steps = steps
        self.pointers = (ctypes.c_void_p * (steps * (len(self.TABLES) + self._states)))()
        self.active_counts, self.spike_counts = (ctypes.c_int64 * steps)(), (ctypes.c_int64 * steps)()

    def _point(self, first: int, end: int) -> None:
        """Lets the struct's tables begin at a step, and end before another."""
        a, steps, size = self.arguments, self.steps, ctypes.sizeof(ctypes.c_void_p)
        begin = ctypes.addressof(self.pointers) + first * size
        for k, name in enumerate(self.TABLES):
            _set_table(a, name, begin + k * steps * size)
        for i in range(self._states):
            a.states[i] = begin + (len(self.TABLES) + i) * steps * size
        a.steps = end - first
        a.active_counts = ctypes.addressof(self.active_counts) + first * ctypes.sizeof(ctypes.c_int64)
        a.spike_counts = ctypes.addressof(self.spike_counts) + first * ctypes.sizeof(ctypes.c_int64)
        self._range = (first, end)

    def run(self, steps: int, pointers: Iterable[int | None], state_in: Sequence[int], state_out: Sequence[int],
            values: int | None = None, values_capacity: int = 0, first: int = 0, end: int | None = None,
            report: Any = None) -> int:
        """Runs the steps from ``first`` to ``end`` and returns how many were done (see ``SnnNeuronForward``).

        Args:
            steps: number of steps the tables describe.
            pointers: addresses, table after table in the order of ``TABLES`` and then the recorded states, one a step;
                they stay in force where a later step is the first.
            state_in, state_out: addresses of the states before and after.
            values, values_capacity: address of and room for the compressed membranes of the active sites.
            first, end: by default all.
            report: CUDA: where counts go, a ``SnnReport``.
        """
        wanted = (first, steps if end is None else end)
        if steps != self.steps:
            self._resize(steps)
            self._point(*wanted)
        elif wanted != self._range:
            self._point(*wanted)
        if self.needs_scratch and self._scratch is None:
            layer = self._layer
            self._scratch = torch.empty(layer.rows * layer.words * TILE, dtype=layer.dtype, device=layer.device)
            self.arguments.scratch = self._scratch.data_ptr()
        if first == 0:
            given = pointer_table(pointers)
            ctypes.memmove(self.pointers, given.buffer_info()[0], len(given) * given.itemsize)
        count = self._states
        self._state_in[:count], self._state_out[:count] = state_in, state_out
        self.arguments.values, self.arguments.values_capacity = values, values_capacity
        if report is not None:
            self.arguments.report = report
        done = self._kernel(self._address)
        return wanted[1] - first if report is not None else done


class BackwardScan:
    """The backward scan: fills ``grad_input``, ``grad_state_in``, and adds to ``grad_parameters`` (zeroed before).

    Args:
        tables: pointer tables (or None) named as in ``SnnNeuronBackward``, traces as in ``TRACES``.
    """

    def __init__(self, layer: Layer, steps: int, *, grad_input: torch.Tensor | None,
                 grad_state_in: Sequence[torch.Tensor | None], grad_parameters: Sequence[torch.Tensor | None],
                 grad_states: Sequence[Any], state_in: Sequence[torch.Tensor | None], **tables: Any) -> None:
        self.layer, self.steps = layer, steps
        a = self.arguments = STRUCTS["SnnNeuronBackward"](layer=layer.struct, steps=steps)
        if layer.surrogate.given is not None:  # the bounds are part of what was evaluated
            a.layer.surrogate.low, a.layer.surrogate.high = -math.inf, math.inf
        self._tables, self._states = tables, grad_states
        self._keep: list[Any] = [grad_input, grad_state_in, grad_parameters, state_in]
        if event_parallel(layer.device) and steps > CONSTANTS["kStepsPerLaunch"]:
            carry = [layer.empty() for _ in layer.dynamics.carried]
            self._keep.append(carry)
            for i, scratch in enumerate(carry):
                a.carry[i] = scratch.data_ptr()
        self._point(0)
        for slots, tensors in ((a.state_in, state_in), (a.grad_state_in, grad_state_in),
                               (a.grad_parameters, grad_parameters)):
            for i, tensor in enumerate(tensors):
                slots[i] = tensor.data_ptr() if tensor is not None else None
        if grad_input is not None:
            a.grad_input = grad_input.data_ptr()

    def _point(self, first: int) -> None:
        """Lets the tables begin at a step."""
        offset = first * ctypes.sizeof(ctypes.c_void_p)

        def begin(table: Table[int] | None) -> int | None:
            address = _address(table)
            return address + offset if address is not None else None

        for name, table in self._tables.items():
            _set_table(self.arguments, name, begin(table))
        for i, table in enumerate(self._states):
            self.arguments.grad_states[i] = begin(table)

    def run(self) -> None:
        """All steps."""
        kernel("neuron_backward", self.layer.device)(ctypes.addressof(self.arguments))

    def run_one(self, step: int, grad_input: torch.Tensor, recurrent: torch.Tensor | None,
                carry: Sequence[torch.Tensor]) -> None:
        """A single step, after those behind it.

        Args:
            grad_input: where the gradient of its input goes.
            recurrent: the gradient of its output through the recurrence; None in the last step.
            carry: the gradients of the states, those behind the step and then those before it; the latter only in the
                last step.
        """
        a = self.arguments
        a.steps, a.earlier = 1, step
        self._point(step)
        a.grad_input, a.grad_recurrent = grad_input.data_ptr(), None if recurrent is None else recurrent.data_ptr()
        for i, tensor in enumerate(carry):
            a.grad_state_in[i] = tensor.data_ptr()
            a.carry_in[i] = tensor.data_ptr() if step < self.steps - 1 else None
        self.run()


def neuron_backward(layer: Layer, steps: int, **described: Any) -> None:
    """Runs a :class:`BackwardScan`."""
    BackwardScan(layer, steps, **described).run()
