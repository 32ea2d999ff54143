"""For test suites: assert that a model's gradients are the host library's own."""

from __future__ import annotations

from typing import Any

from torch import nn

from .equivalence import Loss, Report, check


def assert_gradients_match(model: nn.Module, inputs: Any, loss: Loss | None = None, *, require_fused: bool = True,
                           **options: Any) -> Report:
    """Asserts that the sparse backend reproduces the host library's gradients, None pattern and spikes.

    Args:
        model, inputs, loss: as for :func:`snn_sparse_backend.check`.
        require_fused: also fail if no time step ran on the fused path.
        options: further arguments of :func:`snn_sparse_backend.check`.

    Returns:
        The report.

    Raises:
        AssertionError: with the report as its message.
    """
    report = check(model, inputs, loss, **options)
    if not report.ok or (require_fused and not report.fused_steps):
        raise AssertionError(f"the gradients do not match\n{report}")
    return report
