# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The examples of the model's README run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qwen35

PACKAGE = Path(qwen35.__file__).parent
MODEL_ROOT = PACKAGE.parents[1]


@pytest.mark.parametrize(
    ("section", "expected"),
    [("Usage", "The capital of France is Paris"), ("Images and video", "red"), ("Many requests", "Tokyo")],
)
def test_the_examples_of_the_readme_run(section: str, expected: str, tmp_path: Path) -> None:
    readme = (MODEL_ROOT / "README.md").read_text()
    example = re.search(rf"^## {section}\n.*?```python\n(.*?)```", readme, re.DOTALL | re.MULTILINE)
    assert example is not None
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", example[1]]
    output = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert expected in output
