"""``inhibition=True``: only the neuron furthest above its threshold spikes, on the kernels as in snnTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import snntorch as snn
import torch
from devices import cuda_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BATCH, SIZES, Net, Side, assert_same, differences, frames, precision, run, train, weighted
from snn_sparse_backend.adapters import fallback
from snntorch import surrogate
from torch import Tensor, nn

import snn_sparse_backend as sparse
from snn_sparse_backend import inhibition, neuron_tape, tables
from snn_sparse_backend.memory import layer_outputs, saved_bytes
from snn_sparse_backend.summation import order_of

STATES = {"Leaky": 1, "Synaptic": 2, "Lapicque": 1, "Alpha": 3, "RLeaky": 2, "RSynaptic": 3}
SURROGATES: dict[str, Callable[[], Any]] = {
    "atan": surrogate.atan, "fast_sigmoid": surrogate.fast_sigmoid, "triangular": surrogate.triangular,
    "straight_through_estimator": surrogate.straight_through_estimator, "SFS": lambda: surrogate.SFS(slope=5, B=0.3),
    "registered": lambda: registered,
}


def registered(x: Tensor) -> Tensor:
    """A surrogate of the user's own."""
    return surrogate.atan(alpha=3.0)(x)


sparse.register_surrogate(registered)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    fallback.forget_warnings()
    yield
    assert sparse.config.libraries == {}


def make(kind: str, size: int, **options: Any) -> Any:
    """A layer with inhibition; the attribute is set later, so that nobody is warned that it is unstable."""
    arguments: dict[str, tuple[Any, ...]] = {"Leaky": (0.8,), "Synaptic": (0.7, 0.8), "Lapicque": (0.8,),
                                             "Alpha": (0.85, 0.6), "RLeaky": (0.8,), "RSynaptic": (0.7, 0.8)}
    if kind.startswith("R"):
        options.setdefault("linear_features", size)
    if kind == "Lapicque":
        options.pop("learn_beta", None)
    if kind not in ("Synaptic", "RSynaptic"):
        options.pop("learn_alpha", None)
    layer = getattr(snn, kind)(*arguments[kind], **options)
    layer.inhibition = True
    return layer


# -------------------------------------------------------------------------------------------------- properties

CASES = st.fixed_dictionaries({
    "kinds": st.lists(st.sampled_from(sorted(STATES)), min_size=1, max_size=2),
    "batch": st.integers(1, 4),
    "size": st.sampled_from((1, 2, 7, 63, 64, 65, 130)),
    "steps": st.sampled_from((1, 2, 5, 9, 70)),
    "reset": st.sampled_from(("subtract", "zero", "none")),
    "threshold": st.sampled_from((0.4, 1, 0.0, -0.3, "neurons")),
    "learn": st.sets(st.sampled_from(("beta", "threshold", "alpha"))),
    "one_to_one": st.booleans(),
    "surrogate": st.sampled_from(sorted(SURROGATES)),
    "input": st.sampled_from(("binary", "normal", "ties")),
    "x_grad": st.booleans(),
    "hidden": st.booleans(),
    "between": st.sampled_from(("carry", "carry", "detach", "edit")),
    "loss": st.sampled_from(("all", "spikes", "last", "membranes")),
    "cutoff": st.sampled_from((None, None, 0.1, 0.7)),
    "fuse_steps": st.sampled_from((True, True, True, False)),
    "seed": st.integers(0, 10**6),
})


def inputs(case: dict[str, Any]) -> Tensor:
    x = torch.randn(case["steps"], case["batch"], case["size"])
    if case["input"] == "binary":
        x = (x > 0.7).to(x.dtype)
    elif case["input"] == "ties":  # many neurons have the same membrane, which is a small fraction
        x = (2 * x).round() / 4
    return x.requires_grad_(case["x_grad"])


def unroll(case: dict[str, Any]) -> Callable[[Side], None]:
    """Neurons, and in front of all but those that are to be equal a Linear; a time loop as a user would write it."""

    def program(side: Side) -> None:
        size, x, linears = case["size"], inputs(case), case["input"] != "ties"
        options: dict[str, Any] = {f"learn_{name}": True for name in case["learn"]}
        options |= {"reset_mechanism": case["reset"], "init_hidden": case["hidden"], "output": case["hidden"],
                    "spike_grad": side.surrogate(SURROGATES[case["surrogate"]]())}
        layers = nn.ModuleList()
        for kind in case["kinds"]:
            threshold = torch.linspace(0.1, 0.6, size) if case["threshold"] == "neurons" else case["threshold"]
            own = {"all_to_all": False, "V": 0.7} if case["one_to_one"] and kind.startswith("R") else {}
            if own:
                own["linear_features"] = None
            if isinstance(threshold, int):  # it has no gradient
                options["learn_threshold"] = False
            layers.append(nn.Linear(size, size) if linears else nn.Identity())
            layers.append(make(kind, size, threshold=threshold, **options, **own))
        states: list[Any] = [[None] * STATES[kind] for kind in case["kinds"]]
        loss = x.new_zeros(())
        for t in range(case["steps"]):
            h = x[t]
            for i, kind in enumerate(case["kinds"]):
                h, layer = layers[2 * i](h), layers[2 * i + 1]
                h, *rest = layer(2 * h) if case["hidden"] else layer(2 * h, *states[i])
                found = [h, *rest] if kind.startswith("R") else rest
                states[i] = found
                for k, value in enumerate((h, *rest)):
                    side.output(f"{k} of {i} at {t}", value)
                    counted = {"all": True, "spikes": k == 0, "membranes": value is rest[-1],
                               "last": t == case["steps"] - 1}
                    if counted[case["loss"]]:
                        loss = loss + (value * torch.randn(value.shape)).sum()
                if t == case["steps"] // 2 and not case["hidden"]:
                    if case["between"] == "detach":
                        states[i] = [state.detach() for state in found]
                    elif case["between"] == "edit":
                        states[i] = [*found[:-1], found[-1] * 0.5]
        if loss.requires_grad:
            loss.backward()
        side.collect(layers, x=x)

    return program


