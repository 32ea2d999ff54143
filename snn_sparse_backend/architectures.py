"""The GPUs that torch sees, and the architectures that the CUDA kernels are compiled for.

An architecture is written as in $TORCH_CUDA_ARCH_LIST: "9.0" is machine code, "9.0+PTX" also holds the portable code
that the driver compiles for newer GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .toolchain import MEANWHILE_CUDA, BuildError

PORTABLE = ("8.0", "9.0+PTX")  # where no GPU says what is needed


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name and its compute capability."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


def visible_gpus() -> tuple[Gpu, ...]:
    """The GPUs that a CUDA build of torch can use now."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():  # a ROCm build has GPUs too, but no nvcc for them
        return ()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(device.name, (device.major, device.minor)) for device in devices)


def listed_architectures() -> tuple[str, ...]:
    """Those of $TORCH_CUDA_ARCH_LIST; none when it is not set."""
    return tuple(os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split())


def architectures_of(gpus: Iterable[Gpu]) -> tuple[str, ...]:
    return tuple(f"{major}.{minor}" for major, minor in sorted({gpu.capability for gpu in gpus}))


def code_flags(architectures: Iterable[str]) -> tuple[str, ...]:
    """What tells nvcc to compile for `architectures`, in an order of its own."""
    flags = set()
    for architecture in architectures:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", architecture)
        if match is None:
            raise BuildError(
                f"expected a CUDA architecture like 8.0 or 9.0+PTX, got {architecture!r}. "
                f"Correct or unset $TORCH_CUDA_ARCH_LIST. {MEANWHILE_CUDA}"
            )
        number = match[1] + match[2]
        flags.add(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.add(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(sorted(flags))


def portable_serves(gpus: Iterable[Gpu], driver_compiles: bool) -> bool:
    """Whether a library for PORTABLE runs on all `gpus`, with `driver_compiles` also where only its PTX does."""
    code = {tuple(map(int, architecture.removesuffix("+PTX").split("."))) for architecture in PORTABLE}

    def serves(capability: tuple[int, int]) -> bool:
        # Machine code runs within a major version, PTX from its version on.
        native = any(major == capability[0] and minor <= capability[1] for major, minor in code)
        return native or (driver_compiles and capability >= max(code))

    return all(serves(gpu.capability) for gpu in gpus)
