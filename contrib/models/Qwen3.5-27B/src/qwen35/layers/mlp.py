# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The MLP of a layer, and where it is chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..fp8_form import FP8
from ..kernel_selection import MLPKernel, select_mlp_kernel
from ..nki_kernels.library_mlp import FEW_TOKENS
from .linear import TransposedLinear, column_parallel, row_parallel, sum_over_ranks


class Qwen35MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), for x [B, S, hidden_size]."""

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = column_parallel(config, hidden, inner)
        self.up_proj = column_parallel(config, hidden, inner)
        self.down_proj = row_parallel(config, inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In place: on a CPU, fresh memory for a whole prompt costs as much as the arithmetic.
        return self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x)))


class Qwen35KernelMLP(nn.Module):
    """`Qwen35MLP` by nki-library's kernel for token generation where a call has at most `FEW_TOKENS` tokens.

    Its kernel for context encoding is left out: docs/library_kernels.md says why. Longer calls multiply by the same
    weights, which lie as the kernel takes them.
    """

    def __init__(self, config: Qwen35InferenceConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = TransposedLinear(config, hidden, inner, split=1)
        self.up_proj = TransposedLinear(config, hidden, inner, split=1)
        self.down_proj = TransposedLinear(config, inner, hidden, split=0)
        from .kernel_launch import mlp  # loads NKI or its emulator

        self.launch = mlp
        self.cores, self.in_fp8 = config.neuron_config.logical_nc_config, config.matrix_dtype == FP8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] * x.shape[1] > FEW_TOKENS:
            return sum_over_ranks(self.down_proj(F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x))))
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        scales = (gate.scale, up.scale, down.scale) if self.in_fp8 else None
        return sum_over_ranks(self.launch(self.cores, x, (gate.weight, up.weight, down.weight), scales))


def make_mlp(config: Qwen35InferenceConfig, layer_idx: int) -> nn.Module:
    """The MLP of layer `layer_idx`: the dense one, in every layer of the dense family, by the configured kernel."""
    if select_mlp_kernel(config) is MLPKernel.NKI:
        return Qwen35KernelMLP(config)
    return Qwen35MLP(config)
