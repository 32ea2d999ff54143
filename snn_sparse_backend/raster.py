"""Spike rasters: one bit a site, rows of 64-bit words."""

from __future__ import annotations

import torch

from .reports import Densities

WORD = 64


def words_of(cols: int) -> int:
    """Number of 64-bit words that hold one row of ``cols`` sites."""
    return (cols + WORD - 1) // WORD


class Raster:
    """Packed bits of a binary matrix ``[rows, cols]``; a row is one (time step, batch) pair.

    Args:
        words: int64 tensor ``[rows, ceil(cols / 64)]``, lowest bit first, bits beyond ``cols`` zero.
        cols: number of sites in a row.
        ones: number of ones, where it is known.
        densities: on CUDA, what is known of the neurons whose spikes these are.
    """

    __slots__ = ("words", "cols", "ones", "densities")

    def __init__(self, words: torch.Tensor, cols: int, ones: int | None = None,
                 densities: Densities | None = None) -> None:
        self.words, self.cols, self.ones, self.densities = words, cols, ones, densities

    @property
    def rows(self) -> int:
        return self.words.shape[0]

    @property
    def sites(self) -> int:
        return self.rows * self.cols

    @staticmethod
    def empty(rows: int, cols: int, device: torch.device | str = "cpu") -> Raster:
        return Raster(torch.empty((rows, words_of(cols)), dtype=torch.int64, device=device), cols)

    @staticmethod
    def concatenate(rasters: list[Raster]) -> Raster:
        """The rasters one below the other."""
        if len(rasters) == 1:
            return rasters[0]
        ones = [r.ones for r in rasters if r.ones is not None]
        known = sum(ones) if len(ones) == len(rasters) else None
        return Raster(torch.cat([r.words for r in rasters]), rasters[0].cols, known, rasters[0].densities)
