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
from support.integration import Media, Settings, greedy, require_same_up_to_ties, slots_of
from support.recorded_logits import example_picture

PICTURES, NEW_TOKENS = 3, 12


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


def test_colours_of_shapes_are_seen(generator: TextGenerator) -> None:
    # The mini answers all of these right, docs/checkpoints.md. How many shapes there are, and where, a larger model may
    # say in other words.
    cases = [case for case in held_out_images(3 * PICTURES) if case[1].kind == "colour"]
    assert len(cases) == PICTURES
    for picture, question in cases:
        asked = conversation(question.text, picture.frames[0])
        assert question.answer in generator.chat([asked], NEW_TOKENS, enable_thinking=False).texts[0].lower()


def encoded(generator: TextGenerator, asked: list[dict[str, Any]]) -> tuple[list[int], Media]:
    """The prompt of a conversation, and its media."""
    processor = VisionProcessor.from_pretrained(generator.model_path)
    inputs = encode_chat(generator.tokenizer, processor, [asked], enable_thinking=False)
    media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    return inputs["input_ids"][0].tolist(), media


def test_a_picture_beside_a_prompt_without_one_changes_neither(generator: TextGenerator, settings: Settings) -> None:
    model = generator.model
    if slots_of(model) == 1:
        pytest.skip(f"one row at a time; with several: {settings.compile_command()}")
    asked = [
        conversation("What is the capital of France?"),
        conversation("What colour is the square?", example_picture()),
    ]
    prompts, media = zip(*(encoded(generator, each) for each in asked), strict=True)
    together, _ = greedy(model, prompts, NEW_TOKENS, media)
    for tokens, prompt, own in zip(together, prompts, media, strict=True):
        (alone,), (logits,) = greedy(model, [prompt], NEW_TOKENS, [own])
        require_same_up_to_ties(tokens, alone, logits, model.neuron_config.torch_dtype)


def test_a_request_with_a_picture_gets_what_its_prompt_gets(generator: TextGenerator) -> None:
    model = generator.model
    prompt, media = encoded(generator, conversation("What colour is the square?", example_picture()))
    engine = Qwen35Engine(model)
    outputs = [*engine.stream(engine.add(Request(prompt, NEW_TOKENS, media=media)))]
    (alone,), (logits,) = greedy(model, [prompt], NEW_TOKENS, [media])
    tokens = [output.token for output in outputs if output.token is not None]
    assert len(tokens) == NEW_TOKENS
    require_same_up_to_ties(tokens, alone, logits, model.neuron_config.torch_dtype)
