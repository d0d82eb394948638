# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The script that makes vLLM's environment says what is wrong before it makes or fetches anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import qwen35

pytestmark = pytest.mark.vllm

SCRIPT = Path(qwen35.__file__).parents[2] / "tools" / "vllm_env.sh"


@pytest.mark.parametrize("version", ["3.9", "3.10", "3.14"])
def test_a_python_that_vllm_is_not_for_is_refused_and_nothing_is_made(version: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")  # what it answers when it is asked for its version
    python.chmod(0o755)
    command = [str(SCRIPT), "0.33.0", str(tmp_path / "environment")]
    variables = {"PYTHON": str(python), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert ended.returncode == 1 and not (tmp_path / "environment").exists()
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{python} is Python {version}: it must be 3.11 to 3.13; name one")
