"""The precision of snnTorch's spikes, which are float32 whatever the membrane is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float64_spikes() -> Iterator[None]:
    """Inside, ``Tensor.float`` leaves float64 alone, so that snnTorch nets can run in double precision."""
    original = torch.Tensor.float

    def redirect(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A surrogate converts the comparison u > 0: the boolean no longer tells the precision of u.
        if self.dtype in (torch.bool, torch.float64):
            return self.double()
        return original(self, *args, **kwargs)

    torch.Tensor.float = redirect  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.float = original  # type: ignore[method-assign]
