"""The benchmark of whole networks: its peers, its accounts, its sweeps, and how two results are compared."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import bench
from snn_sparse_backend.bench import peers, runner, variants
from snn_sparse_backend.bench.cases import PEERS, PRESETS, Case, sweep_cases
from snn_sparse_backend.bench.networks import Net, linear_layers
from snn_sparse_backend.bench.peak import PeakError, peak_of
from snn_sparse_backend.cli import main

CPU = torch.device("cpu")
PNG = b"\x89PNG\r\n\x1a\n"
TINY = Case("snntorch", (30, 40, 10), 10, 4, rounds=1, compiled=())
OTHERS = ("spikingjelly", "sinabs")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert not sparse.config.libraries and sparse.config.defaults == sparse.Options()


def figures(case: Case) -> dict[str, Any]:
    return runner.run_case(case, 0.0, CPU).as_dict()


def names(case: dict[str, Any]) -> list[str]:
    return [variant["name"] for variant in case["variants"]]


# ------------------------------------------------------------------------------------------------------- recurrence


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_a_recurrent_layer(library: str) -> None:
    pytest.importorskip(library)
    case = figures(replace(TINY, library=library, recurrent=True))
    assert "30-40r-10" in case["name"] and len(case["hidden"]) == 1
    assert all(0.01 < layer["spike_rate"] < 0.05 for layer in case["hidden"])
    for variant in case["variants"]:
        if variant["fused"]:
            assert {"recurrent_gradient_dense", "recurrent_gradient_sparse"} & variant["counts"].keys()
            assert "cutoff" in variant["name"] or variant["gradient_difference"] < 1e-4
    counts = case["variants"][-1]["counts"]
    assert counts["recurrent_gradient_sparse"]
    assert counts["lane_steps"] > 30 if library == "snntorch" else counts["recurrent_sparse"]  # of 40 steps of layers


# ------------------------------------------------------------------------------------------------------ a whole run


def test_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("norse")
    assert main(["bench", "--preset", "quick", "--out", str(tmp_path), "--compile-seconds", "0", "--threads", "1"]) == 0
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("bench.png", "memory.png"))
    results = json.loads((tmp_path / "bench.json").read_text())
    assert {"date", "cpu", "threads", "torch", "snntorch", "python", "device", *OTHERS} <= results["environment"].keys()
    assert results["environment"]["threads"] == 1
    assert [case["library"] for case in results["cases"]] == ["snntorch", "norse"]
    for case in results["cases"]:
        assert all(0.01 < layer["spike_rate"] < 0.05 for layer in case["hidden"])
        assert all(0 < layer["active_fraction"] < 0.5 for layer in case["hidden"])
        assert case["gemm_floor_ms"]["step"] > 0 and results["environment"]["gpu"] is None
        for variant in case["variants"]:
            assert variant["fused"] == bool(variant["counts"].get("neuron_steps")) == (variant["kind"] == "fused")
            assert variant["forward_ms"] > 0 and variant["backward_ms"] > 0 and variant["saved_mib"] > 0
            assert variant["bytes_per_site"] == pytest.approx(variant["saved_mib"] * 2**20 / case["sites"])
            by_layer = variant["saved_by_layer"]
            assert list(by_layer) == ["layer 1", "layer 2", "layer 3", "outside the layers"]
            assert sum(by_layer.values()) == sum(variant["saved_bytes"].values())
            assert all(by_layer[f"layer {i}"] > 3 * by_layer["outside the layers"] for i in (1, 2, 3))
            exact = "cutoff" not in variant["name"]
            if variant["same_maths"]:
                assert variant["gradient_difference"] < 1e-4 if exact else variant["gradient_difference"] < 2
            else:
                assert variant["gradient_difference"] is None
        dense = next(v for v in case["variants"] if v["name"] == "fused, dense products")
        assert not any("sparse" in product for product in dense["counts"])
        best = case["variants"][-1]
        assert all(best["counts"][f"{product}_sparse"] for product in ("weight_gradient", "input_gradient", "forward"))
        assert best["workspace_mib"] > 0 and all(v["workspace_mib"] == 0 for v in case["variants"] if not v["fused"])
    everyone = set(names(results["cases"][0])) | {remark.partition(":")[0] for remark in results["cases"][0]["remarks"]}
    assert everyone > set(PEERS)
    said = capsys.readouterr().out
    assert "not tried" in said and "bench.json" in said and "outside the layers" in said


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in (*OTHERS, "norse") else object())
    case = figures(replace(TINY, peers=PEERS))
    assert [name for name in names(case) if name in PEERS] == [
        "snnTorch, layer by layer", "dense layer, indexed", "dense layer, unbind"]
    assert len(case["remarks"]) == 4 and "sinabs: left out, sinabs is not installed" in case["remarks"]


def test_peers_of_one_layer_and_of_the_convolutional_network() -> None:
    given = tuple(peer.name for peer in peers.BY_NAME.values() if peer.installed)
    layer = figures(Case("snntorch", (40, 40), 10, 4, rounds=1, layer=True, compiled=(), peers=given))
    assert set(given) < set(names(layer))
    conv = next(case for case in PRESETS["cpu"] if case.conv)
    tiny = figures(replace(conv, steps=3, batch=2, rounds=1, peers=given, peak=False))
    assert set(given) < set(names(tiny)) and tiny["gemm_floor_ms"]["backward"] > 0
    for case in (layer, tiny):
        for v in case["variants"]:
            assert v["gradient_difference"] is None or "cutoff" in v["name"] or v["gradient_difference"] < 1e-4


def stepped(currents: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Spikes and membranes of a neuron that resets within the step, step by step."""
    membrane, spikes, membranes = torch.zeros_like(currents[0]), [], []
    for current in currents:
        membrane = beta * membrane + current
        spikes.append((membrane >= 1.0).float())
        membrane = membrane - spikes[-1]
        membranes.append(membrane)
    return torch.stack(spikes), torch.stack(membranes)


