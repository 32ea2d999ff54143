"""What is measured: the cases of each preset."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from . import SWEEPS

COMPILED = ("loop", "step")
RATE = 0.02
# Of the peers in peers.py: all; and those whose backward is linear in T.
PEERS = ("snnTorch, layer by layer", "Norse sequence", "Norse cells, unbind", "SpikingJelly multi-step", "sinabs",
         "dense layer, indexed", "dense layer, unbind")
LINEAR_PEERS = tuple(name for name in PEERS if name not in ("Norse sequence", "sinabs", "dense layer, indexed"))
# snnTorch's tutorial 6: what a neuron sees is the pooled map, so sizes are those of the input and of the pooled maps.
_CONV_SIZES = (784, 12 * 12 * 12, 64 * 4 * 4, 10)


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
        recurrent: the hidden layer drives itself, from all neurons to all.
        conv: the convolutional network of snnTorch's tutorial 6, which sees the same image at every step.
        compiled: what of the host goes through ``torch.compile``.
        peers: other implementations beside the host and ours; see ``peers.py``.
        input_rate, hidden_rate: share of the sites that spike.
        beta: decay of the membrane, for all but Norse.
        peak: the peak of resident memory is measured too, in processes of their own.
    """

    library: str
    sizes: tuple[int, ...]
    steps: int
    batch: int
    rounds: int = 7
    layer: bool = False
    gaussian: bool = False
    recurrent: bool = False
    conv: bool = False
    compiled: tuple[str, ...] = COMPILED
    peers: tuple[str, ...] = ()
    input_rate: float = RATE
    hidden_rate: float = RATE
    beta: float = 0.9
    peak: bool = False

    @property
    def name(self) -> str:
        given = ", Gaussian input" if self.gaussian else ", static image" if self.conv else ""
        rates = f", {self.input_rate:.2%} spikes" if self.input_rate != RATE else ""
        layers = [str(size) for size in self.sizes]
        layers[1] += "r" * self.recurrent
        what = "12C5-MP2-64C5-MP2-1024FC10" if self.conv else "-".join(layers)
        return f"{self.library} {what}, T={self.steps}, B={self.batch}{given}{rates}"

    @property
    def hidden(self) -> int:
        """Spiking layers whose rate is calibrated: all but a readout."""
        return len(self.sizes) - (1 if self.layer else 2)

    @property
    def sites(self) -> int:
        """Neurons of all layers, times T and B."""
        return self.steps * self.batch * sum(self.sizes[1:])

    def as_json(self) -> str:
        """For another process; see :meth:`from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case that :meth:`as_json` wrote."""
        properties: dict[str, Any] = json.loads(text)
        for key, value in properties.items():
            if isinstance(value, list):
                properties[key] = tuple(value)
        return cls(**properties)


def _paper(library: str, inputs: int, hidden: int, classes: int, steps: int, **options: object) -> Case:
    """The shapes of Perez-Nieves and Goodman, 'Sparse Spiking Gradient Descent': SHD, N-MNIST, Fashion-MNIST."""
    case = Case(library, (inputs, hidden, hidden, classes), steps, 256, rounds=5, compiled=())
    return replace(case, **options)  # type: ignore[arg-type]


def _layer(library: str, size: int, steps: int = 500, batch: int = 16, **options: object) -> tuple[Case, Case]:
    """The shape of Open Neuromorphic's benchmark, with dense and with spiking input."""
    case = replace(Case(library, (size, size), steps, batch, rounds=5, layer=True, compiled=()),
                   **options)  # type: ignore[arg-type]
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
_WIDE = Case("snntorch", (700, 1000, 1000, 20), 100, 64, rounds=5, peers=PEERS, peak=True)
_TINY = Case("snntorch", (50, 80, 80, 10), 12, 8, rounds=2, peers=PEERS)
_CPU = (
    replace(_WIDE, compiled=("loop",)),
    Case("snntorch", (700, 200, 200, 20), 500, 64, rounds=5, compiled=("step",), peers=PEERS, peak=True),
    Case("norse", (700, 1000, 1000, 20), 100, 64, rounds=5),
    Case("norse", (700, 200, 200, 20), 500, 64, rounds=5),
    Case("snntorch", _CONV_SIZES, 50, 64, rounds=3, conv=True, beta=0.5, compiled=(), peak=True,
         peers=("snnTorch, layer by layer", "SpikingJelly multi-step", "sinabs")),
    # What is quadratic in T is so here too, and adds nothing but minutes.
    Case("snntorch", (1156, 200, 200, 10), 300, 64, rounds=3, compiled=(), peers=LINEAR_PEERS),
    Case("snntorch", (784, 200, 200, 10), 100, 256, rounds=5, compiled=(), peers=LINEAR_PEERS),
    *_layer("snntorch", 512, rounds=3, peers=PEERS),
    *_layer("snntorch", 2048, rounds=2, peers=LINEAR_PEERS),
    *_layer("snntorch", 4096, rounds=1, peers=("SpikingJelly multi-step",)),
    # On whole sequences the synapse is one product, as the floor's is: what is left is what the neuron costs.
    *_layer("norse", 512, rounds=3),
    *_layer("norse", 2048, rounds=2),
    *_layer("norse", 4096, rounds=1),
)

_RECURRENT = tuple(Case(library, (700, 256, 20), 250, 64, rounds=5, recurrent=True, compiled=(), peak=True)
                   for library in ("snntorch", "norse"))

PRESETS = {
    "cpu": (*_CPU, *_RECURRENT),
    "recurrent": _RECURRENT,
    "quick": (_TINY, replace(_TINY, library="norse", peers=())),
    "gpu": _GPU,
    "gpu-quick": (
        replace(_TINY, compiled=(), peers=()),
        *_layer("norse", 96, steps=12, batch=4),
    ),
}


def _swept(case: Case, values: Iterable[Case]) -> tuple[Case, ...]:
    return tuple(replace(value, compiled=(), peers=case.peers, peak=False) for value in values)


def sweep_cases(sweep: str, quick: bool = False) -> tuple[Case, ...]:
    """The cases of a sweep.

    Args:
        sweep: one of ``bench.SWEEPS``.
        quick: a tiny network and few values.

    Raises:
        ValueError: if there is no such sweep.
    """
    base = replace(_TINY, rounds=1, peers=()) if quick else replace(_WIDE, rounds=3, peers=())
    inputs, _, _, classes = base.sizes
    if sweep == "density":
        rates = (0.02, 0.1) if quick else (0.003, 0.01, 0.02, 0.05, 0.1, 0.3)
        return _swept(base, (replace(base, input_rate=rate, hidden_rate=rate) for rate in rates))
    if sweep == "steps":
        steps = (6, 12) if quick else (25, 50, 100, 200, 400)
        return _swept(base, (replace(base, steps=count) for count in steps))
    if sweep == "batch":
        batches = (4, 8) if quick else (8, 16, 32, 64, 128, 256)
        return _swept(base, (replace(base, batch=count) for count in batches))
    if sweep == "width":
        widths = (40, 80) if quick else (125, 250, 500, 1000, 2000)
        return _swept(base, (replace(base, sizes=(inputs, width, width, classes)) for width in widths))
    raise ValueError(f"no sweep {sweep!r}: there are {', '.join(SWEEPS)}")


def swept_value(sweep: str, case: Case) -> float:
    """Where a case stands on the axis of its sweep."""
    return {"density": case.hidden_rate, "steps": case.steps, "batch": case.batch, "width": case.sizes[1]}[sweep]
