"""Turning the backend on and off: for a library, for a scope, or for one model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from ..compat.versions import described, known
from ..config import config
from .adapter import OPTIONS, Adapter
from .fallback import SparseFallbackWarning
from .support import names

_LIBRARIES = ("snntorch", "norse")


def _adapter(library: str) -> Adapter:
    if library not in _LIBRARIES:
        expected = " or ".join(map(repr, _LIBRARIES))
        raise ValueError(f"unknown library {library!r}: expected {expected}, or a model (torch.nn.Module)")
    try:
        module = import_module(f"..{library}", __name__)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == library:
            raise ModuleNotFoundError(f"{library} is not installed: pip install {library}", name=library) from error
        if known(library):
            raise
        raise ImportError(f"this package does not know {described(library)} and cannot use it: {error}") from error
    adapter: Adapter = module.adapter
    return adapter


def _installed() -> Iterator[Adapter]:
    for library in _LIBRARIES:
        try:
            yield _adapter(library)
        except ModuleNotFoundError:
            continue
        except ImportError as error:  # the other library may be all that is wanted
            warnings.warn(str(error), SparseFallbackWarning, stacklevel=4)


def enable(target: str | nn.Module, **options: Any) -> None:
    """Turns the sparse, time-fused backward on.

    Args:
        target: ``"snntorch"`` or ``"norse"`` for every supported layer of this library in the process, or one model.
            Enabling twice just changes the options.
        options: see :class:`snn_sparse_backend.Options`; those not named are the defaults in force.

    Raises:
        ValueError: for an unknown library, a bad option value, or a model without a supported spiking layer.
        TypeError: for an unknown option or a target that is neither a name nor a model.
        ModuleNotFoundError: if the library is not installed.
        ImportError: if it is of an unknown version that lacks what this package builds on.
    """
    chosen = config.defaults.updated(options)
    if isinstance(target, nn.Module):
        if not sum([adapter.adopt(target, chosen) for adapter in _installed()]):
            raise ValueError(
                f"{type(target).__name__} has no spiking layer that can be enabled: expected at least one of "
                + "; ".join(f"{library}: {', '.join(names(library))}" for library in _LIBRARIES)
            )
        return
    if not isinstance(target, str):
        raise TypeError(f"expected the name of a library or a torch.nn.Module, got {type(target).__name__}")
    adapter = _adapter(target)
    config.libraries[target] = chosen
    adapter.refresh()


def disable(target: str | nn.Module) -> None:
    """Turns it off again; graphs that were recorded stay valid.

    Raises:
        ValueError: if the library or the model is not enabled, or the library is unknown.
    """
    if isinstance(target, nn.Module):
        if not sum([adapter.abandon(target) for adapter in _installed()]):
            raise ValueError(f"this {type(target).__name__} is not enabled: call enable(model) first")
        return
    if not isinstance(target, str):
        raise TypeError(f"expected the name of a library or a torch.nn.Module, got {type(target).__name__}")
    adapter = _adapter(target)
    if target not in config.libraries:
        on = ", ".join(map(repr, config.libraries)) or "none"
        raise ValueError(f"{target!r} is not enabled (enabled: {on})")
    del config.libraries[target]
    adapter.refresh()


@contextmanager
def enabled(target: str | nn.Module, **options: Any) -> Iterator[None]:
    """``with enabled("snntorch", cutoff=0.3): ...``: on inside, and as it was before outside."""
    libraries = dict(config.libraries)
    models = [(m, m.__dict__.get(OPTIONS)) for m in target.modules()] if isinstance(target, nn.Module) else []
    enable(target, **options)
    try:
        yield
    finally:
        if isinstance(target, str):
            config.libraries = libraries
            _adapter(target).refresh()
        else:
            disable(target)
            for adapter in _installed():
                adapter.adopt_again(models)


@contextmanager
def host_code() -> Iterator[None]:
    """Inside, every layer runs the host library's own code, whatever is enabled."""
    before, config.suspended = config.suspended, True
    try:
        yield
    finally:
        config.suspended = before


def spiking_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the supported layers of a model that emit spikes."""
    found = {m for adapter in _installed() for m in adapter.layers(model) if adapter.spikes(m)}
    return [(name, module) for name, module in model.named_modules() if module in found]


@contextmanager
def truncated_surrogates(model: nn.Module, cutoff: float | None) -> Iterator[None]:
    """Inside, the host libraries multiply their surrogate derivatives by ``1[|U - threshold| < cutoff]``."""
    with ExitStack() as stack:
        if cutoff is not None:
            for adapter in _installed():
                stack.enter_context(adapter.truncated(model, cutoff))
        yield
