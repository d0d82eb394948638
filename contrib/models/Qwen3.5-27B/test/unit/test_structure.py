# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and where the test of a module is.

Every import statement counts, wherever it stands and however it is written; what imports in another way is refused but
where MAY_IMPORT_BY_NAME has it. A tree of sources is
`{path below src: text}`, so that a planted violation is a line in this file.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

import qwen35

SRC = Path(qwen35.__file__).parents[1]
UNIT_TESTS = Path(__file__).parent
VLLM_TESTS = (UNIT_TESTS / "qwen35_vllm", UNIT_TESTS.parent / "vllm_lane")
"""Of modules that need no vLLM, and of those that do."""

FLOORS: tuple[tuple[set[str], ...], ...] = (
    ({"error_text"}, {"hardware"}, {"ops"}, {"phase"}),
    ({"json_files"}, {"fp8_form"}),
    ({"nxdi"}, {"nki_kernels"}),
    ({"kernel_selection", "configuration_qwen35", "configuration_qwen35_vl"},),
    ({"weights"},),
    ({"layers"}, {"vision"}),
    ({"memory"}, {"submodels"}),
    ({"modeling_qwen35_mtp"},),
    ({"modeling_qwen35"},),
    ({"modeling_qwen35_vl"},),
    ({"planning"},),
    ({"serving"},),
    ({"cli"},),
    ({"__init__"},),
)
"""From below, the rooms of each floor of qwen35: a folder, or modules that are in none and may import one another."""

