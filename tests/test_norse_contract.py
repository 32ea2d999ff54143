"""How Norse is used: every usage pattern gives with the swapped classes what it gives with Norse's own."""

from __future__ import annotations

import copy
import pickle
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("norse")

import norse.torch as stock
from norse_oracle import (
    CLASSES,
    FLOAT,
    agree,
    assert_identical,
    clean_slate,
    data,
    each_class,
    each_lif,
    fused,
    grads,
    layer_input,
    net,
    unroll,
    weighted,
)
from snn_sparse_backend.adapters import norse as swapped
from torch import Tensor, nn

import snn_sparse_backend as sparse


@pytest.fixture(autouse=True)
def slate() -> Iterator[None]:
    torch.manual_seed(0)
    with clean_slate():
        yield


# ------------------------------------------------------------------------------------------------ containers


def test_sequential_state_with_hidden_outputs_and_hooks() -> None:
    def program(library: Any) -> Any:
        model, seen = net(library, return_hidden=True), []
        model.register_forward_state_hooks(lambda module, inputs, output: seen.append((inputs[1], output)))
        x = data(5, 3, 6)
        hidden, state = model(x)
        assert [s is None for s in state] == [True, False, True, False]
        model.remove_forward_state_hooks()
        hidden2, state2 = model(x, list(state))
        return (hidden, state, hidden2, state2, seen), grads(weighted(*hidden, *hidden2), x, *model.parameters())

    agree(program)


def test_nested_sequential_states_and_recurrent_layers() -> None:
    def program(library: Any) -> Any:
        inner = library.SequentialState(nn.Linear(6, 9), library.LIF(), nn.RNN(9, 6))
        model = library.SequentialState(inner, library.LIFRecurrent(6, 5), library.LI()).double()
        x = data(5, 3, 6)
        y, state = model(x)
        assert isinstance(state[0], list)
        return (y, state), grads(weighted(y, state[0][1].v), x, *model.parameters())

    agree(program)


def test_lift_and_convolution() -> None:
    def program(library: Any) -> Any:
        model = library.SequentialState(library.Lift(nn.Conv2d(2, 3, 3)), library.LIF(), nn.Flatten(2),
                                        library.Lift(library.SequentialState(nn.Linear(48, 4), library.LICell())))
        model.double()
        x = data(5, 2, 2, 6, 6)
        y, state = library.Lift(library.LIFCell())((model[0](x), None))
        z, state2 = model[1](model[0](x))
        out, state3 = model[3](nn.Flatten(2)(z))
        return (y, state, z, state2, out, state3), grads(weighted(y, z, out), x, *model.parameters())

    agree(program)


def test_recurrent_sequential_feeds_the_output_back() -> None:
    def program(library: Any) -> Any:
        model = library.RecurrentSequential(nn.Linear(6, 6), library.LIFCell(), nn.Linear(6, 6), library.LICell())
        x = data(5, 3, 6)
        outputs, states = unroll(model.double(), x)
        return outputs, grads(weighted(*outputs), x, *model.parameters())

    agree(program)


def test_cells_in_a_loop_with_a_carried_list() -> None:
    def program(library: Any) -> Any:
        model = library.SequentialState(nn.Linear(6, 9), library.LIFCell(), nn.Linear(9, 4), library.LICell()).double()
        x, state, voltages = data(5, 3, 6), None, torch.zeros(5, 3, 4, dtype=FLOAT)
        for t, step in enumerate(x.transpose(0, 1).unbind(1)):
            y, state = model(step, state)
            voltages[t] = y
        return (voltages, state), grads(weighted(voltages.max(0).values, voltages.mean(0)), x, *model.parameters())

    agree(program)


# ------------------------------------------------------------------------------------------------ shapes and dtypes


@each_class
def test_no_steps_and_no_rows(name: str) -> None:
    def program(library: Any) -> Any:
        layer, outcome = getattr(library, name)(), layer_input(name, 0)
        y, state = layer(outcome)
        return (y, state), grads(y.sum() + state.v.sum(), outcome)

    agree(program)  # B = 0
    if not name.endswith("Cell"):
        with pytest.raises(RuntimeError) as expected:
            getattr(stock, name)()(torch.zeros(0, 3, 4))
        with pytest.raises(RuntimeError) as found:
            getattr(swapped, name)()(torch.zeros(0, 3, 4))
        assert str(found.value) == str(expected.value) != ""


@each_class
def test_batchless(name: str) -> None:
    def program(library: Any) -> Any:
        x = layer_input(name, None)
        y, state = getattr(library, name)()(x)
        assert library is stock or fused()
        return (y, state), grads(weighted(y, *state), x)

    agree(program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
@each_class
def test_dtypes_of_inputs(name: str, dtype: torch.dtype) -> None:
    def program(library: Any) -> Any:
        x = layer_input(name, dtype=torch.float32, grad=False).to(dtype).requires_grad_(dtype.is_floating_point)
        y, state = getattr(library, name)()(x)
        y2, state2 = getattr(library, name)()(x, state)
        wanted = [x] if x.requires_grad else []
        return (y, state, y2, state2), grads(weighted(y, y2, state2.v), *wanted) if wanted else []

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparse.SparseFallbackWarning)
        agree(program)


