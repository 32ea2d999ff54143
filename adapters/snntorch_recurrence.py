"""The recurrences of snnTorch's RLeaky and RSynaptic: which of them the kernels know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from snntorch._neurons import rleaky, rsynaptic
from torch import Tensor, nn

from ..recurrences import ConvRecurrence, OneToOne, Recurrence
from .fallback import tensor_problem

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ONE_TO_ONE = (rleaky.RecurrentOneToOne, rsynaptic.RecurrentOneToOne)
WEIGHT, BIAS = "recurrent.weight", "recurrent.bias"


def tensors_of(module: Any) -> tuple[dict[str, Tensor], str | None]:
    """Weight and bias, by the names that :func:`recurrence_of` wants, or why there are none."""
    recurrent = module._modules.get("recurrent")
    if type(recurrent) not in (nn.Linear, nn.Conv2d, *_ONE_TO_ONE):
        return {}, "its recurrence is not a Linear, a Conv2d or one to one"
    if any(getattr(recurrent, hooks) for hooks in _HOOKS) or "forward" in vars(recurrent):
        return {}, "its recurrence has hooks"
    found = {WEIGHT: recurrent.V} if isinstance(recurrent, _ONE_TO_ONE) else {
        WEIGHT: recurrent.weight, BIAS: recurrent.bias}
    if not isinstance(found[WEIGHT], Tensor):
        return {}, "the weight of its recurrence is not a tensor"
    return {name: tensor for name, tensor in found.items() if tensor is not None}, None


def settings_of(module: Any) -> tuple[Any, ...]:
    """What else about the recurrence a plan depends on."""
    recurrent = module._modules.get("recurrent")
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return type(recurrent), *(getattr(recurrent, name, None) for name in names)


def problem_of(module: Any, x: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """Why the recurrence does not fit the input ``[B, ...]``."""
    recurrent, weight = module.recurrent, tensors[WEIGHT]
    found = [tensors[name] for name in (WEIGHT, BIAS) if name in tensors]
    problem = tensor_problem(x, *found)
    if problem is not None:
        return f"recurrence: {problem}"
    mixes = isinstance(recurrent, _ONE_TO_ONE) and torch.result_type(x, weight) is x.dtype  # V may be an integer
    if any(tensor.dtype is not x.dtype for tensor in found) and not mixes:
        return f"its recurrence is of {weight.dtype} and its input of {x.dtype}"
    if isinstance(recurrent, nn.Linear):
        fits = x.dim() in (1, 2) and weight.shape == (x.shape[-1], x.shape[-1])
    elif isinstance(recurrent, nn.Conv2d):
        if recurrent.padding_mode != "zeros" or isinstance(recurrent.padding, str):
            return f"its recurrence pads with {recurrent.padding_mode!r}, {recurrent.padding!r}"
        fits = x.dim() == 4 and x.shape[1] == recurrent.in_channels and _keeps(recurrent, x.shape)
    else:
        row = x.shape[1:] if x.dim() > 1 else x.shape
        fits = weight.dim() <= len(row) and all(
            size in (1, of) for size, of in zip(reversed(weight.shape), reversed(row), strict=False))
    return None if fits else (f"its recurrence with a weight of shape {tuple(weight.shape)} does not fit the input of "
                              f"shape {tuple(x.shape)}")


def _keeps(conv: nn.Conv2d, shape: torch.Size) -> bool:
    """Whether a convolution leaves maps as they are in number and size."""
    assert not isinstance(conv.padding, str)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(
        shape[2:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)]
    return (conv.out_channels, *sizes) == tuple(shape[1:])


def recurrence_of(module: Any, tensors: Mapping[str, Tensor]) -> Recurrence:
    """How the spikes of a module drive it."""
    recurrent, weight, bias = module.recurrent, tensors[WEIGHT], tensors.get(BIAS)
    if isinstance(recurrent, nn.Linear):
        return Recurrence(weight, bias)
    if isinstance(recurrent, nn.Conv2d):
        assert not isinstance(recurrent.padding, str)
        return ConvRecurrence(weight, bias, recurrent.stride, recurrent.padding, recurrent.dilation, recurrent.groups)
    return OneToOne(weight)
