"""The trials of unknown versions: they agree with what is installed, and nothing of a step escapes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch as snn
import torch
from snn_sparse_backend.adapters import snntorch as adapter
from snn_sparse_backend.adapters import snntorch_trials
from snn_sparse_backend.adapters.snntorch_neurons import KINDS
from snn_sparse_backend.compat import probe
from snntorch import surrogate

import snn_sparse_backend as sparse

norse = pytest.importorskip("norse.torch")
from norse_oracle import OTHER_STEP, clean_slate  # noqa: E402
from snn_sparse_backend.adapters import norse as swapped  # noqa: E402
from snn_sparse_backend.adapters import norse_trials  # noqa: E402
from snn_sparse_backend.adapters.norse_neurons import KINDS as NORSE_KINDS  # noqa: E402

SNNTORCH = pytest.mark.parametrize("host", KINDS, ids=lambda host: host.__name__)
NORSE = pytest.mark.parametrize("name", [name for name in swapped.__all__ if name not in OTHER_STEP])


def trials_of(host: Any, spike_grad: Any = None, method: str = "super") -> Iterator[probe.Trial]:
    """The trials of a class of either library, with a surrogate."""
    if host in KINDS:
        return snntorch_trials.trials(KINDS[host], host, adapter._FORWARDS[host], spike_grad or surrogate.atan())
    kind, sequence = NORSE_KINDS[host], not host.__name__.endswith("Cell")
    p = host(*((4, 6) if kind.weights else ())).p
    if hasattr(kind.core(p), "method"):
        p = kind.replaced(p, {"method": method})
    return norse_trials.trials(kind, host, sequence, swapped._forward_of(host), swapped._STOCK[host], p)


@pytest.mark.parametrize("host", [*KINDS, *NORSE_KINDS], ids=lambda host: f"{host.__module__}.{host.__name__}")
def test_trials_reach_every_parameter(host: type) -> None:
    """A formula that no output and no gradient depends on could change unseen."""
    spiking = host in KINDS or "v_th" in NORSE_KINDS[host].parameters
    for trial in trials_of(host):
        torch.manual_seed(0)
        outcome = trial(False)
        spikes = torch.stack([v for n, v in outcome.outputs.items() if n.startswith(("spk", "output"))])
        if spiking:
            assert 0.02 < float(spikes.mean()) < 0.98
        silent = {n for n, g in outcome.gradients.items() if g is None or not g.any()}
        assert silent <= ({"mem"} if host is snn.Alpha else set())
        assert {n for n, g in outcome.gradients.items() if g is None} == silent
        assert all(g.isfinite().all() for g in outcome.gradients.values() if g is not None)


@SNNTORCH
@pytest.mark.parametrize("make", [surrogate.atan, surrogate.fast_sigmoid, surrogate.sigmoid, surrogate.triangular,
                                  surrogate.straight_through_estimator, surrogate.heaviside,
                                  surrogate.spike_rate_escape, surrogate.SFS], ids=lambda make: make.__name__)
def test_trials_agree_with_every_surrogate(host: type, make: Callable[[], Any]) -> None:
    with clean_slate():
        for trial in trials_of(host, make()):
            assert probe._difference(trial) is None


@NORSE
@pytest.mark.parametrize("method", ["super", "triangle", "tanh", "circ", "heavi_erfc", "heaviside"])
def test_trials_agree_with_every_method(name: str, method: str) -> None:
    with clean_slate():
        for trial in trials_of(getattr(norse, name), method=method):
            assert probe._difference(trial) is None


def outcome(output: Any = (1.0, 2.0), gradient: Any = (1.0, 1.0)) -> probe.Outcome:
    tensor = torch.tensor
    return probe.Outcome({"spk": tensor(output, dtype=torch.float64)},
                         {"beta": None if gradient is None else tensor(gradient, dtype=torch.float64)})


@pytest.mark.parametrize(("found", "words"), [
    (outcome(), None),
    (outcome(gradient=(1.0, 1 + 1e-12)), None),
    (outcome(output=(1.0, 2 + 1e-12)), "its spk differs by 1.0e-12"),
    (outcome(output=(1.0,)), "its spk has another shape or dtype"),
    (outcome(output=(1.0, float("nan"))), "its spk differs by nan"),
    (outcome(gradient=(1.0, 1.01)), "the gradient of its beta differs by 1.0e-02"),
    (outcome(gradient=(1.0, float("nan"))), "the gradient of its beta differs by nan"),
    (outcome(gradient=None), "the gradient of its beta is not None, unlike ours"),
])
@pytest.mark.parametrize("steps", ["neuron_steps", "host_steps", None])
def test_the_comparison(found: probe.Outcome, words: str | None, steps: str | None) -> None:
    def trial(fused: bool) -> probe.Outcome:
        if fused and steps is not None:
            sparse.counts[steps] += 1
        return found if fused else outcome()

    with clean_slate():
        if steps != "neuron_steps":
            words = "a trial of it did not run on the kernels"
        assert probe._difference(trial) == words