@pytest.mark.parametrize("v_leak", [torch.tensor(0.05, dtype=FLOAT), torch.tensor(0.05), torch.tensor(0.25)])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, FLOAT])
@pytest.mark.parametrize("state_shape", [(), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT], ids=str)
@each_class
@pytest.mark.filterwarnings("ignore::snn_sparse_backend.SparseFallbackWarning")
def test_mixed_dtypes(name: str, dtype: torch.dtype, state_shape: tuple[int, ...], state_dtype: torch.dtype | None,
                      v_leak: Tensor) -> None:
    """Norse subtracts v from v_leak in the dtype of these two, which may be narrower or wider than that of the step."""

    def program(library: Any) -> Any:
        lif = name.startswith("LIF")
        layer = getattr(library, name)((library.LIFParameters if lif else library.LIParameters)(v_leak=v_leak))
        kind = library.LIFFeedForwardState if lif else library.LIState
        state = kind(*(torch.rand(state_shape, dtype=state_dtype) for _ in "vi")) if state_dtype else None
        x = layer_input(name, dtype=dtype)
        y, after = layer(x, state)
        y2, after2 = layer(x, after)
        return (y, after, y2, after2), grads(weighted(y, y2, after2.v), x)

    agree(program)


@each_lif
@pytest.mark.filterwarnings("ignore::snn_sparse_backend.SparseFallbackWarning")
def test_scalars(name: str) -> None:
    def program(library: Any) -> Any:
        x = torch.tensor(4.0) if name == "LIFCell" else torch.tensor([4.0, 1.0, 3.0])
        layers = [getattr(library, name)(library.LIFParameters(v_th=torch.tensor(0.3, dtype=d)))
                  for d in (torch.float32, FLOAT)]
        return [layer(x) for layer in layers], []

    agree(program)


@each_class
def test_sparse_coo_input_falls_back(name: str) -> None:
    def program(library: Any) -> Any:
        x = (layer_input(name, grad=False, dtype=torch.float32) > 2).float().to_sparse()
        y, state = getattr(library, name)()(x)
        return (y.is_sparse, y.to_dense(), state.v.to_dense(), state.i.to_dense()), []

    if name.startswith("LIF"):
        with pytest.warns(sparse.SparseFallbackWarning, match="COO"):
            agree(program)


# ------------------------------------------------------------------------------------------------ what outputs are


@each_class
def test_outputs_require_grad_by_default(name: str) -> None:
    x = layer_input(name, dtype=torch.float32, grad=False)
    y, state = getattr(swapped, name)()(x)
    y.sum().backward()
    assert y.requires_grad and state.v.grad_fn is not None and not state.i.requires_grad and fused()
    layer = getattr(swapped, name)(getattr(stock, "LIFParameters" if "LIF" in name else "LIParameters")(
        tau_syn_inv=torch.tensor(100.0, requires_grad=True)))
    assert layer(x)[1].i.requires_grad
    assert (y is state.v) == (name == "LICell") and y._base is None and state.v._base is None


@each_lif
def test_heaviside_spikes_have_no_gradient(name: str) -> None:
    layer = getattr(swapped, name)(stock.LIFParameters(method="heaviside"))
    z, state = layer(layer_input(name))
    assert not z.requires_grad and state.v.requires_grad and fused()


@each_lif
@pytest.mark.parametrize("method", ["logistic", "adjoint", ""])
def test_unknown_methods(name: str, method: str) -> None:
    messages = []
    for library in (stock, swapped):
        with pytest.raises(ValueError) as error:
            getattr(library, name)(stock.LIFParameters(method=method))(layer_input(name, dtype=torch.float32))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@each_class
def test_in_place_detach_and_edits(name: str) -> None:
    def program(library: Any) -> Any:
        layer, x = getattr(library, name)(), layer_input(name)
        y, state = layer(x)
        before = weighted(y)
        state.v.detach_()
        state.i.detach_()
        y2, state2 = layer(x, state)
        y2.mul_(2)
        return (y, y2, state2), grads(before + weighted(y2, *state2), x)

    agree(program)


# ------------------------------------------------------------------------------------------------ modules


@each_class
def test_a_swapped_class_is_norse_s_class(name: str) -> None:
    kind, host = getattr(swapped, name), getattr(stock, name)
    assert kind.__name__ == name and issubclass(kind, host) and str(kind()) == str(host())
    assert list(kind().state_dict()) == list(host().state_dict()) == []
    layer = kind(dt=0.002).double().to(torch.get_default_device())
    assert layer.dt == 0.002 and vars(layer).keys() == vars(host()).keys()
    x = layer_input(name)
    assert_identical(host(dt=0.002)(x), copy.deepcopy(layer)(x))
    assert_identical(layer.activation(x, layer.initial_state(x), layer.p, 0.002)[0].shape, x.shape)


