"""How one host library is switched on and off."""

from __future__ import annotations

from collections.abc import Callable, MutableSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import Options
from .fallback import warn
from .support import Bystanders

OPTIONS = "_snn_sparse_options"  # attribute of the layers of a model that is enabled on its own


class _Truncate(torch.autograd.Function):
    """Spikes of a host surrogate, with the gradient of x kept only where |x| < cutoff."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cutoff: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.cutoff = cutoff
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < ctx.cutoff).to(grad.dtype), None


def truncate(surrogate: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, cutoff: float) -> torch.Tensor:
    """``surrogate(x)``, its derivative multiplied by ``1[|x| < cutoff]``."""
    return surrogate(_Truncate.apply(x, cutoff))


@dataclass(frozen=True)
class Adapter:
    """A host library.

    Args:
        library: its name.
        refresh: brings the patches in line with ``config`` and with ``models``.
        layers: the supported layers of a model.
        models: layers of models that are enabled on their own (held weakly).
        truncated: scope in which the host library itself uses truncated surrogate derivatives.
        spikes: whether a supported layer emits spikes (an integrator does not).
        bystanders: the classes that are left alone.
    """

    library: str
    refresh: Callable[[], None]
    layers: Callable[[nn.Module], list[nn.Module]]
    models: MutableSet[Any]
    truncated: Callable[[nn.Module, float], AbstractContextManager[None]]
    spikes: Callable[[nn.Module], bool]
    bystanders: Bystanders

    def adopt(self, model: nn.Module, options: Options) -> int:
        """Enables the supported layers of one model; returns how many there are."""
        layers = self.layers(model)
        for layer in layers:
            layer.__dict__[OPTIONS] = options
            self.models.add(layer)
        self.refresh()
        if layers:
            for module, reason in self.bystanders.within(model.modules()):
                warn(module, reason)
        return len(layers)

    def adopt_again(self, layers: list[tuple[nn.Module, Options | None]]) -> None:
        """Gives single layers of this library their options back."""
        for layer, options in layers:
            if options is not None and layer in self.layers(layer):
                layer.__dict__[OPTIONS] = options
                self.models.add(layer)
        self.refresh()

    def abandon(self, model: nn.Module) -> int:
        """Undoes :meth:`adopt`; returns how many layers were enabled."""
        layers = [layer for layer in self.layers(model) if layer.__dict__.pop(OPTIONS, None) is not None]
        for layer in layers:
            self.models.discard(layer)
        self.refresh()
        return len(layers)
