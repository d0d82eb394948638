# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM loads the entry points in each of its processes, wherever this package is installed: they import little."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from qwen35_vllm import plugin


def test_the_entry_points_import_nothing_heavy() -> None:
    code = "import sys, qwen35_vllm.plugin; print({'torch', 'transformers', 'vllm', 'qwen35'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


@pytest.mark.parametrize(
    ("group", "function"), [("vllm.platform_plugins", plugin.platform), ("vllm.general_plugins", plugin.register)]
)
def test_they_are_declared(group: str, function: object) -> None:
    found = [entry for entry in entry_points(group=group) if entry.name == plugin.NAME]
    if not found:
        pytest.skip("the package is not installed here, its sources are on the path")
    assert found[0].load() is function


def test_neuron_devices_are_those_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("neuron0", "neuron11", "neuron", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr(plugin, "DEVICES", tmp_path)
    assert plugin.neuron_devices() == [str(tmp_path / "neuron0"), str(tmp_path / "neuron11")]
