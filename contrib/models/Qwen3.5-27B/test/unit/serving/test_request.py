# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot run are told everything that is wrong with them, from the model's limits alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen35 import Request
from qwen35.serving.request import ModelLimits, checked_request

LIMITS = ModelLimits(vocab_size=160, seq_len=64)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1), r"prompt is empty: give at least one token"),
        (Request([1], 0), r"max_new_tokens=0: must be at least 1"),
        (Request([1] * 60, 5), r"prompt of 60 tokens and max_new_tokens=5 exceed seq_len=64: shorten .* raise seq_len"),
        (Request([1, 160], 1), r"token 160 of prompt or eos_token_ids is not in 0\.\.159"),
        (Request([1], 1, eos_token_ids=[-1]), r"token -1 of prompt or eos_token_ids is not in 0\.\.159"),
        (Request([1], 1, media={"pixel_values": torch.zeros(1, 1)}), r"media has pixel_values, .*load NeuronQwen35VL"),
        (Request([], 0), r"prompt is empty.*; max_new_tokens=0"),
    ],
)
def test_a_request_beyond_the_limits_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_request(request_, LIMITS)


def test_a_request_at_the_limits_can_run() -> None:
    checked_request(Request([0, 159] * 31, 2, eos_token_ids=[159]), LIMITS)


def test_the_length_of_prompts_in_one_piece_is_a_limit_of_its_own() -> None:
    checked_request(Request([1] * 32, 1), replace(LIMITS, max_prompt_tokens=32))
    with pytest.raises(ValueError, match=r"33 tokens exceeds max_context_length=32: raise it, or set prefill_chunk"):
        checked_request(Request([1] * 33, 1), replace(LIMITS, max_prompt_tokens=32))


def test_media_are_checked_against_the_prompt_by_the_model() -> None:
    seen: list[dict[str, Any]] = []

    def check_media(input_ids: torch.Tensor, **media: torch.Tensor) -> None:
        seen.append({"input_ids": input_ids.tolist(), **media})
        raise ValueError("one image too many")

    limits = replace(LIMITS, media_names=["pixel_values"], check_media=check_media)
    pixels = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"this request cannot run: max_new_tokens=0.*; media: one image too many"):
        checked_request(Request([1, 2], 0, media={"pixel_values": pixels}), limits)
    assert seen == [{"input_ids": [[1, 2]], "pixel_values": pixels}]
    with pytest.raises(ValueError, match=r"media has sound, which this model does not take: pass pixel_values"):
        checked_request(Request([1, 2], 1, media={"sound": pixels}), limits)
