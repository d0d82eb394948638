# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Conversations with the shipped checkpoint, turn by turn."""

from __future__ import annotations

import pytest

from qwen35 import PrefixCache, Qwen35InferenceConfig
from qwen35.serving.chat import Conversation
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.serving.sampling import GREEDY

QUESTIONS = ["What is the capital of Italy?", "What is the capital of France?", "What is 3 + 4?"]


def conversation(chunk: int | None, seq_len: int = 256) -> Conversation:
    neuron_config = default_neuron_config(seq_len, prefill_chunk_size=chunk)
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=neuron_config)
    return Conversation(TextGenerator.load(MINI_CHECKPOINT, config), 16, GREEDY, cache_bytes=1 << 30)


@pytest.fixture(scope="module")
def with_cache() -> Conversation:
    return conversation(chunk=16)


def test_turns_that_restore_what_was_said_get_the_answers_of_turns_encoded_anew(
    with_cache: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored: list[int] = []
    restore = PrefixCache.restore
    monkeypatch.setattr(
        PrefixCache,
        "restore",
        lambda *args: restored.append(restore(*args)) or restored[-1],  # type: ignore[func-returns-value]
    )
    without = conversation(chunk=None)
    assert without.cache is None and with_cache.cache is not None
    for question in QUESTIONS:
        pieces = [*with_cache.ask(question)]
        assert len(pieces) > 1 and all(pieces)
        assert "".join(pieces) == "".join(without.ask(question))
        assert with_cache.messages[-2:] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "".join(pieces)},
        ]
    assert with_cache.messages == without.messages and with_cache.messages[1]["content"] == "Rome."
    assert restored[0] == 0 and restored[1] >= 16 and restored[2] > restored[1]


def test_a_question_that_does_not_fit_leaves_the_conversation_as_it_was(with_cache: Conversation) -> None:
    before = [*with_cache.messages]
    with pytest.raises(ValueError, match=r"exceed seq_len=256"):
        with_cache.ask("What is the capital of Italy? " * 40)
    assert with_cache.messages == before and not with_cache.engine.has_work
    assert "".join(with_cache.ask(QUESTIONS[0]))
