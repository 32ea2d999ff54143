"""The oracle that users run on their own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import norse.torch as norse
import pytest
import snntorch as snn
import torch
from snn_sparse_backend.adapters.norse import LI, LIF
from snn_sparse_backend.adapters.switch import host_code, truncated_surrogates
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import neuron_tape
from snn_sparse_backend.equivalence import check_file, float64_spikes
from snn_sparse_backend.testing import assert_gradients_match


class Net(nn.Module):
    """Two layers of snnTorch, states kept in the modules."""

    def __init__(self, **leaky: Any) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(20, 70), snn.Leaky(0.9, **leaky)
        self.fc2, self.lif2 = nn.Linear(70, 5), snn.Leaky(0.8, learn_beta=True)
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            self.fc1.weight *= 3
            self.fc2.weight *= 3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.lif1.reset_mem()
        self.lif2.reset_mem()
        spikes, membranes = zip(*(self.lif2(self.fc2(self.lif1(self.fc1(step))[0])) for step in x), strict=True)
        return torch.stack(spikes), torch.stack(membranes)


@pytest.fixture
def frames() -> Tensor:
    torch.manual_seed(0)  # the weights of the test's model
    return (torch.rand(9, 4, 20, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) < 0.3).float()


def test_a_right_model_agrees(frames: Tensor) -> None:
    report = sparse.check(Net(), frames)
    assert report.ok and report.worst < 1e-6
    assert report.fused_steps == 18 and report.host_steps == 0
    assert report.spike_flips == {"lif1": 0, "lif2": 0}
    assert report.loss_dense == report.loss_sparse
    names = {d.name for d in report.differences}
    assert {"fc1.weight", "fc2.bias", "lif2.beta", "unused.weight"} <= names
    assert "agree" in str(report) and "fc1.weight" in str(report)


@pytest.mark.parametrize("options", [{"cutoff": 0.3}, {"forward": "sparse"}, {"cutoff": 0.3, "forward": "sparse"}])
def test_float64_copies_agree_to_rounding(frames: Tensor, options: dict[str, Any]) -> None:
    report = sparse.check(Net(reset_mechanism="zero"), frames, double=True, **options)
    assert report.ok and report.tolerance == 1e-10 and report.worst < 1e-12


def test_a_cutoff_changes_the_gradients_it_should(frames: Tensor) -> None:
    """The comparison would notice if the truncation of the dense side were missing."""
    net = Net()
    full, cut = (gradients(net, frames, cutoff) for cutoff in (None, 0.1))
    assert (full - cut).norm() > 1e-3 * full.norm()


def gradients(net: Net, frames: Tensor, cutoff: float | None) -> Tensor:
    net.zero_grad()
    with host_code(), truncated_surrogates(net, cutoff):
        net(frames)[1].square().sum().backward()
    assert net.fc1.weight.grad is not None
    return net.fc1.weight.grad


def test_the_model_is_left_as_it_was(frames: Tensor) -> None:
    net = nn.Sequential(Net(), Last())
    net(frames).sum().backward()
    states = {name: value for name, value in net.named_buffers()}
    grads = [p.grad for p in net.parameters()]
    generator = torch.get_rng_state()
    sparse.check(net, frames)
    assert all(value is states[name] for name, value in net.named_buffers())
    assert all(a is b for a, b in zip(grads, (p.grad for p in net.parameters()), strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert "forward" not in vars(net) and not sparse.config.suspended and not sparse.config.libraries


class Last(nn.Module):
    def forward(self, outputs: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.dropout(outputs[1], 0.5)


def test_both_sides_draw_the_same_random_numbers(frames: Tensor) -> None:
    assert sparse.check(nn.Sequential(Net(), Last()), frames).ok


@pytest.mark.parametrize("classes", [(norse.LIF, norse.LI), (LIF, LI)])
@pytest.mark.parametrize("cutoff", [None, 0.2])
def test_norse_models(classes: tuple[Any, Any], cutoff: float | None) -> None:
    net = norse.SequentialState(nn.Linear(20, 70), classes[0](), nn.Linear(70, 5), classes[1]())
    x = (torch.rand(9, 4, 20) * 40).requires_grad_()
    report = assert_gradients_match(net, x, lambda out: out[0].square().sum(), cutoff=cutoff, double=True)
    assert report.spike_flips == {"1": 0} and any(d.name == "input[0]" for d in report.differences)


def test_a_planted_error_is_found(frames: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    right = neuron_tape.neuron_backward

    def wrong(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        kwargs["grad_input"].mul_(1.01)

    monkeypatch.setattr(neuron_tape, "neuron_backward", wrong)
    report = sparse.check(Net(), frames)
    assert not report.ok and "DIFFER" in str(report)
    assert report.worst == pytest.approx(1.01**2 - 1, rel=1e-3)  # one percent in each layer
    with pytest.raises(AssertionError, match="fc1.weight"):
        assert_gradients_match(Net(), frames)


def test_not_fused_is_said(frames: Tensor) -> None:
    with pytest.warns(sparse.SparseFallbackWarning):
        report = sparse.check(Single(), frames)
    assert report.ok and report.fused_steps == 0 and "itself" in str(report)
    with pytest.raises(AssertionError, match="fused path"):
        assert_gradients_match(Single(), frames)


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(20, 5), snn.Leaky(0.9, spike_grad=lambda x: torch.sigmoid(x))

    def forward(self, x: Tensor) -> Tensor:
        self.lif.reset_mem()
        return torch.stack([self.lif(self.fc(step))[1] for step in x])


def test_nan_is_not_agreement(frames: Tensor) -> None:
    net = Net()
    with torch.no_grad():
        net.fc1.weight[0, 0] = float("nan")
    report = sparse.check(net, frames)
    assert not report.ok and report.worst != report.worst


def test_bad_arguments(frames: Tensor) -> None:
    with pytest.raises(ValueError, match="scalar"):
        sparse.check(Net(), frames, lambda out: out[1])
    with pytest.raises(ValueError, match="no spiking layer"):
        sparse.check(nn.Linear(20, 2), frames)
    with pytest.raises(ValueError, match="cutoff"):
        sparse.check(Net(), frames, cutoff=-1.0)


def test_check_file(tmp_path: Path) -> None:
    file = tmp_path / "their_model.py"
    file.write_text("import snntorch as snn\nimport torch\n"
                    "class Net(torch.nn.Module):\n"
                    "    def __init__(self):\n        super().__init__()\n"
                    "        self.fc, self.lif = torch.nn.Linear(4, 9), snn.Leaky(0.9)\n"
                    "    def forward(self, x):\n        self.lif.reset_mem()\n"
                    "        return torch.stack([self.lif(self.fc(s))[1] for s in x])\n"
                    "def make():\n    return Net(), torch.rand(6, 2, 4)\n"
                    "def loss_too():\n    return Net(), torch.rand(6, 2, 4), lambda y: y.square().mean()\n"
                    "def nothing():\n    return 1\n")
    assert check_file(f"{file}:make").ok and check_file(f"{file}:loss_too", cutoff=0.5).ok
    for spec, words in (("file_without_factory.py", "FILE.py:FACTORY"), (f"{file}:missing", "no function 'missing'"),
                        ("nowhere.py:make", "no such file"), (f"{file}:nothing", "expected \\(model, inputs\\)")):
        with pytest.raises(ValueError, match=words):
            check_file(spec)


def test_float64_spikes_ends() -> None:
    x = torch.ones(1, dtype=torch.float64)
    with float64_spikes():
        assert x.float().dtype is torch.float64 and (x > 0).float().dtype is torch.float64
        assert x.half().float().dtype is torch.float32
    assert x.float().dtype is torch.float32