PLACES = {name: (floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms for name in room}
"""Of what is at the top of qwen35: its floor, and its room."""

ONLY_IMPORTERS = {
    "libneuronxla": {"qwen35.nxdi"},
    "neuronxcc": {"qwen35.nxdi"},
    "neuronx_distributed": {"qwen35.nxdi"},
    "neuronx_distributed_inference": {"qwen35.nxdi"},
    "nxdi_cpu": {"qwen35.nxdi"},
    "torch_neuronx": {"qwen35.nxdi"},
    "torch_xla": {"qwen35.nxdi"},
    "nki": {"qwen35.nki_kernels.nki_seam"},
    "nkilib": {"qwen35.nki_kernels.library_mlp"},
    "nki_emulator": {"qwen35.nki_kernels.nki_seam", "qwen35.cli.kernels"},  # the report is about the emulator
}
"""The modules that may import a package; of any other, all may."""

IMPORTERS_OF_VLLM = "qwen35_vllm"
"""The package that may import vLLM; nothing imports that package."""

ROOMS_FOR_VLLM = {
    "configuration_qwen35", "configuration_qwen35_vl", "error_text", "fp8_form", "hardware", "json_files",
    "kernel_selection", "memory", "modeling_qwen35", "modeling_qwen35_vl", "nxdi", "planning", "serving", "vision",
}  # fmt: skip
"""What qwen35_vllm may import of qwen35: what configures, plans, loads and runs a model and processes its inputs, not
what it is made of."""

MAY_IMPORT_BY_NAME = {"qwen35", "qwen35.nxdi", "qwen35_vllm.plugin"}
"""The package's lazy names, the choice between NxDI and its stand-in, other platforms' entry points."""

READS_VERSIONS = {"importlib.metadata.version", "importlib.metadata.PackageNotFoundError"}
"""Of importlib, what imports nothing."""

IMPORTS_BY_NAME = {"importlib", "import_module", "__import__", "resolve_name", "pkgutil", "runpy", "sys.modules"}
RUNS_TEXT = {"exec", "eval"}
"""Built-in functions; methods of these names are others, as eval() of a torch module."""

TESTED_ELSEWHERE = {
    "nki_kernels/chunk_pieces": "code of kernels, which runs in one only: test_chunked.py, test_fused_chunked.py",
    "nki_kernels/common": "code of kernels, which runs in one only: the tests of all of them",
    "nki_kernels/decode_io": "code of kernels, which runs in them only: test_decode_layer.py and its neighbours",
    "nki_kernels/decode_operands": "code of kernels, which runs in them only: test_{decode,verify}_layer.py",
    "nki_kernels/nki_seam": "imports alone: test_structure.py says who may, test_emulator_install.py what is imported",
    "cli/plan_report": "what the command prints: test_cli_plan.py",
}
"""The modules of qwen35 that have no test file of their name, and why."""

VLLM_TESTED_ELSEWHERE = {
    "model": "vLLM inspects it and nobody builds it: test_platform_selection.py",
    "platform": "what vLLM asks of it: test_platform_selection.py, test_refusals.py",
    "request_rules": "what a client is told: test_worker.py, test_server.py",
    "versions": "all tests of the lane run on it, with either version",
}
"""The same of qwen35_vllm."""

Tree = Mapping[str, str]


class Import(NamedTuple):
    importer: str
    line: int
    imported: str
    """The module, when it is one of the tree; else all that the statement says."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def read(package: str) -> Tree:
    return {path.relative_to(SRC).as_posix(): path.read_text() for path in sorted((SRC / package).rglob("*.py"))}


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: Tree) -> Iterator[Import]:
    """Every import of every module. What `from x import y` names is the module x.y if there is one, else x."""
    modules = {module_of(path) for path in tree}
    for path, text in tree.items():
        importer = module_of(path)
        package = importer if path.endswith("__init__.py") else importer.rpartition(".")[0]
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Import():
                    names = [alias.name for alias in node.names]
                case ast.ImportFrom():
                    origin = resolve_name("." * node.level + (node.module or ""), package)
                    names = [f"{origin}.{alias.name}" for alias in node.names]
                case _:
                    continue
            for name in names:
                parent = name.rpartition(".")[0]
                yield Import(importer, node.lineno, parent if name not in modules and parent in modules else name)


def top_of(module: str) -> str:
    """What is at the top of qwen35: "layers" for qwen35.layers.cache, "__init__" for qwen35."""
    return (*module.split("."), "__init__")[1]


def modules_without_a_floor(tree: Tree) -> list[str]:
    return [module for module in map(module_of, tree) if top_of(module) not in PLACES]


def upward_imports(tree: Tree) -> list[str]:
    """Imports that go neither to a lower floor nor into the importer's own room."""
    found = []
    for item in imports(tree):
        if item.imported.split(".")[0] == "qwen35":
            # What has no floor is above all others: it may import them, and is imported by none.
            here, there = (PLACES.get(top_of(m), (len(FLOORS), {m})) for m in (item.importer, item.imported))
            if there[0] >= here[0] and there != here:
                found.append(f"{item}: floor {here[0]} to {there[0]}")
    return found


def circles(tree: Tree) -> list[str]:
    """The first circle of imports, if there is one."""
    graph: dict[str, set[str]] = {module_of(path): set() for path in tree}
    for item in imports(tree):
        if item.imported in graph:
            graph[item.importer].add(item.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def imports_past_a_seam(tree: Tree) -> list[str]:
    return [
        str(item)
        for item in imports(tree)
        if item.importer not in ONLY_IMPORTERS.get(item.imported.split(".")[0], {item.importer})
    ]


def imports_across_packages(tree: Tree) -> list[str]:
    """Imports of vLLM, or of what serves with it, from elsewhere; and what that imports of rooms it may not see."""
    found = []
    for item in imports(tree):
        importer, imported = item.importer.split(".")[0], item.imported.split(".")[0]
        if importer != IMPORTERS_OF_VLLM and imported in ("vllm", IMPORTERS_OF_VLLM):
            found.append(str(item))
        # Its public names, which stand above all rooms, would do: they are slower to import.
        if importer == IMPORTERS_OF_VLLM and imported == "qwen35" and top_of(item.imported) not in ROOMS_FOR_VLLM:
            found.append(str(item))
    return found


def imports_by_name(tree: Tree) -> list[str]:
    """What imports without an import statement, which the other rules would not see."""
    found = []
    for path, text in tree.items():
        if (module := module_of(path)) in MAY_IMPORT_BY_NAME:
            continue
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Import() | ast.ImportFrom():
                    origin = getattr(node, "module", None) or ""
                    if {f"{origin}.{alias.name}" for alias in node.names} <= READS_VERSIONS:
                        continue
                    names = {origin, *(alias.name for alias in node.names)}
                    names |= {name.split(".")[0] for name in names} | {f"{origin}.{alias.name}" for alias in node.names}
                case ast.Name():
                    names = {node.id}
                case ast.Attribute():
                    names = {ast.unparse(node), node.attr} - RUNS_TEXT
                case _:
                    continue
            found += [f"{module}:{node.lineno} uses {name}" for name in names & (IMPORTS_BY_NAME | RUNS_TEXT)]
    return found


@pytest.mark.parametrize(
    "rule",
    [modules_without_a_floor, upward_imports, circles, imports_past_a_seam, imports_across_packages, imports_by_name],
)
def test_qwen35_keeps_the_rule(rule: Callable[[Tree], list[str]]) -> None:
    assert rule(read("qwen35")) == []


@pytest.mark.parametrize("rule", [circles, imports_past_a_seam, imports_across_packages, imports_by_name])
def test_qwen35_vllm_keeps_the_rule(rule: Callable[[Tree], list[str]]) -> None:
    assert rule(read("qwen35_vllm")) == []


@pytest.mark.parametrize("package", ["nki_emulator", "nxdi_cpu"])
def test_the_packages_beside_it_have_no_circles(package: str) -> None:
    assert circles(read(package)) == []


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("import qwen35.serving.engine", "serving.engine"),
        ("import qwen35.serving.engine as e", "serving.engine"),
        ("from qwen35.serving.engine import Request", "serving.engine"),
        ("from qwen35.serving import engine", "serving.engine"),
        ("from ..serving.engine import Request", "serving.engine"),
        ("from ..serving import engine as e", "serving.engine"),
        ("from ..serving import *", "serving"),
        ("from ..serving import Request", "serving"),
        ("from .. import serving", "serving"),
        ("from . import cache, engine", "layers.cache"),
        ("def f():\n    from ..serving import engine", "serving.engine"),
        ("if TYPE_CHECKING:\n    from ..serving import engine", "serving.engine"),
        ("try:\n    pass\nexcept ImportError:\n    from ..serving import engine", "serving.engine"),
    ],
)
def test_an_import_is_found_however_it_is_written(text: str, imported: str) -> None:
    others = ("serving/__init__", "serving/engine", "layers/__init__", "layers/cache", "__init__")
    tree = {"qwen35/layers/norms.py": text, **{f"qwen35/{path}.py": "" for path in others}}
    assert next(imports(tree)).imported == f"qwen35.{imported}"


