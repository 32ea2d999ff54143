"""Spike rasters: one bit a site, rows of 64-bit words."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .reports import Densities

WORD = 64


def words_of(cols: int) -> int:
    """Number of 64-bit words that hold one row of ``cols`` sites."""
    return (cols + WORD - 1) // WORD


class Raster:
    """Packed bits of a binary matrix ``[rows, cols]``; a row is one (time step, batch) pair.

    Args:
        storage: int64 tensor ``[all rows, ceil(cols / 64)]``, lowest bit first, bits beyond ``cols`` zero.
        cols: number of sites in a row.
        ones: number of ones, where it is known.
        densities: on CUDA, what is known of the neurons whose spikes these are.
        first, rows: which rows of the storage these are; by default all.
    """

    __slots__ = ("storage", "cols", "ones", "densities", "first", "rows")

    def __init__(self, storage: torch.Tensor, cols: int, ones: int | None = None, densities: Densities | None = None,
                 first: int = 0, rows: int | None = None) -> None:
        self.storage, self.cols, self.ones, self.densities = storage, cols, ones, densities
        self.first, self.rows = first, storage.shape[0] if rows is None else rows

    @property
    def words(self) -> torch.Tensor:
        """The words ``[rows, ceil(cols / 64)]``."""
        if self.rows == self.storage.shape[0]:
            return self.storage
        return self.storage[self.first : self.first + self.rows]

    @property
    def address(self) -> int:
        return self.storage.data_ptr() + 8 * self.first * self.storage.shape[1]

    @property
    def sites(self) -> int:
        return self.rows * self.cols

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def part(self, first: int, end: int) -> Raster:
        """Some of the rows."""
        return Raster(self.storage, self.cols, None, self.densities, self.first + first, end - first)

    @staticmethod
    def empty(rows: int, cols: int, device: torch.device | str = "cpu") -> Raster:
        return Raster(torch.empty((rows, words_of(cols)), dtype=torch.int64, device=device), cols)

    @staticmethod
    def concatenate(rasters: Iterable[Raster]) -> Raster:
        """The rasters one below the other, at least one."""
        stack = RasterStack()
        for raster in rasters:
            stack.add(raster)
        return stack.whole()


class RasterStack:
    """Rasters one below the other; those that lie so in memory already are not copied."""

    def __init__(self) -> None:
        self._last: Raster | None = None
        self._finished: list[torch.Tensor] = []  # runs of neighbours, but the last
        self._start = self._end = 0  # of the last run, in the storage of the last raster
        self._ones: int | None = 0

    def add(self, raster: Raster) -> None:
        """Puts one more below."""
        last = self._last
        if last is not None and (raster.first != self._end or raster.storage is not last.storage):
            self._finished.append(last.storage[self._start : self._end])
            last = None
        if last is None:
            self._start = raster.first
        self._end, self._last = raster.first + raster.rows, raster
        self._ones = self._ones + raster.ones if self._ones is not None and raster.ones is not None else None

    def whole(self) -> Raster:
        """All of them."""
        last = self._last
        assert last is not None
        if not self._finished:
            return Raster(last.storage, last.cols, self._ones, last.densities, self._start, self._end - self._start)
        words = torch.cat([*self._finished, last.storage[self._start : self._end]])
        return Raster(words, last.cols, self._ones, last.densities)


class RasterArena:
    """Storage for the rasters of a sequence whose length is not known: some steps at a time, so that few are copied.

    Args:
        rows, cols: size of one step.
        first_steps: how many to begin with, where single steps are taken.
    """

    FIRST_STEPS, MOST_STEPS = 8, 32

    def __init__(self, rows: int, cols: int, device: torch.device, first_steps: int = FIRST_STEPS) -> None:
        self._rows, self._cols, self._device = rows, cols, device
        self._storage = torch.empty((0, words_of(cols)), dtype=torch.int64, device=device)
        self._address = self._used = self._room = 0
        self._next, self.stride = first_steps, 8 * rows * words_of(cols)  # stride: bytes of one step

    def take(self, steps: int) -> tuple[Raster, int]:
        """A raster of so many steps, and its address."""
        if steps > self._room:
            self._room, self._used = max(steps, self._next if steps == 1 else 0), 0
            self._next = self.MOST_STEPS
            self._storage = torch.empty((self._room * self._rows, words_of(self._cols)), dtype=torch.int64,
                                        device=self._device)
            self._address = self._storage.data_ptr()
        used = self._used
        self._used += steps
        self._room -= steps
        raster = Raster(self._storage, self._cols, None, None, used * self._rows, steps * self._rows)
        return raster, self._address + used * self.stride
