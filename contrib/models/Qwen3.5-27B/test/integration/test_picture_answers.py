# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures: alone, beside questions without one, and as requests."""

from __future__ import annotations

from typing import Any

import pytest

from mini_images import held_out_images
from qwen35 import Qwen35Engine, Request
from qwen35.serving.generation import TextGenerator
from qwen35.serving.prompts import encode_chat
from qwen35.vision.processing import VisionProcessor
from support.integration import Settings, slots_of
from support.recorded_logits import example_picture

PICTURES, RIGHT = 4, 3
"""The mini answers 197 of 200 of them right."""
NEW_TOKENS = 12


@pytest.fixture(autouse=True)
def _takes_pictures(generator: TextGenerator, settings: Settings) -> None:
    if not generator.model.get_required_kwargs():
        pytest.skip(f"a model of text; one that takes pictures: {settings.compile_command()}")


def conversation(question: str, picture: Any = None) -> list[dict[str, Any]]:
    pictures = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


def test_the_colour_of_a_square_is_seen(generator: TextGenerator) -> None:
    asked = conversation("What colour is the square?", example_picture())
    assert "red" in generator.chat([asked], NEW_TOKENS, enable_thinking=False).texts[0].lower()


def test_questions_about_shapes_are_answered(generator: TextGenerator) -> None:
    cases = held_out_images(PICTURES)
    right = 0
    for picture, question in cases:
        asked = conversation(f"{question.text} Answer in a word or two.", picture.frames[0])
        right += question.answer in generator.chat([asked], NEW_TOKENS, enable_thinking=False).texts[0].lower()
    assert right >= RIGHT, f"{right} of {len(cases)}"


def test_a_picture_beside_a_question_without_one_changes_neither(generator: TextGenerator) -> None:
    if slots_of(generator.model) == 1:
        pytest.skip("compiled for one row at a time")
    asked = [
        conversation("What is the capital of France?"),
        conversation("What colour is the square?", example_picture()),
    ]
    alone = [generator.chat([each], NEW_TOKENS, enable_thinking=False).texts[0] for each in asked]
    assert generator.chat(asked, NEW_TOKENS, enable_thinking=False).texts == alone


def test_a_request_with_a_picture_gets_the_answer_of_a_chat(generator: TextGenerator) -> None:
    asked = [conversation("What colour is the square?", example_picture())]
    processor = VisionProcessor.from_pretrained(generator.model_path)
    inputs = encode_chat(generator.tokenizer, processor, asked, enable_thinking=False)
    media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    prompt = inputs["input_ids"][0].tolist()
    engine = Qwen35Engine(generator.model)
    request = Request(prompt, NEW_TOKENS, eos_token_ids=generator.eos_token_ids, media=media)
    tokens = [output.token for output in engine.stream(engine.add(request))]
    assert tokens == generator.chat(asked, NEW_TOKENS, enable_thinking=False).tokens[0]
