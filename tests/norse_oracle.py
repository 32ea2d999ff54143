"""The oracle of the Norse tests: Norse's own classes, on the same inputs, parameters and states."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import norse.torch as stock
import pytest
import torch
from norse.torch.functional import iaf, lif, lif_adex, lif_box, lif_ex, lif_refrac, lsnn
from oracle import cut
from snn_sparse_backend.adapters import norse as swapped
from snn_sparse_backend.adapters import synapses
from snn_sparse_backend.adapters.fallback import forget_warnings
from snn_sparse_backend.compat.norse import input_drives_membrane_at_once, recurrent_step_is_compiled
from torch import Tensor, nn

import snn_sparse_backend as sparse

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


# Norse 1.0: the input joins after the membrane; and TorchScript, which rounds differently from call to call.
OTHER_STEP = ((() if input_drives_membrane_at_once() else ("LIF", "LIFCell", "LIFRefracCell"))
              + (("LIFRecurrent", "LIFRecurrentCell", "LIFRefracRecurrent", "LIFRefracRecurrentCell")
                 if recurrent_step_is_compiled() else ()))


def needs(*names: str) -> pytest.MarkDecorator:
    """For tests of classes that not every version of Norse has, or whose step is another one in some (Norse 1.0)."""
    missing = [name for name in names if name in OTHER_STEP or not hasattr(stock, name)]
    return pytest.mark.skipif(bool(missing), reason=f"not in this version of Norse, or another step: {missing}")


# ------------------------------------------------------------------------------------------------ comparing


def relative_error(expected: Tensor, found: Tensor, rounding: float = 0.0) -> float:
    """``||a - b|| / ||a||``; infinite if shape or dtype differ or something is not finite.

    Differences up to ``rounding`` do not count.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return math.inf
    error, norm = max((expected - found).norm().item() - rounding, 0.0), expected.norm().item()
    return error if error == 0 else error / norm if norm > 0 and math.isfinite(error) else math.inf


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """The tensors of nested lists and tuples."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from tensors_in(item)


def assert_gradients(expected: Sequence[Tensor | None], found: Sequence[Tensor | None], names: Sequence[str] = (),
                     rounded: str | None = None, outputs: Any = ()) -> None:
    """The same gradients, and None where Norse has None; Norse itself rounds that of ``rounded`` to float32.

    ``outputs`` of the run tell with the gradients how large its terms are: what is left of a sum whose terms cancel may
    differ by a few units in the last place of these.
    """
    assert len(expected) == len(found)
    terms = list(tensors_in([expected, outputs]))
    size = sum(t.detach().double().norm().item() ** 2 for t in terms if t.isfinite().all()) ** 0.5
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        name = names[i] if names else str(i)
        assert (a is None) == (b is None), f"gradient of {name}: stock {a}, sparse {b}"
        if a is not None and b is not None:
            error = relative_error(a, b, 4 * torch.finfo(a.dtype).eps * size)
            if name == rounded and (a - b).norm().item() < torch.finfo(torch.float32).tiny:
                continue  # too small for float32: Norse rounded it to 0
            tolerance = TOLERANCE[torch.float32 if name == rounded else a.dtype]
            assert error <= tolerance, f"gradient of {name}: {error:.2e}\n{a}\n{b}"


def assert_identical(expected: Any, found: Any, what: str = "output") -> None:
    """The same values bit by bit, dtype, shape, ``requires_grad`` and tuple type; recursively."""
    if isinstance(expected, (tuple, list)):
        assert type(expected) is type(found) and len(expected) == len(found), what
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            assert_identical(a, b, f"{what}[{i}]")
    elif isinstance(expected, Tensor):
        assert (expected.dtype, expected.shape) == (found.dtype, found.shape), what
        assert expected.requires_grad == found.requires_grad, f"{what}: requires_grad is {found.requires_grad}"
        assert torch.equal(expected, found), f"{what}: {(expected - found).abs().max()}"
    else:
        assert expected == found, what


# ------------------------------------------------------------------------------------------------ switching


@contextmanager
def clean_slate(**options: Any) -> Iterator[None]:
    """Nothing enabled, no warning given, no counts; inside, these options are the defaults; all undone at the end."""
    before = sparse.config.defaults
    sparse.config.set(**options)
    sparse.reset_counts()
    forget_warnings()
    try:
        yield
    finally:
        sparse.config.defaults = before
        for library in list(sparse.config.libraries):
            sparse.disable(library)
        synapses.switch("norse classes", False)


@contextmanager
def threshold_cut_at(cutoff: float | None) -> Iterator[None]:
    """Norse's own steps with their threshold derivative multiplied by ``1[|u - v_th| < cutoff]``."""
    original, modules = lif.threshold, (iaf, lif, lif_adex, lif_box, lif_ex, lif_refrac, lsnn)
    if cutoff is not None:
        for module in modules:
            module.threshold = lambda x, *how: cut(lambda y: original(y, *how), cutoff)(x)
    try:
        yield
    finally:
        for module in modules:
            module.threshold = original


