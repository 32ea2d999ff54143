"""Graded spikes that drive a recurrence: their factor counts in the currents of the next step and in all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from oracle import BATCH, SIZES, Side, assert_same, differences, frames, precision, run, train, weighted
from snntorch import surrogate
from torch import Tensor, nn

from snn_sparse_backend import neuron_tape

SIZE = SIZES[1]
MAKERS: dict[str, Callable[..., Any]] = {
    "RLeaky": lambda **options: snn.RLeaky(0.8, **options),
    "RSynaptic": lambda **options: snn.RSynaptic(0.7, 0.8, **options),
}
RECURRENCES: dict[str, dict[str, Any]] = {"linear": {"linear_features": SIZE},
                                          "one to one": {"all_to_all": False, "V": 0.7}}
FACTORS: dict[str, Callable[[], Tensor]] = {
    "number": lambda: torch.tensor(0.6),
    "neurons": lambda: torch.linspace(0.3, 1.4, SIZE),
    "rows": lambda: torch.linspace(0.3, 1.4, BATCH).view(BATCH, 1),
    "learnable": lambda: nn.Parameter(torch.tensor(0.6)),
    "learnable neurons": lambda: nn.Parameter(torch.linspace(0.3, 1.4, SIZE)),
}


def unroll(kind: str, recurrence: str, factor: str) -> Callable[[Side], None]:
    def program(side: Side) -> None:
        fc, out = nn.Linear(SIZES[0], SIZE), nn.Linear(SIZE, 3)
        layer = MAKERS[kind](threshold=0.4, learn_threshold=True, spike_grad=side.surrogate(surrogate.atan()),
                             **RECURRENCES[recurrence])
        given = FACTORS[factor]()
        if isinstance(given, nn.Parameter):
            del layer.graded_spikes_factor  # a buffer
        layer.graded_spikes_factor = given
        state: Any = (None,) * (2 if kind == "RLeaky" else 3)
        loss = torch.zeros(())
        for x in frames(9):
            state = layer(2 * fc(x), *state)
            for k, value in enumerate(state):
                side.output(f"{k}: {len(side.outputs)}", value)
            loss = loss + weighted(out(state[0]), state[-1])
        train(side, nn.ModuleList([fc, layer, out]), loss)

    return program


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("kind", MAKERS)
def test_as_in_the_host(kind: str, recurrence: str, factor: str) -> None:
    for options in ({}, {"cutoff": 0.2, "crossover": 1.0}, {"forward": "sparse"}, {"fuse_steps": False}):
        with precision(torch.float64):
            side = assert_same(unroll(kind, recurrence, factor), **options)
        assert not side.counts["recurrent_sparse"], "a sum over events knows no factor"


def test_a_planted_error_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight gradient takes spikes for ones."""
    program = unroll("RLeaky", "linear", "neurons")
    stock = run(program, on=False)
    assert not differences(stock, run(program, on=True), tolerance=1e-5)

    def ones(tape: neuron_tape.NeuronTape, rows: int) -> Tensor:
        return neuron_tape.unpack(tape._raster(rows), tape.layer.dtype)

    monkeypatch.setattr(neuron_tape.NeuronTape, "_spikes", ones)
    (found,) = differences(stock, run(program, on=True), tolerance=1e-5)
    assert "recurrent.weight" in found