@pytest.mark.parametrize(
    ("rule", "planted"),
    [
        (modules_without_a_floor, {"qwen35/helpers.py": ""}),
        (modules_without_a_floor, {"qwen35/helpers/__init__.py": ""}),
        (modules_without_a_floor, {"qwen35/helpers/text.py": ""}),
        (upward_imports, {"qwen35/layers/cache.py": "from ..serving import engine"}),
        (upward_imports, {"qwen35/layers/cache.py": "from ..vision.positions import frame_positions"}),
        (upward_imports, {"qwen35/layers/cache.py": "def f():\n    from ..memory.fit import require_fits"}),
        (upward_imports, {"qwen35/memory/fit.py": "if TYPE_CHECKING:\n    from ..modeling_qwen35 import Qwen35MLP"}),
        (upward_imports, {"qwen35/memory/fit.py": "from .. import submodels", "qwen35/submodels.py": ""}),
        (upward_imports, {"qwen35/phase.py": "from .ops import l2norm"}),
        (upward_imports, {"qwen35/serving/engine.py": "from qwen35 import PrefixCache", "qwen35/__init__.py": ""}),
        (upward_imports, {"qwen35/serving/engine.py": "from ..helpers import text"}),
        (upward_imports, {"qwen35/ops/causal_conv.py": "import qwen35.nxdi"}),
        (circles, {"qwen35/ops/a.py": "from . import b", "qwen35/ops/b.py": "def f():\n    from .a import g"}),
        (
            circles,
            {
                "nxdi_cpu/a.py": "from .b import f",
                "nxdi_cpu/b.py": "import nxdi_cpu.c",
                "nxdi_cpu/c.py": "if TYPE_CHECKING:\n    from . import a",
            },
        ),
        (circles, {"nki_emulator/__init__.py": "from .jit import jit", "nki_emulator/jit.py": "from . import nl"}),
        (imports_past_a_seam, {"qwen35/submodels.py": "from neuronx_distributed.trace.trace import shard_children"}),
        (imports_past_a_seam, {"qwen35/submodels.py": "import neuronx_distributed_inference"}),
        (imports_past_a_seam, {"qwen35/layers/cache.py": "def f():\n    from nxdi_cpu import kv_cache"}),
        (imports_past_a_seam, {"qwen35/nki_kernels/decode_layer.py": "import nki.language as nl"}),
        (imports_past_a_seam, {"qwen35/cli/plan.py": "if TYPE_CHECKING:\n    from nki_emulator.report import Report"}),
        (imports_past_a_seam, {"qwen35/cli/kernels.py": "import nki"}),
        (imports_past_a_seam, {"qwen35/layers/mlp.py": "def f():\n    from nkilib.core.mlp.mlp import mlp"}),
        (imports_past_a_seam, {"qwen35/nki_kernels/decode_layer.py": "import neuronxcc.nki as nki"}),
        (imports_past_a_seam, {"qwen35/serving/loading.py": "def f():\n    import libneuronxla"}),
        (imports_past_a_seam, {"qwen35_vllm/worker.py": "from nxdi_cpu.config import NeuronConfig"}),
        (imports_across_packages, {"qwen35/serving/engine.py": "def f():\n    from vllm import LLM"}),
        (imports_across_packages, {"qwen35/cli/compile.py": "from qwen35_vllm.options import ServeOptions"}),
        (imports_across_packages, {"qwen35_vllm/worker.py": "from qwen35.layers.cache import CacheLayout"}),
        (imports_across_packages, {"qwen35_vllm/worker.py": "from qwen35 import NeuronQwen35ForCausalLM"}),
        (circles, {"qwen35_vllm/a.py": "from .b import f", "qwen35_vllm/b.py": "def g():\n    from . import a"}),
        *(
            (imports_by_name, {"qwen35/layers/norms.py": text})
            for text in (
                "import importlib\nimportlib.import_module('qwen35.serving.engine')",
                "import importlib as i",
                "import importlib.util",
                "from importlib import import_module\nimport_module('..serving.engine', __package__)",
                "__import__('qwen35.serving.engine')",
                "import sys\nsys.modules['qwen35.serving.engine']",
                "from sys import modules",
                "import pkgutil\npkgutil.resolve_name('qwen35.serving.engine:X')",
                "from importlib.metadata import entry_points, version",
                "exec('from qwen35.serving import engine')",
                "engine = eval('qwen35.serving.engine')",
            )
        ),
    ],
)
def test_a_planted_violation_is_found(rule: Callable[[Tree], list[str]], planted: Tree) -> None:
    assert rule(planted) != []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("qwen35/layers/gated_deltanet.py", "from .norms import Qwen35GatedRMSNorm\nfrom ..ops import l2norm"),
        ("qwen35/configuration_qwen35_vl.py", "from .configuration_qwen35 import Qwen35InferenceConfig"),
        ("qwen35/modeling_qwen35.py", "from .submodels import Qwen35ModelWrapper"),
        ("qwen35/nxdi.py", "import neuronx_distributed\nfrom nxdi_cpu.config import NeuronConfig"),
        ("qwen35/cli/kernels.py", "from nki_emulator.report import Report\nfrom .. import hardware"),
        ("qwen35/__init__.py", "from .cli import main"),
        ("qwen35/__init__.py", "from importlib import import_module"),
        ("qwen35/vision/encoder.py", "import sys\nsys.stdin\nmodel.eval()"),
        ("qwen35/serving/compiled.py", "from importlib.metadata import PackageNotFoundError, version"),
        ("qwen35_vllm/worker.py", "from vllm.config import VllmConfig\nfrom qwen35.serving.runner import Row"),
    ],
)
def test_what_the_rules_allow_is_not_reported(path: str, text: str) -> None:
    tree = {path: text, "qwen35/hardware.py": ""}
    own = {path: text for path, text in tree.items() if path.startswith("qwen35/")}
    assert upward_imports(tree) == circles(tree) == imports_past_a_seam(tree) == modules_without_a_floor(own) == []
    assert imports_by_name(tree) == imports_across_packages(tree) == []


