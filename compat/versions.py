"""Which versions are known, and which are installed: the only place that asks for either."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# The versions whose formulas these sources follow; every other one is tried before it is trusted, see probe.py.
KNOWN: dict[str, tuple[str, ...]] = {
    "snntorch": ("0.9.4", "1.0.0"),
    "norse": ("1.0.0", "1.1.0"),
    "torch": ("2.11.*", "2.12.*", "2.13.*", "2.14.*", "2.15.*"),
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@cache
def installed(library: str) -> str | None:
    """The installed version; None if there is none, or only files without metadata."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


@cache
def known(library: str) -> bool:
    """Whether the installed version is one of the table."""
    found = installed(library)
    return found is not None and any(fnmatch(found, pattern) for pattern in KNOWN[library])


def described(library: str) -> str:
    """Name and version, for messages."""
    return f"{library} {installed(library) or 'of an unknown version'}"