def check(case: dict[str, Any], dtype: torch.dtype) -> None:
    with precision(dtype):
        side = assert_same(unroll(case), seed=case["seed"], fused=None, cutoff=case["cutoff"],
                           fuse_steps=case["fuse_steps"])
        assert not side.counts["host_steps"]
        steps = case["steps"] * len(case["kinds"])
        learned = case["x_grad"] or case["input"] != "ties"
        assert not learned or side.counts["inhibited_steps"] == side.counts["neuron_steps"] >= steps


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(case=CASES)
def test_in_float64(case: dict[str, Any]) -> None:
    check(case, torch.float64)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(case=CASES)
def test_in_float32(case: dict[str, Any]) -> None:
    check(case, torch.float32)


# -------------------------------------------------------------------------------------------------- what it is for


def inhibited(side: Side, **options: Any) -> Net:
    net = Net(side, **{"learn_beta": False, **options})
    net.lif1.inhibition = net.lif2.inhibition = True
    return net


def test_gradients_go_through_the_winners_alone() -> None:
    """Without any cutoff, and with a surrogate that is nowhere zero, the products of backward are sparse."""

    orders: list[Any] = []

    def program(side: Side) -> None:
        net = inhibited(side)
        orders.append(None if cuda_kernels() else order_of(BATCH, *SIZES[1:], torch.float32, True))
        train(side, net, net(frames(20)))

    side = assert_same(program, synapses=True)
    assert side.counts["input_gradient_sparse"] == 1 and not side.counts["input_gradient_dense"]
    assert side.counts["weight_gradient_sparse"] > 0
    # Those of the first Linear are a lane's; the second one's owner has no lane.
    assert None in orders or side.counts["forward_sparse"] - side.counts["lane_steps"] >= 20


def test_one_membrane_a_row_is_kept() -> None:
    def kept(inhibits: bool) -> int:
        torch.manual_seed(0)
        lif = snn.Leaky(0.9)
        lif.inhibition = inhibits
        x, mem, loss = torch.randn(40, 8, 256, requires_grad=True), None, torch.zeros(())
        with sparse.enabled("snntorch"), layer_outputs() as made:
            for frame in x:
                spk, mem = lif(frame, mem)
                loss = loss + spk[0, 0]
            return saved_bytes([loss, *made], exclude=[x])

    assert kept(True) < 0.4 * kept(False)


def test_the_graded_factor_is_not_asked_for() -> None:
    def program(side: Side) -> None:
        net = inhibited(side, graded_spikes_factor=0.3, learn_graded_spikes_factor=True)
        train(side, net, net(frames()))
        assert net.lif1.graded_spikes_factor.grad is None

    assert_same(program, synapses=True)


def test_a_recurrence_does_not_see_the_factor_either() -> None:
    def program(side: Side) -> None:
        fc, lif, state = nn.Linear(SIZES[0], 9), make("RLeaky", 9), (None, None)
        lif.graded_spikes_factor = torch.tensor(0.3)
        loss = torch.zeros(())
        for x in frames():
            state = lif(3 * fc(x), *state)
            loss = loss + weighted(*state)
        train(side, nn.ModuleList([fc, lif]), loss)

    assert_same(program)


@pytest.mark.parametrize("learn", [False, True])
def test_switched_on_and_off_in_the_middle(learn: bool) -> None:
    def program(side: Side) -> None:
        net, loss = Net(side, learn_beta=learn), torch.zeros(())
        mems = net.start()
        for t, x in enumerate(frames(12)):
            net.lif1.inhibition = t // 4 == 1
            loss = loss + weighted(*net.step(x, mems))
        train(side, net, loss)

    assert assert_same(program, synapses=True).counts["inhibited_steps"] == 4


