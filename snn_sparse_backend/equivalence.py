"""Dense against sparse: the same model, inputs and weights through the host library's autograd and through ours."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .adapters.switch import enabled, host_code, spiking_layers, truncated_surrogates
from .compat.spikes import float64_spikes
from .counters import counts

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """How the gradients of one tensor differ.

    Args:
        name: parameter name, or ``input[i]``.
        relative: ``|dense - sparse| / |dense|`` in the Euclidean norm.
        cosine: cosine of the angle between them (1 when both vanish).
        missing: None pattern: ``""`` when both or neither exist, else which side has no gradient.
    """

    name: str
    relative: float
    cosine: float
    missing: str = ""


@dataclass
class Report:
    """What :func:`check` found. ``ok`` says whether everything agrees; ``print(report)`` shows a table."""

    tolerance: float
    loss_dense: float
    loss_sparse: float
    differences: list[Difference]
    spike_flips: dict[str, int]
    fused_steps: int
    host_steps: int
    cutoff: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """Largest relative difference of a gradient; NaN if any gradient is not a number."""
        values = [d.relative for d in self.differences]
        return float("nan") if any(v != v for v in values) else max(values, default=0.0)

    @property
    def ok(self) -> bool:
        """Whether every gradient agrees within the tolerance, with the same None pattern and the same spikes."""
        if any(d.missing or not d.relative <= self.tolerance for d in self.differences):
            return False
        return not any(self.spike_flips.values())

    def __str__(self) -> str:
        lines = [f"{'tensor':32} {'relative':>10} {'cosine':>12}"]
        for d in sorted(self.differences, key=lambda d: -d.relative if d.relative == d.relative else float("-inf")):
            lines.append(f"{d.name:32} {d.relative:10.2e} {d.cosine:12.9f} {d.missing}")
        lines.append(f"loss: dense {self.loss_dense:.9g}, sparse {self.loss_sparse:.9g}"
                     + (f"; surrogate derivative cut at {self.cutoff}" if self.cutoff is not None else ""))
        flips = ", ".join(f"{name}: {n}" for name, n in self.spike_flips.items())
        lines.append(f"spike flips: {flips or 'no spiking layer seen'}")
        lines.append(f"time steps on the fused path: {self.fused_steps}, by the host's own code: {self.host_steps}")
        lines += self.notes
        verdict = "agree" if self.ok else "DIFFER"
        lines.append(f"{verdict}: worst relative difference {self.worst:.2e}, tolerance {self.tolerance:.0e}")
        return "\n".join(lines)


def check(model: nn.Module, inputs: Any, loss: Loss | None = None, *, cutoff: float | None = None,
          forward: str = "host", tolerance: float | None = None, double: bool = False) -> Report:
    """Compares the sparse backend with the host library's dense autograd on one batch.

    The model is left as it was: gradients, states, buffers and random generators are restored.

    Args:
        model: a model with snnTorch or Norse layers.
        inputs: its input, or a tuple of positional arguments; layouts as the model expects them, e.g. ``[T, B, N]``.
        loss: turns the output into a scalar; default: a fixed random weighting of every floating-point output.
        cutoff: check the truncated surrogate: the dense side then runs the host library with the surrogate derivative
            multiplied by ``1[|U - threshold| < cutoff]``.
        forward: ``"host"`` or ``"sparse"``, see :class:`~snn_sparse_backend.Options`.
        tolerance: largest relative difference; default 1e-5 in float32, 1e-10 in float64.
        double: compare a float64 copy of the model (snnTorch's spikes are kept in float64 for this purpose).

    Returns:
        A :class:`Report`.

    Raises:
        ValueError: if the model has no spiking layer that can be enabled, or the loss is not a scalar.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with ExitStack() as stack:
        if double:
            with _states_kept(model):
                model = copy.deepcopy(model).double()
            arguments = tree_map(_to_double, arguments)
            stack.enter_context(float64_spikes())
        stack.enter_context(_left_as_it_was(model, arguments))
        with host_code(), truncated_surrogates(model, cutoff), _states_kept(model):
            dense = _run(model, arguments, loss)
        before = counts.copy()
        with enabled(model, cutoff=cutoff, forward=forward), _states_kept(model):
            sparse = _run(model, arguments, loss)
    fused, host = (counts[key] - before[key] for key in ("neuron_steps", "host_steps"))
    dtype = torch.float64 if double else torch.float32
    report = Report(
        tolerance=TOLERANCE[dtype] if tolerance is None else tolerance,
        loss_dense=dense.loss, loss_sparse=sparse.loss,
        differences=[_difference(n, dense.grads[n], sparse.grads[n]) for n in dense.grads],
        spike_flips={n: _flips(dense.spikes[n], sparse.spikes.get(n, [])) for n in dense.spikes},
        fused_steps=fused, host_steps=host, cutoff=cutoff,
    )
    if not fused:
        report.notes.append("note: no step ran on the fused path, so this compared the host library with itself")
    return report


def check_file(spec: str, **options: Any) -> Report:
    """:func:`check` for ``FILE.py:FACTORY``; the factory returns ``(model, inputs)`` or ``(model, inputs, loss)``.

    Raises:
        ValueError: for a malformed spec, a missing file or factory, or a factory that returns something else.
    """
    file, _, name = spec.rpartition(":")
    if not file or not name:
        raise ValueError(f"expected FILE.py:FACTORY, got {spec!r}")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file}: no such file")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path.stem] = module
    module_spec.loader.exec_module(module)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"{file} has no function {name!r} that returns (model, inputs) or (model, inputs, loss)")
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise ValueError(f"{spec}: expected (model, inputs) or (model, inputs, loss), got {type(made).__name__}")
    return check(made[0], made[1], made[2] if len(made) == 3 else None, **options)


