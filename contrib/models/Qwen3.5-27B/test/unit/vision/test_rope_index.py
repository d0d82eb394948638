# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Positions of prompts with images and videos against transformers', and grids that do not fit the placeholders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings

from qwen35 import Qwen35NeuronConfig, Qwen35VLInferenceConfig
from qwen35.vision.rope_index import get_rope_index
from support.oracle import transformers_model
from support.vl_cases import (
    END,
    EXAMPLE,
    IMAGE,
    START,
    VIDEO,
    Row,
    batches,
    media,
    padded,
    save_vl_checkpoint,
    types,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vision-language")
    save_vl_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def config(path: Path) -> Qwen35VLInferenceConfig:
    return Qwen35VLInferenceConfig.from_pretrained(path, neuron_config=Qwen35NeuronConfig())


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    return transformers_model(path)


def grids_of(rows: list[Row]) -> dict[str, torch.Tensor]:
    return {name: grid for name, grid in media(rows).items() if "grid" in name}


def ours(config: Qwen35VLInferenceConfig, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    grids = grids_of(rows)
    return get_rope_index(config, *padded(rows), grids.get("image_grid_thw"), grids.get("video_grid_thw"))


def check(reference: Any, config: Qwen35VLInferenceConfig, rows: list[Row]) -> None:
    ids, mask = padded(rows)
    positions, deltas = ours(config, rows)
    theirs = reference.model.get_rope_index(ids, types(ids), attention_mask=mask, **grids_of(rows))
    assert torch.equal(positions, theirs[0].movedim(0, 1)) and torch.equal(deltas, theirs[1][:, 0])


def test_positions_equal_transformers(reference: Any, config: Qwen35VLInferenceConfig) -> None:
    check(reference, config, EXAMPLE)

    @settings(max_examples=200, phases=(Phase.explicit, Phase.generate))
    @given(batches())
    def run(rows: list[Row]) -> None:
        check(reference, config, rows)

    run()


def test_an_image_has_one_time_and_counts_its_rows_and_columns(config: Qwen35VLInferenceConfig) -> None:
    positions, deltas = ours(config, [Row([7, START, *[IMAGE] * 6, END, 3], images=[(1, 4, 6)])])
    assert positions[0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert deltas.tolist() == [7 - 10]


def test_images_without_text_between_them_follow_each_other(config: Qwen35VLInferenceConfig) -> None:
    positions, _ = ours(config, [Row([IMAGE] * 2, images=[(1, 2, 2), (1, 2, 2)])])
    assert positions[0].tolist() == [[0, 1]] * 3


def test_padding_may_be_on_either_side(config: Qwen35VLInferenceConfig) -> None:
    ids = torch.tensor([[IMAGE, 5, 6], [5, 6, IMAGE]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    positions, deltas = get_rope_index(config, ids, mask, None, None)
    assert positions.tolist() == [[[0, 0, 1]] * 3, [[0, 1, 0]] * 3] and deltas.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        (
            [5, IMAGE],
            [(1, 2, 4)],
            "row 0 has 1 image placeholders at token 1, its grid makes 2 tokens; pass",
        ),
        ([5, IMAGE], [], "row 0 has 1 image placeholders at token 1, its grid makes 0 tokens"),
        ([5, VIDEO], [(1, 2, 2)], "row 0 has 1 video placeholders at token 1, its grid makes 0 tokens"),
        ([5, 6], [(1, 2, 2)], rf"image_grid_thw has 1 frames more than input_ids have runs of .* \({IMAGE}\)"),
        ([IMAGE], [(1, 3, 2)], r"image_grid_thw has \[1, 3, 2\]: rows and columns must be positive multiples of 2"),
        ([IMAGE], [(1, 2)], r"image_grid_thw has shape \[1, 2\], expected \[N, 3\]"),
    ],
)
def test_grids_that_are_not_those_of_the_placeholders_are_named(
    ids: list[int], images: list[tuple[int, ...]], message: str, config: Qwen35VLInferenceConfig
) -> None:
    input_ids = torch.tensor([ids])
    grids = torch.tensor(images) if images else None
    with pytest.raises(ValueError, match=message):
        get_rope_index(config, input_ids, torch.ones_like(input_ids), grids, None)
