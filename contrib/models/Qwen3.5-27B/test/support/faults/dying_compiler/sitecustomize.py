# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A fault, on PYTHONPATH: whoever compiles the attention kernel of decoding is killed."""

import os
import signal
from importlib import import_module
from typing import Any

jit = import_module("nki_emulator.jit")  # the package has the decorator by this name
_launch = jit._launch


def _dying(function: Any, grid: Any, options: Any, args: Any, kwargs: Any) -> Any:
    if function.__name__ == "attention_decode":
        print("neuronx-cc: [NCC_EBVF030] The number of instructions generated exceeds the limit", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return _launch(function, grid, options, args, kwargs)


jit._launch = _dying
