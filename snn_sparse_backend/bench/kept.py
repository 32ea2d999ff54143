"""What a step keeps for backward: by what holds it, and by the layer it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..build import load_node
from ..memory import host_saved_by, layer_outputs, saved_by_kind
from ..tapes import Tape
from .networks import Net

OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward; both sum to the same total.

    Args:
        by_kind: by what holds them, e.g. ``NeuronTape.blocks.raster``, or ``saved`` for plain autograd.
        by_layer: by the synapse and neuron they belong to. What a synapse multiplies belongs to that synapse, also if
            the layer before it holds it too.
    """

    by_kind: dict[str, int]
    by_layer: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def host_kept(net: Net, forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> Kept:
    """Of a network that plain autograd records."""
    layer_of = _layers(net)
    inside: list[str] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in layer_of:
            inside.append(layer_of[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in layer_of:
            inside.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        found = host_saved_by(lambda: inside[-1] if inside else OUTSIDE, forward, exclude)
    finally:
        for hook in hooks:
            hook.remove()
    return Kept({"saved": sum(found.values())}, _in_order(found, net))


def fused_kept(net: Net, forward: Callable[[], Tensor], exclude: Iterable[Tensor]) -> Kept:
    """Of a network that runs fused here."""
    with layer_outputs() as made, _made_by(_layers(net)) as makers:
        result = forward()
    layers: dict[int, str] = {}
    for layer, tensor in makers:
        handle = load_node().handle_of(tensor)
        if handle is not None and handle.tape is not None:
            layers.setdefault(id(handle.tape), layer)

    def label(tape: Tape | None, path: str) -> str:
        return f"{layers.get(id(tape), OUTSIDE)}\n{path}"

    by_kind: dict[str, int] = {}
    by_layer: dict[str, int] = {}
    for name, size in saved_by_kind([result, *made], exclude, label).items():
        layer, _, path = name.partition("\n")
        by_kind[path] = by_kind.get(path, 0) + size
        by_layer[layer] = by_layer.get(layer, 0) + size
    return Kept(by_kind, _in_order(by_layer, net))


def _layers(net: Net) -> dict[nn.Module, str]:
    return {module: f"layer {i}" for i, stage in enumerate(net.stages, 1)
            for part in stage for module in part.modules()}


def _in_order(found: dict[str, int], net: Net) -> dict[str, int]:
    names = [f"layer {i}" for i in range(1, len(net.stages) + 1)]
    return {name: found.get(name, 0) for name in (*names, OUTSIDE)}


@contextmanager
def _made_by(layer_of: dict[nn.Module, str]) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors that the modules of layers return inside, with their layers."""
    made: list[tuple[str, Tensor]] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if module in layer_of:
            made.extend((layer_of[module], t) for t in (output if isinstance(output, tuple) else (output,))
                        if isinstance(t, Tensor))

    hook = register_module_forward_hook(note)
    try:
        yield made
    finally:
        hook.remove()
