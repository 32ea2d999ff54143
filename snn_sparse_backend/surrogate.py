"""Descriptions of surrogate derivatives. The formulas themselves are in ``csrc/surrogates.h``, for CPU and CUDA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Surrogate:
    """A surrogate derivative of the spike function at ``x = u - threshold``.

    Args:
        kind: name of the functor in ``csrc/surrogates.h`` (``"Atan"``, ``"FastSigmoid"``, ...).
        a, b: its constants (slope, alpha, ...).
        low, high: the derivative is zero outside the open interval ``(low, high)``.
        given: computes the derivative at any tensor of ``x``, where the formula is a user's own (``"Given"``).
    """

    kind: str
    a: float = 0.0
    b: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    given: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def differentiable(self) -> bool:
        """Whether spikes pass gradients on at all."""
        return self.kind != "ZeroDerivative"

    @property
    def bounded(self) -> bool:
        """Whether the derivative vanishes far from threshold on both sides, so that few sites are active."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def within(self, cutoff: float | None) -> Surrogate:
        """This derivative multiplied by ``1[|x| < cutoff]``."""
        if cutoff is None:
            return self
        return replace(self, low=max(self.low, -cutoff), high=min(self.high, cutoff))


NO_GRADIENT = Surrogate("ZeroDerivative", low=0.0, high=0.0)
