"""The peak of resident memory during one training step, in a process of its own.

``python -m snn_sparse_backend.bench.peak THREADS VARIANT CASE FACTORS`` is that process; it prints the bytes. Only
there has the allocator nothing left over from other steps that it could hand out again unseen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from .cases import Case

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_WARM_STEPS = 4
_LIMIT_SECONDS = 180


class PeakError(RuntimeError):
    """The peak could not be measured."""


def peak_of(case: Case, variant: str, factors: list[float], threads: int) -> int:
    """Bytes by which the resident memory of a fresh process grows at most during one step.

    Args:
        factors: what the weights are scaled by, as ``networks.calibrate`` found them.

    Raises:
        PeakError: if that process fails, or the system does not tell.
    """
    command = [sys.executable, "-m", __name__, str(threads), variant, case.as_json(), json.dumps(factors)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise PeakError(f"not within {_LIMIT_SECONDS} s") from error
    if done.returncode != 0:
        raise PeakError((done.stderr.strip().splitlines() or ["no message"])[-1][:120])
    return int(done.stdout.split()[-1])


def _resident(what: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise PeakError(f"{_STATUS} has no {what}")


def _measure(variant_name: str, case: Case, factors: list[float]) -> int:
    from .networks import scale
    from .variants import contest_of

    contest = contest_of(case, 0.0, torch.device("cpu"), only=variant_name)
    scale(contest.host.synapses, factors)
    variant = next(v for v in contest.variants if v.name == variant_name)
    whole = contest.x
    with variant.scope():
        # A short sequence loads what is loaded once, and shows which synapses feed neurons.
        contest.use(whole[:_WARM_STEPS])
        for _ in range(2):
            variant.loss().backward()
        contest.host.zero_grad()
        contest.use(whole)
        variant.prepare()
        before = _resident("VmRSS")
        try:
            _CLEAR.write_text("5")  # the high-water mark starts again from here
        except OSError as error:
            raise PeakError(f"{_CLEAR} cannot be written") from error
        variant.loss().backward()
        return max(0, _resident("VmHWM") - before)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(_measure(sys.argv[2], Case.from_json(sys.argv[3]), json.loads(sys.argv[4])))