# ------------------------------------------------------------------------------------------------ programs


def both(program: Callable[[Any], Any], **options: Any) -> tuple[Any, Any]:
    """What a program returns when it is given Norse's module, and when it is given the swapped classes.

    Args:
        program: takes ``norse.torch`` or something that has the swapped classes instead, from the same seed.
        options: of the backend.
    """
    results = []
    for library in (stock, Swapped()):
        with clean_slate(**options):
            torch.manual_seed(0)
            results.append(program(library))
    return results[0], results[1]


class Swapped:
    """``norse.torch`` with the classes of the adapter."""

    def __getattr__(self, name: str) -> Any:
        return getattr(swapped if name in swapped.__all__ else stock, name)


def agree(program: Callable[[Any], tuple[Any, Sequence[Tensor | None]]], **options: Any) -> None:
    """A program ``library -> (outputs, gradients)`` gives the same with either library."""
    (expected, gradients), (found, others) = both(program, **options)
    assert_identical(expected, found)
    assert_gradients(gradients, others)


# ------------------------------------------------------------------------------------------------ tuples


def tuple_of(name: str, values: dict[str, Any]) -> Any:
    """A tuple of Norse by its name; of a refractory neuron, all but the counter's is in another one within."""
    kind = getattr(stock, name)
    if "Refrac" not in name:
        return kind(**values)
    own = {n: values[n] for n in kind._fields if n in values}
    inner = {n: value for n, value in values.items() if n not in own}
    return kind(lif=tuple_of(name.replace("Refrac", ""), inner), **own)


def mapped(state: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """A state with each of its tensors changed, which is given by its name."""
    members = zip(state._fields, state, strict=True)
    return type(state)(*(mapped(m, change) if isinstance(m, tuple) else change(n, m) for n, m in members))


# ------------------------------------------------------------------------------------------------ pieces

FLOAT = torch.float64
CLASSES = ("LIF", "LIFCell", "LI", "LICell")
each_class = pytest.mark.parametrize("name", CLASSES)
each_lif = pytest.mark.parametrize("name", ("LIF", "LIFCell"))


def data(*shape: int, dtype: torch.dtype = FLOAT, grad: bool = True) -> Tensor:
    return (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_(grad)


def grads(loss: Tensor, *wanted: Tensor, **options: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, **options))


def weighted(*tensors: Tensor) -> Tensor:
    return torch.stack([(t * torch.randn_like(t)).sum() for t in tensors if t.requires_grad]).sum()


def unroll(cell: nn.Module, x: Tensor, state: Any = None) -> tuple[list[Tensor], list[Any]]:
    outputs, states = [], []
    for step in x:
        output, state = cell(step, state)
        outputs.append(output)
        states.append(state)
    return outputs, states


def nodes(*tensors: Tensor) -> Counter[str]:
    """How many autograd nodes of each name a graph has."""
    seen, todo = set(), [t.grad_fn for t in tensors]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def fused() -> bool:
    return sparse.counts["neuron_steps"] > 0 and sparse.counts["host_steps"] == 0


def layer_input(name: str, rows: int | None = 3, **options: Any) -> Tensor:
    shape = (7,) if rows is None else (rows, 7)
    return data(*(() if name.endswith("Cell") else (5,)), *shape, **options)


def net(library: Any, **options: Any) -> Any:
    return library.SequentialState(nn.Linear(6, 9), library.LIF(library.LIFParameters(v_th=torch.tensor(0.2))),
                                   nn.Linear(9, 4), library.LI(), **options).double()
