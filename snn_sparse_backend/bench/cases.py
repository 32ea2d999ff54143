"""What is measured: the cases of each preset."""

from __future__ import annotations

from dataclasses import dataclass, replace

COMPILED = ("loop", "step")


@dataclass(frozen=True)
class Case:
    """One network to measure.

    Args:
        library: the host library.
        sizes: of the input and of the layers.
        steps, batch: T and B.
        rounds: how often each variant is timed.
        layer: one spiking layer on whole sequences, instead of a classifier.
        gaussian: dense normal input instead of spikes.
        compiled: what of the host goes through ``torch.compile``.
    """

    library: str
    sizes: tuple[int, ...]
    steps: int
    batch: int
    rounds: int = 7
    layer: bool = False
    gaussian: bool = False
    compiled: tuple[str, ...] = COMPILED

    @property
    def name(self) -> str:
        given = ", Gaussian input" if self.gaussian else ""
        return f"{self.library} {'-'.join(map(str, self.sizes))}, T={self.steps}, B={self.batch}{given}"

    @property
    def hidden(self) -> int:
        """Spiking layers whose rate is calibrated: all but a readout."""
        return len(self.sizes) - (1 if self.layer else 2)


def _paper(library: str, inputs: int, hidden: int, classes: int, steps: int, **options: object) -> Case:
    """The shapes of Perez-Nieves and Goodman, 'Sparse Spiking Gradient Descent': SHD, N-MNIST, Fashion-MNIST."""
    case = Case(library, (inputs, hidden, hidden, classes), steps, 256, rounds=5, compiled=())
    return replace(case, **options)  # type: ignore[arg-type]


def _layer(library: str, size: int, steps: int = 500, batch: int = 16) -> tuple[Case, Case]:
    """The shape of Open Neuromorphic's benchmark, with dense and with spiking input."""
    case = Case(library, (size, size), steps, batch, rounds=5, layer=True, compiled=())
    return replace(case, gaussian=True), case


# Those that say most come first: a run may be cut short.
_GPU = (
    # The loop over 500 steps takes torch.compile longer than anybody waits; one step of it does not.
    _paper("snntorch", 700, 200, 20, 500, compiled=("step",)),
    _paper("norse", 700, 200, 20, 500, rounds=3),
    *(case for size in (4096, 8192, 16384) for case in _layer("norse", size)),
    _paper("snntorch", 1156, 200, 10, 300),
    _paper("snntorch", 784, 200, 10, 100, compiled=("step",)),
    _paper("snntorch", 700, 1000, 20, 500, rounds=3),
    _paper("snntorch", 1156, 1000, 10, 300, rounds=3),
    _paper("snntorch", 784, 1000, 10, 100),
    *_layer("snntorch", 4096),
)

PRESETS = {
    "first-light": (
        Case("snntorch", (700, 1000, 1000, 20), 100, 64),
        Case("snntorch", (700, 200, 200, 20), 500, 64),
        Case("norse", (700, 1000, 1000, 20), 100, 64),
    ),
    "quick": (
        Case("snntorch", (50, 80, 80, 10), 12, 8, rounds=2),
        Case("norse", (50, 80, 80, 10), 12, 8, rounds=2),
    ),
    "gpu": _GPU,
    "gpu-quick": (
        Case("snntorch", (50, 80, 80, 10), 12, 8, rounds=2, compiled=()),
        *_layer("norse", 96, steps=12, batch=4),
    ),
}
