"""Options: what is in force for the process, a library or a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from . import crossovers
from .compat.precision import full_on_cuda

FORWARDS = ("host", "sparse")
# They follow from the memory rates of the kernels, see docs/kernels.md.
_CUDA_CROSSOVER, _TF32_CROSSOVER = 0.1, 0.03
_CONVOLUTION_CROSSOVER = 0.2


@dataclass(frozen=True)
class Options:
    """How the sparse backend computes.

    Args:
        cutoff: backpropagate through a spike only where ``|U - threshold| < cutoff``; None: the exact surrogate
            derivative everywhere.
        forward: ``"host"``: currents come from the host library's own operation, so outputs are bit-identical;
            ``"sparse"``: currents are summed over the spikes only (another order of summation).
        fuse_steps: one autograd node per layer and sequence. False: one per layer and step, for those who need the
            gradient at an intermediate membrane state.
        crossover: products run sparse below this density of spikes or active sites, dense above it; None: what suits
            the product, its shape and the device.
    """

    cutoff: float | None = None
    forward: str = "host"
    fuse_steps: bool = True
    crossover: float | None = None

    def __post_init__(self) -> None:
        if self.cutoff is not None:
            number = isinstance(self.cutoff, (int, float)) and not isinstance(self.cutoff, bool)
            if not number or not self.cutoff > 0 or math.isinf(self.cutoff):
                raise ValueError(
                    f"cutoff: expected a positive finite number (distance of the membrane potential from threshold) "
                    f"or None for the full surrogate derivative, got {self.cutoff!r}"
                )
        if self.forward not in FORWARDS:
            raise ValueError(f"forward: expected one of {', '.join(map(repr, FORWARDS))}, got {self.forward!r}")
        if not isinstance(self.fuse_steps, bool):
            raise ValueError(f"fuse_steps: expected True or False, got {self.fuse_steps!r}")
        if self.crossover is not None and not 0 <= self.crossover <= 1:
            raise ValueError(f"crossover: expected a density between 0 and 1 or None, got {self.crossover!r}")

    def crossover_on(self, device: torch.device, product: str, rows: int, inputs: int, outputs: int) -> float:
        """The density up to which a product runs sparse on a device.

        Args:
            product: ``"forward"``, ``"weight_gradient"`` or ``"input_gradient"``.
            rows, inputs, outputs: its shape; ``rows`` are pairs of time step and batch row.
        """
        if self.crossover is not None:
            return self.crossover
        if device.type != "cuda":
            return crossovers.density(product, rows, inputs, outputs)
        return _CUDA_CROSSOVER if full_on_cuda() else _TF32_CROSSOVER

    @property
    def crossover_of_convolutions(self) -> float:
        """The density up to which a product of a convolution runs sparse on the CPU."""
        return _CONVOLUTION_CROSSOVER if self.crossover is None else self.crossover

    def updated(self, changes: dict[str, Any]) -> Options:
        """These options with some of them changed.

        Raises:
            TypeError: for a name that is not an option.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"unknown option {name!r}: the options are {', '.join(known)}")
        return replace(self, **changes)


class Config:
    """What is in force; ``print(snn_sparse_backend.config)`` shows it.

    Attributes:
        defaults: options where neither a library nor a model sets its own; change them with :meth:`set`.
        libraries: options of each enabled library.
        suspended: inside ``host_code()``, where nothing of ours runs.
    """

    def __init__(self) -> None:
        self.defaults = Options()
        self.libraries: dict[str, Options] = {}
        self.suspended = False

    def set(self, **options: Any) -> None:
        """Changes process-wide defaults, e.g. ``config.set(cutoff=0.3)`` for Norse's swapped classes.

        Raises:
            TypeError: for an unknown option.
            ValueError: for a bad value; nothing is changed then.
        """
        self.defaults = self.defaults.updated(options)

    def of(self, library: str) -> Options:
        """Options in force for a library."""
        return self.libraries.get(library, self.defaults)

    def __repr__(self) -> str:
        lines = [f"defaults: {self.defaults}"]
        lines += [f"{name}: enabled, {options}" for name, options in self.libraries.items()]
        return "\n".join(lines if self.libraries else [*lines, "no library enabled"])


config = Config()
