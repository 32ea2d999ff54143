"""Counts that come back from CUDA kernels some time later, and the arenas of membranes that depend on them.

The kernels run on the CPU (see cuda_host/), where a report is in as soon as a call returns; `reports_missed` lets the
host learn of it later, or never.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from comparisons import MODELS, SURROGATES, Case, cuda_on_host, identical, make_case, same, values_in_order
from cuda_builds import cuda_on_host_library
from oracle import Net, Side

from snn_sparse_backend import kernels, native, reports, scans
from snn_sparse_backend.abi import CONSTANTS
from snn_sparse_backend.config import Options
from snn_sparse_backend.recorder import Block, Plan, Recorder
from snn_sparse_backend.reports import Counter, Densities, Slots
from snn_sparse_backend.stores import ARENA_STEPS, DeviceStore
from snn_sparse_backend.surrogate import Surrogate

CPU = torch.device("cpu")
LAYERS = 2  # of oracle.Net


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[ctypes.CDLL]:
    with cuda_on_host(cuda_on_host_library()) as library:
        yield library


@contextmanager
def reports_missed(launches: float = math.inf) -> Iterator[None]:
    """Until so many launches were made, the host finds no report where it looks for one."""
    read, until = Slots.read, reports._slots(False)._last + launches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slots, "read", lambda slots, launch: read(slots, launch) if slots._last >= until else None)
        yield


@pytest.fixture
def four_slots(monkeypatch: pytest.MonkeyPatch) -> Slots:
    monkeypatch.setattr(reports, "_SLOTS", 4)
    slots = Slots(pinned=False)
    monkeypatch.setattr(reports, "_slots", lambda pinned: slots)
    return slots


def pack(ones: int, report: Any) -> None:
    """A kernel that counts so many ones."""
    dense, words = torch.ones(1, ones), torch.empty((1, ones), dtype=torch.int64)
    native.call("raster_pack", "SnnRasterPack", CPU, dense=dense, rows=1, cols=ones, row_stride=ones, words=words,
                dtype=0, report=report)


# ---- counters --------------------------------------------------------------------------------------------------------


def test_counts_of_several_launches() -> None:
    counter = Counter(CPU)
    for ones in (7, 600, 1):
        kernels.nonzero(torch.ones(1, ones), counter)
    assert (counter.known, counter.done, counter.started, counter.settled) == ((0, 0), 0, 608, False)
    counter.look()
    assert (counter.known, counter.done, counter.started, counter.settled) == ((0, 608), 608, 608, True)
    assert counter.counts.tolist() == [0, 608]


def test_only_reports_that_are_in_are_taken() -> None:
    counter = Counter(CPU)
    first, second, third = (counter.launch(10) for _ in range(3))
    pack(3, first)
    counter.look()
    assert (counter.known, counter.done, counter.settled) == ((0, 3), 10, False)
    counter.look()
    assert (counter.known, counter.done) == ((0, 3), 10)
    pack(4, second)
    pack(5, third)
    counter.look()
    assert (counter.known, counter.done, counter.settled) == ((0, 12), 30, True)


def test_half_a_report_is_none(four_slots: Slots) -> None:
    counter = Counter(CPU)
    report = counter.launch(1)
    at = 2 * (four_slots._last % 4)
    for word in (0, 1):
        counter.look()
        assert not counter.settled
        four_slots._words[at + word] = report.tag << CONSTANTS["kReportBits"] | 20 + word
    counter.look()
    assert counter.settled and counter.known == (20, 21)


def test_an_overwritten_report_is_not_waited_for(four_slots: Slots) -> None:
    mine, others = Counter(CPU), Counter(CPU)
    pack(3, mine.launch(10))
    for _ in range(3):
        pack(1, others.launch(1))
    lost = four_slots.place(1)
    assert others.launch(1).slot == lost[0]
    with reports_missed():
        mine.look()
    assert (mine.known, mine.done, mine.settled) == ((0, 0), 0, True)
    pack(4, mine.launch(10))  # counts run on, so that the next report tells of both
    mine.look()
    assert (mine.known, mine.done, mine.settled) == ((0, 7), 20, True)


def test_a_late_report_with_an_old_tag_is_ignored(four_slots: Slots) -> None:
    early, late = Counter(CPU), Counter(CPU)
    delayed = early.launch(10)
    for _ in range(3):
        late.launch(1)
    last = late.launch(1)
    assert (last.slot, last.tag) == (delayed.slot, delayed.tag + 1)
    pack(3, delayed)
    late._pending = type(late._pending)([late._pending[-1]])
    late.look()
    assert not late.settled and late.known == (0, 0)
    pack(5, last)
    late.look()
    early.look()
    assert late.settled and late.known == (0, 5)
    assert early.settled and early.known == (0, 0)


def test_captured_launches_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their slot would be written again whenever the graph is replayed."""
    counter = Counter(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(reports, "capturing", lambda device: True)
        report = counter.launch(10)
    assert not report.slot and counter.settled and counter.started == 10
    pack(3, report)
    counter.look()
    assert (counter.known, counter.done) == ((0, 0), 0)
    pack(4, counter.launch(10))
    counter.look()
    assert (counter.known, counter.done) == ((0, 7), 20)


def test_densities_are_those_of_the_last_report() -> None:
    densities, counters = Densities(), [Counter(CPU) for _ in range(3)]
    assert (densities.look().active, densities.look().spikes) == (None, None)
    for counter in counters:
        densities.watch(counter)
    pack(3, counters[0].launch(10))
    delayed = counters[2].launch(20)
    assert densities.look().spikes == 0.3 and densities.active == 0
    pack(5, delayed)
    assert densities.look().spikes == 0.25
    assert densities._watched == []


def test_a_counter_is_watched_once() -> None:
    """However many launches of a sequence are outstanding, there is room to watch the next one."""
    densities, busy, other = Densities(), Counter(CPU), Counter(CPU)
    for _ in range(20):
        busy.launch(10)
        densities.watch(busy)
    report = other.launch(20)
    densities.watch(other)
    pack(5, report)
    assert densities.look().spikes == 0.25


# ---- arenas ----------------------------------------------------------------------------------------------------------


def sequence(steps: int, dtype: torch.dtype = torch.float64) -> Case:
    """A layer of which about one site in twenty is active."""
    return make_case(MODELS["subtract"], SURROGATES[1].within(0.05), steps, 6, 200, dtype, 0)


def recorder(case: Case, densities: Densities | None = None) -> Recorder:
    options = Options(cutoff=0.05)
    plan = Plan(case.model, case.surrogate, options, (), lambda: (), densities=densities or Densities())
    return Recorder(plan, case.layer(), set())


def record(case: Case, by: Recorder, inputs: torch.Tensor | None = None) -> list[Block]:
    """The blocks of the steps, or of some of them, run one by one; the case goes on from there."""
    blocks = []
    for x in case.inputs if inputs is None else inputs:
        result = by.run(x, case.states, None, False, first=not blocks)
        blocks.append(result.block)
        case.states = result.finals
    return blocks


def store_of(by: Recorder) -> DeviceStore:
    assert isinstance(by.store, DeviceStore)
    return by.store


def arenas(blocks: list[Block]) -> list[torch.Tensor]:
    return list({id(b.values[0][0]): b.values[0][0] for b in blocks}.values())


def contents(arena: torch.Tensor) -> torch.Tensor:
    """What is in its memory, which may have shrunk."""
    return torch.empty(0, dtype=arena.dtype).set_(arena.untyped_storage())


def values(blocks: list[Block], case: Case) -> list[torch.Tensor]:
    """The membranes that were stored, step by step."""
    return [values_in_order(b.active.words, b.offsets.words[0], contents(b.values[0][0]))
            for b in blocks if b.active is not None and b.offsets is not None]


def expected_values(steps: int) -> list[torch.Tensor]:
    """The same, from membranes that were stored whole."""
    case, by = sequence(steps), recorder(sequence(steps))
    by.keep_membrane = True
    return [b.membrane[kernels.unpack(b.active, torch.float64).bool()] for b in record(case, by)
            if b.membrane is not None and b.active is not None]


def test_arenas_are_used_on_when_reports_come_in() -> None:
    steps = 8 * ARENA_STEPS
    expected = expected_values(steps)
    assert 0 < sum(map(len, expected)) < 7 * 1200
    for missed, number in ((0, 1), (math.inf, 8)):
        case = sequence(steps)
        with reports_missed(missed):
            blocks = record(case, recorder(case))
            found = values(blocks, case)
        assert len(arenas(blocks)) == number
        for actual, right in zip(found, expected, strict=True):
            same(actual, right)


def test_full_arenas_shrink_when_their_reports_are_in() -> None:
    steps = 4 * ARENA_STEPS
    case, expected = sequence(steps), expected_values(steps)
    by = recorder(case)
    with reports_missed():
        blocks = record(case, by, case.inputs[: 3 * ARENA_STEPS])
        size = ARENA_STEPS * 1200 * 8
        assert [a.untyped_storage().nbytes() for a in arenas(blocks)] == [size] * 3
        assert len(store_of(by)._full) == 2
    blocks += record(case, by, case.inputs[3 * ARENA_STEPS :])  # looks, because the third one seems to be full
    assert len(arenas(blocks)) == 3 and store_of(by)._full == []
    steps_of = ((0, ARENA_STEPS), (ARENA_STEPS, 2 * ARENA_STEPS))
    kept = [sum(map(len, expected[first:last])) * 8 for first, last in steps_of]
    assert [a.untyped_storage().nbytes() for a in arenas(blocks)] == [*kept, size]
    for actual, right in zip(values(blocks, case), expected, strict=True):
        same(actual, right)


def test_a_sequence_that_is_longer_than_an_arena_gets_one_of_its_own() -> None:
    case = sequence(3 * ARENA_STEPS)
    by = recorder(case)
    block = by.run(case.inputs, case.states, 3 * ARENA_STEPS, False, first=True).block
    ((arena, places),) = block.values
    assert places == [0] * 3 * ARENA_STEPS
    assert arena.numel() == 3 * ARENA_STEPS * 1200 and block.offsets is not None and block.active is not None
    active = block.active.words.view(3 * ARENA_STEPS, 6, -1)
    for step, right in enumerate(expected_values(3 * ARENA_STEPS)):
        same(values_in_order(active[step], block.offsets.words[step], arena), right)


def test_dense_layers_store_the_whole_membrane_once_that_is_known() -> None:
    densities = Densities()
    surrogate = Surrogate("FastSigmoid", 25.0).within(5.0)
    for missed, dense in ((math.inf, False), (math.inf, False), (0, True)):
        case = make_case(MODELS["subtract"], surrogate, 1, 6, 200, torch.float64, 0)
        with reports_missed(missed):
            by = recorder(case, densities)
            (block,) = record(case, by)
            assert (block.membrane is not None) == dense and bool(block.values) != dense
    assert densities.look().active is not None and densities.look().active > 0.9


# ---- gradients -------------------------------------------------------------------------------------------------------


def backward(case: Case, blocks: list[Block], grads: torch.Tensor) -> list[torch.Tensor]:
    steps, layer = len(blocks), case.layer()
    grad_input, grad_state = torch.empty_like(case.inputs), layer.empty()
    tables: dict[str, Any] = {name: scans.pointer_table(getattr(b, name).address for b in blocks)
                              for name in ("raster", "active", "offsets")}
    tables["values"] = scans.pointer_table(arena.data_ptr() for b in blocks for arena, _ in b.values)
    scans.neuron_backward(layer, steps, grad_input=grad_input, grad_state_in=[grad_state], grad_parameters=[None] * 3,
                          grad_states=[None], state_in=[None], **tables,
                          grad_output=scans.pointer_table(scans.step_pointers(grads, steps)))
    return [grad_input, grad_state]


def test_gradients_do_not_depend_on_when_reports_come_in() -> None:
    steps = 5 * ARENA_STEPS
    torch.manual_seed(1)
    grads, found = torch.randn(steps, 6, 200, dtype=torch.float64), []
    for late, used, shrunk in ((0, 1, 0), (1, 1, 0), (3 * ARENA_STEPS, 3, 2), (steps, 5, 0)):
        case = sequence(steps)
        with reports_missed(late):
            blocks = record(case, recorder(case))
        sizes = [arena.untyped_storage().nbytes() for arena in arenas(blocks)]
        assert len(sizes) == used and sum(size < max(sizes) / 10 for size in sizes) == shrunk
        found.append(backward(case, blocks, grads))
        assert found[-1][0].count_nonzero() > 1000
    for gradients in found[1:]:
        identical(gradients, found[0])


@pytest.mark.parametrize("missed", [0, 2 * LAYERS * ARENA_STEPS, math.inf])
@pytest.mark.parametrize("options", [{}, {"learn_beta": False}], ids=["learned", "fixed"])
def test_models_train_right_whenever_reports_come_in(missed: float, options: dict[str, Any]) -> None:
    """Two sequences of a snnTorch model, the second of which may use what the first one taught about densities."""
    def program(side: Side) -> None:
        net, frames = Net(side, **options), oracle.frames(7 * ARENA_STEPS)
        for name in ("first.", "second."):
            net.zero_grad()
            oracle.train(side, net, net(frames), name)

    with oracle.precision(torch.float64), reports_missed(missed):
        backend = oracle.assert_same(program, synapses=True, cutoff=0.3, crossover=0.05)
    # More sites than one in twenty are active; as long as that is not known, products are sparse.
    assert backend.counts["input_gradient_sparse"] == (2 if missed == math.inf else 0)
