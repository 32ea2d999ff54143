"""How counts come back from a CUDA device without waiting for it.

A kernel's last block writes them into pinned host memory, tagged with the number of the launch; the host looks there
whenever it wants to know, and takes what it finds. No call of the CUDA runtime is involved, so looking costs nothing
and is allowed at any time.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .abi import CONSTANTS, STRUCTS
from .compat.cuda import capturing

_SLOTS = 65536
_COUNT = (1 << CONSTANTS["kReportBits"]) - 1
_TAGS = 1 << 22
_PENDING = 8


class Slots:
    """Pinned memory for the reports of the last 65536 launches.

    It is never freed: a kernel may still write to it when nobody waits for its report any more, and a captured one
    will do so whenever its graph is replayed. Such a late report carries an old tag and is ignored.
    """

    def __init__(self, pinned: bool) -> None:
        self._memory = torch.zeros((_SLOTS, 2), dtype=torch.int64, device="cpu", pin_memory=pinned)
        self.address = self._memory.data_ptr()
        self._words = (ctypes.c_int64 * (2 * _SLOTS)).from_address(self.address)
        self._launches = itertools.count(1)  # safe to ask from several threads
        self._last = 0

    def next(self) -> int:
        self._last = next(self._launches)
        return self._last

    def overwritten(self, launch: int) -> bool:
        """Whether a later launch has the slot by now."""
        return self._last - launch >= _SLOTS

    def place(self, launch: int) -> tuple[int, int]:
        """Address of the slot and tag of a launch."""
        return self.address + 16 * (launch % _SLOTS), (launch // _SLOTS + 1) % _TAGS

    def read(self, launch: int) -> tuple[int, int] | None:
        """The counts that a launch reported, or None if it has not yet (or too long ago)."""
        at, tag = 2 * (launch % _SLOTS), (launch // _SLOTS + 1) % _TAGS
        first, second = self._words[at], self._words[at + 1]
        if first >> CONSTANTS["kReportBits"] != tag or second >> CONSTANTS["kReportBits"] != tag:
            return None
        return first & _COUNT, second & _COUNT


@cache
def _slots(pinned: bool) -> Slots:
    return Slots(pinned)


class Counter:
    """Two running counts in device memory, and what is known of them on the host.

    Attributes:
        counts: int64 ``[2]`` on the device.
        known: the counts after the last launch whose report came in.
        done: what had been counted over by then, in the unit of the caller (steps, sites).
        started: the same for all launches so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._device, self._slots = device, _slots(device.type == "cuda")
        self._pending: deque[tuple[int, int]] = deque()
        self.known = (0, 0)
        self.done = self.started = 0

    def launch(self, amount: int) -> Any:
        """The report argument of a launch that counts over so much more.

        Without a slot where no report would come in: while a graph is captured, or if there is nothing to launch.
        """
        self.started += amount
        if not amount or capturing(self._device):
            return STRUCTS["SnnReport"](counts=self.counts.data_ptr())
        launch = self._slots.next()
        self._pending.append((launch, self.started))
        slot, tag = self._slots.place(launch)
        return STRUCTS["SnnReport"](counts=self.counts.data_ptr(), slot=slot, tag=tag)

    def look(self) -> None:
        """Takes notice of the reports that came in."""
        while self._pending:
            launch, started = self._pending[0]
            found = self._slots.read(launch)
            if found is not None:
                self.known, self.done = found, started
            elif not self._slots.overwritten(launch):
                return
            self._pending.popleft()

    @property
    def settled(self) -> bool:
        """Whether no report is outstanding."""
        return not self._pending


class Densities:
    """Densities of a layer's spikes and active sites, as far as the host knows them; None until then.

    On the CPU every raster knows its own. On CUDA those of earlier steps, or of earlier sequences, stand in for it.
    """

    def __init__(self) -> None:
        self.active: float | None = None
        self.spikes: float | None = None
        self._watched: list[Counter] = []

    def watch(self, counter: Counter) -> None:
        """Learn from a counter of (active sites, spikes) over sites once its report comes in."""
        # Where there are many, the older ones, which come in sooner, will do.
        if counter not in self._watched and len(self._watched) < _PENDING:
            self._watched.append(counter)

    def for_choice(self) -> Densities:
        """As :meth:`look`, for choices that affect how sums are rounded.

        When a report comes in differs from run to run, so nothing is known under ``use_deterministic_algorithms``.
        """
        return Densities() if torch.are_deterministic_algorithms_enabled() else self.look()

    def look(self) -> Densities:
        """Takes notice of the reports that came in; returns itself."""
        for counter in list(self._watched):
            counter.look()
            if counter.done:
                self.active, self.spikes = (count / counter.done for count in counter.known)
            if counter.settled:
                self._watched.remove(counter)
        return self


_of_modules: WeakKeyDictionary[Any, Densities] = WeakKeyDictionary()


def densities_of(module: Any) -> Densities:
    """What is known of the densities of a module: of a neuron's sites, or of a synapse's inputs without a raster."""
    return _of_modules.setdefault(module, Densities())
