# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Speculation with the checkpoint's MTP head: the same tokens as without, in fewer steps."""

from __future__ import annotations

import time

import pytest

from qwen35 import Qwen35Engine, Request
from qwen35.serving.generation import TextGenerator
from qwen35.serving.prompts import as_chat, token_ids
from support.integration import Report, Settings, greedy, require_same_up_to_ties, slots_of

QUESTIONS = (
    "What is the capital of France?",
    "What is the opposite of hot?",
    "What is the currency of Canada?",
    "What is 3 + 4?",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def prompts(generator: TextGenerator, settings: Settings) -> list[list[int]]:
    if not generator.model.config.num_speculative_tokens:
        pytest.skip(f"tokens are not drafted; with drafts: {settings.compile_command()}")
    return [token_ids(generator.tokenizer, as_chat(generator.tokenizer, question)) for question in QUESTIONS]


def test_drafts_change_no_token_and_save_steps(
    generator: TextGenerator, prompts: list[list[int]], report: Report
) -> None:
    model = generator.model
    engine = Qwen35Engine(model)
    ids = [engine.add(Request(prompt, NEW_TOKENS, eos_token_ids=generator.eos_token_ids)) for prompt in prompts]
    tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    start = time.perf_counter()
    while engine.has_work:
        for output in engine.step():
            assert output.error is None and output.token is not None
            tokens[output.request_id].append(output.token)
    seconds = time.perf_counter() - start
    count = sum(map(len, tokens.values()))
    rows = min(len(prompts), slots_of(model))
    report(
        "Speculation",
        f"{engine.acceptance}; {count} tokens of {len(prompts)} requests, {rows} at a time, prompts included: "
        f"{count / seconds:.1f} tokens/s",
    )
    for prompt, request_id in zip(prompts, ids, strict=True):
        own = tokens[request_id]
        (plain,), (logits,) = greedy(model, [prompt], len(own))
        require_same_up_to_ties(own, plain, logits, model.neuron_config.torch_dtype)
    assert engine.acceptance.tokens_per_step > 1, "no draft was right"
