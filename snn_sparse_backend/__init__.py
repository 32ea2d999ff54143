"""Sparse, time-fused backward passes for the spiking networks of snnTorch and Norse.

::

    import snn_sparse_backend as sparse

    sparse.enable("snntorch")              # every snnTorch layer of this process
    sparse.enable("snntorch", cutoff=0.3)  # backpropagate only where |U - threshold| < 0.3
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path

if not (_Path(__file__).resolve().parent / "adapters").is_dir():  # a source checkout
    __path__.append(str(_Path(__file__).resolve().parent.parent))

from .adapters.fallback import SparseFallbackWarning
from .adapters.switch import disable, enable, enabled
from .build import BuildError
from .config import Options, config
from .counters import counts, reset_counts
from .equivalence import Report, check
from .registered import register_surrogate

try:
    __version__ = _version("snn-sparse-backend")
except _PackageNotFoundError:  # used from a checkout that is not installed
    __version__ = "0+checkout"

__all__ = ["BuildError", "Options", "Report", "SparseFallbackWarning", "check", "config", "counts", "disable", "enable",
           "enabled", "register_surrogate", "reset_counts"]
