"""What only matters with CUDA's kernels: streams, captured graphs, waiting, memory. ``pytest --kernels cuda``.

With ``--kernels cuda-host`` those tests run that need no device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import devices
import norse.torch as stock
import pytest
import snntorch as snn
import torch
from devices import cuda_kernels, down, up
from norse.torch.functional.leaky_integrator import LIState
from norse_oracle import clean_slate
from snn_sparse_backend.adapters import fallback
from snn_sparse_backend.adapters import norse as swapped
from snn_sparse_backend.adapters.switch import truncated_surrogates
from snntorch import surrogate
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import BuildError, kernels, memory, native, reports, scans
from snn_sparse_backend.norse_dynamics import LI
from snn_sparse_backend.recorder import Recorder
from snn_sparse_backend.surrogate import NO_GRADIENT

pytestmark = pytest.mark.skipif(not cuda_kernels(), reason="needs --kernels cuda or cuda-host")
on_a_gpu = pytest.mark.skipif(devices.device.type != "cuda", reason="needs a GPU")

STEPS, BATCH, SIZES = 40, 16, (70, 200, 150, 10)


class Net(nn.Module):
    """Linear and Leaky in turn, in a loop over time."""

    def __init__(self, learn_beta: bool = False) -> None:
        super().__init__()
        self.synapses = nn.ModuleList(nn.Linear(a, b) for a, b in zip(SIZES, SIZES[1:], strict=False))
        spike_grad = surrogate.fast_sigmoid(slope=25)
        self.neurons = nn.ModuleList(snn.Leaky(0.9, learn_beta=learn_beta, spike_grad=spike_grad) for _ in SIZES[1:])
        for synapse in self.synapses:
            nn.init.uniform_(synapse.weight, -0.25, 0.25)

    def forward(self, xs: Tensor) -> Tensor:
        mems = [lif.reset_mem() for lif in self.neurons]
        total = xs.new_zeros(())
        for x in xs:
            for i, (synapse, lif) in enumerate(zip(self.synapses, self.neurons, strict=True)):
                x, mems[i] = lif(synapse(x), mems[i])
            total = total + (x * torch.linspace(-1, 1, x.shape[1], device=x.device)).sum() + mems[-1].square().mean()
        return total


def make(**options: Any) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    xs = (torch.rand(STEPS, BATCH, SIZES[0], device="cpu") < 0.1).float()
    with torch.device("cpu"):
        net = Net(**options)
    return net.to(devices.device), up(xs)


def gradients(net: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    net.zero_grad()
    value = loss()
    value.backward()
    return [value.detach().clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm(), (a - b).norm() / b.norm()


OPTIONS: tuple[dict[str, Any], ...] = ({}, {"cutoff": 0.3}, {"cutoff": 0.3, "forward": "sparse"})


@pytest.mark.parametrize("learn_beta", [False, True])
def test_a_net_that_is_moved(learn_beta: bool) -> None:
    """``net.cuda()`` is all there is to do; the choice of products changes once densities are known, the result not."""
    net, xs = make(learn_beta=learn_beta)
    expected = gradients(net, lambda: net(xs))
    ran = set()
    with sparse.enabled("snntorch"):
        for _ in range(4):
            sparse.reset_counts()
            close(gradients(net, lambda: net(xs)), expected)
            ran |= {name for name, number in sparse.counts.items() if number}
            assert sparse.counts["host_steps"] == 0 and sparse.counts["neuron_nodes"] == 3
            devices.wait()
    assert {"weight_gradient_dense", "weight_gradient_sparse"} <= ran  # the first synapse had to learn its density


@pytest.mark.parametrize("options", OPTIONS)
def test_no_kernel_of_the_cpu_runs(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentinel: ``counts`` tells fused from host, but not which library served."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} of the CPU was called")

    monkeypatch.setattr(native, "_cpu_function", refuse)
    net, xs = make()
    with sparse.enabled("snntorch", **options):
        for _ in range(2):
            gradients(net, lambda: net(xs))
    assert sparse.counts["host_steps"] == 0 and sparse.counts["neuron_steps"] > 0


@pytest.mark.parametrize("options", OPTIONS)
def test_every_run_gives_the_same_bits(options: dict[str, Any]) -> None:
    net, xs = make()
    with sparse.enabled("snntorch", **options):
        for _ in range(3):  # until the densities are known
            gradients(net, lambda: net(xs))
            devices.wait()
        runs = [gradients(net, lambda: net(xs)) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("options", OPTIONS)
def test_deterministic_algorithms(options: dict[str, Any]) -> None:
    """The first sequence, when nothing is known, and a later one give the same bits: nothing is learnt meanwhile."""
    net, xs = make()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would ask for an environment variable
    try:
        with sparse.enabled("snntorch", **options):
            gradients(net, lambda: net(xs))  # which synapses feed neurons is learnt, though
            runs = []
            for _ in range(3):
                runs.append(gradients(net, lambda: net(xs)))
                devices.wait()
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_memory_kept_with_a_cutoff() -> None:
    """Less than a tenth of what the host keeps, though nobody knew beforehand how many sites would be active."""
    torch.manual_seed(0)
    sizes, steps, batch = (100, 512, 512), 100, 16
    with torch.device("cpu"):
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        xs = (torch.rand(steps, batch, sizes[0]) < 0.1).float()
    synapses = nn.ModuleList(layers).to(devices.device)
    neurons = [snn.Leaky(0.9, spike_grad=surrogate.fast_sigmoid(slope=25)).to(devices.device) for _ in layers]
    xs = up(xs)
    for synapse, gain in zip(synapses, (0.5, 0.4), strict=True):
        nn.init.normal_(synapse.weight, 0.0, gain / sizes[0] ** 0.5 * 2)
        nn.init.constant_(synapse.bias, -0.05)
    made: list[Tensor] = []
    rates: list[Tensor] = []

    def run() -> Tensor:
        mems = [lif.reset_mem() for lif in neurons]
        total = xs.new_zeros(())
        for x in xs:
            for i, (synapse, lif) in enumerate(zip(synapses, neurons, strict=True)):
                x, mems[i] = lif(synapse(x), mems[i])
                rates.append(x.detach().mean())
                made.extend((x, mems[i]))
            devices.wait()  # as a host that is slower than the device
            total = total + x.sum()
        return total

    host = memory.host_saved_bytes(run, exclude=[xs])
    assert 0.005 < down(torch.stack(rates)).mean() < 0.04
    made.clear()
    with sparse.enabled("snntorch", cutoff=0.05):
        loss = run()
        kept = memory.saved_by_kind([loss, *made], exclude=[xs])
    assert sum(kept.values()) < host / 10, (kept, host)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BuildError("no nvcc found. Install it: pip install 'snn-sparse-backend[cuda]'")

    monkeypatch.setattr(fallback, "load_cuda", fail)
    monkeypatch.setattr(fallback, "_problems", {})
    fallback.forget_warnings()


def test_the_reason_when_there_is_no_compiler(no_compiler: None) -> None:
    for _ in range(2):
        problem = fallback.kernels_problem(torch.device("cuda", 0))
        assert problem is not None and "the CUDA kernels are not available: no nvcc" in problem
    assert fallback.kernels_problem(torch.device("cpu")) is None and fallback.core_problem() is None


@on_a_gpu
def test_without_a_compiler_the_host_runs(no_compiler: None) -> None:
    """One warning that says how to get it, and the host's own result; CPU tensors stay fused."""
    net, xs = make()
    expected = gradients(net, lambda: net(xs))
    sparse.reset_counts()
    with sparse.enabled("snntorch"):
        with pytest.warns(sparse.SparseFallbackWarning, match="pip install") as seen:
            found = gradients(net, lambda: net(xs))
        assert len(seen) == 1 and sparse.counts["neuron_steps"] == 0 and sparse.counts["host_steps"] > 0
        close(found, expected)
        sparse.reset_counts()
        net, xs = net.cpu(), xs.cpu()
        with torch.device("cpu"):
            gradients(net, lambda: net(xs))
        assert sparse.counts["host_steps"] == 0 and sparse.counts["neuron_steps"] == 3 * STEPS


