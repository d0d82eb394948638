# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""One batch in, texts out, on the shipped checkpoint."""

from __future__ import annotations

import pytest
import torch

from qwen35 import Qwen35InferenceConfig, SamplingOptions
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config

PROMPTS = ["The capital of France is", "3 + 4 =", "The capital of Japan is"]


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(64, 3))
    return TextGenerator.load(MINI_CHECKPOINT, config)


def test_a_row_ends_with_the_token_that_ends_an_answer(generator: TextGenerator) -> None:
    result = generator.generate(PROMPTS, 24)
    ends = {*generator.eos_token_ids}
    for prompt, tokens, text in zip(PROMPTS, result.tokens, result.texts, strict=True):
        assert tokens[-1] in ends and not ends & {*tokens[:-1]}, prompt
        assert text == generator.tokenizer.decode(tokens[:-1])
    assert "Paris" in result.texts[0] and "Tokyo" in result.texts[2]


def test_the_tokens_of_each_step_are_handed_over_as_they_come(generator: TextGenerator) -> None:
    steps: list[torch.Tensor] = []
    result = generator.generate(PROMPTS, 3, on_token=steps.append)
    assert [step.shape for step in steps] == [(3,)] * 3
    assert torch.stack(steps, dim=1).tolist() == result.tokens


def test_times_are_those_of_the_first_token_and_of_each_after_it(generator: TextGenerator) -> None:
    result = generator.generate(PROMPTS[:1], 3)
    assert result.time_to_first_token > 0
    assert result.time_per_output_token is not None and result.time_per_output_token > 0
    assert generator.generate(PROMPTS[:1], 1).time_per_output_token is None


def test_a_seed_makes_a_batch_repeatable(generator: TextGenerator) -> None:
    def sample(seed: int) -> list[list[int]]:
        options = SamplingOptions(temperature=3.0, top_p=0.95, top_k=50, seed=seed)
        return generator.generate(PROMPTS, 12, options).tokens

    assert sample(1) == sample(1) != sample(2)
