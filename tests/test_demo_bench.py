"""The demo, the command line, and the accounting of memory that they and the benchmark rely on."""

from __future__ import annotations

import builtins
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend.bench.measure import NotFusedError, activities, counted, require_path, worst_difference
from snn_sparse_backend.cli import main
from snn_sparse_backend.memory import host_saved_bytes, layer_outputs, saved_by_kind, saved_bytes, tapes_of

T, B, SIZES = 8, 4, (70, 130, 10)  # T: as many steps as the first storage of rasters holds
FLOAT = 4
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    assert not sparse.config.libraries and sparse.config.defaults == sparse.Options()


# ------------------------------------------------------------------------------------------------------ memory


class Net(nn.Module):
    """Linear, Leaky, Linear, Leaky; ``between`` stands in front of the second Linear."""

    def __init__(self, between: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(SIZES[0], SIZES[1]), nn.Linear(SIZES[1], SIZES[2])
        self.lif1 = snn.Leaky(0.9, spike_grad=snn.surrogate.fast_sigmoid(25))
        self.lif2 = snn.Leaky(0.9, spike_grad=snn.surrogate.fast_sigmoid(25))
        self.between = between or nn.Identity()
        with torch.no_grad():
            self.fc1.weight *= 3

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, readout = self.lif1.reset_mem(), self.lif2.reset_mem(), []
        for x_t in x:
            spk, mem1 = self.lif1(self.fc1(x_t), mem1)
            _, mem2 = self.lif2(self.fc2(self.between(spk)), mem2)
            readout.append(mem2)
        return torch.stack(readout)


def batch() -> Tensor:
    return (torch.rand(T, B, SIZES[0], generator=torch.Generator().manual_seed(1)) < 0.2).float()


def fused_graph(net: Net, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The output, and what the layers returned, in a process where the library had been enabled before."""
    with sparse.enabled("snntorch", **options):
        net(x)
        with layer_outputs() as made:
            return net(x), made


def test_host_bytes_are_one_float_per_membrane_and_per_spike_that_is_multiplied() -> None:
    net, x = Net(), batch()
    scalars = host_saved_bytes(lambda: net(x), [x]) - FLOAT * T * B * (SIZES[1] + SIZES[1])
    assert 0 <= scalars <= 64 * T  # beta, clamped, and the like; the readout's spikes, which nobody used, are gone


def test_host_bytes_leave_out_weights_and_input() -> None:
    fc, x = nn.Linear(5, 7), torch.rand(3, 5)
    assert host_saved_bytes(lambda: fc(x), [x]) == 0
    assert host_saved_bytes(lambda: fc(x)) == FLOAT * 15
    assert host_saved_bytes(lambda: torch.sigmoid(fc(x)), [x]) == FLOAT * 21


def test_host_bytes_do_not_count_what_is_gone_at_the_end() -> None:
    fc, x = nn.Linear(5, 7), torch.rand(3, 5)

    def forward() -> Tensor:
        torch.sigmoid(fc(x)).detach()
        return fc(x)

    assert host_saved_bytes(forward, [x]) == 0


def test_fused_bytes_with_a_cutoff_are_the_rasters_and_little_else() -> None:
    net, x = Net(), batch()
    out, made = fused_graph(net, x, cutoff=0.2)
    kinds = saved_by_kind([out, *made], [x])
    words = {n: (n + 63) // 64 * 8 for n in SIZES}  # bytes of a row
    hidden, readout, given = (T * B * words[SIZES[i]] for i in (1, 2, 0))
    rasters, active = (sum(size for kind, size in kinds.items() if name in kind) for name in ("raster", "active"))
    # The first step may have taught the synapse.
    assert rasters in (hidden + readout + given, hidden + readout + given * (T - 1) // T)
    assert active == hidden + readout
    assert not any("membrane" in kind or "dense" in kind for kind in kinds)


def test_fused_bytes_of_the_exact_surrogate_hold_one_membrane_a_site() -> None:
    net, x = Net(), batch()
    out, made = fused_graph(net, x)
    assert saved_by_kind([out, *made], [x])["NeuronTape.blocks.membrane"] == FLOAT * T * B * (SIZES[1] + SIZES[2])


def test_a_dense_input_is_the_users_own() -> None:
    net, x = Net(), torch.rand(T, B, SIZES[0])
    out, made = fused_graph(net, x)
    name = "SynapseTape.steps.entry.dense"
    assert name not in saved_by_kind([out, *made], [x]) and saved_by_kind([out, *made])[name] == x.nbytes


def test_every_storage_counts_once() -> None:
    net, x = Net(), batch()
    out, made = fused_graph(net, x, cutoff=0.2)
    assert saved_bytes([out, *made], [x]) == saved_bytes([out, out, *made, *made], [x])


def test_ordinary_nodes_between_fused_layers_count() -> None:
    x = batch()
    with_dropout, without = Net(nn.Dropout(0.5)), Net()
    kinds = saved_by_kind(*_given(with_dropout, x))
    masks = [size for kind, size in kinds.items() if "Dropout" in kind or kind.startswith("Mul")]
    assert sum(masks) >= T * B * SIZES[1]  # one mask a step
    assert not [kind for kind in saved_by_kind(*_given(without, x)) if kind.startswith("Mul")]


def _given(net: Net, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    out, made = fused_graph(net, x, cutoff=0.2)
    return [out, *made], [x]


def test_chained_tapes_are_found_from_the_last_layer_alone() -> None:
    net, x = Net(), batch()
    _, made = fused_graph(net, x)
    last = made[-2:]  # spikes and membrane of the readout's last step
    kinds = {type(tape).__name__ for tape in tapes_of(last)}
    assert kinds == {"NeuronTape", "SynapseTape"} and len(tapes_of(last)) == 4


def test_a_tape_that_cannot_be_reached_is_an_error_not_an_undercount() -> None:
    out, _ = fused_graph(Net(), batch())
    with pytest.raises(RuntimeError, match="layer_outputs"):
        saved_bytes([out])


def test_nothing_is_left_after_backward() -> None:
    net, x = Net(), batch()
    out, made = fused_graph(net, x, cutoff=0.2)
    tapes = tapes_of([out, *made])
    out.sum().backward()
    assert all(tape.released for tape in tapes)
    del tapes, made
    gc.collect()
    assert tapes_of([out.detach()]) == []


# ------------------------------------------------------------------------------------------------------ measure


def test_densities_are_those_of_the_dense_tensors() -> None:
    net, x = Net(), batch()
    _, made = fused_graph(net, x, cutoff=0.2)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = net.lif1.register_forward_hook(lambda module, args, out: seen.append(out))
    net(x)
    hook.remove()
    # With reset_delay, the default, Leaky subtracts in the next step: what it returns is U at the comparison.
    spikes, membrane = (torch.stack(tensors) for tensors in zip(*seen, strict=True))
    hidden, readout = activities(made)
    assert hidden.spike_rate == pytest.approx(spikes.mean().item())
    assert hidden.active_fraction == pytest.approx(((membrane - 1).abs() < 0.2).float().mean().item(), abs=1e-3)
    assert 0 <= readout.spike_rate <= 1


def test_the_proof_of_the_path_can_fail() -> None:
    net, x = Net(), batch()
    with counted() as host:
        net(x)
    require_path(host, 0)
    with pytest.raises(NotFusedError):
        require_path(host, 2 * T)
    with sparse.enabled("snntorch"), counted() as fused:
        net(x)
    require_path(fused, 2 * T)
    with pytest.raises(NotFusedError):
        require_path(fused, 0)


def test_worst_difference_finds_the_parameter() -> None:
    host = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([100.0])}
    assert worst_difference(host, {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([101.0])}) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="different parameters"):
        worst_difference(host, {"a": host["a"]})


# ------------------------------------------------------------------------------------------------------ demo, bench


@pytest.mark.parametrize("library", ["snntorch", "norse"])
def test_demo(library: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(library)
    from snn_sparse_backend.demo import run

    out = tmp_path / "new" / "demo.png"
    threads = torch.get_num_threads()
    found = run(library, out, quick=True)
    assert out.read_bytes().startswith(PNG) and torch.get_num_threads() == threads
    host, exact, cut = found.contestants
    assert exact.gradient_difference < 1e-4
    assert host.losses[-1] < host.losses[0] and exact.losses == pytest.approx(host.losses, rel=1e-3)
    steps = len(exact.progress) * 3 * found.settings.steps
    assert exact.counts["neuron_steps"] == cut.counts["neuron_steps"] == steps and not host.counts["neuron_steps"]
    assert cut.counts["forward_sparse"] > 0 and cut.counts["input_gradient_sparse"] > 0
    assert all(0 < layer.spike_rate < 0.5 for layer in exact.hidden)
    said = capsys.readouterr().out
    assert str(out) in said.replace("\n", "") and "host_steps 0" in said and "accuracy" in said


def test_demo_models_are_plain_library_code() -> None:
    import snn_sparse_backend.demo as demo

    folder = Path(demo.__file__).parent
    for name in ("snntorch_model.py", "norse_model.py", "training.py"):
        imports = [line for line in (folder / name).read_text().splitlines() if line.startswith(("import", "from"))]
        assert imports and not any("snn_sparse" in line or "from ." in line for line in imports)


# ------------------------------------------------------------------------------------------------------ command line


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    said = capsys.readouterr().out
    commands = ("demo", "bench", "bench-compare", "check", "build", "info")
    assert stop.value.code == 0 and all(name in said for name in commands)


@pytest.mark.parametrize("arguments", [[], ["fly"], ["demo", "--library", "brian"], ["demo", "--epochs", "0"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said and "cutoff=None" in said and "cache" in said and "instruction set" in said


def test_build(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build"]) == 0
    said = capsys.readouterr().out
    assert "snn_sparse_core" in said and "snn_sparse_node" in said


@pytest.mark.parametrize("spec", ["model.py", "no_such_file.py:make", "{}:nothing"])
def test_check_with_an_unknown_spec(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some_model.py"
    file.write_text("")
    assert main(["check", spec.format(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("snn_sparse_backend check: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--cutoff", "0.3"]])
def test_check(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checked_model.py"
    file.write_text(
        "import snntorch as snn, torch\n"
        "from torch import nn\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    lif = snn.Leaky(0.9, spike_grad=snn.surrogate.fast_sigmoid(25), init_hidden=True)\n"
        "    return nn.Sequential(nn.Linear(20, 10), lif), 4 * torch.rand(8, 20)\n")
    assert main(["check", f"{file}:make", *options]) == 0
    assert "agree" in capsys.readouterr().out


@pytest.mark.parametrize("package,command", [("sklearn", ["demo", "--quick"]), ("matplotlib", ["demo", "--quick"]),
                                             ("norse", ["demo", "--quick", "--library", "norse"])])
def test_a_missing_package_is_one_line(package: str, command: list[str], tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([*command, "--out", str(tmp_path / "x.png"), "--epochs", "1"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("snn_sparse_backend")]
    assert len(said) == 1 and "pip install" in said[0]
