"""``torch.compile`` of the stock network, guarded: tried in a process of its own first, with a time limit.

``python -m snn_sparse_backend.bench.compiled loop cpu 100 64 700 1000 1000 20`` is that process: what to compile (the
whole loop or one time step), the device, T, B, and the sizes of the layers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .cases import Case
from .networks import SnntorchNet, linear_layers


def compiled_loss(net: SnntorchNet, x: Tensor, labels: Tensor, kind: str) -> Callable[[], Tensor]:
    """The loss of a network whose whole loop, or whose time step, goes through ``torch.compile``.

    Args:
        net: one that nobody else uses: the compiled code guards what its modules remember.
    """
    if kind == "loop":
        whole = torch.compile(lambda inputs: F.cross_entropy(net(inputs), labels))
        return lambda: whole(x)
    net.step = torch.compile(net.step)  # type: ignore[method-assign]
    return lambda: F.cross_entropy(net(x), labels)


def problem_with(kind: str, case: Case, device: torch.device, seconds: float) -> str | None:
    """Why this does not compile within so many seconds, or None if it does."""
    if seconds <= 0:
        return "not tried"
    command = [sys.executable, "-m", __name__, kind, str(device), *map(str, (case.steps, case.batch, *case.sizes))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"does not compile within {seconds:.0f} s"
    if done.returncode != 0:
        return f"does not compile: {(done.stderr.strip().splitlines() or ['no message'])[-1][:120]}"
    return None


def _try(kind: str, device: torch.device, steps: int, batch: int, *sizes: int) -> None:
    net = SnntorchNet(linear_layers(sizes)).to(device)
    x = (torch.rand(steps, batch, sizes[0], device=device) < 0.02).float()
    loss = compiled_loss(net, x, torch.zeros(batch, dtype=torch.long, device=device), kind)
    for _ in range(2):
        loss().backward()


if __name__ == "__main__":
    _try(sys.argv[1], torch.device(sys.argv[2]), *map(int, sys.argv[3:]))
