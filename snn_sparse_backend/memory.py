"""How many bytes a graph keeps for its backward: of tapes and of ordinary autograd nodes alike.

::

    with layer_outputs() as made:
        loss = criterion(net(x), labels)
    saved_bytes([loss, *made], exclude=[x])      # the sparse backend
    host_saved_bytes(lambda: criterion(net(x), labels), exclude=[x])  # plain autograd

Each storage counts once and whole. Parameters never count, and neither does what ``exclude`` names. Packed weights are
working memory of their modules, not of a graph: see :func:`workspace_bytes`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from .build import load_node
from .conv_tape import ConvTape
from .kernels import SynapseForward
from .lanes import Chain
from .neuron_tape import NeuronTape
from .pool_tape import PoolTape
from .recorder import Plan
from .reports import Slots
from .synapse_tape import SynapseTape, tiles_of
from .tapes import Tape

_PACKAGE = __name__.partition(".")[0]
_SEQUENCES = "Sparse"  # how the names of sequence nodes begin


class _Tally:
    """Unique storages, by what they were found under; holds on to them, so that no address is used twice."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        self.kept: list[Tensor] = []
        self.seen = {t.untyped_storage().data_ptr() for t in exclude}
        self.bytes: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if _of_a_parameter(tensor) or storage.data_ptr() in self.seen or not storage.nbytes():
            return
        self.seen.add(storage.data_ptr())
        self.kept.append(tensor)
        self.bytes[name] = self.bytes.get(name, 0) + storage.nbytes()


def _of_a_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor._base if tensor._base is not None else tensor, nn.Parameter)


@contextmanager
def layer_outputs() -> Iterator[list[Tensor]]:
    """Collects every tensor that a module returns inside; the way from a graph to its tapes goes through them."""
    made: list[Tensor] = []
    hook = register_module_forward_hook(lambda module, args, output: made.extend(_flat(output)))
    try:
        yield made
    finally:
        hook.remove()


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)