def untested_modules(tree: Tree, tests: Collection[str]) -> list[str]:
    """Modules without a test of their name, the same folder given; `tests` are paths below test/unit.

    A name that two rooms have takes its room along, as in cli/test_cli_plan.py: pytest wants names of files distinct.
    """
    found = []
    for path in tree:
        *room, name = path.removeprefix("qwen35/").removesuffix(".py").split("/")
        names = {f"test_{name}.py", "_".join(["test", *room, f"{name}.py"])}
        if not name.startswith("__") and not any("/".join([*room, test]) in tests for test in names):
            found.append("/".join([*room, name]))
    return found


def test_every_module_has_a_test_of_its_name() -> None:
    tests = {path.relative_to(UNIT_TESTS).as_posix() for path in UNIT_TESTS.rglob("test_*.py")}
    assert sorted(untested_modules(read("qwen35"), tests)) == sorted(TESTED_ELSEWHERE)


def test_every_module_of_qwen35_vllm_has_a_test_of_its_name() -> None:
    tests = {path.name.replace("test_vllm_", "test_") for folder in VLLM_TESTS for path in folder.glob("test_*.py")}
    modules = [module_of(path).split(".") for path in read("qwen35_vllm")]
    untested = {name for _, *names in modules for name in names if f"test_{name}.py" not in tests}
    assert untested == VLLM_TESTED_ELSEWHERE.keys()


def test_names_of_test_files_are_distinct() -> None:
    names = [path.name for path in UNIT_TESTS.parent.rglob("test_*.py")]
    assert sorted(names) == sorted({*names})


def test_a_module_without_a_test_of_its_name_is_found() -> None:
    modules = ("__init__", "hardware", "cli/__main__", "cli/plan", "layers/cache", "layers/rope", "planning/plan")
    tests = {"test_hardware.py", "cli/test_cli_plan.py", "layers/test_cache.py", "test_rope.py"}
    assert untested_modules({f"qwen35/{module}.py": "" for module in modules}, tests) == [
        "layers/rope",
        "planning/plan",
    ]