@pytest.mark.parametrize("name", ["SpikingJelly multi-step", "sinabs"])
def test_other_dynamics_have_the_same_leak_and_reset(name: str) -> None:
    peer = peers.BY_NAME[name]
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    torch.manual_seed(0)
    case = replace(TINY, sizes=(30, 40), layer=True)
    net = peer.make(linear_layers(case.sizes), case)
    x = 2 * torch.rand(12, 4, 30)

    def spikes() -> Tensor:
        out = net(x.transpose(0, 1) if net.batch_first else x)
        return out.transpose(0, 1) if net.batch_first else out

    with torch.no_grad():
        net.synapses[0].weight *= 4  # type: ignore[operator]
        found = spikes()
        expected, _ = stepped(net.synapses[0](x), case.beta)
        assert 0.05 < expected.mean() < 0.9 and torch.equal(found, expected)
        assert torch.equal(spikes(), expected)  # nothing is left over from the call before
    assert all(p.grad is None for p in net.parameters())
    spikes().sum().backward()
    trained = [n for n, p in net.named_parameters() if p.grad is not None]
    assert len(trained) == 2 and all("synapses" in n for n in trained)


def test_what_is_quadratic_runs_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(TINY, rounds=2, peers=("dense layer, indexed", "dense layer, unbind"))
    monkeypatch.setattr(variants, "_LONG", 5)
    found = {v["name"]: v for v in figures(case)["variants"]}
    assert len(found["dense layer, indexed"]["rounds_ms"]) == 1 and len(found["dense layer, unbind"]["rounds_ms"]) == 2
    assert found["dense layer, indexed"]["gradient_difference"] < 1e-4
    monkeypatch.setattr(variants, "TOO_SLOW_SECONDS", 0.0)
    without = figures(case)
    assert "dense layer, indexed" not in names(without) and "dense layer, unbind" in names(without)
    assert "quadratic" in without["remarks"][0]
    pytest.importorskip("norse")
    assert names(figures(replace(case, library="norse", peers=())))[0] == "Norse sequence"  # the baseline stays


# ------------------------------------------------------------------------------------------------------ memory


