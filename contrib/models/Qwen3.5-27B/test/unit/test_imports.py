# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Importing the package, or a name of it, loads what that name needs and no more."""

from __future__ import annotations

import ast
import inspect
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import qwen35
import qwen35.nxdi
from qwen35.nxdi import NXDI_AVAILABLE

PACKAGE = Path(qwen35.__file__).parent
HEAVY = ("transformers", "PIL", "nki_emulator", "qwen35.planning")

SECONDS_BEYOND_TORCH = 0.3
"""Of `import qwen35`; measured 1 ms, and 2 to 3 s with every name imported at once."""

MEASURE = """
import json, sys, time, torch
start = time.perf_counter()
{statement}
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""


def measure(statement: str) -> tuple[float, set[str]]:
    """Seconds that `statement` takes in a process that has torch, and the modules that the process has after it."""
    command = [sys.executable, "-c", MEASURE.format(statement=statement)]
    seconds, modules = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, set(modules)


def test_the_package_is_imported_in_an_instant() -> None:
    best = math.inf
    for _ in range(3):  # a busy machine may stall one of them
        seconds, modules = measure("import qwen35")
        best = min(best, seconds)
        assert {name for name in modules if name.startswith("qwen35.")} == set()
        assert modules.isdisjoint(HEAVY)
    assert best <= SECONDS_BEYOND_TORCH


@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI itself imports transformers")
@pytest.mark.parametrize("name", ["Qwen35NeuronConfig", "NeuronQwen35ForCausalLM"])
def test_neither_configuration_nor_model_loads_what_only_generation_needs(name: str) -> None:
    _, modules = measure(f"from qwen35 import {name}")
    assert modules & set(HEAVY) == set()


def test_the_runtime_does_not_need_transformers_own_model() -> None:
    for package in (PACKAGE, PACKAGE.parent / "nxdi_cpu"):
        for path in package.rglob("*.py"):
            assert not re.search(r"import.*Qwen3_5|transformers\.models\.qwen3_5", path.read_text()), path


def test_every_public_name_is_an_attribute_a_star_import_and_listed() -> None:
    names: dict[str, Any] = {}
    exec("from qwen35 import *", names)
    for name in qwen35.__all__:
        assert names[name] is getattr(qwen35, name)
    assert set(qwen35.__all__) <= set(dir(qwen35))


def test_a_public_name_is_imported_from_the_module_that_defines_it() -> None:
    for name, module in qwen35._MODULES.items():
        if module != "nxdi":  # a seam defines nothing
            assert getattr(qwen35, name).__module__ == f"qwen35.{module}", name


def test_a_public_class_survives_pickling() -> None:
    for name in qwen35.__all__:
        value = getattr(qwen35, name)
        assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.parametrize("module", [qwen35, qwen35.nxdi])
def test_an_unknown_name_is_the_usual_attribute_error(module: ModuleType) -> None:
    with pytest.raises(AttributeError, match=f"^module '{module.__name__}' has no attribute 'Qwen36'$"):
        module.Qwen36  # noqa: B018


def names_for_type_checkers(source: str) -> dict[str, str]:
    """The name and the module of each import in the `if TYPE_CHECKING:` that has an `else:`."""
    block = next(node for node in ast.parse(source).body if isinstance(node, ast.If) and node.orelse)
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def test_type_checkers_see_the_names_that_are_imported_when_used() -> None:
    assert names_for_type_checkers(inspect.getsource(qwen35)) == qwen35._MODULES
    assert sorted(qwen35._MODULES) == sorted(qwen35.__all__)
    stand_ins = {name: stand_in for name, (_, stand_in) in qwen35.nxdi._MODULES.items()}
    assert names_for_type_checkers(inspect.getsource(qwen35.nxdi)) == stand_ins
    own = {"NXDI_AVAILABLE", "as_rank", "compile_program", "offer_application", "on_stand_ins"}
    assert set(qwen35.nxdi.__all__) - set(stand_ins) == own
