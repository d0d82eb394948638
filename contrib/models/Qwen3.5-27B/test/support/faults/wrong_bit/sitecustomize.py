# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A fault, on PYTHONPATH: one bit of one value of what the decoding kernel of DeltaNet stores is wrong."""

from importlib import import_module
from typing import Any

import torch

jit = import_module("nki_emulator.jit")  # the package has the decorator by this name
_launch = jit._launch
EXPONENT_BIT = 1 << 13
"""Of bfloat16: it makes a value 2 ** 64 times as large or as small."""


def _wrong(function: Any, grid: Any, options: Any, args: Any, kwargs: Any) -> Any:
    result = _launch(function, grid, options, args, kwargs)
    if function.__name__ == "deltanet_decode_layer":
        bits = result.outputs[0].view(torch.int16 if result.outputs[0].element_size() == 2 else torch.int32)
        bits.view(-1)[7] ^= EXPONENT_BIT << (0 if bits.element_size() == 2 else 16)
    return result


jit._launch = _wrong
