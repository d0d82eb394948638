# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs: the choices there are, what overrides the configured one, and what `auto` means."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from enum import Enum
from typing import Any


class DeltaNetKernel(str, Enum):
    """What computes the gated delta rule of a prompt; decoding has one kernel, used by all but TORCH."""

    AUTO = "auto"  # FUSED on a Neuron device, TORCH on a CPU
    FUSED = "fused"  # all heads and chunks in one launch per layer
    LOOPED = "looped"  # the same with a loop on the device over every 512 tokens, for prompts of whole loops
    CHUNKED = "chunked"  # one launch per chunk of 128 tokens
    RECURRENT = "recurrent"  # token by token, one launch per head: to check the others
    TORCH = "torch"  # `qwen35.ops`


class DeltaNetInverse(str, Enum):
    """How FUSED, LOOPED and CHUNKED invert the triangular system of a chunk."""

    TILED = "tiled"  # on sub-arrays of the Tensor engine, side by side
    PLAIN = "plain"  # by matmuls that take all of it: slower, and nothing in it goes beyond NKI's documents


KERNEL_ENVIRONMENT = {
    "USE_NKI_FUSED": DeltaNetKernel.FUSED,
    "USE_NKI_CHUNKED": DeltaNetKernel.CHUNKED,
    "USE_NKI": DeltaNetKernel.RECURRENT,
    "DELTANET_SEQUENTIAL": DeltaNetKernel.TORCH,
}
"""Environment variables that override `deltanet_kernel` when they are "1"; those of the published port."""

KERNEL_HEAD_DIM = 128
"""K and V of every published checkpoint, and of the decoding kernel."""


def select_deltanet_kernel(config: Any) -> DeltaNetKernel:
    """The kernel that a `Qwen35InferenceConfig` runs: the environment's, else the configured one, with AUTO decided."""
    override = _overrides()
    if override:
        return KERNEL_ENVIRONMENT[override[0]]
    kernel = DeltaNetKernel(_configured(config))
    if kernel is not DeltaNetKernel.AUTO:
        return kernel
    fits = config.linear_key_head_dim == config.linear_value_head_dim == KERNEL_HEAD_DIM
    return DeltaNetKernel.FUSED if fits and not config.neuron_config.on_cpu else DeltaNetKernel.TORCH


def select_deltanet_inverse(config: Any) -> DeltaNetInverse:
    """How the kernels of a `Qwen35InferenceConfig` invert the system of a chunk."""
    return DeltaNetInverse(_configured_inverse(config))


def kernel_problems(config: Any, malformed: Collection[str]) -> Iterator[str]:
    """What is wrong with the choice, one line each; `malformed` are fields of `config` that cannot be read."""
    override = _overrides()
    if len(override) > 1:
        yield f"{' and '.join(override)} are all set to 1; each names another kernel, set one"
    inverse, inverses = _configured_inverse(config), [choice.value for choice in DeltaNetInverse]
    if inverse not in inverses:
        yield f"deltanet_inverse={inverse!r} is unknown; set it to {', '.join(inverses)}"
    chosen = _configured(config)
    if chosen not in [kernel.value for kernel in DeltaNetKernel]:
        yield f"deltanet_kernel={chosen!r} is unknown; set it to {', '.join(kernel.value for kernel in DeltaNetKernel)}"
    elif "linear_key_head_dim" not in malformed and "linear_value_head_dim" not in malformed:
        kernel = select_deltanet_kernel(config)
        dims = (config.linear_key_head_dim, config.linear_value_head_dim)
        if kernel is not DeltaNetKernel.TORCH and dims != (KERNEL_HEAD_DIM, KERNEL_HEAD_DIM):
            yield f"deltanet_kernel={kernel.value!r} has heads of 128 dims, not {dims[0]} and {dims[1]}; use 'torch'"


def _overrides() -> list[str]:
    return [name for name in KERNEL_ENVIRONMENT if os.environ.get(name) == "1"]


def _configured(config: Any) -> str:
    """The configured kernel; a plain NeuronConfig, which has no such field, means auto."""
    kernel: str = getattr(config.neuron_config, "deltanet_kernel", DeltaNetKernel.AUTO.value)
    return kernel


def _configured_inverse(config: Any) -> str:
    """The configured inverse; a plain NeuronConfig, which has no such field, means tiled."""
    inverse: str = getattr(config.neuron_config, "deltanet_inverse", DeltaNetInverse.TILED.value)
    return inverse
