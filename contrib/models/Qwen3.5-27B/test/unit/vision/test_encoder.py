# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder on the host against transformers', and its loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwen35.configuration_qwen35_vl import Qwen35VisionConfig
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.vision.encoder import NeuronQwen35VisionModel, arithmetic_dtype
from qwen35.weights.checkpoint import CheckpointReader
from support.compare import assert_close
from support.vision_cases import (
    CLOSE,
    TINY,
    Grids,
    expected_tokens,
    ours_of,
    random_pixels,
    random_reference,
    save_checkpoint,
    tensors_of,
)


@st.composite
def encoders(draw: Any) -> tuple[dict[str, int], Grids]:
    """Sizes of an encoder, and images and videos of sizes that it accepts."""
    merge, heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    sizes = dict(
        depth=draw(st.integers(1, 3)),
        # Wide enough that no row of activations is constant by chance, whose rounding a norm would blow up.
        hidden_size=4 * heads * draw(st.integers(8, 12)),
        intermediate_size=draw(st.integers(1, 70)),
        num_heads=heads,
        out_hidden_size=draw(st.integers(1, 40)),
        num_position_embeddings=draw(st.integers(1, 9)) ** 2,
        patch_size=draw(st.integers(1, 5)),
        temporal_patch_size=draw(st.integers(1, 3)),
        spatial_merge_size=merge,
        in_channels=draw(st.integers(1, 4)),
    )
    side = st.integers(1, 6).map(lambda blocks: blocks * merge)
    return sizes, draw(st.lists(st.tuples(st.integers(1, 4), side, side), min_size=1, max_size=5))


@settings(max_examples=120, phases=(Phase.explicit, Phase.generate))
@given(case=encoders(), seed=st.integers(0, 999))
def test_tokens_equal_transformers_for_any_sizes_images_and_videos(case: Any, seed: int) -> None:
    sizes, grids = case
    reference = random_reference(seed, **sizes)
    pixels, grid_thw = random_pixels(grids, reference.config, seed)
    actual = ours_of(reference)(pixels, grid_thw)
    assert_close(actual, expected_tokens(reference, pixels, grid_thw), **CLOSE, label=f"{sizes} {grids}")


def test_a_layer_of_27b_width_equals_transformers() -> None:
    reference = random_reference(
        depth=1,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        out_hidden_size=512,
        num_position_embeddings=2304,
        patch_size=16,
    )
    pixels, grid_thw = random_pixels([[1, 10, 14], [2, 4, 6]], reference.config)
    actual = ours_of(reference)(pixels, grid_thw)
    assert_close(actual, expected_tokens(reference, pixels, grid_thw), **CLOSE, label="27B's width")


def test_patches_of_more_than_one_mlp_block_equal_transformers() -> None:
    reference = random_reference()
    pixels, grid_thw = random_pixels([[1, 40, 60]], reference.config)  # 2,400 patches in blocks of 1,024
    assert_close(ours_of(reference)(pixels, grid_thw), expected_tokens(reference, pixels, grid_thw), **CLOSE)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(compute_dtype: torch.dtype) -> None:
    reference = random_reference(depth=3).bfloat16()
    pixels, grid_thw = random_pixels([[1, 6, 8], [2, 4, 4], [1, 8, 6]], reference.config)
    model = ours_of(reference, torch.bfloat16)
    model.compute_dtype = compute_dtype
    actual = model(pixels.bfloat16(), grid_thw)
    theirs = expected_tokens(reference, pixels.bfloat16(), grid_thw)
    exact = expected_tokens(reference.float(), pixels.bfloat16().float(), grid_thw)
    assert actual.dtype == torch.bfloat16
    error, their_error = ((t.float() - exact).square().mean().sqrt() for t in (actual, theirs))
    # Half again: the order of roundings differs.
    assert error < 1.5 * their_error, f"error {error}, transformers' {their_error}"


def test_float32_weights_are_multiplied_in_float32() -> None:
    assert arithmetic_dtype(torch.float32) == torch.float32


def test_images_do_not_see_each_other_and_come_back_in_order() -> None:
    model = ours_of(random_reference())
    grids = [[1, 8, 8], [1, 2, 2], [2, 4, 6], [1, 6, 4], [1, 2, 2]]
    pixels, grid_thw = random_pixels(grids, model.config)
    together = model(pixels, grid_thw)
    counts = grid_thw.prod(1).tolist()
    alone = [
        model(image, grid[None]) for image, grid in zip(pixels.split(counts), grid_thw, strict=True)
    ]  # float32 rounding depends on the number of rows of a product
    assert_close(together, torch.cat(alone), atol=1e-5, label="images together and alone")


def test_a_video_is_encoded_as_its_frames_are() -> None:
    model = ours_of(random_reference())
    pixels, grid_thw = random_pixels([[3, 4, 6]], model.config)
    frames = model(pixels, torch.tensor([[1, 4, 6]] * 3))
    assert_close(model(pixels, grid_thw), frames, label="a video and its frames")


def test_no_images_give_no_tokens() -> None:
    model = ours_of(random_reference())
    tokens = model(torch.zeros(0, model.config.patch_dim), torch.zeros(0, 3, dtype=torch.long))
    assert tokens.shape == (0, TINY["out_hidden_size"])


def test_pixels_that_do_not_fit_their_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixel_values has shape \[15, 96\].*need \[16, 96\]"):
        ours_of(random_reference())(torch.zeros(15, 96), torch.tensor([[1, 4, 4]]))


def test_a_dtype_without_support_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16"):
        NeuronQwen35VisionModel(Qwen35VisionConfig(**TINY), torch.float16)


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_a_checkpoint_is_read_a_tensor_at_a_time_and_the_decoder_not_at_all(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = random_reference()
    save_checkpoint(tmp_path, reference, prefix)
    read: list[str] = []
    original = CheckpointReader.__getitem__
    monkeypatch.setattr(CheckpointReader, "__getitem__", lambda self, name: read.append(name) or original(self, name))
    model = NeuronQwen35VisionModel.from_pretrained(tmp_path, torch.float32)
    assert sorted(read) == sorted(tensors_of(reference, prefix))
    pixels, grid_thw = random_pixels([[1, 4, 6]], reference.config)
    assert_close(model(pixels, grid_thw), expected_tokens(reference, pixels, grid_thw), **CLOSE)


def test_the_mini_is_encoded_as_transformers_does() -> None:
    model = NeuronQwen35VisionModel.from_pretrained(MINI_CHECKPOINT, torch.float32)
    transformers = pytest.importorskip("transformers")
    reference = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32)
    pixels, grid_thw = random_pixels([[1, 8, 10], [2, 4, 4]], model.config)
    expected = expected_tokens(reference.model.visual, pixels, grid_thw)
    assert_close(model(pixels, grid_thw), expected, **CLOSE, label="the mini")
