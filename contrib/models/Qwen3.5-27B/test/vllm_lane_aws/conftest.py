# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The platform of AWS's plugin in this process, where that is installed; and a copy of the mini, which it writes to."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from qwen35.serving.loading import MINI_CHECKPOINT
from support import aws_machine

if aws_machine.PLUGIN_AVAILABLE:
    site = tempfile.TemporaryDirectory(prefix="aws_machine")  # removed with this name, at the end
    aws_machine.install(Path(site.name))  # before vLLM is imported, by the tests


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI_CHECKPOINT, tmp_path / "mini"))
