# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The scripts that make vLLM's environments say what is wrong before they fetch anything; what they make is pinned."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import qwen35

pytestmark = pytest.mark.vllm

TOOLS = Path(qwen35.__file__).parents[2] / "tools"
SCRIPTS = ("vllm_env.sh", "lane_vllm.sh")


def refusal(script: str, *arguments: str, python: str = "python3") -> str:
    """The line in which a script says why it ends."""
    variables = {"PYTHON": python, "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([str(TOOLS / script), *arguments], env=variables, capture_output=True, text=True)
    assert ended.returncode == 1 and not ended.stdout
    (line,) = ended.stderr.splitlines()
    return line


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", ["3.9", "3.10", "3.14"])
def test_a_python_that_vllm_is_not_for_is_refused_and_nothing_is_made(script: str, number: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {number}\n")  # what it answers when it is asked for its version
    python.chmod(0o755)
    line = refusal(script, "0.33.0", str(tmp_path / "environment"), python=str(python))
    assert line.startswith(f"{python} is Python {number}: it must be 3.11 to 3.13; name one")
    assert [*tmp_path.iterdir()] == [python]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_version_that_is_not_served_is_refused_with_those_that_are(script: str, tmp_path: Path) -> None:
    line = refusal(script, "0.30.0", str(tmp_path / "environment"))
    assert line == "VERSION=0.30.0: there is no constraints_vllm_0.30.0.txt; choose 0.33.0 or 0.23.0"
    assert not [*tmp_path.iterdir()]


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (TOOLS / file).read_text(encoding="utf-8"), re.MULTILINE))


def test_0_23_has_the_torch_and_transformers_of_nxdi_s_environments() -> None:
    nxdi, found = pins("constraints_torch29.txt"), pins("constraints_vllm_0.23.0.txt")
    assert (found["torch"], found["transformers"]) == (nxdi["torch"], nxdi["transformers"]) == ("2.9.1", "4.57.6")


def test_the_tests_of_the_lane_run_with_what_its_constraints_name() -> None:
    pinned = pins(f"constraints_vllm_{version('vllm').split('+')[0]}.txt")
    for name in ("torch", "transformers"):
        assert version(name).split("+")[0] == pinned[name]
