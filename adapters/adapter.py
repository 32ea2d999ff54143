"""How one host library is switched on and off."""

from __future__ import annotations

from collections.abc import Callable, MutableSet
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..config import Options

OPTIONS = "_snn_sparse_options"  # attribute of the layers of a model that is enabled on its own


@dataclass(frozen=True)
class Adapter:
    """A host library.

    Args:
        library: its name.
        refresh: brings the patches in line with ``config`` and with ``models``.
        layers: the supported layers of a model.
        models: layers of models that are enabled on their own (held weakly).
    """

    library: str
    refresh: Callable[[], None]
    layers: Callable[[nn.Module], list[nn.Module]]
    models: MutableSet[Any]

    def adopt(self, model: nn.Module, options: Options) -> int:
        """Enables the supported layers of one model; returns how many there are."""
        layers = self.layers(model)
        for layer in layers:
            layer.__dict__[OPTIONS] = options
            self.models.add(layer)
        if layers:
            self.refresh()
        return len(layers)

    def abandon(self, model: nn.Module) -> int:
        """Undoes :meth:`adopt`; returns how many layers were enabled."""
        layers = [layer for layer in self.layers(model) if layer.__dict__.pop(OPTIONS, None) is not None]
        for layer in layers:
            self.models.discard(layer)
        if layers:
            self.refresh()
        return len(layers)