def saved_bytes(outputs: Iterable[Tensor], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that the graph behind ``outputs`` keeps for backward; see :func:`saved_by_kind`."""
    return sum(saved_by_kind(outputs, exclude).values())


def _kind(tape: Tape | None, path: str) -> str:
    return path


def saved_by_kind(outputs: Iterable[Tensor], exclude: Iterable[Tensor] = (),
                  label: Callable[[Tape | None, str], str] = _kind) -> dict[str, int]:
    """Bytes that the graph behind ``outputs`` keeps for backward, by what keeps them.

    Args:
        outputs: where the walk begins. Tapes are found from the tensors their layers returned (:func:`layer_outputs`)
            and from there on by themselves.
        exclude: tensors whose storage does not count, e.g. the input of the network.
        label: another name for what a tape (None: an autograd node) keeps under some name.

    Returns:
        Bytes by name: the attribute of a tape, such as ``NeuronTape.blocks.raster``, or of an autograd node.

    Raises:
        RuntimeError: if a tape can be seen in the graph but none of its output tensors was given.
    """
    tally = _Tally(exclude)
    tapes, functions = _walk(outputs)
    for tape in tapes:
        tape.absorb()
        for path, tensor in _held(tape, type(tape).__name__, set()):
            tally.add(label(tape, path), tensor)
    for function in functions:
        for attribute in dir(function):
            if attribute.startswith("_saved_"):
                for tensor in _flat(getattr(function, attribute)):
                    tally.add(label(None, f"{function.name()}.{attribute.removeprefix('_saved_')}"), tensor)
    return tally.bytes


def tapes_of(outputs: Iterable[Tensor]) -> list[Tape]:
    """All tapes of the graph behind ``outputs``, which are as in :func:`saved_by_kind`."""
    return _walk(outputs)[0]


def workspace_bytes(model: nn.Module) -> int:
    """Bytes of packed weights that the synapses of a model hold on to between their sequences."""
    return sum(tiles.nbytes for module in model.modules() if (tiles := tiles_of(module)) is not None)


def host_saved_bytes(forward: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that plain autograd keeps for backward once ``forward`` has run; see :func:`host_saved_by`."""
    return sum(host_saved_by(lambda: "saved", forward, exclude).values())


def host_saved_by(label: Callable[[], str], forward: Callable[[], Any],
                  exclude: Iterable[Tensor] = ()) -> dict[str, int]:
    """Bytes that plain autograd keeps for backward once ``forward`` has run and its result is alive.

    Not for the sparse backend: it hands over to the host library while saved-tensor hooks are active.

    Args:
        label: asked for a name whenever a tensor is saved.
        forward: runs the forward pass.
        exclude: tensors whose storage does not count, e.g. the input of the network.

    Returns:
        Bytes by name; what was saved more than once counts under the first.
    """
    saved: list[tuple[str, weakref.ref[_Saved]]] = []

    def pack(tensor: Tensor) -> _Saved:
        # Detached: a node that saved its own output would otherwise keep itself alive.
        box = _Saved(tensor.detach())
        if not _of_a_parameter(tensor):
            saved.append((label(), weakref.ref(box)))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        result = forward()
    tally = _Tally(exclude)
    for name, box in [(name, reference()) for name, reference in saved]:
        if box is not None:  # else the part of the graph it belonged to is gone already
            tally.add(name, box.tensor)
    del result
    return tally.bytes


class _Saved:
    """A saved tensor, for as long as its autograd node lives."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _walk(outputs: Iterable[Tensor]) -> tuple[list[Tape], list[Any]]:
    """The tapes and the ordinary autograd nodes behind some tensors."""
    tapes: dict[Any, Tape] = {}  # by autograd node
    starts = []

    def learn(tensor: Tensor) -> None:
        handle = load_node().handle_of(tensor)
        if handle is not None and handle.tape is not None:
            tapes[tensor.grad_fn] = handle.tape

    for tensor in outputs:
        learn(tensor)
        starts.append(tensor.grad_fn)
    found: list[Tape] = []
    ordinary: list[Any] = []
    unknown: list[Any] = []
    waiting, seen = [f for f in starts if f is not None], set()
    while waiting or unknown:
        if not waiting:
            waiting = [f for f in unknown if f in tapes]
            if not waiting:
                raise RuntimeError(
                    f"the graph has a {unknown[0].name()} none of whose outputs was given: add the tensors that the "
                    "layers returned (see layer_outputs), and measure before backward"
                )
            unknown = [f for f in unknown if f not in tapes]
        function = waiting.pop()
        if function in seen:
            continue
        if function.name().startswith(_SEQUENCES) and function not in tapes:
            unknown.append(function)
            continue
        seen.add(function)
        edges: list[Any] = [f for f, _ in function.next_functions]
        tape = tapes.get(function)
        if tape is None:
            ordinary.append(function)
        else:
            found.append(tape)
            for position, source in _sources(tape):
                if edges[position] is not None and edges[position].name().startswith(_SEQUENCES):
                    tapes.setdefault(edges[position], source)
        waiting += [f for f in edges if f is not None]
    return found, ordinary


def _sources(tape: Tape) -> Iterator[tuple[int, Tape]]:
    """The tapes that a tape itself knows before it, each with the edge that leads there."""
    if isinstance(tape, NeuronTape):
        first = len(tape.plan.dynamics.inputs_of_node)
        links = [(first + i, block.source) for i, block in enumerate(tape.blocks)]
    elif isinstance(tape, SynapseTape):
        links = [(2 + i, step.spikes) for i, step in enumerate(tape.steps)]  # type: ignore[misc]
    elif isinstance(tape, ConvTape):
        links = [(2 + i, step.before) for i, step in enumerate(tape.steps)]  # type: ignore[misc]
    elif isinstance(tape, PoolTape):
        links = [(i, (tape.source, step.index)) for i, step in enumerate(tape.steps)]  # type: ignore[misc]
    else:
        return
    for position, link in links:
        source = link[0]() if link is not None else None
        if source is not None:
            yield position, source


def _held(thing: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds on to, with the attributes that lead to it; what serves all graphs left out."""
    if isinstance(thing, Tensor):
        yield path, thing
        return
    if id(thing) in seen or isinstance(thing, (nn.Module, Plan, Slots, SynapseForward)):
        return
    seen.add(id(thing))
    if isinstance(thing, Chain):
        yield from _held(thing.parts, path, seen)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from _held(item, path, seen)
    elif isinstance(thing, dict):
        for item in thing.values():
            yield from _held(item, path, seen)
    elif type(thing).__module__.partition(".")[0] == _PACKAGE:
        names = [*getattr(thing, "__slots__", ()), *getattr(thing, "__dict__", ())]
        for name in names:
            yield from _held(getattr(thing, name, None), f"{path}.{name.lstrip('_')}", seen)
