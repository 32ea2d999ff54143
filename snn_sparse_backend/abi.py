"""The C structs of the core as ctypes structures, read from ``csrc/abi.h`` so that each struct is written once."""

from __future__ import annotations

import ctypes
import re
from typing import Any

from .build import csrc_folder

_SCALARS: dict[str, Any] = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}


def _parse(text: str) -> tuple[dict[str, type[ctypes.Structure]], dict[str, int]]:
    text = re.sub(r"//[^\n]*", "", text)
    constants: dict[str, int] = {}
    for body in re.findall(r"enum \w+ : int32_t \{([^}]*)\}", text) + re.findall(r"constexpr int ([^;]*);", text):
        following = 0
        for item in filter(None, (part.strip() for part in body.split(","))):
            name, _, value = (word.strip() for word in item.partition("="))
            following = int(value) if value else following
            constants[name] = following
            following += 1
    structs: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"struct (\w+) \{([^}]*)\};", text):
        fields = [field for line in body.split(";") if line.strip() for field in _fields(line, structs, constants)]
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs, constants


def _fields(line: str, structs: dict[str, type[ctypes.Structure]], constants: dict[str, int]) -> list[tuple[str, Any]]:
    """The members that one declaration such as ``const void* state_in[kMaxStates]`` or ``int64_t a, b`` adds."""
    declared = " ".join(line.split())
    kind: Any
    if "*" in declared:
        names, kind = declared[declared.rindex("*") + 1 :], ctypes.c_void_p
    else:
        word, names = declared.removeprefix("const ").split(" ", 1)
        kind = _SCALARS.get(word) or structs[word]
    members = []
    for name in names.split(","):
        match = re.fullmatch(r"\s*(?:const )?(\w+)(?:\[(\w+)\])?\s*", name)
        if match is None:
            raise ValueError(f"abi.h: cannot read the declaration {declared!r}")
        members.append((match[1], kind * constants[match[2]] if match[2] else kind))
    return members


STRUCTS, CONSTANTS = _parse((csrc_folder() / "abi.h").read_text())
SURROGATES = _parse((csrc_folder() / "surrogates.h").read_text())[1]