# ---------------------------------------------------------------------------------------------------- one run


@dataclass
class _Outcome:
    loss: float
    grads: dict[str, torch.Tensor | None]
    spikes: dict[str, list[torch.Tensor]]


def _run(model: nn.Module, arguments: Sequence[Any], loss: Loss | None) -> _Outcome:
    """One forward and backward from cleared gradients; collects gradients and the spikes of every spiking layer."""
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.requires_grad]
    for tensor in (*model.parameters(), *leaves):
        tensor.grad = None
    spikes: dict[str, list[torch.Tensor]] = {}
    hooks = [layer.register_forward_hook(_collector(spikes.setdefault(name, []))) for name, layer in
             spiking_layers(model)]
    try:
        value = (loss or _default_loss)(model(*arguments))
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"the loss must be a scalar tensor, got {shape}")
    value.backward()
    grads: dict[str, torch.Tensor | None] = {n: p.grad for n, p in model.named_parameters()}
    grads.update({f"input[{i}]": leaf.grad for i, leaf in enumerate(leaves)})
    return _Outcome(value.item(), grads, spikes)


def _collector(into: list[torch.Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        into.append(first.detach().clone())

    return hook


def _default_loss(output: Any) -> torch.Tensor:
    """A fixed random weighting of every floating-point tensor of the output."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not tensors:
        raise ValueError("the output of the model does not depend on anything that requires a gradient")
    generator = torch.Generator("cpu").manual_seed(0)  # the same weights on every device
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype, device="cpu").to(t.device) for t in tensors]
    return torch.stack([(t * w).sum() for t, w in zip(tensors, weights, strict=True)]).sum()


def _difference(name: str, dense: torch.Tensor | None, sparse: torch.Tensor | None) -> Difference:
    if dense is None or sparse is None:
        missing = "" if dense is sparse else f"None only in the {'dense' if dense is None else 'sparse'} run"
        return Difference(name, 0.0, 1.0, missing)
    a, b = dense.double().flatten(), sparse.double().flatten()
    gap, size = (a - b).norm().item(), a.norm().item()
    relative = gap / size if size else (0.0 if gap == 0 else float("inf"))
    product = size * b.norm().item()
    return Difference(name, relative, (a @ b).item() / product if product else float(gap == 0))


def _flips(dense: list[torch.Tensor], sparse: list[torch.Tensor]) -> int:
    if len(dense) != len(sparse):
        return max(len(dense), len(sparse))
    return sum(int((a != b).sum()) for a, b in zip(dense, sparse, strict=True))


# ---------------------------------------------------------------------------------------------------- scopes


def _to_double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


@contextmanager
def _states_kept(model: nn.Module) -> Iterator[None]:
    """Starts from detached states and buffers, and puts the original ones back."""
    kept = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for module, name, buffer in kept:
        module._buffers[name] = buffer.detach().clone()
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer


def _random_state() -> list[torch.Tensor]:
    """The states of the generators of the CPU and, if CUDA is in use, of its devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])


@contextmanager
def _left_as_it_was(model: nn.Module, arguments: Sequence[Any]) -> Iterator[None]:
    """Restores gradients afterwards; makes both runs draw the same random numbers."""
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, torch.Tensor) and t.requires_grad]
    kept = [(t, t.grad) for t in (*model.parameters(), *leaves)]
    state = _random_state()
    original = model.forward

    def seeded(*args: Any, **kwargs: Any) -> Any:
        _set_random_state(state)
        return original(*args, **kwargs)

    model.forward = seeded
    try:
        yield
    finally:
        del model.forward
        if model.forward != original:  # it was an attribute of the instance
            model.forward = original
        _set_random_state(state)
        for tensor, grad in kept:
            tensor.grad = grad
