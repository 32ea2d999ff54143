"""What a synapse tape keeps of each call."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import kernels
from .lanes import addresses, integers, rasters_at
from .raster import Raster

if TYPE_CHECKING:
    from .neuron_tape import NeuronTape


@dataclass(eq=False)
class Entry:
    """The input of one step: its raster, or the tensor itself where it is not binary."""

    raster: Raster | None
    dense: torch.Tensor | None  # [rows, inputs], a detached alias
    version: int
    seen: tuple[int, bool]  # version of the tensor when it was multiplied, and whether it required a gradient

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The input as a matrix ``[rows, inputs]``.

        Raises:
            RuntimeError: if the tensor was changed in place meanwhile, as autograd does.
        """
        if self.raster is not None:
            return kernels.unpack(self.raster, dtype)
        assert self.dense is not None
        check_version(self.dense, self.version)
        return self.dense


@dataclass(eq=False)
class Step:
    """One call of the synapse."""

    entry: Entry
    input: torch.Tensor | None  # as autograd knows it, where a gradient flows to it and the step may have to move
    shape: torch.Size  # of the input
    rows: int
    spikes: tuple[weakref.ref[NeuronTape], int] | None  # the neuron block whose untouched output the input is


def same_values(x: torch.Tensor, before: torch.Tensor | None) -> bool:
    """Whether an input is that of the step before: the same tensor, or, where no gradient flows to either, another view
    of the same memory, as the slices of an expanded image are. (Views of one tensor share its version.)"""
    if x is before or before is None:
        return x is before
    return (
        not x.requires_grad and not before.requires_grad and x._is_view() and before._is_view()
        and x._base is before._base and x.data_ptr() == before.data_ptr() and x.shape == before.shape
        and x.stride() == before.stride()
    )


def check_version(tensor: torch.Tensor, version: int) -> None:
    """Raises RuntimeError, as autograd does, if a tensor was changed in place since it had this version."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"a tensor of shape {list(tensor.shape)} is at version {tensor._version}, expected version {version}"
        )


class SynapseRun:
    """Time steps of a synapse that a lane recorded.

    Args:
        taken: what the lane gave.
        rows, cols: of the input of one step, ``[rows, cols]``.
        before: the neuron whose blocks the inputs are, or None.
        last: the entry of the step before, and its number.
    """

    def __init__(self, taken: dict[str, Any], rows: int, cols: int, before: weakref.ref[NeuronTape] | None,
                 last: tuple[Entry, int]) -> None:
        self.steps: int = taken["steps"]
        self._rows, self._cols, self._before = rows, cols, before
        self.numbers, self._ones = integers(taken["entries"]), integers(taken["ones"])
        self._table, self.raster = addresses(taken["raster"]), taken["rasters"]
        self.dense, self._versions = taken["dense"], integers(taken["dense_versions"])
        self.blocks = integers(taken["blocks"]).tolist() if before is not None else None
        self.movable = taken["movable"]
        self._entries: dict[int, Entry] = {last[1]: last[0]}

    def rasters(self) -> list[Raster] | None:
        """Those of all inputs, one below the other; None if some input has none."""
        if not all(self._table):
            return None
        found, step = rasters_at(self._table, self.raster, self._rows, self._cols), 0
        for raster in found:
            steps = raster.rows // self._rows
            raster.ones = sum(self._ones[step : step + steps])
            step += steps
        return found

    def at(self, index: int) -> Step:
        """One step."""
        number = self.numbers[index]
        if number not in self._entries:
            self._entries[number] = self._entry(index)
        spikes = (self._before, self.blocks[index]) if self._before is not None and self.blocks is not None else None
        shape = torch.Size((self._rows, self._cols))
        return Step(self._entries[number], self.movable[index], shape, self._rows, spikes)

    def _entry(self, index: int) -> Entry:
        if not self._table[index]:
            return Entry(None, self.dense[index], self._versions[index], (0, False))
        (raster,) = rasters_at(self._table[index : index + 1], self.raster, self._rows, self._cols)
        raster.ones = self._ones[index]
        return Entry(raster, None, 0, (0, False))
