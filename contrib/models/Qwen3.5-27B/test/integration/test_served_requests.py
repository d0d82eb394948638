# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Several prompts at a time: batches of unequal lengths, requests that come and go, prefixes that are restored."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from qwen35 import Qwen35Engine, Request, SamplingOptions
from qwen35.serving.generation import TextGenerator
from qwen35.serving.prefix_cache import PrefixCache
from qwen35.serving.prompts import token_ids
from qwen35.serving.request import FinishReason, StepOutput
from support.integration import Settings, greedy, require_same_up_to_ties, slots_of

PROMPTS = (
    "The capital of France is",
    "3 + 4 =",
    "The opposite of hot is",
    "The capital of Japan is Tokyo. The capital of Italy is",
    "The",
)
NEW_TOKENS = 6
CACHE_BYTES = 4 << 30


Alone = Callable[[list[int], list[int]], None]
"""Checks the tokens that a prompt got, against those it gets alone."""


@pytest.fixture(scope="module")
def require_as_alone(generator: TextGenerator) -> Alone:
    dtype = generator.model.neuron_config.torch_dtype
    computed = cache(lambda prompt: [each[0] for each in greedy(generator.model, [prompt], NEW_TOKENS)])

    def check(prompt: list[int], tokens: list[int]) -> None:
        alone, logits = computed(tuple(prompt))
        assert len(tokens) == NEW_TOKENS
        require_same_up_to_ties(tokens, alone, logits, dtype)

    return check


@pytest.fixture(scope="module")
def prompts(generator: TextGenerator) -> list[list[int]]:
    """One more than there are slots, at least."""
    count = max(len(PROMPTS), slots_of(generator.model) + 1)
    return [token_ids(generator.tokenizer, PROMPTS[i % len(PROMPTS)]) for i in range(count)]


def tokens_of(outputs: list[StepOutput], request_id: int) -> list[int]:
    return [output.token for output in outputs if output.request_id == request_id and output.token is not None]


def finish(engine: Qwen35Engine) -> list[StepOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert not [output.error for output in outputs if output.error is not None]
    return outputs


def test_prompts_of_unequal_lengths_in_a_batch_get_what_each_gets_alone(
    generator: TextGenerator, settings: Settings, prompts: list[list[int]], require_as_alone: Alone
) -> None:
    rows = slots_of(generator.model)
    if rows == 1:
        pytest.skip(f"one row at a time; with several: {settings.compile_command()}")
    together, _ = greedy(generator.model, prompts[:rows], NEW_TOKENS)
    for prompt, tokens in zip(prompts[:rows], together, strict=True):
        require_as_alone(prompt, tokens)


def test_requests_that_come_and_go_get_what_each_gets_alone(
    generator: TextGenerator, prompts: list[list[int]], require_as_alone: Alone
) -> None:
    engine = Qwen35Engine(generator.model)
    outputs, ids = [], []
    cancelled = engine.add(Request(prompts[-1], NEW_TOKENS))
    for i, prompt in enumerate(prompts):
        ids.append(engine.add(Request(prompt, NEW_TOKENS)))
        if i % 2:  # two requests between steps
            outputs += engine.step()
        if i == 2:
            engine.cancel(cancelled)
    outputs += finish(engine)
    ended = [output.finish_reason for output in outputs if output.request_id == cancelled and output.finish_reason]
    assert ended == [FinishReason.CANCELLED]
    for prompt, request_id in zip(prompts, ids, strict=True):
        require_as_alone(prompt, tokens_of(outputs, request_id))


def test_a_seed_repeats_what_is_sampled(generator: TextGenerator, prompts: list[list[int]]) -> None:
    sampling = SamplingOptions(temperature=1.0, top_p=0.9, seed=3)
    engine = Qwen35Engine(generator.model)
    drawn = []
    for _ in range(2):
        request_id = engine.add(Request(prompts[0], NEW_TOKENS, sampling))
        drawn.append(tokens_of(finish(engine), request_id))
    assert drawn[0] == drawn[1]


def test_a_restored_prefix_gives_what_a_cold_one_gives(
    generator: TextGenerator, settings: Settings, prompts: list[list[int]]
) -> None:
    chunk = generator.model.config.prefill_chunk_size
    if chunk is None:
        pytest.skip(f"prefixes are restored where a chunk ended; with chunks: {settings.compile_command()}")
    # A state has as many bytes however long the prompt: a block of one chunk, and a few tokens after it.
    prompt = (token_ids(generator.tokenizer, " ".join(PROMPTS)) * chunk)[: chunk + 5]
    cache = PrefixCache(generator.model, CACHE_BYTES)
    engine = Qwen35Engine(generator.model, cache)
    runs = []
    for blocks in (0, 1):
        assert cache.blocks == blocks
        request_id = engine.add(Request(prompt, NEW_TOKENS, logprobs=1))
        # Another prompt takes the slot before the second run, so that nothing is left there by chance.
        outputs = finish(engine)
        runs.append([(output.token, output.logprobs) for output in outputs if output.request_id == request_id])
        engine.add(Request(prompts[0], 2))
        finish(engine)
    assert [token for token, _ in runs[0]] == [token for token, _ in runs[1]]
    assert runs[0] == runs[1], "the same programs on the same numbers"
