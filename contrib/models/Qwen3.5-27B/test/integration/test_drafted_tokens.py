# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Speculation with the checkpoint's MTP head: the same tokens as without, in fewer steps."""

from __future__ import annotations

import time

import pytest

from qwen35 import Qwen35Engine, Request
from qwen35.planning.step import not_modelled, step_model_of
from qwen35.serving.generation import TextGenerator
from qwen35.serving.prompts import as_chat, token_ids
from support.integration import Report, Settings, greedy, require_same_up_to_ties, slots_of
from support.times_table import Spread, modelled_with_drafts, place_of

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
    while engine.has_work:
        for output in engine.step():
            assert output.error is None and output.token is not None
            tokens[output.request_id].append(output.token)
    report("Speculation", f"{model.config.num_speculative_tokens} drafts a step: {engine.acceptance}\n")
    assert engine.acceptance.tokens_per_step > 1, "no draft was right"
    slots = slots_of(model)
    for first in range(0, len(prompts), slots):
        given = [tokens[request_id] for request_id in ids[first : first + slots]]
        plain, logits = greedy(model, prompts[first : first + slots], max(map(len, given)))
        for own, expected, own_logits in zip(given, plain, logits, strict=True):
            require_same_up_to_ties(own, expected, own_logits, model.neuron_config.torch_dtype)


def test_time_per_token_with_drafts_is_reported(
    generator: TextGenerator, prompts: list[list[int]], report: Report
) -> None:
    engine = Qwen35Engine(generator.model)
    times = []
    for prompt in prompts:
        request_id = engine.add(Request(prompt, NEW_TOKENS, eos_token_ids=generator.eos_token_ids))
        own = [time.perf_counter() for _ in engine.stream(request_id)]
        if len(own) > 1:  # of a step's tokens all come at once
            times.append((own[-1] - own[0]) / (len(own) - 1))
    assert times, "every answer was one token"
    reason, modelled = not_modelled(generator.model), "not modelled"
    if reason is None:
        drafts = generator.model.config.num_speculative_tokens
        seconds = modelled_with_drafts(step_model_of(generator.model), engine.acceptance, drafts, len(prompts[0]))
        modelled = f"modelled with this acceptance {1e3 * seconds:.2f} ms"
    report(
        "Speculation",
        f"One request at a time: TPOT {Spread.of(times)} ms, {engine.acceptance.tokens_per_step:.2f} tokens a step, "
        f"{modelled} ({place_of(generator.model)})",
    )