def test_counts_do_not_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host far ahead of the device: no report ever comes in, and all gradients are the same."""
    net, xs = make()
    with sparse.enabled("snntorch", cutoff=0.3):
        expected = gradients(net, lambda: net(xs))
        monkeypatch.setattr(reports.Counter, "look", lambda self: None)
        found = gradients(net, lambda: net(xs))
    close(found, expected)


@pytest.mark.parametrize("options", OPTIONS)
def test_check_on_the_device(options: dict[str, Any]) -> None:
    """The user's own test, with a dropout that draws from the device's generator."""
    net, xs = make()
    model = nn.Sequential(nn.Dropout(0.2), net.synapses[0], snn.Leaky(0.9, init_hidden=True)).to(devices.device)
    report = sparse.check(model, xs[0], **options)
    assert report.ok and report.fused_steps, report


def test_scalars_on_the_cpu_are_filled_in() -> None:
    """Norse keeps its parameters and its first membrane there, whatever device the net is on."""
    value, shape, meta = torch.tensor(0.25, dtype=torch.float64, device="cpu"), torch.Size((3, 5)), torch.device("meta")
    layer = scans.Layer(LI, NO_GRADIENT, [value] * 3, shape, torch.float32, meta)
    assert all(p.device == meta and p.dtype == torch.float32 for p in layer.parameters)
    recorder = object.__new__(Recorder)
    recorder.layer = layer
    ready = recorder._ready(value, shape)
    assert (ready.device, ready.shape, ready.dtype) == (meta, shape, torch.float32)
    kind, state = swapped._KINDS[swapped.LI], LIState(v=value.requires_grad_(), i=torch.zeros(shape))
    state = swapped._on_device(kind, state, devices.device)
    assert state.v.device == devices.device and state.v.requires_grad and down(state.v) == 0.25


@pytest.mark.parametrize("options", OPTIONS)
def test_norse_with_parameters_on_the_cpu(options: dict[str, Any]) -> None:
    """Sequence and cells on the device; Norse's constants stay where they were made."""
    torch.manual_seed(0)
    x = up((torch.rand(30, 8, 50, device="cpu") < 0.2).float())
    spiking, reading = (
        type(p)(*[t.cpu() if isinstance(t, Tensor) else t for t in p])
        for p in (stock.LIFParameters(v_th=torch.tensor(0.2)), stock.LIParameters())
    )
    with torch.device("cpu"):
        first, second = nn.Linear(50, 130), nn.Linear(130, 7)
    results = []
    for library in (stock, swapped):
        layers = first, library.LIF(spiking), second, library.LI(reading)
        net = stock.SequentialState(*layers).to(devices.device)
        cutoff = options.get("cutoff") if library is stock else None
        with clean_slate(**options), truncated_surrogates(net, cutoff):
            results.append(gradients(net, lambda: net(x)[0].square().sum()))  # noqa: B023
            assert sparse.counts["neuron_steps"] == (60 if library is swapped else 0)
            assert sparse.counts["host_steps"] == 0
    close(results[1], results[0])


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_a_training_step_never_waits(options: dict[str, Any]) -> None:
    net, xs = make(learn_beta=True)
    optimizer = torch.optim.Adam(net.parameters(), capturable=True)

    def step() -> None:
        optimizer.zero_grad()
        net(xs).backward()
        optimizer.step()

    with sparse.enabled("snntorch", **options):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sparse.counts["host_steps"] == 0


