"""One sequence of a neuron layer, to call its scans again and again on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..dynamics import Dynamics
from ..native import event_parallel
from ..norse_dynamics import LIF
from ..raster import Raster
from ..reports import Counter
from ..scans import TILE, ForwardScan, Layer, neuron_backward, pointer_table, step_pointers
from ..snntorch_dynamics import leaky
from ..surrogate import Surrogate
from .clock import Meter
from .measure import ones

LEAKY = leaky("subtract", late_reset=False)
# Parameters in the order of the dynamics, and the scale of the input at which some neurons come close to threshold.
_NEURONS: dict[str, tuple[tuple[float, ...], float]] = {
    LEAKY.name: ((0.9, 1.0, 1.0), 0.25),
    LIF.name: ((0.1, -0.2, 0.0, 1.0, 0.0), 1.5),
}
_SAMPLE = 100_000  # sites from which the cutoff is found


class Sequence:
    """Random currents ``[T, B, N]`` into a layer with threshold 1, and all that its scans read and write.

    Args:
        dynamics: ``LEAKY`` or ``LIF``.
        shape: T, B, N.
        density: share of the sites that shall be active, whose membranes are kept compressed; None: all are kept.

    Attributes:
        active: number of active sites, None without a density.
    """

    def __init__(self, dynamics: Dynamics, shape: tuple[int, int, int], density: float | None,
                 device: torch.device) -> None:
        self.dynamics, self.shape, self._device = dynamics, shape, device
        self._steps, rows, cols = shape
        values, scale = _NEURONS[dynamics.name]
        self._parameters = [torch.tensor(value) for value in values]
        self._input = torch.randn(shape, device=device).add_(0.2).mul_(scale)
        self._states = [torch.zeros(rows, cols, device=device) for _ in range(2 * len(dynamics.states))]
        self._output, self._grad_input = torch.empty_like(self._input), torch.empty_like(self._input)
        self._raster = Raster.empty(self._steps * rows, cols, device)
        self._bits: Raster | None = None
        self._membrane: Tensor | None = torch.empty_like(self._input)
        self._values: Tensor | None = None
        self._offsets: Tensor | None = None
        self.active: int | None = None
        self._bind(None)
        if density is not None:
            self.forward()
            self._compress(density)

    def _bind(self, cutoff: float | None) -> None:
        surrogate = Surrogate("FastSigmoid", a=25.0).within(cutoff)
        self._layer = Layer(self.dynamics, surrogate, self._parameters, torch.Size(self.shape[1:]), torch.float32,
                            self._device)
        self._scan = ForwardScan(self._layer)
        self._counter = Counter(self._device) if event_parallel(self._device) else None

    def _compress(self, density: float) -> None:
        """From now on a cutoff lets that share of the sites be active, and only their membranes are kept."""
        assert self._membrane is not None
        distances = (self._membrane - 1).abs_().flatten()
        sample = distances[:: max(1, distances.numel() // _SAMPLE)].sort().values
        self._bind(float(sample[int(density * len(sample))]))
        self._membrane, self._bits = None, Raster.empty(self._raster.rows, self._raster.cols, self._device)
        # On CUDA the values of all calls in a row lie one behind the other; the CPU wants room for one more step.
        room = int(1.5 * Meter.LAUNCHES * density * distances.numel())
        self._values = torch.empty(room + self._layer.rows * self._layer.words * TILE, device=self._device)
        if event_parallel(self._device):
            self._offsets = torch.empty((self._steps, self._layer.blocks), dtype=torch.int64, device=self._device)
        self.prepare()
        self.forward()
        self.active = ones([self._bits])

    def prepare(self) -> None:
        """Before each row of forward scans: their values begin at the beginning again."""
        if self._counter is not None:
            self._counter.counts.zero_()

    def forward(self) -> None:
        """The forward scan."""
        tensors: dict[str, Tensor | None] = {
            "input": self._input, "output": self._output, "raster": self._raster.words, "active": _words(self._bits),
            "membrane": self._membrane, "offsets": self._offsets,
        }
        tables = [tensors.get(name) for name in ForwardScan.TABLES] + [None] * len(self.dynamics.states)
        pointers = [pointer for tensor in tables for pointer in step_pointers(tensor, self._steps)]
        states, half = [s.data_ptr() for s in self._states], len(self.dynamics.states)
        report = self._counter.launch(self._input.numel()) if self._counter is not None else None
        done = self._scan.run(self._steps, pointers, states[:half], states[half:],
                              self._values.data_ptr() if self._values is not None else None,
                              self._values.numel() if self._values is not None else 0, report=report)
        if done < self._steps:
            raise RuntimeError(f"the forward scan ended after {done} of {self._steps} steps")

    def backward(self) -> Callable[[], None]:
        """The backward scan of a forward scan that is done now; its tables are made once."""
        self.prepare()
        self.forward()
        tensors: dict[str, Tensor | None] = {
            "raster": self._raster.words, "active": _words(self._bits), "membrane": self._membrane,
            "offsets": self._offsets,
        }
        tables: dict[str, Any] = {name: step_pointers(tensor, self._steps) for name, tensor in tensors.items()}
        lists = self.active is not None and self._counter is None  # on the CPU: of the active sites
        grad = torch.randn(self.active if lists else self.shape, device=self._device)  # type: ignore[arg-type]
        tables["grad_output" if self.active is None else "grad_active"] = step_pointers(grad, self._steps)
        if self._values is not None:
            places = [0] * self._steps
            if lists:
                places = [4 * place for place in accumulate(self._scan.active_counts, initial=0)][: self._steps]
                tables["grad_active"] = [grad.data_ptr() + place for place in places]
            tables["values"] = [self._values.data_ptr() + place for place in places]
        made = {name: pointer_table(table) for name, table in tables.items()}
        states, parameters = [None] * len(self.dynamics.states), [None] * len(self._parameters)

        def run(keep: Tensor = grad) -> None:
            neuron_backward(self._layer, self._steps, grad_input=self._grad_input, grad_state_in=states,
                            grad_parameters=parameters, grad_states=states, state_in=states, **made)

        return run


def _words(raster: Raster | None) -> Tensor | None:
    return raster.words if raster is not None else None
