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

FACTS = json.loads((Path(__file__).parents[2] / "data" / "nki_signatures.json").read_text())["modules"]
MODULES = {"nki": nki_emulator, "nki.isa": nki_emulator.isa, "nki.language": nki_emulator.language}
FUNCTIONS = [(module, name) for module in MODULES for name in FACTS[module]["functions"]]


def text(default: Any) -> str | None:
    """A default value as the documentation writes it."""
    if default is inspect.Parameter.empty:
        return None
    if isinstance(default, enum.Enum):
        return f"{type(default).__name__}.{default.name}"
    if hasattr(default, "nki_operator"):
        return f"nl.{default.nki_operator}"
    return repr(default)


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=[f"{m}.{n}" for m, n in FUNCTIONS])
def test_parameters_are_those_of_the_documentation(module: str, name: str) -> None:
    parameters = inspect.signature(getattr(MODULES[module], name)).parameters.values()
    found = [{"default": text(p.default), "kind": p.kind.name.lower(), "name": p.name} for p in parameters]
    assert found == FACTS[module]["functions"][name]


@pytest.mark.parametrize(
    ("module", "name", "members"),
    [(m, name, members) for m in MODULES for name, members in FACTS[m]["enums"].items()],
)
def test_enumerations_have_the_documented_members(module: str, name: str, members: list[str]) -> None:
    assert [member.name for member in getattr(MODULES[module], name)] == members


@pytest.mark.parametrize("module", MODULES)
def test_constants_and_classes_exist(module: str) -> None:
    names = [*FACTS[module]["constants"], *FACTS[module]["classes"]]
    assert [n for n in names if not hasattr(MODULES[module], n)] == []
    for member in FACTS["nki.language"]["classes"]["tile_size"]["members"]:
        assert isinstance(getattr(nki_emulator.language.tile_size, member), int)


@pytest.mark.parametrize(
    "name",
    "dropout exponential nc_matmul_mx quantize_mx rand2 rand_get_state rand_set_state rng set_rng_seed".split(),
)
def test_what_is_not_emulated_says_so_by_name(name: str) -> None:
    function = getattr(nki_emulator.isa, name)
    required = [p for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty]
    with pytest.raises(NotImplementedError, match=f"nki.isa.{name} is not emulated"):
        function(*[None] * len(required))