@on_a_gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_a_captured_step_replays(options: dict[str, Any]) -> None:
    """Forward and backward in one CUDA graph; its input and weights may change between replays."""
    net, xs = make()
    static = xs.clone()
    with sparse.enabled("snntorch", **options):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                gradients(net, lambda: net(static))
        torch.cuda.current_stream().wait_stream(side)
        net.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = net(static)
            loss.backward()
        for seed in range(3):
            torch.manual_seed(seed)
            other = (torch.rand_like(xs) < 0.1).float()
            static.copy_(other)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            graph.replay()
            found = [loss.detach().clone(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]
            before = [p.grad for p in net.parameters()]
            eager = gradients(net, lambda: net(static))  # noqa: B023
            for parameter, grad in zip(net.parameters(), before, strict=True):
                parameter.grad = grad  # where the graph writes
            close(found, eager)


@on_a_gpu
def test_streams() -> None:
    """A step on a stream of its own, two at once, and a sequence that changes streams half-way."""
    net, xs = make()
    other, ys = make()
    with sparse.enabled("snntorch", cutoff=0.3):
        expected = gradients(net, lambda: net(xs))
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
        for model, inputs, stream in ((net, xs, streams[0]), (other, ys, streams[1])):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(gradients(model, lambda: model(inputs)))  # noqa: B023
        torch.cuda.synchronize()
        close(found[0], expected)
        close(found[1], expected)

        def changing() -> Tensor:
            lif, synapse = net.neurons[0], net.synapses[0]
            mem, total, main = lif.reset_mem(), xs.new_zeros(()), torch.cuda.current_stream()
            for t, x in enumerate(xs):
                stream = main if t % 10 < 5 else streams[0]
                stream.wait_stream(main if stream is not main else streams[0])
                with torch.cuda.stream(stream):
                    spk, mem = lif(synapse(x), mem)
                    total = total + (spk * torch.linspace(-1, 1, spk.shape[1])).sum()
            main.wait_stream(streams[0])
            return total

        again = gradients(net, changing)
    torch.cuda.synchronize()
    with torch.no_grad():
        assert all(g.isfinite().all() for g in again)
    close(again, gradients(net, changing))


@on_a_gpu
def test_the_host_keeps_its_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    net, xs = make()
    expected = down(gradients(net, lambda: net(xs)))
    net, xs = net.to("cuda:1"), xs.to("cuda:1")
    with sparse.enabled("snntorch"), torch.cuda.device(0):
        close(down(gradients(net, lambda: net(xs))), expected)
        assert torch.cuda.current_device() == 0


@on_a_gpu
def test_layers_on_the_cpu_stay_as_they_are() -> None:
    net, xs = make()
    with torch.device("cpu"), sparse.enabled("snntorch"):
        net, xs = net.cpu(), xs.cpu()
        sparse.reset_counts()
        gradients(net, lambda: net(xs))
    assert sparse.counts["host_steps"] == 0 and sparse.counts["neuron_steps"] == 3 * STEPS


@on_a_gpu
def test_an_error_of_the_device_is_told() -> None:
    a = torch.ones(4, 64, device=devices.device)
    with pytest.raises(RuntimeError, match="CUDA error: invalid configuration"):
        native.call("raster_unpack", "SnnRasterUnpack", a.device, words=a, rows=1 << 60, cols=64, dense=a, dtype=0)
    raster = kernels.nonzero(a)
    assert torch.equal(kernels.unpack(raster, torch.float32), a)
