"""A class of a version that is not known is tried once against the library's own code before it runs on the kernels.

A *trial* plays a few steps, by the library's code or fused, and hands over everything that a user could see.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..counters import counts
from .versions import described, known

TOLERANCE = 1e-10  # of gradients in float64, relative; outputs are to be the same bits


@dataclass(frozen=True)
class Outcome:
    """What one side of a trial gave, by name.

    Args:
        outputs: of every step, with its states.
        gradients: None where autograd finds none.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


Trial = Callable[[bool], Outcome]  # whether it runs fused


class Probe:
    """Whether the classes of a library compute what the kernels compute.

    Args:
        library: its name.
    """

    def __init__(self, library: str) -> None:
        self.library = library
        self._verdicts: dict[Hashable, str | None] = {}
        self._lock = threading.RLock()

    @cached_property
    def wanted(self) -> bool:
        """Whether there is anything to find out: known versions of the library and of torch were tested."""
        return not (known(self.library) and known("torch"))

    def problem(self, key: Hashable, trials: Callable[[], Iterable[Trial]]) -> str | None:
        """Why a class must be left to the library, or None.

        Args:
            key: what the verdict is about; the trials run once for each.
            trials: makes them.
        """
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = None  # the trials themselves ask
                try:
                    self._verdicts[key] = self._reason(trials)
                except BaseException:  # interrupted: nothing was found out
                    del self._verdicts[key]
                    raise
            return self._verdicts[key]

    def forget(self) -> None:
        """Lets everything be tried again."""
        self._verdicts.clear()
        self.__dict__.pop("wanted", None)

    def _reason(self, trials: Callable[[], Iterable[Trial]]) -> str | None:
        before = counts.copy()
        try:
            with _undisturbed():
                found = next(filter(None, map(_difference, trials())), None)
        except Exception as error:
            found = f"trying it failed: {type(error).__name__}: {error}"
        finally:
            counts.clear()
            counts.update(before)
        if found is None:
            return None
        unknown = " and ".join(described(name) for name in (self.library, "torch") if not known(name))
        return f"this package does not know {unknown}, and {found}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Trials draw from a generator of their own, on the CPU, and warn nobody; the user's settings do not matter."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _difference(trial: Trial) -> str | None:
    """What differs between the two sides, in words."""
    torch.default_generator.manual_seed(0)
    expected = trial(False)
    torch.default_generator.manual_seed(0)
    counts.clear()
    found = trial(True)
    if counts["host_steps"] or not counts["neuron_steps"]:
        return "a trial of it did not run on the kernels"
    for name, output in expected.outputs.items():
        other = found.outputs[name]
        if (output.dtype, output.shape) != (other.dtype, other.shape):
            return f"its {name} has another shape or dtype"
        if not torch.equal(output, other):
            return f"its {name} differs by {float((output - other).abs().max()):.1e}"
    size = max((float(g.norm()) for g in expected.gradients.values() if g is not None), default=0.0)
    for name, gradient in expected.gradients.items():
        another = found.gradients[name]
        if gradient is None or another is None:
            if gradient is not another:
                return f"the gradient of its {name} is {'None' if gradient is None else 'not None'}, unlike ours"
            continue
        error = float((gradient - another).norm())
        if not error <= TOLERANCE * size:  # nor if it is not a number
            return f"the gradient of its {name} differs by {error:.1e}"
    return None