@pytest.mark.parametrize("name", ["LI", "LICell"])
def test_integrators_can_be_pickled(name: str) -> None:
    layer = getattr(swapped, name)()
    x = layer_input(name)
    layer(x)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is type(layer)
    assert_identical(layer(x), again(x))


@each_lif
def test_python_numbers_as_parameters(name: str) -> None:
    def program(library: Any) -> Any:
        layer, x = getattr(library, name)(library.LIFParameters(200.0, 100, 0.0, 0.5, 0, "tanh", 2)), layer_input(name)
        z, state = layer(x)
        assert library is stock or fused()
        return (z, state), grads(weighted(z, state.v), x)

    agree(program)


class Learnable(nn.Module):
    """Norse's idiom for learnable parameters: a module owns them, the layer's ``p`` holds the same objects."""

    def __init__(self, library: Any, name: str) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.full((7,), 120.0))
        self.v_th, self.v_reset = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.zeros(1, 7))
        p = library.LIFParameters(tau_mem_inv=self.tau, v_th=self.v_th, v_reset=self.v_reset, method="tanh",
                                  alpha=torch.tensor(2.0, requires_grad=True))  # which never gets a gradient
        self.layer = getattr(library, name)(p)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.layer(x, state)


@each_lif
def test_learnable_parameters_are_read_at_every_forward(name: str) -> None:
    def program(library: Any) -> Any:
        model, seen, gradients = Learnable(library, name), [], []
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.01), layer_input(name, dtype=torch.float32)
        for change in (None, "step", "data", "double", "load", "replace", "deepcopy"):
            if change == "step":
                for parameter in model.parameters():
                    parameter.grad = torch.ones_like(parameter)  # those of the two sides agree only to rounding
                optimizer.step()
            elif change == "data":
                model.v_th.data = torch.tensor(0.6)
            elif change == "double":
                model.double()
            elif change == "load":
                model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
            elif change == "replace":
                model.layer.p = model.layer.p._replace(v_th=model.v_th * 0.5, alpha=0.3)
            elif change == "deepcopy":
                model.layer.p = model.layer.p._replace(v_th=model.v_th)
                model = copy.deepcopy(model)
            seen.append(model(x))
            optimizer.zero_grad()
            weighted(seen[-1][0], *seen[-1][1]).backward()
            gradients += [p.grad.clone() for p in model.parameters()]
            with torch.no_grad():
                model.tau.add_(1.0)
        return seen, gradients

    with warnings.catch_warnings():  # after double() the parameters of each neuron are wider than the input
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", sparse.SparseFallbackWarning)
        agree(program)


@pytest.mark.parametrize("name", [*CLASSES, "LIFRefracCell"])
def test_parameters_that_are_no_tuple_may_change_within_a_loop(name: str) -> None:
    """The lane that goes on with a loop cannot look into them."""

    def program(library: Any) -> Any:
        layer = getattr(library, name)()
        p = getattr(layer.p, "lif", layer.p)
        mutable = types.SimpleNamespace(**{n: getattr(p, n) for n in p._fields})
        layer.p = mutable if p is layer.p else types.SimpleNamespace(lif=mutable, rho_reset=layer.p.rho_reset)
        x, seen, state = layer_input(name), [], None
        for _ in range(3):
            y, state = layer(x, state)
            seen.append((y, state))
            mutable.v_leak = mutable.v_leak + 0.25
        assert library is stock or fused()
        return seen, grads(weighted(*(y for y, _ in seen)), x)

    agree(program)


@each_class
def test_a_patched_activation_runs_norse_s_code(name: str) -> None:
    def program(library: Any) -> Any:
        layer = getattr(library, name)()
        original = layer.activation
        layer.activation = lambda x, *rest: original(2 * x, *rest)
        x = layer_input(name)
        y, state = layer(x)
        return (y, state), grads(weighted(y), x)

    with pytest.warns(sparse.SparseFallbackWarning, match="activation"):
        agree(program)


def test_nir_export_and_import() -> None:
    nir = pytest.importorskip("nir")
    models = [lib.SequentialState(nn.Linear(4, 3), cell(), nn.Linear(3, 2), stock.LIBoxCell())
              for lib, cell in ((stock, stock.LIFCell), (stock, swapped.LIFCell))]
    graphs = [stock.to_nir(model, torch.randn(1, 4)) for model in models]
    assert [type(n) for n in graphs[1].nodes.values()] == [type(n) for n in graphs[0].nodes.values()]
    assert any(isinstance(n, nir.CubaLIF) for n in graphs[1].nodes.values())
    outcomes = []
    for graph in graphs:
        try:
            outcomes.append(str(stock.from_nir(graph)))
        except Exception as error:  # noqa: BLE001 - whatever Norse does, it does with both
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]
