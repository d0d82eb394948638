# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Positions of patches against independent computations, and grids that do not fit their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qwen35.configuration_qwen35_vl import Qwen35VisionConfig
from qwen35.vision.positions import checked_grids, frame_positions
from support.compare import assert_close

SIZES: dict[str, Any] = dict(
    depth=1,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=24,
    num_position_embeddings=49,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
)


def merged_order(height: int, width: int, merge: int) -> list[tuple[int, int]]:
    """(row, column) of each patch of a frame, in the order of the processor."""
    return [
        (block_row + row, block_column + column)
        for block_row in range(0, height, merge)
        for block_column in range(0, width, merge)
        for row in range(merge)
        for column in range(merge)
    ]


frames = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 9))


@given(frames)
def test_the_learned_grid_is_interpolated_with_aligned_corners(case: tuple[int, int, int, int]) -> None:
    blocks_high, blocks_wide, merge, side = case
    height, width = blocks_high * merge, blocks_wide * merge
    config = Qwen35VisionConfig(**{**SIZES, "spatial_merge_size": merge, "num_position_embeddings": side**2})
    table = torch.randn(side**2, 3, generator=torch.Generator().manual_seed(side))
    at = frame_positions(height, width, config)
    actual = (table[at.indices] * at.weights[..., None]).sum(1)
    grid = table.T.view(1, 3, side, side)
    whole = F.interpolate(grid, (height, width), mode="bilinear", align_corners=True)[0]
    expected = torch.stack([whole[:, row, column] for row, column in merged_order(height, width, merge)])
    # A place between two entries is rounded in another order: 1e-6 of at most 8 steps of the grid.
    assert_close(actual, expected, atol=2e-5, label=f"{height} by {width} of {side} by {side}")


@given(frames)
def test_rotary_angles_are_those_of_the_row_then_those_of_the_column(case: tuple[int, int, int, int]) -> None:
    blocks_high, blocks_wide, merge, _ = case
    config = Qwen35VisionConfig(**{**SIZES, "spatial_merge_size": merge})
    frequencies = [config.rope_theta ** (-i / 4) for i in range(4)]  # head dim 16, a quarter for each axis
    expected = [
        [place * frequency for place in patch for frequency in frequencies]
        for patch in merged_order(blocks_high * merge, blocks_wide * merge, merge)
    ]
    angles = frame_positions(blocks_high * merge, blocks_wide * merge, config).angles
    assert_close(angles, torch.tensor(expected), atol=1e-5, label="angles up to 18, in float32")


@pytest.mark.parametrize(
    ("grids", "rows", "columns", "words"),
    [
        ([[1, 4, 4]], 15, 96, ("[15, 96]", "[16, 96]")),
        ([[1, 4, 4]], 16, 95, ("[16, 95]", "[16, 96]")),
        ([[1, 4, 4], [1, 3, 4]], 28, 96, ("grid_thw[1]=[1, 3, 4]", "spatial_merge_size=2")),
        ([[0, 4, 4]], 0, 96, ("grid_thw[0]=[0, 4, 4]", "at least 1")),
        ([1, 4, 4], 16, 96, ("shape [3]", "[images, 3]")),
    ],
)
def test_pixels_and_grids_that_do_not_fit_are_refused(
    grids: Any, rows: int, columns: int, words: Sequence[str]
) -> None:
    with pytest.raises(ValueError) as error:
        checked_grids(torch.zeros(rows, columns), torch.tensor(grids), Qwen35VisionConfig(**SIZES))
    assert all(word in str(error.value) for word in words), error.value


def test_grids_that_fit_come_as_lists() -> None:
    grids = [[1, 4, 4], [2, 2, 6]]
    assert checked_grids(torch.zeros(40, 96), torch.tensor(grids), Qwen35VisionConfig(**SIZES)) == grids
