# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Every function, enumeration and constant has the documented name, parameters and defaults of NKI 0.3.0."""

from __future__ import annotations

import enum
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import nki_emulator

RECORD = Path(nki_emulator.__file__).with_name("nki_versions.json")
#: What NKI 0.3.0 documents: names with the parameters of functions, "" for anything else.
DOCUMENTED: dict[str, str] = {
    name: signatures["0.3.0"]
    for name, signatures in json.loads(RECORD.read_text(encoding="utf-8"))["names"].items()
    if "0.3.0" in signatures
}
MODULES = {"nki": nki_emulator, "nki.isa": nki_emulator.isa, "nki.language": nki_emulator.language}
#: (module, name) of what a module has, and the names in each of those that have some.
NAMES = [(m, name.removeprefix(f"{m}.")) for m in MODULES for name in DOCUMENTED if name.rpartition(".")[0] == m]
FUNCTIONS = [(m, name) for m, name in NAMES if DOCUMENTED[f"{m}.{name}"]]
MEMBERS = {
    (m, name): {member for member in DOCUMENTED if member.rpartition(".")[0] == f"{m}.{name}"} for m, name in NAMES
}
ENUMERATIONS = [
    key for key, members in MEMBERS.items() if members and isinstance(getattr(MODULES[key[0]], key[1]), enum.EnumMeta)
]


def text(default: Any) -> str | None:
    """A default value as the documentation writes it."""
    if default is inspect.Parameter.empty:
        return None
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    if hasattr(default, "nki_operator"):
        return f"nl.{default.nki_operator}"
    return repr(default)


def signature(function: Any) -> str:
    """Parameters as the record writes them."""
    parts = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in "".join(parts):
            parts.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = text(p.default)
        parts.append(f"{stars}{p.name}" + ("" if default is None else f"={default}"))
    return f"({', '.join(parts)})"


def test_the_record_is_read_whole() -> None:
    assert len(FUNCTIONS) == 150 and len(ENUMERATIONS) == 8 and ("nki.isa", "engine") in ENUMERATIONS


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=[f"{m}.{n}" for m, n in FUNCTIONS])
def test_parameters_are_those_of_the_documentation(module: str, name: str) -> None:
    assert signature(getattr(MODULES[module], name)) == DOCUMENTED[f"{module}.{name}"]


@pytest.mark.parametrize(("module", "name"), ENUMERATIONS)
def test_enumerations_have_the_documented_members(module: str, name: str) -> None:
    found = {f"{module}.{name}.{member.name}" for member in getattr(MODULES[module], name)}
    assert found == MEMBERS[module, name]


@pytest.mark.parametrize("module", MODULES)
def test_every_documented_name_exists(module: str) -> None:
    assert [n for m, n in NAMES if m == module and not hasattr(MODULES[module], n)] == []


def test_sizes_of_tiles_are_numbers() -> None:
    for member in MEMBERS["nki.language", "tile_size"]:
        assert isinstance(getattr(nki_emulator.language.tile_size, member.rpartition(".")[2]), int)


@pytest.mark.parametrize(
    "name",
    "dropout exponential nc_matmul_mx quantize_mx rand2 rand_get_state rand_set_state rng set_rng_seed".split(),
)
def test_what_is_not_emulated_says_so_by_name(name: str) -> None:
    function = getattr(nki_emulator.isa, name)
    required = [p for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty]
    with pytest.raises(NotImplementedError, match=f"nki.isa.{name} is not emulated"):
        function(*[None] * len(required))
