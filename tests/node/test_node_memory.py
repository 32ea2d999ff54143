"""Leaks, copies, threads and processes."""
from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from node_cases import FLOAT, STEPS, Constant, Scaling, grad, leaf
from torch import Tensor
from toy_cell import ToyCell, ToyTape, loss_of, node, unroll

# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_tapes_are_freed_by_reference_counting_alone(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    before = len(ToyTape.alive)
    outputs = unroll(cell, x, v0)
    assert len(ToyTape.alive) == before + 1
    del outputs  # a forward pass without backward
    assert len(ToyTape.alive) == before
    outputs = unroll(cell, x, v0)
    loss_of(*outputs).backward()
    assert len(ToyTape.alive) == before  # though the outputs are still here
    outputs = unroll(cell, x, v0)
    loss_of(*outputs).backward(retain_graph=True)
    assert len(ToyTape.alive) == before + 1
    del outputs
    assert len(ToyTape.alive) == before


def test_a_handle_is_weak(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    outputs = unroll(cell, x, v0)
    handle = node.handle_of(outputs[0][0])
    tape = weakref.ref(handle.tape)
    del outputs
    assert tape() is None and handle.tape is None and not handle.alive and not handle.open
    assert (handle.num_inputs, handle.num_outputs, handle.topological_nr) == (0, 0, 0)
    assert node.extend(handle, [cell.weight], [torch.ones(2)]) is False


def test_a_tape_that_holds_an_output_is_freed_by_backward_only() -> None:
    # Why tapes must not do so: Python's collector cannot see through the node.
    tape, out = Constant(None), torch.ones(2)
    node.create(tape, [torch.ones(2, requires_grad=True)], [out])
    tape.out = out
    alive = weakref.ref(tape)
    del tape, out
    gc.collect()
    assert alive() is not None
    alive().out.sum().backward()
    gc.collect()
    assert alive() is None


def test_release_is_called_when_the_graph_is_freed(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, states = unroll(cell, x, v0)
    tape = node.tape_of(spikes[0])  # somebody else holds the tape
    loss = loss_of(spikes, states)
    loss.backward(retain_graph=True)
    assert tape.releases == 0 and len(tape.steps) == STEPS
    loss.backward()
    assert tape.releases == 1 and tape.steps == []
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert tape.releases == 1


@pytest.mark.parametrize("hold_handle", [True, False])
def test_a_node_that_dies_unused_does_not_release(hold_handle: bool, cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    outputs = unroll(cell, x, v0)
    tape = node.tape_of(outputs[0][0])
    if not hold_handle:
        tape.handle = None
    del outputs
    assert tape.releases == 0 and len(tape.steps) == STEPS


@pytest.mark.parametrize("error", [ValueError("in release"), AttributeError("in release")])
def test_errors_of_release_are_reported(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Scaling):
        def release(self) -> None:
            raise error

    reports: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda report: reports.append((report.exc_value, report.object)))
    w, out = torch.ones(2, requires_grad=True), torch.ones(2)
    tape = Failing()
    node.create(tape, [w], [out])
    out.sum().backward()
    assert w.grad.tolist() == [1, 1] and reports == [(error, tape)]


@pytest.mark.usefixtures("no_collector")
def test_a_node_may_die_while_an_exception_travels() -> None:
    # list() drops what it has collected so far, nodes included, with the KeyError already set
    gone: list[str] = []

    def make(number: int) -> Tensor:
        if number == 3:
            raise KeyError("travelling")
        out, tape = torch.ones(2), Constant(None)
        weakref.finalize(tape, gone.append, number)
        node.create(tape, [torch.ones(2, requires_grad=True)], [out])
        return out

    with pytest.raises(KeyError, match="travelling"):
        list(map(make, range(5)))
    assert sorted(gone) == [0, 1, 2]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_stable() -> None:
    cell, x, v0 = ToyCell(64, 64), leaf(20, 8, 64), torch.zeros(8, 64, dtype=FLOAT)

    def train(times: int) -> None:
        for _ in range(times):
            loss_of(*unroll(cell, x, v0)).backward()
            unroll(cell, x, v0)

    train(40)
    before = resident_bytes()
    train(200)
    assert resident_bytes() - before < 8 << 20  # one leaked sequence of 400 would be 200 KB


@pytest.mark.parametrize("hold_handles", [True, False])
def test_a_long_chain_ends_without_stack_overflow(hold_handles: bool) -> None:
    out, tape, handles = torch.zeros(1, requires_grad=True), Constant(None), []
    for _ in range(100_000):
        previous, out = out, torch.zeros(1)
        handle = node.create(tape, [previous], [out])
        if hold_handles:
            handles.append(handle)
    alive = weakref.ref(tape)
    del previous, out, handle, tape
    assert alive() is None and not any(handle.alive for handle in handles)


def test_many_edges_on_one_node() -> None:
    steps = 20_000
    w, outs = torch.ones(1, requires_grad=True), [torch.zeros(1) for _ in range(steps)]
    handle = node.create(Constant(*[torch.ones(1)] * steps), [w], outs[:1])
    assert all(node.extend(handle, [w], [out]) for out in outs[1:])
    torch.stack(outs).sum().backward()
    assert w.grad.item() == steps


# ---- copies, threads, processes --------------------------------------------------------------------------------------


def test_copies_of_a_handle_are_none(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    spikes, _ = unroll(cell, x, v0)
    cell.handle = node.handle_of(spikes[0])
    assert copy.deepcopy(cell).handle is None and copy.copy(cell.handle) is None
    assert pickle.loads(pickle.dumps(cell.handle)) is None
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(spikes[0])


def run_in_threads(work: Callable[[], None], threads: int = 6) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            for _ in range(30):
                work()
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=guarded, daemon=True) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(60)
    assert not any(thread.is_alive() for thread in pool), "a thread hangs"
    assert errors == []


def test_threads_with_their_own_graphs(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    x, v0 = x.detach(), v0.detach()
    expected = grad(loss_of(*unroll(cell, x, v0)), cell.weight)
    run_in_threads(lambda: torch.testing.assert_close(grad(loss_of(*unroll(cell, x, v0)), cell.weight), expected))


def test_threads_on_one_retained_graph(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    loss = loss_of(*unroll(cell, x, v0))
    expected = grad(loss, cell.weight, x, retain_graph=True)
    run_in_threads(lambda: torch.testing.assert_close(grad(loss, cell.weight, x, retain_graph=True), expected))


@pytest.mark.usefixtures("no_collector")
def test_the_last_reference_dies_in_a_thread(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    before = len(ToyTape.alive)
    for _ in range(30):
        thread = threading.Thread(target=loss_of(*unroll(cell, x, v0)).backward, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    del thread
    assert len(ToyTape.alive) == before


def test_reentrant_backward_in_a_tape(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    w, out = torch.ones((), dtype=FLOAT, requires_grad=True), torch.ones((), dtype=FLOAT)
    tasks: list[int] = []

    def tape(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor]:
        tasks.append(node.task_id())
        with torch.enable_grad():
            inner = grad(loss_of(*unroll(cell, x, v0)), cell.weight)[0]
        tasks.append(node.task_id())
        return [grads[0] * inner.sum()]

    node.create(tape, [w], [out])
    out.backward()
    torch.testing.assert_close(w.grad, grad(loss_of(*unroll(cell, x, v0)), cell.weight)[0].sum())
    assert tasks[0] == tasks[1] >= 0


def test_a_forked_child_may_drop_a_node(cell: ToyCell, x: Tensor, v0: Tensor) -> None:
    outputs = unroll(cell, x, v0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of threads
        child = os.fork()
    if child == 0:
        del outputs
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    loss_of(*outputs).backward()
    assert cell.weight.grad.abs().sum() > 0


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


AT_EXIT = """
import sys, torch
from toy_cell import *
cell, x, v0 = ToyCell(4, 6), torch.randn(5, 3, 4, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64)
outputs = unroll(cell, x, v0)
if sys.argv[1] == "alive":
    sys.modules["kept until the very end"] = torch.kept = outputs
elif sys.argv[1] == "exit in the tape":
    node.tape_of(outputs[0][0]).error = SystemExit(0)
    loss_of(*outputs).backward()
    sys.exit("backward returned")
"""


def test_the_interpreter_exits_cleanly() -> None:
    children = [python(AT_EXIT, how) for how in ("alive", "exit in the tape")]
    for child in children:
        output, _ = child.communicate(timeout=120)
        assert child.returncode == 0, output


DDP = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy_cell import *

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = ToyCell(4, 6), ToyCell(6, 2)
        self.unused = nn.Parameter(torch.zeros(3))
    def forward(self, x):
        v, w, spikes = x.new_zeros(x.shape[1], 6), x.new_zeros(x.shape[1], 2), []
        for step in x:
            s, v = self.first(step, v)
            s, w = self.second(s, w)
            spikes.append(s)
        return torch.stack(spikes)

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(7)
batches = torch.randn(2, 5, 3, 4, dtype=torch.float64)
plain = Net()
plain.first.fused = plain.second.fused = False
sum(plain(batch).square().sum() / 2 for batch in batches).backward()
expected = [plain.first.weight.grad, plain.second.weight.grad]
for options in ({}, {"bucket_cap_mb": 1e-5}):
    net = DistributedDataParallel(Net(), find_unused_parameters=True, **options)
    cells = [net.module.first, net.module.second]
    for iteration in range(2):
        net.zero_grad()
        net(batches[rank]).square().sum().backward()
        torch.testing.assert_close([cell.weight.grad for cell in cells], expected)
        assert [cell.created for cell in cells] == [iteration + 1] * 2
    with net.no_sync():
        net(batches[rank]).square().sum().backward()
dist.destroy_process_group()
print("agreed")
"""


def test_distributed_data_parallel(tmp_path: Path) -> None:
    ranks = [python(DDP, str(rank), str(tmp_path / "store")) for rank in range(2)]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0 and "agreed" in output, output