class Product(Net):
    """A synapse whose output and input are both multiplied: two tensors are kept, by one layer."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList([nn.Linear(5, 7)]))
        self.neurons = nn.ModuleList([nn.Sigmoid()])

    def forward(self, x: Tensor) -> Tensor:
        return self.neurons[0](self.synapses[0](x)).exp().sum()


def test_bytes_belong_to_the_layer_that_saves_them() -> None:
    net, x = Product(), torch.rand(3, 5)
    kept = variants.host_kept(net, lambda: net(x), [])
    assert kept.by_layer == {"layer 1": 4 * (15 + 21), "outside the layers": 4 * 21} and kept.total == 4 * 57
    assert variants.host_kept(net, lambda: net(x), [x]).by_layer["layer 1"] == 4 * 21


def test_fused_layers_keep_what_they_and_their_synapses_need() -> None:
    steps = 8  # as many as the first storage of rasters holds
    case = figures(replace(TINY, sizes=(30, 200, 10), steps=steps, peers=()))
    exact = next(v for v in case["variants"] if v["name"] == variants.DEFAULT)["saved_by_layer"]
    # A membrane a site, and a bit of what is multiplied; spikes of the last layer are kept by itself.
    rows, words = steps * 4, {n: (n + 63) // 64 * 8 for n in (30, 200, 10)}
    assert exact["layer 1"] == pytest.approx(rows * (4 * 200 + words[30]), rel=0.02)
    assert exact["layer 2"] == pytest.approx(rows * (4 * 10 + words[200] + words[10]), rel=0.05)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_of_resident_memory() -> None:
    case = Case("snntorch", (50, 600, 10), 64, 64, rounds=1, compiled=())
    stock = peak_of(case, "snnTorch", [4.0], 1)
    kept = 2 * 4 * case.sites  # a membrane a site, and a spike a site that is multiplied
    assert 0.7 * kept < stock < 6 * kept
    assert peak_of(case, "cutoff 0.2, sparse forward", [4.0], 1) < stock


def test_a_process_without_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nStopIteration\n")
    monkeypatch.setattr(subprocess, "run", lambda *rest, **options: failed)
    with pytest.raises(PeakError, match="StopIteration"):
        peak_of(TINY, "no such variant", [4.0], 1)


def test_a_peak_that_cannot_be_measured_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*rest: Any) -> int:
        raise PeakError("no luck")

    monkeypatch.setattr(runner, "peak_of", fails)
    case = figures(replace(TINY, peak=True))
    assert len(case["remarks"]) == len(case["variants"]) and "no luck" in case["remarks"][0]
    assert all(v["peak_rss_mib"] is None for v in case["variants"])


def test_a_case_goes_through_json() -> None:
    for case in PRESETS["cpu"]:
        assert Case.from_json(case.as_json()) == case


# ------------------------------------------------------------------------------------------------------ sweeps, threads


@pytest.mark.parametrize("sweep", bench.SWEEPS)
def test_sweeps(sweep: str, tmp_path: Path) -> None:
    assert main(["bench", "--sweep", sweep, "--preset", "quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"sweep-{sweep}.json").read_text())
    assert (tmp_path / f"sweep-{sweep}.png").read_bytes().startswith(PNG)
    values = [case["value"] for case in results["cases"]]
    assert len(values) == 2 and values[0] < values[1] and results["sweep"] == sweep
    low, high = results["cases"]
    assert low["name"] != high["name"] and names(low) == names(high) == ["snnTorch", *variants.OPTIONS]
    if sweep == "density":
        assert low["hidden"][1]["spike_rate"] < 0.04 and 0.06 < high["hidden"][1]["spike_rate"] < 0.15
    else:
        key = {"steps": "T", "batch": "B"}.get(sweep)
        assert values == [case[key] if key else case["sizes"][1] for case in results["cases"]]


def test_a_sweep_that_is_none() -> None:
    with pytest.raises(ValueError, match="density"):
        sweep_cases("colour")
    with pytest.raises(SystemExit):
        main(["bench", "--sweep", "colour"])


def test_each_number_of_threads_has_a_process_of_its_own(tmp_path: Path) -> None:
    arguments = ["--preset", "quick", "--sweep", "batch", "--out", str(tmp_path), "--seconds", "100"]
    assert main(["bench", "--threads", "2", "1", *arguments]) == 0
    runs = json.loads((tmp_path / "sweep-batch.json").read_text())["runs"]
    assert [run["environment"]["threads"] for run in runs] == [2, 1]
    assert (tmp_path / "threads-2" / "sweep-batch.png").exists()


def test_only_some_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["bench", "--preset", "quick", "--out", str(tmp_path), "--compile-seconds", "0"]
    assert main([*quick, "--only", "4096"]) == 2
    assert "leave none of\n  snntorch 50-" in capsys.readouterr().err
    assert main([*quick, "--only", "snntorch 50-"]) == 0
    assert [case["library"] for case in json.loads((tmp_path / "bench.json").read_text())["cases"]] == ["snntorch"]


def test_a_process_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["bench", "--threads", "1", "2", "--library", "norse", "--only", "2048", "--out", str(tmp_path)]) == 2
    assert len(commands) == 1 and commands[0][commands[0].index("--library") + 1] == "norse"
    assert commands[0][commands[0].index("--only") + 1] == "2048"
    assert "1 thread(s) ended with code 2" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ comparing


def result(speedup: float = 8.0, kept: float = 20.0, name: str = "net", **extra: Any) -> dict[str, Any]:
    host = {"name": "snnTorch", "fused": False, "speedup_step": 1.0, "speedup_backward": 1.0, "saved_ratio": 1.0}
    ours = {"name": "cutoff", "fused": True, "speedup_step": speedup, "speedup_backward": 9.0, "saved_ratio": kept}
    return {"environment": {"gpu": None, "threads": 1}, "cases": [{"name": name, "variants": [host, ours]}], **extra}


def compare(tmp_path: Path, old: Any, new: Any) -> int:
    for name, what in (("old.json", old), ("new.json", new)):
        (tmp_path / name).write_text(what if isinstance(what, str) else json.dumps(what))
    return main(["bench-compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])


@pytest.mark.parametrize("new,code,said", [
    (result(), 0, "0 fell"),
    (result(speedup=7.3), 0, "0 fell"),
    (result(speedup=12.0), 0, "1 rose"),
    (result(speedup=7.1), 1, "FELL"),
    (result(kept=10.0), 1, "FELL"),
    (result(speedup=7.1, kept=10.0), 1, "2 fell"),
    ({"runs": [result()]}, 0, "3 ratios"),
])
def test_compare(new: Any, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, result(), new) == code
    assert said in capsys.readouterr().out


def test_compare_tells_threads_and_cases_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = result(speedup=4.0)
    two["environment"]["threads"] = 2
    both = {"runs": [result(), two]}
    assert compare(tmp_path, both, both) == 0 and "6 ratios" in capsys.readouterr().out
    more = copy.deepcopy(both)
    more["runs"][0]["cases"] += result(name="another")["cases"]
    assert compare(tmp_path, both, more) == 0 and "only in" in capsys.readouterr().out
    assert compare(tmp_path, more, both) == 0  # a case may be left out
    lost = copy.deepcopy(both)
    lost["runs"][1]["cases"][0]["variants"][1]["saved_ratio"] = None
    assert compare(tmp_path, both, lost) == 1 and "net, 2 thread(s): cutoff: kept ratio" in capsys.readouterr().out


@pytest.mark.parametrize("new,said", [
    ("{", "is no JSON"), ("[1]", "no result of the benchmark"), ({"runs": []}, "no result of the benchmark"),
    ({"kernels": []}, "no result of the benchmark"), (result(name="other"), "share no case"),
    ({"environment": {}, "cases": []}, "no result of the benchmark"),
    ({"environment": {"gpu": None, "threads": 1}, "cases": [{"name": "net"}]}, "no result of the benchmark"),
])
def test_compare_with_a_file_that_is_something_else(new: Any, said: str, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(tmp_path, result(), new) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_compare_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench-compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
