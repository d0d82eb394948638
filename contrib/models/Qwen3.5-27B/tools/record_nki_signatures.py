# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Record the names and parameters of NKI for each release of the Neuron SDK, and which pages its documents have.

Both come from a clone of github.com/aws-neuron/aws-neuron-sdk with its tags, whose stubs under nki/api/ are parsed, not
imported:

    python tools/record_nki_signatures.py --sdk ../aws-neuron-sdk

`nki_emulator.lint_kernel(kernel, version=...)` reads the first file, `test/unit/test_cited_pages.py` the second.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIGNATURES = ROOT / "src" / "nki_emulator" / "nki_versions.json"
PAGES = ROOT / "test" / "data" / "sdk_pages.json"

RELEASES = {"0.3.0": "v2.29.0", "0.4.0": "v2.30.0", "0.5.0": "v2.31.1", "0.6.0": "v2.32.0"}
"""NKI versions and the tags of the SDK releases that have them (nki/migration/index.rst)."""

TILE_SIZE_PAGE = "nki/api/nki.language.tile_size.rst"
MODULES = ("nki", "nki.isa", "nki.language")
PAGE_FOLDERS = (
    "nki/",
    "about-neuron/announcements/neuron2.x/",
    "about-neuron/arch/",
    "compiler/error-codes/",
    "compiler/neuronx-cc/",
    "release-notes/components/",
)


class Sdk:
    """A clone of the documentation at one tag."""

    def __init__(self, clone: Path, tag: str) -> None:
        self.clone, self.tag = clone, tag

    def _git(self, *arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(self.clone), *arguments], check=True, capture_output=True, text=True
        ).stdout

    def commit(self) -> str:
        return self._git("rev-parse", f"{self.tag}^{{commit}}").strip()

    def files(self) -> list[str]:
        return self._git("ls-tree", "-r", "--name-only", self.tag).splitlines()

    def text(self, path: str) -> str:
        return self._git("show", f"{self.tag}:{path}")

    def stub(self, module: str) -> ast.Module:
        return ast.parse(self.text("/".join(["nki", "api", *module.split("."), "__init__.py"])))


def signature(function: ast.FunctionDef) -> str:
    """Parameters as they are written, without annotations and without `self`."""
    arguments = function.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    text = ast.unparse(arguments)
    return text.removeprefix("self, ").removeprefix("self")


def names_of(sdk: Sdk) -> dict[str, str]:
    """{name: parameters} of every function, and {name: ""} of constants, classes and members of enumerations."""
    found: dict[str, str] = {}
    for module in MODULES:
        for node in sdk.stub(module).body:
            match node:
                case ast.FunctionDef():
                    found[f"{module}.{node.name}"] = f"({signature(node)})"
                case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                    found[f"{module}.{name}"] = ""
                case ast.ClassDef():
                    found.update(_members(f"{module}.{node.name}", node))
    tile_size = "nki.language.tile_size"
    if not any(name.startswith(f"{tile_size}.") for name in found):  # 0.4.0 and 0.5.0 have them on a page only
        found.update({f"{tile_size}.{name}": "" for name in re.findall(r"attribute:: (\w+)", sdk.text(TILE_SIZE_PAGE))})
    return found


def _members(name: str, node: ast.ClassDef) -> dict[str, str]:
    # From 0.6.0 on the object tile_size is one of the private class _TileSize.
    name = name.replace("_TileSize", "tile_size")
    found = {name: ""}
    for member in node.body:
        match member:
            case ast.Assign(targets=[ast.Name(attribute)]) | ast.AnnAssign(target=ast.Name(attribute)):
                found[f"{name}.{attribute}"] = ""
            case ast.FunctionDef(name=attribute) if not attribute.startswith("_"):
                is_property = any(isinstance(d, ast.Name) and d.id == "property" for d in member.decorator_list)
                found[f"{name}.{attribute}"] = "" if is_property else f"({signature(member)})"
    return found


def changes(by_version: dict[str, dict[str, str]]) -> dict[str, dict[str, str | None]]:
    """{name: {version: parameters}}, only where a version differs from the one before it; None: it is gone."""
    found: dict[str, dict[str, str | None]] = {}
    for name in sorted({name for names in by_version.values() for name in names}):
        before: str | None = None
        for version, names in by_version.items():
            now = names.get(name)
            if now != before:
                found.setdefault(name, {})[version] = now
            before = now
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Record NKI's names and parameters for each SDK release.")
    parser.add_argument("--sdk", type=Path, required=True, help="clone of github.com/aws-neuron/aws-neuron-sdk")
    args = parser.parse_args()
    releases = {version: Sdk(args.sdk, tag) for version, tag in RELEASES.items()}
    record = {
        "versions": {version: {"sdk": sdk.tag, "commit": sdk.commit()} for version, sdk in releases.items()},
        "names": changes({version: names_of(sdk) for version, sdk in releases.items()}),
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in record["names"].items())
    SIGNATURES.write_text(f'{{\n "versions": {json.dumps(record["versions"])},\n "names": {{\n{lines}\n }}\n}}\n')

    pages: dict[str, list[str]] = {}
    for sdk in releases.values():
        for path in sdk.files():
            if path.startswith(PAGE_FOLDERS) and path.endswith((".rst", ".py")):
                pages.setdefault(path, []).append(sdk.tag)
    lines = ",\n".join(f"  {json.dumps(path)}: {json.dumps(tags)}" for path, tags in sorted(pages.items()))
    PAGES.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
