# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of prompts with images and videos, from token ids and grids alone.

Letters: B batch, S tokens of the prompt, N images or videos.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..configuration_qwen35_vl import Qwen35VLInferenceConfig


class _Medium(NamedTuple):
    """The images, or the videos, of a call."""

    name: str
    frames: Iterator[tuple[int, int]]  # (rows, columns) of merged tokens of those frames that were not placed yet


def get_rope_index(
    config: Qwen35VLInferenceConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions on the time, height and width axes (transformers' `Qwen3_5Model.get_rope_index`).

    A text token has one position on all axes, one more than the token before it. The tokens of an image of h x w
    merged tokens share one time; their heights and widths count rows and columns from that position. The text after
    it continues max(h, w) positions later. Each frame of a video counts as an image, with its timestamp as text before
    it.

    Args:
        config: placeholder ids and sizes of the vision encoder.
        input_ids, attention_mask: [B, S] int; padding may be anywhere.
        image_grid_thw, video_grid_thw: [N, 3] int, frames, rows and columns of patches, in the order of the
            placeholders.

    Returns:
        position_ids: [B, 3, S] int64, 0 at padding.
        rope_deltas: [B] int64, what a decoding step adds to the index of its token.

    Raises:
        ValueError: the runs of placeholders are not those of the grids; it names the row and both numbers.
    """
    merge, image, video = config.vision.spatial_merge_size, config.image_token_id, config.video_token_id
    assert image is not None and video is not None, "the configuration was validated"
    media = {
        image: _Medium("image", _frames(image_grid_thw, merge, "image_grid_thw")),
        video: _Medium("video", _frames(video_grid_thw, merge, "video_grid_thw")),
    }
    position_ids = torch.zeros(input_ids.shape[0], 3, input_ids.shape[1], dtype=torch.long)
    deltas = []
    for row, (ids, real) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        tokens = ids[real].tolist()
        positions = _row_positions(row, tokens, media)
        position_ids[row][:, real] = positions
        deltas.append(int(positions.max()) + 1 - len(tokens))
    for token, (name, rest) in media.items():
        if left := len([*rest]):
            raise ValueError(
                f"{name}_grid_thw has {left} frames more than input_ids have runs of {name} placeholders ({token}); "
                "pass input_ids and grids of the same call of the processor"
            )
    return position_ids, torch.tensor(deltas)


def media_of_rows(
    config: Qwen35VLInferenceConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    video_grid_thw: torch.Tensor | None,
) -> list[dict[str, list[int]]]:
    """For each row, which images and which videos are its own: indices into image_grid_thw and video_grid_thw, by name.

    Raises:
        ValueError: as `get_rope_index`, whose arguments these are.
    """
    get_rope_index(config, input_ids, attention_mask, image_grid_thw, video_grid_thw)
    ids = input_ids.masked_fill(attention_mask == 0, -1)
    rows: list[dict[str, list[int]]] = [{} for _ in ids]
    for name, token, grids in (
        ("image_grid_thw", config.image_token_id, image_grid_thw),
        ("video_grid_thw", config.video_token_id, video_grid_thw),
    ):
        assert token is not None, "the configuration was validated"
        sizes = [] if grids is None else (grids.prod(dim=1) // config.vision.merge_unit).tolist()
        first = 0
        for row, left in zip(rows, ids.eq(token).sum(dim=1).tolist(), strict=True):
            stop = first
            while left > 0:
                left, stop = left - sizes[stop], stop + 1
            row[name], first = [*range(first, stop)], stop
    return rows


def _row_positions(row: int, tokens: list[int], media: dict[int, _Medium]) -> torch.Tensor:
    """Positions [3, S] of one prompt's tokens; the frames of its placeholders are taken from `media`.

    Raises:
        ValueError: a run of placeholders is not of its frame's length.
    """
    parts, start, i = [], 0, 0
    while i < len(tokens):
        kind = tokens[i]
        if kind in media:
            name, frames = media[kind]
            height, width = next(frames, (0, 0))
            run = height * width
            found = next((j for j in range(i, len(tokens)) if tokens[j] != kind), len(tokens)) - i
            if not 0 < run <= found:
                raise ValueError(
                    f"row {row} has {found} {name} placeholders at token {i}, its grid makes {run} tokens; pass "
                    f"the {name}_grid_thw that the processor gave with these input_ids"
                )
            time = torch.zeros(height, width, dtype=torch.long)
            rows, columns = torch.arange(height).unsqueeze(1), torch.arange(width)
            parts.append(start + torch.stack((time, rows + time, columns + time)).flatten(1))
            start += max(height, width)
        else:
            run = next((j for j in range(i, len(tokens)) if tokens[j] in media), len(tokens)) - i
            parts.append(start + torch.arange(run).expand(3, -1))
            start += run
        i += run
    return torch.cat(parts, dim=1)


def _frames(grid_thw: torch.Tensor | None, merge: int, name: str) -> Iterator[tuple[int, int]]:
    """(rows, columns) of merged tokens of every frame.

    Raises:
        ValueError: grid_thw is not [N, 3], or its rows and columns are not made of whole merged tokens.
    """
    if grid_thw is None:
        return
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3:
        raise ValueError(f"{name} has shape {list(grid_thw.shape)}, expected [N, 3]: frames, rows, columns")
    for frames, rows, columns in grid_thw.tolist():
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"{name} has {[frames, rows, columns]}: rows and columns must be positive multiples of {merge}, the "
                "patches on a side of a merged token"
            )
        for _ in range(frames):
            yield rows // merge, columns // merge
