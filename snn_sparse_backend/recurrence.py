"""Recurrent layers: the scan of a step, and the product of its spikes that drives the next one, in turn."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import kernels
from .abi import STRUCTS
from .config import Options
from .counters import counts
from .native import event_parallel, kernel
from .raster import Raster
from .recurrences import Recurrence
from .scans import BackwardScan, ForwardScan, Layer
from .stepped import Precompute, SteppedScan
from .summation import finite, order_of

ALIGNMENT = 64  # bytes; of the tensors that torch allocates


class RecurrentScan(SteppedScan):
    """The forward scan of a recurrent layer: it multiplies the spikes of each step by itself.

    Args:
        recurrence: how its spikes drive it.
        options: tell whether the product may add in an order of its own.
        unit_spikes: spikes are exactly 0 and 1.
        precompute: see :class:`SteppedScan`.
    """

    def __init__(self, layer: Layer, recurrence: Recurrence, options: Options, unit_spikes: bool,
                 precompute: Precompute | None) -> None:
        super().__init__(layer, precompute)
        self._recurrence = recurrence
        self._current = layer.empty()  # of the recurrence, in the next step
        self._slot = (ctypes.c_void_p * 1)(self._current.data_ptr())
        self.arguments.recurrent = ctypes.addressof(self._slot)
        self.product = self._by_events(options) if unit_spikes else None
        self._spikes: torch.Tensor | None = None
        self._raster: Raster | None = None
        self._outputs: torch.Tensor | None = None

    def _by_events(self, options: Options) -> kernels.SynapseForward | None:
        """The product that walks the events, where it gives the same bits as the host's or need not."""
        layer, weight, bias = self._layer, self._recurrence.weight.detach(), self._recurrence.bias
        if event_parallel(layer.device) or len(layer.shape) != 2 or not self._recurrence.dense:
            return None
        bias = bias.detach() if bias is not None else None
        if options.forward == "sparse":
            return kernels.SynapseForward(weight, bias)
        with_bias = bias is not None
        order = order_of(layer.rows, layer.cols, layer.cols, layer.dtype, with_bias) if weight.is_contiguous() else None
        if order is None or not finite(weight):
            return None
        return kernels.SynapseForward(weight, bias, order=order)

    def begin(self, spikes: torch.Tensor, raster: Raster | None, outputs: torch.Tensor | None) -> None:
        """To be called before a block is run.

        Args:
            spikes: what the step before emitted ``[B, N]``.
            raster: the same, if it is known to be spikes.
            outputs: where the spikes of a sequence go ``[T, B, N]``; None for a single step.
        """
        self._spikes, self._raster, self._outputs = spikes, raster, outputs

    def finish(self) -> None:
        """Lets go of what :meth:`enter` and :meth:`begin` were given, once the block has run."""
        super().finish()
        self._spikes = self._raster = self._outputs = None

    def run(self, steps: int, pointers: Iterable[int | None], state_in: Sequence[int], state_out: Sequence[int],
            values: int | None = None, values_capacity: int = 0, first: int = 0, end: int | None = None,
            report: Any = None) -> int:
        last = steps if end is None else end
        if self.product is not None and self._precompute is None and last - first > 1:
            return self._run_together(steps, pointers, state_in, state_out, values, values_capacity, first, last)
        return super().run(steps, pointers, state_in, state_out, values, values_capacity, first, last, report)

    def _run_together(self, steps: int, pointers: Iterable[int | None], state_in: Sequence[int],
                      state_out: Sequence[int], values: int | None, capacity: int, first: int, last: int) -> int:
        """Several steps in one call."""
        self._multiply(first)
        one = self._kernel

        def together(address: int) -> int:
            assert self.product is not None
            counts["recurrent_sparse"] += 1
            whole = STRUCTS["SnnRecurrentForward"](scan=self.arguments, product=self.product.arguments,
                                                   current=self._current.data_ptr())
            whole.product.threads = self.arguments.layer.threads
            return kernel("recurrent_forward", self._layer.device)(ctypes.addressof(whole))

        self._kernel = together
        try:
            return ForwardScan.run(self, steps, pointers, state_in, state_out, values, capacity, first, last)
        finally:
            self._kernel = one

    def prepare(self, step: int) -> None:
        super().prepare(step)
        self._multiply(step)

    def _multiply(self, step: int) -> None:
        """The recurrent current of a step, from the spikes before it."""
        layer, raster = self._layer, self._raster
        spikes = self._spikes if step == 0 or self._outputs is None else self._outputs[step - 1]
        if self.product is not None and step > 0 and self._outputs is not None:
            raster = kernels.pack(self._outputs[step - 1])
        if self.product is not None and raster is not None:
            counts["recurrent_sparse"] += 1
            self.product(raster, out=self._current)
            return
        assert spikes is not None
        if spikes is not self._spikes and spikes.data_ptr() % ALIGNMENT:
            spikes = spikes.clone()  # the host's are a tensor of their own, and the product may round by address
        with torch.no_grad(), torch.autocast(layer.device.type, enabled=False):
            self._current.copy_(self._recurrence.current(spikes))


def backward(scan: BackwardScan, recurrence: Recurrence, tiles: torch.Tensor | None, grad_input: torch.Tensor,
             carry: Sequence[torch.Tensor], winners: Sequence[torch.Tensor] | None = None) -> None:
    """The backward scan of a recurrent layer.

    Args:
        recurrence: how spikes drove the next steps.
        tiles: CPU: its weight packed, where gradients through it are wanted at active sites only.
        grad_input: ``[T * B, N]``, filled.
        carry: gradients of the states before the first step, filled.
        winners: the only neurons ``[B, 1]`` whose spikes pass gradients on, of each step; None: the scan knows.
    """
    layer = scan.layer
    if tiles is not None:
        counts["recurrent_gradient_sparse"] += 1
        memory = torch.zeros((layer.rows, layer.cols), dtype=layer.dtype)
        a = STRUCTS["SnnRecurrentBackward"](scan=scan.arguments, tiles=tiles.data_ptr(), through=memory.data_ptr())
        for i, tensor in enumerate(carry):
            a.scan.grad_state_in[i] = tensor.data_ptr()
        a.scan.grad_input = grad_input.data_ptr()
        kernel("recurrent_backward", layer.device)(ctypes.addressof(a))
        return
    counts["recurrent_gradient_dense"] += 1
    through: torch.Tensor | None = None
    for step in range(scan.steps - 1, -1, -1):
        grad = grad_input[step * layer.rows : (step + 1) * layer.rows]
        scan.run_one(step, grad, through, carry)
        if step:
            through = recurrence.through(grad.view(layer.rows_shape)).contiguous()
            if winners is not None:
                index = winners[step - 1]
                through = torch.zeros_like(through).scatter_(1, index, through.gather(1, index))
