# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""RMS norms, computed in float32 whatever the activations' dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis, in float32.

    Written out: for the one row of a decoding step PyTorch's `rms_norm` takes three times as long on a CPU.
    """
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).mul_(weight)


class Qwen35RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis.

    The checkpoint's (1 + w) is folded into `weight` [size] by the conversion; it stays float32, because 1 + w has too
    few bits left in bfloat16.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps).to(x.dtype)


class Qwen35GatedRMSNorm(Qwen35RMSNorm):
    """The output norm of a DeltaNet layer: x / rms(x) * weight * silu(gate); its weight has no 1 added."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return rms_norm(x, self.weight, self.eps).mul_(F.silu(gate.float())).to(gate.dtype)
