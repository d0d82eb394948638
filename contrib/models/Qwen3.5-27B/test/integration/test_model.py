# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The model as a user runs it, by the themes of the published ports: it loads, generates, is coherent, knows, is timed.

What the suite runs on, and which variables say so: `support/integration.py`.
"""

from __future__ import annotations

import statistics

import torch

from qwen35.serving.generation import TextGenerator
from qwen35.serving.prompts import as_chat, encode

PROMPT = "The capital of France is"
MAX_NEW_TOKENS = 32


def test_model_loads(generator: TextGenerator) -> None:
    assert all(submodel.model is not None for submodel in generator.model.models)


def test_model_generates(generator: TextGenerator) -> None:
    result = generator.generate([PROMPT], 8)
    assert 1 <= len(result.tokens[0]) <= 8
    assert result.texts[0].strip()


def test_output_is_coherent(generator: TextGenerator) -> None:
    # The mini ends its answer; what any model must not do is fall into a loop of one token or emit broken bytes.
    result = generator.generate([as_chat(generator.tokenizer, "What is the capital of Italy?")], MAX_NEW_TOKENS)
    text, tokens = result.texts[0], result.tokens[0]
    assert "\ufffd" not in text
    assert all(len(set(tokens[i : i + 6])) > 1 for i in range(len(tokens) - 5)), text
    assert any(character.isalpha() for character in text)


def test_top_token_is_valid(generator: TextGenerator) -> None:
    inputs = encode(generator.tokenizer, [PROMPT])
    positions = torch.arange(inputs["input_ids"].shape[1]).unsqueeze(0)
    generator.model.reset()
    logits = generator.model(**inputs, position_ids=positions).logits[0, -1]
    assert torch.isfinite(logits).all()
    assert generator.tokenizer.decode([int(logits.argmax())]).strip()


def test_capital_of_france(generator: TextGenerator) -> None:
    assert "Paris" in generator.generate([PROMPT], MAX_NEW_TOKENS).texts[0]


def test_time_to_first_token_is_reported(generator: TextGenerator) -> None:
    generator.generate([PROMPT], 2)
    times = [generator.generate([PROMPT], 1).time_to_first_token for _ in range(3)]
    print(f"TTFT {1e3 * statistics.median(times):.1f} ms")
    assert 0 < statistics.median(times) < 60


def test_throughput_is_reported(generator: TextGenerator) -> None:
    result = generator.generate([PROMPT], 8)
    assert result.time_per_output_token is not None, f"{result.texts[0]!r}: the model ended after one token"
    print(f"TPOT {1e3 * result.time_per_output_token:.2f} ms, {1 / result.time_per_output_token:.1f} tokens/s")
    assert result.time_per_output_token > 0


def test_prompts_one_after_the_other(generator: TextGenerator) -> None:
    prompts = [PROMPT, "The capital of Japan is", "3 + 4 ="]
    first = [generator.generate([prompt], 8).tokens for prompt in prompts]
    again = [generator.generate([prompt], 8).tokens for prompt in reversed(prompts)]
    assert first == again[::-1]
