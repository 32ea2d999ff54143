"""The least work of each kernel: every input read once, every output written once, float32.

What a format adds on one device only (the offsets of compressed membranes, the states carried from launch to launch,
partial sums) is not counted: it is the kernel's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..raster import words_of

FLOAT = 4


@dataclass(frozen=True)
class Work:
    """What a kernel has to do.

    Args:
        bytes: to be read and written.
        operations: neurons updated, bits handled, weights moved, or multiply-adds.
    """

    bytes: int
    operations: int


def raster_bytes(rows: int, cols: int) -> int:
    """Size of a raster."""
    return 8 * rows * words_of(cols)


def neuron_forward(steps: int, rows: int, cols: int, states: int, active: int | None) -> Work:
    """Current in, spikes and their raster out, the states in and out once, and what backward needs.

    Args:
        active: sites whose membrane is kept, with their raster; None: the membranes of all.
    """
    sites, raster = steps * rows * cols, steps * raster_bytes(rows, cols)
    kept = FLOAT * sites if active is None else FLOAT * active + raster
    return Work(FLOAT * (2 * sites + 2 * states * rows * cols) + raster + kept, sites)


def neuron_backward(steps: int, rows: int, cols: int, uses_spike: bool, active: int | None) -> Work:
    """The gradient of the current out; in the gradient of the spikes and the membranes.

    Args:
        uses_spike: whether the reset sends a gradient back, for which the raster of the spikes is read.
        active: sites where both are read, with their raster; None: everywhere.
    """
    sites, raster = steps * rows * cols, steps * raster_bytes(rows, cols)
    read = 2 * FLOAT * sites if active is None else 2 * FLOAT * active + raster
    return Work(FLOAT * sites + read + raster * uses_spike, sites)


def raster_and_dense(rows: int, cols: int) -> Work:
    """Packing and unpacking: one is read, the other written."""
    return Work(FLOAT * rows * cols + raster_bytes(rows, cols), rows * cols)


def raster_transpose(rows: int, cols: int) -> Work:
    return Work(raster_bytes(rows, cols) + raster_bytes(cols, rows), rows * cols)


def pack_weights(inputs: int, outputs: int) -> Work:
    return Work(FLOAT * inputs * (outputs + 64 * words_of(outputs)), inputs * outputs)


def synapse_forward(rows: int, inputs: int, outputs: int, events: int) -> Work:
    """Raster, weights and bias in, currents out."""
    floats = inputs * outputs + outputs + rows * outputs
    return Work(FLOAT * floats + raster_bytes(rows, inputs), events * outputs)


def weight_gradient(rows: int, inputs: int, outputs: int, events: int) -> Work:
    """The gradients of the currents and the transposed raster in, the gradient of the weights out."""
    return Work(FLOAT * (rows * outputs + inputs * outputs) + raster_bytes(inputs, rows), events * outputs)


def input_gradient(rows: int, inputs: int, outputs: int, events: int) -> Work:
    """The gradients of the currents, the weights and the transposed raster in, one gradient an active site out."""
    floats = rows * outputs + inputs * outputs + events
    return Work(FLOAT * floats + raster_bytes(inputs, rows), events * outputs)
