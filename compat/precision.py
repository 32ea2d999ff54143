"""What float32 products are computed in: torch may have been allowed a narrower format, by its old or new settings."""

from __future__ import annotations

from typing import Any

import torch

_FULL = ("ieee", "none")


def _in_force(backend: Any, legacy: Any) -> bool:
    """Whether products are of full precision; torch refuses to answer by the old ones once the new ones were used."""
    setting = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # torch 2.9 and newer
    return setting in _FULL if setting is not None else legacy()


def full_on_cpu() -> bool:
    """Whether float32 products on the CPU are computed in float32."""
    return _in_force(torch.backends.mkldnn, lambda: torch.get_float32_matmul_precision() == "highest")


def full_on_cuda() -> bool:
    """Whether float32 products on CUDA are computed in float32, not in TF32."""
    return _in_force(torch.backends.cuda, lambda: not torch.backends.cuda.matmul.allow_tf32)