@pytest.mark.parametrize("learn", [False, True])
def test_backward_twice_and_a_second_loss(learn: bool) -> None:
    def program(side: Side) -> None:
        net, mems, losses = inhibited(side, learn_beta=learn), None, []
        mems = net.start()
        for x in frames(8):
            spk, mem = net.step(x, mems)
            losses.append(weighted(spk, mem))
        sum(losses[:5]).backward(retain_graph=True)
        train(side, net, sum(losses[2:]))

    assert_same(program, synapses=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_wins_as_in_stock(value: float) -> None:
    def program(side: Side) -> None:
        lif, x = make("Leaky", 6, learn_threshold=True), torch.randn(4, 3, 6)
        x[1, 0, 2] = value
        x.requires_grad_()
        mem, loss = lif.reset_mem(), torch.zeros(())
        for t in range(4):
            spk, mem = lif(x[t], mem)
            side.output(f"spk {t}", spk)
            side.output(f"mem {t}", mem)
            loss = loss + weighted(spk)
        train(side, lif, loss, x=x)

    assert_same(program)


# -------------------------------------------------------------------------------------------------- left to the host


def replaced() -> Any:
    lif = make("Leaky", 6)
    lif.fire_inhibition = lambda size, mem: lif.fire(mem)
    return lif


LEFT: dict[str, tuple[Callable[[], Any], tuple[int, ...], str, bool]] = {
    "late reset": (lambda: make("Leaky", 6, reset_delay=False), (BATCH, 6), "reset_delay=False", True),
    "replaced": (replaced, (BATCH, 6), "its method fire_inhibition was replaced", True),
    "one dimension": (lambda: make("Leaky", 6), (6,), "this one has 1 dimension", False),
    "maps": (lambda: make("Leaky", 6), (BATCH, 6, 2, 2), "this one has 4 dimensions", False),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_the_host(name: str) -> None:
    create, shape, reason, runs = LEFT[name]

    def program(side: Side) -> None:
        lif, x = create(), torch.randn(5, *shape, requires_grad=True)
        mem, loss = torch.zeros(shape), torch.zeros(())
        for frame in x:
            if not runs:
                with pytest.raises(IndexError):
                    lif(frame, mem)
                side.output("nothing", mem)
                return
            spk, mem = lif(frame, mem)
            side.output(f"spk {len(side.outputs)}", spk)
            loss = loss + weighted(spk, mem)
        train(side, lif, loss, x=x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        side = assert_same(program, fused=False)
    (message,) = [str(w.message) for w in caught if w.category is sparse.SparseFallbackWarning]
    assert message.startswith("Leaky: ") and reason in message
    assert side.counts["host_steps"] == (5 if runs else 1)


def test_without_a_reset_its_delay_does_not_matter() -> None:
    def program(side: Side) -> None:
        net = inhibited(side, reset_mechanism="none", reset_delay=False)
        train(side, net, net(frames()))

    assert_same(program, synapses=True)


# -------------------------------------------------------------------------------------------------- planted errors


def _next_neuron(real: Any) -> Any:
    """Gradients arrive at the neighbours of the winners."""
    return lambda blocks: [(winners + 1) % SIZES[1] for winners in real(blocks)]


def _no_threshold(real: Any) -> Any:
    """The winner is the neuron with the largest membrane."""

    def suppress(self: Any, block: Any, membrane: Tensor, output: Tensor) -> Any:
        self._threshold = torch.zeros_like(self._threshold)
        return real(self, block, membrane, output)

    return suppress


def _winners_reset(real: Any) -> Any:
    """Only who spikes is reset in the next step."""

    def suppress(self: Any, block: Any, membrane: Tensor, output: Tensor) -> Any:
        found = real(self, block, membrane, output)
        block.crossings.words.copy_(block.raster.words)
        return found

    return suppress


def _unmasked(real: Any) -> Any:
    """Gradients through the recurrence reach all neurons."""
    return lambda *arguments: real(*arguments[:5])


PLANTED: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "gradients at the neighbours": (tables, "winners_of", _next_neuron),
    "thresholds forgotten": (inhibition.Inhibition, "suppress", _no_threshold),
    "resets of the winners only": (inhibition.Inhibition, "suppress", _winners_reset),
    "the recurrence is not masked": (neuron_tape, "recurrent_backward", _unmasked),
}


OF_THE_CPU = ("gradients at the neighbours", "the recurrence is not masked")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(side: Side) -> None:
        fc, state = nn.Linear(SIZES[0], SIZES[1]), (None, None)
        lif = make("RLeaky", SIZES[1], threshold=torch.linspace(0.1, 0.6, SIZES[1]), learn_beta=True,
                   learn_threshold=True)
        loss = torch.zeros(())
        for x in frames(12):
            state = lif(3 * fc(x), *state)
            side.output(f"spk {len(side.outputs)}", state[0])
            loss = loss + weighted(*state)
        train(side, nn.ModuleList([fc, lif]), loss)

    if name in OF_THE_CPU and cuda_kernels():
        pytest.skip("the scan of CUDA itself takes gradients at active sites only")
    stock = run(program, on=False)
    assert not differences(stock, run(program, on=True), tolerance=1e-5)
    module, function, plant = PLANTED[name]
    monkeypatch.setattr(module, function, plant(getattr(module, function)))
    assert differences(stock, run(program, on=True), tolerance=1e-5), "the comparison missed it"
