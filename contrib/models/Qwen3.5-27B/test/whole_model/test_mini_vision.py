# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint sees: our model answers questions about pictures that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mini_images import Picture, Question, Split, clip, held_out_clips, held_out_images, image
from qwen35 import Qwen35VLInferenceConfig
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.vision.processing import Video
from support.compare import assert_close

transformers = pytest.importorskip("transformers", minversion="5.0")
from train_mini_vision import answered, look  # noqa: E402

ROWS, SEQ_LEN = 10, 256
"""Conversations asked as one batch, and their tokens with the answer at most."""


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    config = Qwen35VLInferenceConfig.from_pretrained(
        MINI_CHECKPOINT, neuron_config=default_neuron_config(SEQ_LEN, ROWS)
    )
    return TextGenerator.load(MINI_CHECKPOINT, config)


def conversation(picture: Picture, question: Question) -> list[dict[str, Any]]:
    if picture.fps is None:
        medium: dict[str, Any] = {"type": "image", "image": picture.frames[0]}
    else:
        medium = {"type": "video", "video": Video(picture.frames, picture.fps)}
    return [{"role": "user", "content": [medium, {"type": "text", "text": question.text}]}]


def wrong_answers(generator: TextGenerator, asked: Sequence[tuple[Picture, Question]]) -> list[tuple[int, str, str]]:
    """(number, right answer, given text) of the questions that our model does not answer exactly."""
    texts: list[str] = []
    for start in range(0, len(asked), ROWS):
        batch = [conversation(*pair) for pair in asked[start : start + ROWS]]
        texts += generator.chat(batch, max_new_tokens=6).texts
    answers = [question.answer for _, question in asked]
    return [
        (n, answer, text) for n, (answer, text) in enumerate(zip(answers, texts, strict=True)) if text != f"{answer}."
    ]


def test_it_answers_at_least_95_percent_of_200_image_questions_it_was_not_trained_on(generator: TextGenerator) -> None:
    asked = held_out_images(200)
    assert {question.kind for _, question in asked} == {"colour", "count", "position"}
    wrong = wrong_answers(generator, asked)
    assert len(wrong) <= 0.05 * len(asked), wrong[:10]


def test_it_answers_at_least_90_percent_of_100_video_questions_it_was_not_trained_on(generator: TextGenerator) -> None:
    asked = held_out_clips(100)
    assert {question.kind for _, question in asked} == {"motion", "turn", "clip colour"}
    wrong = wrong_answers(generator, asked)
    assert len(wrong) <= 0.1 * len(asked), wrong[:10]


@pytest.mark.parametrize("outer_pair", [False, True])
def test_transformers_model_answers_as_well_in_the_video_format_of_either_transformers(outer_pair: bool) -> None:
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(MINI_CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_CHECKPOINT)
    asked = held_out_clips(60)
    assert sum(answered(model, tokenizer, asked, outer_pair)) >= 0.9 * len(asked)


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
