"""Which products run event by event: the crossovers, what is measured and kept of them, and who asks for them."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snntorch as snn
import torch
from snn_sparse_backend.compat import precision
from torch import nn

import snn_sparse_backend as sparse
from snn_sparse_backend import crossovers, kernels, tune
from snn_sparse_backend.cli import main
from snn_sparse_backend.crossover_defaults import DEFAULTS
from snn_sparse_backend.crossovers import PRODUCTS, Crossover, Table, density, this_machine

MANY = 1 << 40
TABLE: Table = {
    "forward": Crossover(((10, 0.05), (1000, 0.4)), 0.0, 0.0),
    "weight_gradient": Crossover(((10, 0.0), (100, 0.3)), 100.0, 0.0),
    "input_gradient": Crossover(((64, 0.2),), 0.0, 1e6),
}


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for what is measured, and what this process remembers of it dropped."""
    monkeypatch.setenv("SNN_SPARSE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(crossovers, "density", density)
    before = torch.get_num_threads()
    crossovers.forget()
    yield tmp_path / "config" / "crossovers.json"
    torch.set_num_threads(before)
    crossovers.forget()


# -------------------------------------------------------------------------------------------------- crossovers


def test_between_the_measured_numbers_of_outputs_it_is_interpolated_and_beyond_them_it_stays() -> None:
    forward = TABLE["forward"]
    assert [forward.density(MANY, 1, outputs) for outputs in (1, 10, 1000, 5000)] == [0.05, 0.05, 0.4, 0.4]
    assert forward.density(MANY, 1, 100) == pytest.approx((0.05 * 0.4) ** 0.5)
    rising = [forward.density(MANY, 1, outputs) for outputs in range(10, 1001, 30)]
    assert rising == sorted(set(rising))
    zero = [TABLE["weight_gradient"].density(MANY, 1, outputs) for outputs in (10, 50, 100)]
    assert zero == pytest.approx([0, 0, 0.3])
    one = [TABLE["input_gradient"].density(MANY, 1, outputs) for outputs in (1, 64, 65)]
    assert one == pytest.approx([0.2, 0.2, 0.2])


def test_few_rows_and_small_products_take_their_share() -> None:
    by_rows, by_size = TABLE["weight_gradient"], TABLE["input_gradient"]
    assert [by_rows.density(rows, 50, 100) for rows in (1, 100, 200, 10000)] == pytest.approx([0, 0, 0.15, 0.297])
    assert [by_size.density(rows, 100, 100) for rows in (0, 100, 200)] == pytest.approx([0, 0, 0.1])


@pytest.mark.parametrize("change", [
    {"by_outputs": ()}, {"by_outputs": ((10, 0.1), (10, 0.2))}, {"by_outputs": ((0, 0.1),)},
    {"by_outputs": ((1, 1.1),)}, {"by_outputs": ((1, float("nan")),)}, {"rows": -1.0}, {"rows": float("nan")},
    {"multiplications": -1.0},
], ids=str)
def test_what_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(TABLE["forward"], **change)


def test_there_are_built_in_values_for_every_instruction_set_and_any_number_of_threads() -> None:
    assert set(DEFAULTS) == {"baseline", "x86-64-v3", "x86-64-v4"}
    for name, by_threads in DEFAULTS.items():
        assert min(by_threads) == 1
        for threads in (1, 2, 3, 64):
            table = crossovers.default(f"{name} (in words)", threads)
            assert table.keys() == set(PRODUCTS)
            assert all(0.05 < found.density(MANY, 1, 1000) <= 1 for found in table.values())
        assert crossovers.default(name, 64) == crossovers.default(name, max(by_threads))


# ----------------------------------------------------------------------------------------------------- options


def test_an_explicit_crossover_stands_above_all() -> None:
    crossovers.store(TABLE)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for product in PRODUCTS:
        shape = (6400, 300, 200)
        assert sparse.Options().crossover_on(cpu, product, *shape) == TABLE[product].density(*shape)
        assert sparse.Options(crossover=0.77).crossover_on(cpu, product, *shape) == 0.77
        assert sparse.Options(crossover=0.77).crossover_on(cuda, product, *shape) == 0.77
        assert sparse.Options().crossover_on(cuda, product, *shape) == 0.1


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_both_ways_to_allow_a_narrower_format_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cuda() -> float:
        return sparse.Options().crossover_on(torch.device("cuda"), "forward", 1, 1, 1)

    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    try:
        matmul.allow_tf32 = True
        assert on_cuda() == 0.03
        matmul.allow_tf32 = False
        assert on_cuda() == 0.1
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):  # what torch says to the old question then
            _ = matmul.allow_tf32
        assert on_cuda() == 0.03 and precision.full_on_cpu()
    finally:
        matmul.fp32_precision = before
    assert on_cuda() == 0.1
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="bf16"))
    assert not precision.full_on_cpu()
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None)  # torch before 2.9
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert not precision.full_on_cpu()


