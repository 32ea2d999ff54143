"""The products inside Norse's layers: of the input, and in recurrent ones of the spikes of the step before."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import Options
from ..recurrences import Recurrence
from ..synapse_run import run_synapse
from ..tapes import tag_of
from .fallback import tensor_problem


class InputProduct:
    """Stands for the ``nn.Linear`` that the input weight of a layer would be."""

    bias = None

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


_products: weakref.WeakKeyDictionary[Any, InputProduct] = weakref.WeakKeyDictionary()


def problem_of(module: Any, names: tuple[str, ...], x: Tensor, sequence: bool) -> str | None:
    """Why the products of a layer with the weights of these names must be left to the host's code."""
    weights = [getattr(module, name) for name in names]
    if not all(isinstance(weight, Tensor) for weight in weights):
        return "its weights are not tensors"
    problem = tensor_problem(x, *weights)
    if problem is not None:
        return f"weights: {problem}"
    if x.dim() - sequence not in (1, 2):
        return f"inputs of shape {tuple(x.shape)} are not supported, only those of one step [B, N] or [N]"
    if any(weight.dtype is not x.dtype for weight in weights):
        return "its weights and its input have different dtypes"
    hidden = len(module.input_weights)
    expected = [(hidden, x.shape[-1]), (hidden, hidden)][: len(weights)]
    if [tuple(weight.shape) for weight in weights] != expected:
        return f"its weights do not have the shapes {', '.join(map(str, expected))}"
    if sequence and module.record_states:
        return "record_states is not supported with a recurrence"
    return None


def recurrence_of(module: Any) -> Recurrence:
    """Weight of the recurrence."""
    return Recurrence(module.recurrent_weights)


def input_current(module: Any, x: Tensor, sequence: bool, options: Options) -> Tensor:
    """``x @ input_weights.T``, with the bits of the host, which multiplies one step at a time.

    Args:
        x: ``[T, B, inputs]`` of a sequence, ``[B, inputs]`` of a step; or without ``B``.
    """
    weight = module.input_weights

    def host() -> Tensor:
        with torch.no_grad():
            return torch.stack([F.linear(step, weight) for step in x]) if sequence else F.linear(x, weight)

    if not (weight.requires_grad or x.requires_grad):
        return host()
    product = _products.get(module)
    if product is None:
        product = _products[module] = InputProduct(weight)
    product.weight = weight
    rows = x.shape[-2] if x.dim() - sequence == 2 else 1
    one: Any = product
    return run_synapse(one, options, host, x, tag_of(x), rows=rows)
