# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Positions of patches, from `grid_thw` alone: inputs of the vision encoder that are computed on the host.

Letters: P patches of all images and frames, F patches of one frame, N images and videos, E head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..configuration_qwen35_vl import Qwen35VisionConfig


class FramePositions(NamedTuple):
    """Positions of the F patches of one frame, in the order of the processor: merged token by merged token."""

    indices: torch.Tensor  # [F, 4] int64, the entries of the learned grid around each patch
    weights: torch.Tensor  # [F, 4] float32, their share in its position embedding
    angles: torch.Tensor  # [F, E / 2] float32, rotary: those of the row first, then those of the column


def frame_positions(height: int, width: int, config: Qwen35VisionConfig) -> FramePositions:
    """Bilinear interpolation of the learned grid with aligned corners, and 2-D rotary angles.

    As transformers' `get_vision_interpolation_indices_and_weights`, and its axial rotary embedding: one table of E / 4
    frequencies for both axes.

    Args:
        height, width: rows and columns of patches, multiples of the config's spatial_merge_size.
        config: sizes of the encoder.
    """
    merge, side, frequencies = config.spatial_merge_size, config.grid_side, config.head_dim // 4
    blocks = torch.arange(height * width).view(height // merge, merge, width // merge, merge)
    raster = blocks.transpose(1, 2).flatten()
    axes = ((raster // width, height), (raster % width, width))
    taps, shares = [], []
    for index, size in axes:
        place = index.float() * (side - 1) / max(size - 1, 1)
        low = place.long()
        taps.append(torch.stack([low, (low + 1).clamp(max=side - 1)], dim=1))
        shares.append(torch.stack([1 - (place - low), place - low], dim=1))
    (row_taps, column_taps), (row_shares, column_shares) = taps, shares
    exponents = torch.arange(frequencies, dtype=torch.float32) / frequencies
    inverse = 1.0 / config.rope_theta**exponents
    return FramePositions(
        (row_taps[:, :, None] * side + column_taps[:, None, :]).flatten(1),
        (row_shares[:, :, None] * column_shares[:, None, :]).flatten(1),
        torch.cat([index.float()[:, None] * inverse for index, _ in axes], dim=1),
    )


def checked_grids(pixel_values: torch.Tensor, grid_thw: torch.Tensor, config: Qwen35VisionConfig) -> list[list[int]]:
    """grid_thw [N, 3] as lists [frames, rows, columns], once it is known to describe pixel_values [P, patch_dim].

    Raises:
        ValueError: naming the image and the value that does not fit.
    """
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"grid_thw has shape {list(grid_thw.shape)}, expected [images, 3]: frames, rows, columns")
    grids: list[list[int]] = grid_thw.tolist()
    merge = config.spatial_merge_size
    for i, (frames, height, width) in enumerate(grids):
        if min(frames, height, width) < 1 or height % merge or width % merge:
            raise ValueError(
                f"grid_thw[{i}]={grids[i]}: frames must be at least 1, rows and columns multiples of the "
                f"spatial_merge_size={merge}; resize the image as the processor does"
            )
    patches = sum(frames * height * width for frames, height, width in grids)
    if list(pixel_values.shape) != [patches, config.patch_dim]:
        raise ValueError(
            f"pixel_values has shape {list(pixel_values.shape)}, grid_thw and vision_config need "
            f"[{patches}, {config.patch_dim}]; pass both as one processor call returned them"
        )
    return grids
