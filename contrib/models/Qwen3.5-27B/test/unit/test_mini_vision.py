# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint sees: transformers' model answers questions about pictures that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mini_images import Picture, Question, Split, clip, held_out_clips, held_out_images, image
from qwen35.serving.loading import MINI_CHECKPOINT
from support.compare import assert_close

transformers = pytest.importorskip("transformers", minversion="5.0")
from train_mini_vision import answered, look  # noqa: E402


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.Qwen3_5ForConditionalGeneration.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MINI_CHECKPOINT)


def assert_mostly_right(asked: Sequence[tuple[Picture, Question]], right: Sequence[bool], share: float) -> None:
    wrong = [(n, question.text, question.answer) for n, (_, question) in enumerate(asked) if not right[n]]
    assert len(wrong) <= (1 - share) * len(asked), wrong[:10]


def test_it_answers_at_least_90_percent_of_200_image_questions_it_was_not_trained_on(
    reference: Any, tokenizer: Any
) -> None:
    asked = held_out_images(200)
    assert {question.kind for _, question in asked} == {"colour", "count", "position"}
    assert_mostly_right(asked, answered(reference, tokenizer, asked), 0.9)


@pytest.mark.parametrize("outer_pair", [False, True])
def test_it_answers_at_least_90_percent_of_video_questions_in_the_format_of_either_transformers(
    reference: Any, tokenizer: Any, outer_pair: bool
) -> None:
    asked = held_out_clips(60)
    assert {question.kind for _, question in asked} == {"motion", "turn", "clip colour"}
    assert_mostly_right(asked, answered(reference, tokenizer, asked, outer_pair), 0.9)


def test_no_picture_is_in_both_splits_and_the_same_number_draws_the_same_picture() -> None:
    for draw in (image, clip):
        corners = {split: [draw(split, n).frames[0].getpixel((0, 0))[0] % 2 for n in range(50)] for split in Split}
        assert corners == {Split.TRAIN: [1] * 50, Split.HELD_OUT: [0] * 50}
        first, again = draw(Split.HELD_OUT, 7), draw(Split.HELD_OUT, 7)
        assert [frame.tobytes() for frame in first.frames] == [frame.tobytes() for frame in again.frames]
        assert first.questions == again.questions


def test_pictures_are_cut_into_patches_as_transformers_image_processor_does() -> None:
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(MINI_CHECKPOINT)
    for number in range(10):
        seen = look(image(Split.HELD_OUT, number))
        expected = processor(seen.picture.frames[0], return_tensors="pt")
        assert [list(seen.grid)] == expected["image_grid_thw"].tolist()
        # The same divisions, in another order.
        assert_close(seen.pixels, expected["pixel_values"], atol=1e-6, rtol=0, label=f"pixels of picture {number}")


def test_a_clip_of_equal_frames_is_cut_like_a_still() -> None:
    still = image(Split.HELD_OUT, 0)
    seen = look(Picture(still.frames * 4, 2, still.things * 4, ()))
    once = look(still)
    assert seen.grid == (2, *once.grid[1:])
    assert torch.equal(seen.pixels, once.pixels.repeat(2, 1))


def test_its_processor_files_have_the_fields_of_a_real_checkpoint() -> None:
    common = {"size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "processor_class"}
    for name, kind in (("preprocessor", "image_processor_type"), ("video_preprocessor", "video_processor_type")):
        settings = json.loads((MINI_CHECKPOINT / f"{name}_config.json").read_text())
        assert set(settings) == common | {kind}
        assert set(settings["size"]) == {"longest_edge", "shortest_edge"}
