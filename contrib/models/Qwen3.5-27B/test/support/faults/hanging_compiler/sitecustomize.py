# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A fault, on PYTHONPATH: compiling the fused kernel with its tiled inverse starts a process that never ends."""

import subprocess
import sys
from importlib import import_module
from typing import Any

jit = import_module("nki_emulator.jit")  # the package has the decorator by this name
_launch = jit._launch


def _hanging(function: Any, grid: Any, options: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if "fused" in function.__name__ and kwargs.get("inverse") == "tiled":
        subprocess.run([sys.executable, "-S", "-c", "import time; time.sleep(3600)"], check=True)
    return _launch(function, grid, options, args, kwargs)


jit._launch = _hanging
