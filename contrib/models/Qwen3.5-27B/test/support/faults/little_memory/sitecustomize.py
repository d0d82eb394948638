# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A fault, on PYTHONPATH: there is no memory for the attention kernel of continued prompts."""

import resource
from importlib import import_module
from pathlib import Path
from typing import Any

jit = import_module("nki_emulator.jit")  # the package has the decorator by this name
_launch = jit._launch
LEFT = 30 << 20
"""Bytes beyond what the process has."""


def _short(function: Any, grid: Any, options: Any, args: Any, kwargs: Any) -> Any:
    if function.__name__ != "attention_continuation":
        return _launch(function, grid, options, args, kwargs)
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LEFT, before[1]))
    try:
        return _launch(function, grid, options, args, kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


jit._launch = _short
