# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Faults below the self-test, each a folder for PYTHONPATH, and the command under one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import qwen35

SRC = Path(qwen35.__file__).parents[1]
FOLDER = Path(__file__).parent
TESTS = FOLDER.parents[1]


@dataclass(frozen=True)
class Ended:
    """What a command printed and its exit status."""

    status: int
    output: str
    errors: str


def run_with_fault(fault: str, *arguments: str, scratch: Path) -> Ended:
    """`qwen35 ARGUMENTS` in a process of its own, in which, and in all that it starts, something is wrong.

    Args:
        fault: a folder beside this file; "not_compiling" copies the package below `scratch` and breaks a kernel there.
    """
    first = _broken_copy(scratch) if fault == "not_compiling" else FOLDER / fault
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(first), str(SRC), str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(first / "bin"), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "qwen35.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def _broken_copy(scratch: Path) -> Path:
    """The packages, with an attention kernel that uses what NKI does not have."""
    copied = scratch / "src"
    if not copied.exists():
        shutil.copytree(SRC, copied, ignore=shutil.ignore_patterns("__pycache__"))
        kernel = copied / "qwen35" / "nki_kernels" / "attention_prefill.py"
        text = kernel.read_text(encoding="utf-8")
        assert "nisa.nc_matmul(" in text
        kernel.write_text(text.replace("nisa.nc_matmul(", "nisa.nc_matmul_of_a_later_nki("), encoding="utf-8")
    return copied
