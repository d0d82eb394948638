# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the checks compare with is what transformers says, and far from any doubt."""

from __future__ import annotations

import pytest

from qwen35.selftest.recorded import draw, recorded
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import load_tokenizer


def test_prompts_are_of_the_lengths_that_the_checks_need() -> None:
    assert len(recorded().short) == 4 and all(len(answer.prompt) <= 32 for answer in recorded().short)
    first, second = recorded().long
    assert first.prompt[:128] == second.prompt[:128] and first.prompt != second.prompt
    assert all(128 < len(answer.prompt) <= 230 for answer in recorded().long)
    assert {answer.picture is not None for answer in recorded().pictures} == {True}


def test_every_token_leads_by_more_than_bfloat16_moves_a_logit() -> None:
    assert recorded().least_margin >= 2


def test_tokens_are_those_of_the_tokenizer() -> None:
    tokenizer = load_tokenizer(MINI_CHECKPOINT)
    for answer in (*recorded().short, *recorded().long):
        assert tokenizer(answer.text)["input_ids"] == [*answer.prompt]


def test_a_picture_is_drawn_as_described() -> None:
    picture = recorded().pictures[0].picture
    assert picture is not None
    image = draw(picture)
    assert image.size == (picture.width, picture.height)
    assert image.getpixel((0, 0)) == picture.background and image.getpixel(picture.box[:2]) == picture.colour


def test_transformers_says_the_recorded_tokens() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from support.oracle import reference_greedy, transformers_model

    model = transformers_model(MINI_CHECKPOINT)
    for answer in (*recorded().short[:2], recorded().long[0]):
        tokens, _ = reference_greedy(model, [answer.prompt], len(answer.answer))
        assert tokens[0].tolist() == [*answer.answer]
