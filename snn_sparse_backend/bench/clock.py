"""Time, as the device that does the work sees it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch


class Clock:
    """Stamps on the work of one device: the host's time on the CPU, events of the current stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._cuda = device, device.type == "cuda"

    def mark(self) -> Any:
        """A stamp behind all work so far; does not wait for it."""
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def between(self, *marks: Any) -> tuple[float, ...]:
        """Seconds from each stamp to the next; waits for the last one."""
        self.wait()
        return tuple(a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairwise(marks))


class Meter:
    """Times calls of a kernel, several in a row, and copies of a large tensor.

    On CUDA such copies come first: while they run the host queues the calls, so that no call waits for the host. What
    fits into the device's cache stays there from call to call, so it may be faster than any copy.

    Attributes:
        copy_rate: bytes read and written per second by a copy.
    """

    LAUNCHES, REPEATS, COPIES = 10, 5, 4
    ENOUGH_SECONDS = 5e-3  # for one row of calls

    def __init__(self, device: torch.device, size: int) -> None:
        self._clock = Clock(device)
        self._source = torch.rand(size // 4, device=device)
        self._target = torch.empty_like(self._source)
        self.copy_rate = 2 * self._source.nbytes / self.seconds(self._copy)

    def seconds(self, call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
        """The median time of one call.

        Args:
            prepare: runs before each row of calls, untimed.
        """
        launches, times = 1, []
        for i in range(2 + self.REPEATS):
            prepare()
            for _ in range(self.COPIES if self._clock.device.type == "cuda" else 0):
                self._copy()
            start = self._clock.mark()
            for _ in range(launches):
                call()
            (taken,) = self._clock.between(start, self._clock.mark())
            if i == 1:  # the very first call may have loaded or set up something
                launches = max(1, min(self.LAUNCHES, int(self.ENOUGH_SECONDS / max(taken, 1e-9))))
            elif i > 1:
                times.append(taken / launches)
        return median(times)

    def _copy(self) -> None:
        self._target.copy_(self._source)