class Net(nn.Module):
    """Linear, Leaky, Linear, Leaky."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(70, 90), nn.Linear(90, 40)
        with torch.no_grad():
            self.fc1.weight *= 5  # some spikes in every step
        self.lif1, self.lif2 = (snn.Leaky(0.9, spike_grad=snn.surrogate.fast_sigmoid(25)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        for x_t in x:
            spk, mem1 = self.lif1(self.fc1(x_t), mem1)
            _, mem2 = self.lif2(self.fc2(spk), mem2)
        return mem2.sum()


@pytest.mark.parametrize("paying", [(), *((product,) for product in PRODUCTS), PRODUCTS], ids=str)
def test_each_product_follows_its_own_crossover(paying: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[Any, ...]] = set()

    def answer(*question: Any) -> float:
        asked.add(question)
        return float(question[0] in paying)

    monkeypatch.setattr(crossovers, "density", answer)
    net, x = Net(), (torch.rand(6, 8, 70) < 0.2).float()
    with sparse.enabled("snntorch", cutoff=0.3, forward="sparse"):
        for _ in range(2):  # that the first Linear feeds a neuron is known from then on
            sparse.reset_counts()
            asked.clear()
            net(x).backward()
    for product in PRODUCTS[1:]:
        assert (sparse.counts[f"{product}_sparse"] > 0) == (product in paying), product
        assert (sparse.counts[f"{product}_dense"] > 0) == (product not in paying), product
    assert (sparse.counts["forward_sparse"] > 0) == ("forward" in paying)
    steps, rows = 6, 8
    assert {("weight_gradient", steps * rows, 70, 90), ("weight_gradient", steps * rows, 90, 40),
            ("input_gradient", steps * rows, 90, 40), ("forward", rows, 70, 90), ("forward", rows, 90, 40)} <= asked
    assert len(asked) == 5


# ----------------------------------------------------------------------------------------------- measured here


def test_what_is_measured_holds_for_this_machine_and_these_threads_only(nothing_measured: Path) -> None:
    torch.set_num_threads(1)
    built_in = crossovers.in_force()
    assert crossovers.measured() is None and "built in" in crossovers.source()
    asked = ("forward", 6400, 100, 100)
    assert density(*asked) == built_in["forward"].density(*asked[1:])
    assert crossovers.store(TABLE) == nothing_measured
    assert crossovers.in_force() == TABLE and str(nothing_measured) in crossovers.source()
    assert density(*asked) == TABLE["forward"].density(*asked[1:])

    torch.set_num_threads(2)
    assert crossovers.measured() is None
    other = {**TABLE, "forward": Crossover(((1, 0.9),), 0.0, 0.0)}
    crossovers.store(other)
    assert density(*asked) == 0.9
    torch.set_num_threads(1)
    assert crossovers.in_force() == TABLE and density(*asked) != 0.9  # kept
    assert {file.name for file in nothing_measured.parent.iterdir()} <= {"crossovers.json", "crossovers.lock"}


@pytest.mark.parametrize("part", ["cpu", "instruction_set", "torch"])
def test_what_another_machine_measured_is_not_used(nothing_measured: Path, part: str) -> None:
    crossovers.store(TABLE)
    content = json.loads(nothing_measured.read_text())
    content["entries"][0]["machine"][part] = "another"
    nothing_measured.write_text(json.dumps(content))
    crossovers.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert crossovers.measured() is None and crossovers.in_force() != TABLE
    crossovers.store(TABLE)
    assert len(json.loads(nothing_measured.read_text())["entries"]) == 2


def test_reset(nothing_measured: Path) -> None:
    assert not crossovers.reset()
    crossovers.store(TABLE)
    assert crossovers.reset() and not nothing_measured.exists()
    assert crossovers.measured() is None


def _entry(**changes: Any) -> dict[str, Any]:
    forward = {"by_outputs": [[10, 0.1]], "rows": 0, "multiplications": 0}
    machine = {"cpu": "x", "instruction_set": "y", "torch": "z", "threads": 1}
    return {"machine": machine, "crossovers": {**dict.fromkeys(PRODUCTS, forward), **changes}}


def _text(**entry: Any) -> str:
    return json.dumps({**_FORMAT, "entries": [{**_entry(), **entry}]})


def _forward(by_outputs: list[Any], rows: Any) -> str:
    return json.dumps({**_FORMAT, "entries": [
        _entry(forward={"by_outputs": by_outputs, "rows": rows, "multiplications": 0})]})


_FORMAT = {"format": "snn_sparse_backend crossovers 1"}
BROKEN = {
    "empty": "", "cut off": '{"format": "snn', "not text": b"\xff\xfe\x00", "a list": "[]", "foreign": '{"version": 3}',
    "later format": '{"format": "snn_sparse_backend crossovers 2", "entries": []}',
    "no entries": json.dumps(_FORMAT), "entries no list": json.dumps({**_FORMAT, "entries": 3}),
    "no machine": json.dumps({**_FORMAT, "entries": [{"crossovers": {}}]}),
    "unknown machine": _text(machine={"disk": 1}), "product missing": _text(crossovers={}),
    "no pairs": _forward([3], 0), "no density": _forward([[1, 7]], 0), "text for a number": _forward([[1, 0.1]], "few"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_file_is_ignored_with_one_warning_and_replaced_by_tune(
        name: str, nothing_measured: Path) -> None:
    content = BROKEN[name]
    nothing_measured.parent.mkdir()
    nothing_measured.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="measured crossovers are ignored: .*crossovers.json.* tune` replaces") as said:
        for outputs in (10, 20, 30):
            assert density("forward", 6400, 100, outputs) > 0
        torch.set_num_threads(3 - torch.get_num_threads() % 2)
        assert density("forward", 6400, 100, 10) > 0
    assert len(said) == 1
    crossovers.store(TABLE)
    assert crossovers.measured() == TABLE


def test_a_well_formed_file_is_no_broken_one(nothing_measured: Path) -> None:
    nothing_measured.parent.mkdir()
    nothing_measured.write_text(json.dumps({**_FORMAT, "entries": [_entry()]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert crossovers.measured() is None


# --------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("find", [tune.crossing, tune.confirmed_crossing])
@pytest.mark.parametrize("true_value", [0.0015, 0.05, 0.3, 0.9])
def test_the_crossing_is_found(true_value: float, find: Callable[..., float]) -> None:
    assert find(lambda share: share < true_value, 1e-3, 1.0) == pytest.approx(true_value, rel=0.06)
    assert find(lambda share: False, 1e-3, 1.0) == 0 and find(lambda share: True, 1e-3, 1.0) == 1


def test_what_is_not_found_again_is_looked_for_anew() -> None:
    first: list[int] = []

    def wins(share: float) -> bool:
        first.append(1)
        return share < (0.004 if len(first) < 9 else 0.3)  # disturbed while it was looked for at first

    assert tune.confirmed_crossing(wins, 1e-3, 1.0) == pytest.approx(0.3, rel=0.06)


@pytest.mark.parametrize("answers", [(True, False), (False, True)], ids=str)
def test_contradictions_are_an_error_and_keep_nothing(
        answers: tuple[bool, ...], nothing_measured: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    turn = itertools.cycle(answers)
    monkeypatch.setattr(tune, "_sparse_wins", lambda *_: next(turn))
    assert main(["tune"]) == 2
    said = capsys.readouterr().err
    assert re.search("the same measurement gave .*, then .*, never confirmed; is the machine busy", said)
    assert not nothing_measured.exists()


def test_a_race_takes_turns_and_keeps_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []

    def call(name: str, times: list[float]) -> Callable[[], None]:
        def run() -> None:
            now[0] += times.pop(0)
            order.append(name)

        return run

    monkeypatch.setattr(tune, "perf_counter", lambda: now[0])
    found = tune.race(call("a", [9, 5, 4, 3, 7]), call("b", [9, 2, 6, 6, 6]), rounds=3)
    assert found == [3, 2]
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"


def test_short_calls_run_several_times_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        now[0] += 1e-5

    monkeypatch.setattr(tune, "perf_counter", lambda: now[0])
    assert tune.race(call, rounds=2) == [pytest.approx(1e-5)]
    assert calls[0] >= 2 + 2 * 30


def test_the_constants_of_a_known_cost_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse: 3e5 multiplications' time in any case, and that of 50 rows, and 1/0.25 of a dense one per event."""

    def wins(layer: tune.Layer, product: str, share: float) -> bool:
        rows, inputs, outputs = layer.shape
        dense = rows * inputs * outputs
        limit = 0.25 if outputs > 50 else 0.02
        return 3e5 + 50 * inputs * outputs + dense * share / limit < dense

    monkeypatch.setattr(tune, "_sparse_wins", wins)
    monkeypatch.setattr(tune, "ROWS", 200000)  # many
    monkeypatch.setattr(tune, "Layer", lambda *shape: SimpleNamespace(shape=shape))
    parts: list[int] = []
    found = tune.crossover_of("forward", lambda: parts.append(1))
    assert len(parts) == tune.PARTS
    assert [found.density(MANY, 1, outputs) for outputs in (10, 32, 100, 320, 1000)] == pytest.approx(
        [0.02, 0.02, 0.25, 0.25, 0.25], rel=0.08)
    assert found.rows == pytest.approx(50, rel=0.1) and found.multiplications == pytest.approx(3e5, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("product", PRODUCTS)
def test_both_ways_that_are_timed_give_the_same(product: str, dtype: torch.dtype,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    layer, caught = tune.Layer(130, 90, 70, dtype), []
    pack = kernels.pack
    monkeypatch.setattr(kernels, "pack", lambda x: caught.append(x) or pack(x))
    ways = layer.ways(product, 0.3)
    found, expected = ways.sparse(), ways.dense()
    assert caught[0].mean() == pytest.approx(0.3, abs=0.03)
    if product == "input_gradient":
        expected = expected[caught[0] != 0]
    for a, b in zip(*((found, expected) if product == "weight_gradient" else ([found], [expected])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_the_chosen_way_follows_the_crossover(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tune.Layer(20, 30, 40)
    monkeypatch.setattr(crossovers, "density", lambda *question: {("forward", 20, 30, 40): limit}[question])
    assert layer.ways("forward", 0.5).choose() is (limit == 1.0)


# ------------------------------------------------------------------------------------------------ command line


def test_tune_measures_and_keeps_and_shows(nothing_measured: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tune, "measure", lambda: TABLE)
    assert main(["tune", "--threads", "1"]) == 0
    said = capsys.readouterr().out
    assert str(nothing_measured) in said and "weight gradient" in said and "40.0%" in said and "1 thread(s)" in said
    assert crossovers.measured() == TABLE
    assert main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == said
    assert main(["info"]) == 0
    assert "measured on this machine" in capsys.readouterr().out
    assert main(["tune", "--reset"]) == 0
    assert str(nothing_measured) in capsys.readouterr().out and not nothing_measured.exists()
    assert main(["tune", "--show"]) == 0
    assert "built in" in capsys.readouterr().out


def test_the_real_measurement_on_small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "ROWS", 64)
    monkeypatch.setattr(tune, "INPUTS", 40)
    monkeypatch.setattr(tune, "OUTPUTS", (10, 70))
    monkeypatch.setattr(tune, "_LARGE", (120, 120))
    monkeypatch.setattr(tune, "_MOST_ROWS", 8)
    monkeypatch.setattr(tune, "_HALVINGS", 1)
    monkeypatch.setattr(tune, "_TRIES", 1000)
    table = tune.measure()
    assert table.keys() == set(PRODUCTS)
    assert all([width for width, _ in found.by_outputs] == [10, 70] for found in table.values())


def test_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tune, "SWEEP_SHAPES", ((64, 40, 30),))
    monkeypatch.setattr(tune, "SWEEP_DENSITIES", (0.01, 1.0))
    out = tmp_path / "sweep.json"
    assert main(["tune", "--sweep", "--out", str(out)]) == 0
    said, content = capsys.readouterr().out, json.loads(out.read_text())
    assert "64x40x30" in said and "of 6 at 0.95 or better" in said
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert [(row["product"], row["density"]) for row in content["rows"]] == [
        (product, share) for product in PRODUCTS for share in (0.01, 1.0)]
    for row in content["rows"]:
        best = min(row["sparse_us"], row["dense_us"])
        assert best > 0 and row["ratio"] == pytest.approx(best / row[f"{row['chosen']}_us"]) and row["choosing_us"] > 0


@pytest.mark.parametrize("best", [0, 1, 2])
def test_defaults_are_printed_as_the_module_that_holds_them(
        best: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, asked = ["baseline (of all)", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)"], []

    def child(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        asked.append(env["MKL_ENABLE_INSTRUCTIONS"])
        ahead = capsys.readouterr().out
        tune.print_default(int(command[-1].split("print_default(")[1].rstrip(")")))
        mine = capsys.readouterr().out
        print(ahead, end="")
        return SimpleNamespace(stdout=mine)

    monkeypatch.setattr(subprocess, "run", child)
    monkeypatch.setattr(tune, "measure", lambda: TABLE)
    monkeypatch.setattr(tune, "instruction_set", lambda limit=2: names[min(limit, best)])
    assert main(["tune", "--defaults"]) == 0
    module = tmp_path / "defaults.py"
    module.write_text(capsys.readouterr().out)
    found = runpy.run_path(str(module))["DEFAULTS"]
    assert list(found) == ["baseline", "x86-64-v3", "x86-64-v4"][: best + 1] and found.keys() <= DEFAULTS.keys()
    assert asked == ["SSE4_2", "AVX2", "AVX512"][: best + 1]
    for by_threads in found.values():
        assert set(by_threads) == {1, 2}
        assert all(Crossover(*by_threads[n][product]) == TABLE[product] for n in (1, 2) for product in PRODUCTS)


def test_machine() -> None:
    torch.set_num_threads(1)
    here = this_machine()
    assert here.threads == 1 and here.torch == torch.__version__ and here.cpu and here.instruction_set
