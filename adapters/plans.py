"""The plans of modules, kept as long as nothing they depend on changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..recorder import Plan

PLANS_PER_MODULE = 8  # one module may serve streams of several shapes in turn


_values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """A setting kept in a tensor, on the CPU. Fetched from CUDA once, because fetching waits for the device."""
    if tensor.is_cpu:
        return tensor.detach()
    version, copy = _values.get(tensor, (None, None))
    if version != tensor._version:
        version, copy = tensor._version, tensor.detach().cpu()
        _values[tensor] = version, copy
    return copy


class PlanCache:
    """Finds the plan of a module by a key that names everything the plan depends on."""

    def __init__(self) -> None:
        self._modules: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Plan | None, str | None, Any]]]
        self._modules = weakref.WeakKeyDictionary()

    def find(self, module: Any, key: tuple[Any, ...], alive: Any,
             make: Callable[[], tuple[Plan | None, str | None]]) -> tuple[Plan | None, str | None]:
        """The plan of a module, or the reason why there is none.

        Args:
            key: hashable; names objects by their id.
            alive: those objects; they are kept alive, so that no other object gets the id.
            make: makes the plan when the key is new.
        """
        plans = self._modules.get(module)
        if plans is None:
            plans = self._modules[module] = {}
        known = plans.get(key)
        if known is None:
            if len(plans) >= PLANS_PER_MODULE:
                del plans[next(iter(plans))]
            plan, problem = make()
            known = plans[key] = plan, problem, alive if plan is not None else None
        return known[0], known[1]
