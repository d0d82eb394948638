# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The `qwen35` command as a whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from qwen35.nxdi import NXDI_AVAILABLE

HEAVY = {"transformers", "PIL", "matplotlib", "nki_emulator", "qwen35.modeling_qwen35", "qwen35.planning.plan"}

LOADED_BY_HELP = """
import json, sys
from qwen35.cli import main
try:
    main(["--help"])
except SystemExit:
    print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.skipif(NXDI_AVAILABLE, reason="NxDI itself imports transformers")
def test_help_loads_neither_the_model_nor_what_only_a_command_needs() -> None:
    output = subprocess.run([sys.executable, "-c", LOADED_BY_HELP], check=True, capture_output=True, text=True).stdout
    help_text, modules = output.rsplit("\n", 2)[:2]
    assert all(command in help_text for command in ("generate", "chat", "compile", "convert", "plan", "kernels"))
    assert HEAVY.isdisjoint(json.loads(modules))
