# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The MLP of a layer, and where it is chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_qwen35 import Qwen35InferenceConfig
from .linear import column_parallel, row_parallel


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


def make_mlp(config: Qwen35InferenceConfig, layer_idx: int) -> nn.Module:
    """The MLP of layer `layer_idx`: the dense one, in every layer of the dense family."""
    return Qwen35MLP(config)
