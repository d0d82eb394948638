# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Partial rotary position embedding with interleaved multimodal axes (time, height, width).

Letters: B batch, S tokens, F = rotary_dim / 2 frequencies, E head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def mrope_axes(mrope_section: Sequence[int]) -> list[int]:
    """Axis (0 time, 1 height, 2 width) that turns each of the F = sum(mrope_section) frequencies.

    The axes interleave by frequency index, T H W T H W ..., until the section of H or W is used up; the rest is T
    (transformers' `apply_interleaved_mrope`).
    """
    return [i % 3 if i % 3 and i < 3 * mrope_section[i % 3] else 0 for i in range(sum(mrope_section))]


class Qwen35RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary dims; one frequency table serves all three axes.

    Without `mrope_section` every frequency follows the time axis.
    """

    def __init__(self, rotary_dim: int, rope_theta: float, mrope_section: Sequence[int]) -> None:
        super().__init__()
        self.rotary_dim, self.rope_theta = rotary_dim, rope_theta
        self.axes = mrope_axes(mrope_section or (rotary_dim // 2, 0, 0))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, S, rotary_dim] float32 for text positions [B, S] or multimodal positions [B, 3, S].

        Rows come first, unlike in transformers, so that rows are selected and padded as in every other input.
        """
        # Computed here, not kept as a buffer: a buffer would be cast with the module, or lost when traced from meta.
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=x.device) / self.rotary_dim
        inverse_frequencies = 1.0 / self.rope_theta**exponents
        if position_ids.dim() == 3:
            positions = position_ids[:, self.axes].transpose(1, 2)
        else:
            positions = position_ids.unsqueeze(-1)
        angles = positions.float() * inverse_frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def apply_partial_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate-half embedding of the first rotary_dim of x [B, heads, S, E]; cos and sin [B, S, rotary_dim] float32."""
    half = cos.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    rotated_half = torch.cat((-second, first), dim=-1)
    rotated = x[..., : 2 * half] * cos + rotated_half * sin
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)
