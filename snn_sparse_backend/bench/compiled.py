"""``torch.compile`` of the stock network, guarded: tried in a process of its own first, with a time limit.

``python -m snn_sparse_backend.bench.compiled loop cpu CASE`` is that process: what to compile (the whole loop or one
time step), the device, and the case as JSON.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Case
from .networks import SnntorchNet, batch_of, synapses_of


def compiled_loss(net: SnntorchNet, loss: Callable[[], Tensor], kind: str) -> Callable[[], Tensor]:
    """The loss of a network whose whole loop, or whose time step, goes through ``torch.compile``.

    Args:
        net: one that nobody else uses: the compiled code guards what its modules remember.
        loss: calls it.
    """
    if kind == "loop":
        net.forward = torch.compile(net.forward)  # type: ignore[method-assign]
    else:
        net.step = torch.compile(net.step)  # type: ignore[method-assign]
    return loss


def problem_with(kind: str, case: Case, device: torch.device, seconds: float) -> str | None:
    """Why this does not compile within so many seconds, or None if it does."""
    if seconds <= 0:
        return "not tried"
    command = [sys.executable, "-m", __name__, kind, str(device), case.as_json()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"does not compile within {seconds:.0f} s"
    if done.returncode != 0:
        return f"does not compile: {(done.stderr.strip().splitlines() or ['no message'])[-1][:120]}"
    return None


def _try(kind: str, device: torch.device, case: Case) -> None:
    net = SnntorchNet(synapses_of(case), case.beta, case.layer).to(device)
    x, _ = batch_of(case, device)
    loss = compiled_loss(net, lambda: net(x).sum(), kind)
    for _ in range(2):
        loss().backward()


if __name__ == "__main__":
    _try(sys.argv[1], torch.device(sys.argv[2]), Case.from_json(sys.argv[3]))
