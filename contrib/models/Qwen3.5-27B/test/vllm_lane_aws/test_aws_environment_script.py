# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The script that makes the environment of this lane says what is wrong before it makes or fetches anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import qwen35

pytestmark = pytest.mark.aws_plugin

SCRIPT = Path(qwen35.__file__).parents[2] / "tools" / "vllm_aws_env.sh"


def refusal(tmp_path: Path, plugin: Path, version: str) -> str:
    """The line it ends with, where the interpreter says that it is this version."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    command = [str(SCRIPT), str(plugin), str(tmp_path / "environment")]
    variables = {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert ended.returncode == 1 and not (tmp_path / "environment").exists()
    (line,) = ended.stderr.splitlines()
    return line


def test_a_folder_without_the_plugin_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, tmp_path, "3.11").startswith(f"PLUGIN={tmp_path} is no checkout of vllm-neuron; git clone")


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_a_python_that_the_plugin_is_not_for_is_refused(version: str, tmp_path: Path) -> None:
    (tmp_path / "plugin" / "vllm_neuron").mkdir(parents=True)
    (tmp_path / "plugin" / "vllm_neuron" / "__init__.py").touch()
    line = refusal(tmp_path, tmp_path / "plugin", version)
    assert line.startswith(f"{tmp_path / 'python'} is Python {version}: it must be 3.10 to 3.12; name one")
