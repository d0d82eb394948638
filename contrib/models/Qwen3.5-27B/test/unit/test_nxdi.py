# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The seam to NxDI: which names it gives, the shapes of a rank, and calls on the stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import qwen35.nxdi
from qwen35 import Qwen35InferenceConfig, Qwen35NeuronConfig
from qwen35.nxdi import (
    ColumnParallelLinear,
    InferenceConfig,
    NeuronConfig,
    as_rank,
    compile_program,
    get_tensor_model_parallel_size,
    on_stand_ins,
)

SIGNATURES = Path(__file__).parents[1] / "data" / "nxdi_signatures.json"


def test_the_seam_imports_each_original_of_its_stand_in() -> None:
    originals = {name: f"{module}.{name}" for name, (module, _) in qwen35.nxdi._MODULES.items()}
    stand_ins = {name: f"{module}.{name}" for name, (_, module) in qwen35.nxdi._MODULES.items()}
    recorded = json.loads(SIGNATURES.read_text(encoding="utf-8"))["names"]
    assert originals == {name: recorded[path.removeprefix("nxdi_cpu.")]["real"] for name, path in stand_ins.items()}


def test_the_seam_gives_the_base_classes() -> None:
    assert issubclass(Qwen35InferenceConfig, InferenceConfig) and issubclass(Qwen35NeuronConfig, NeuronConfig)
    assert Qwen35InferenceConfig.get_neuron_config_cls() is Qwen35NeuronConfig


@pytest.mark.usefixtures("outside_any_rank")
@pytest.mark.parametrize("rank", [0, 3])
def test_modules_are_built_in_the_shapes_of_a_rank_without_its_process(rank: int) -> None:
    with as_rank(rank, 4), torch.device("meta"):
        assert get_tensor_model_parallel_size() == 4
        assert ColumnParallelLinear(8, 32, bias=False).weight.shape == (8, 8)


def module_of_the_config_class() -> str:
    return qwen35.nxdi.InferenceConfig.__module__


def test_a_function_on_the_stand_ins_has_their_classes() -> None:
    assert on_stand_ins(module_of_the_config_class) == "nxdi_cpu.config"


def test_an_error_on_the_stand_ins_reaches_the_caller() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        on_stand_ins(int, "four")


OFFER = """
import sys
from qwen35.nxdi import offer_application

def load():
    print("loaded", "neuronx_distributed_inference.utils.constants" in sys.modules)
    return int

{before}
offer_application(["first", "second"], load)
print("offered", len(sys.meta_path) - finders)
from neuronx_distributed_inference.utils import constants
print({{name: model["causal-lm"].__name__ for name, model in constants.MODEL_TYPES.items()}})
print("left", len(sys.meta_path) - finders)
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("finders = len(sys.meta_path)", ["offered 1", "loaded True"]),
        (
            "import neuronx_distributed_inference.utils.constants; finders = len(sys.meta_path)",
            ["loaded True", "offered 0"],
        ),
    ],
    ids=["before NxDI is imported", "afterwards"],
)
def test_an_application_is_in_nxdis_table_once_that_is_imported(before: str, said: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "neuronx_distributed_inference" / "utils"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()  # so that it goes before the real one
    (folder / "constants.py").write_text("MODEL_TYPES = {'own': {'causal-lm': str}}")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", OFFER.format(before=before)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.splitlines() == [*said, "{'own': 'str', 'first': 'int', 'second': 'int'}", "left 0"]


def documented_trace(
    func: Any,
    example_inputs: Any,
    *_: Any,
    input_output_aliases: Any = {},  # noqa: B006 - the signature of AWS's document
    compiler_workdir: Any = None,
    compiler_args: Any = None,
    partitioner_config: Any = None,
    inline_weights_to_neff: bool = True,
    cpu_backend: bool = False,
) -> Any:
    """torch_neuronx.trace as api-torch-neuronx-trace.rst has it; it gives what it was given."""
    return func, example_inputs, compiler_workdir, compiler_args


@pytest.mark.skipif(qwen35.nxdi.NXDI_AVAILABLE, reason="takes the place of torch_neuronx")
def test_a_program_is_compiled_with_the_arguments_that_are_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = torch.nn.Identity(), (torch.zeros(2),)
    assert compile_program(module, inputs, 2, "work") is module
    shell = ModuleType("torch_neuronx")
    shell.trace = documented_trace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_neuronx", shell)
    monkeypatch.setattr(qwen35.nxdi, "NXDI_AVAILABLE", True)
    assert compile_program(module, inputs, 2, "work") == (module, inputs, "work", ["--auto-cast=none", "--lnc=2"])
