"""What differs between snnTorch versions, and how its surrogate closures are recognised."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from snntorch import surrogate as factories

from ..registered import registered
from ..surrogate import Surrogate

# Code objects are shared by all closures of a factory, so they identify the formula whatever its constants.
_FORMULAS: dict[Any, Callable[[dict[str, float]], Surrogate]] = {
    factories.atan().__code__: lambda c: Surrogate("Atan", c["alpha"]),
    factories.fast_sigmoid().__code__: lambda c: Surrogate("FastSigmoid", c["slope"]),
    factories.sigmoid().__code__: lambda c: Surrogate("Sigmoid", c["slope"]),
    factories.straight_through_estimator().__code__: lambda c: Surrogate("StraightThrough"),
    factories.triangular().__code__: lambda c: Surrogate("Triangular", c["threshold"]),
    factories.heaviside().__code__: lambda c: Surrogate("Step", low=0.0),
    factories.spike_rate_escape().__code__: lambda c: Surrogate("SpikeRateEscape", c["beta"], c["slope"]),
    factories.SFS().__code__: lambda c: Surrogate("FastSigmoid", c["slope"], low=c["B"]),
}
# The autograd functions behind them, as imported: a replaced one has a formula we do not know.
_FUNCTIONS = ("ATan", "FastSigmoid", "Sigmoid", "StraightThroughEstimator", "Triangular", "Heaviside",
              "SpikeRateEscape", "SparseFastSigmoid")
_ORIGINALS = {name: getattr(factories, name) for name in _FUNCTIONS}
_APPLIES = {_ORIGINALS["StraightThroughEstimator"]: Surrogate("StraightThrough"),
            _ORIGINALS["Heaviside"]: Surrogate("Step", low=0.0)}


def constants(spike_grad: Any) -> tuple[float, ...] | None:
    """The constants inside a surrogate closure as they are now (its cells are mutable); None if not all numbers."""
    values = tuple([cell.cell_contents for cell in getattr(spike_grad, "__closure__", None) or ()])
    for value in values:
        if not isinstance(value, (int, float)):
            return None
    return values


def surrogate_of(spike_grad: Any) -> Surrogate | None:
    """The description of a ``spike_grad``, or None if its formula is not known."""
    if any(getattr(factories, name) is not original for name, original in _ORIGINALS.items()):
        return None
    owner = getattr(spike_grad, "__self__", None)
    if isinstance(owner, type) and owner in _APPLIES:
        return _APPLIES[owner]  # e.g. spike_grad=StraightThroughEstimator.apply
    own = registered(spike_grad)
    if own is not None:
        return own
    code = getattr(spike_grad, "__code__", None)
    values = constants(spike_grad)
    if code is None or code not in _FORMULAS or values is None or not all(map(math.isfinite, values)):
        return None
    return _FORMULAS[code](dict(zip(code.co_freevars, map(float, values), strict=True)))


def emits(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the spikes for a membrane of this dtype: snnTorch calls ``.float()``."""
    return dtype if dtype is torch.float32 else torch.zeros((), dtype=dtype).float().dtype
