# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Conversations with the shipped checkpoint, turn by turn."""

from __future__ import annotations

from typing import Any

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


def other(with_cache: Conversation, max_new_tokens: int = 16, **options: Any) -> Conversation:
    """Another conversation over the same model."""
    return Conversation(with_cache.generator, max_new_tokens, GREEDY, 1 << 30, **options)


def test_what_the_template_is_given_is_given_for_every_turn(with_cache: Conversation) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    talk = other(with_cache, system="Be brief.", tools=tools, enable_thinking=True)
    prompts: list[str] = []
    add = talk.engine.add
    talk.engine.add = lambda request: prompts.append(talk.generator.tokenizer.decode(request.prompt)) or add(request)  # type: ignore[method-assign, func-returns-value]
    for question in QUESTIONS[:2]:
        assert "".join(talk.ask(question))
    assert len(prompts) == 2
    for prompt in prompts:
        assert '"name": "weather"' in prompt and "Be brief.<|im_end|>" in prompt and prompt.endswith("<think>\n")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_an_answer_ends_before_a_stop_string_and_is_kept_so(with_cache: Conversation) -> None:
    talk = other(with_cache, stop=["me."])
    pieces = [*talk.ask(QUESTIONS[0])]
    assert "".join(pieces) == talk.messages[-1]["content"] == "Ro" and not talk.engine.has_work


@pytest.mark.parametrize("how", ["close", "throw", "interrupt"])
def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(how: str, with_cache: Conversation) -> None:
    whole = "".join(other(with_cache).ask(QUESTIONS[0]))
    talk = other(with_cache)
    answer = talk.ask(QUESTIONS[0])
    first = next(answer)
    if how == "close":
        answer.close()  # type: ignore[attr-defined]
    elif how == "throw":
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    else:
        talk.interrupt()
        assert [*answer] == []
    assert talk.messages[-1] == {"role": "assistant", "content": first} and first != whole
    assert not talk.engine.has_work
    assert "".join(talk.ask(QUESTIONS[1]))


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(
    with_cache: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = other(with_cache)
    answer = talk.ask(QUESTIONS[0])
    next(answer)
    with monkeypatch.context() as patch:
        patch.setattr(talk.generator.tokenizer, "decode", lambda *args, **options: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            next(answer)
    assert talk.messages == [] and not talk.engine.has_work
    assert "".join(talk.ask(QUESTIONS[0])) == "Rome."


def test_a_question_whose_answer_nobody_reads_gives_way_to_the_next(with_cache: Conversation) -> None:
    talk = other(with_cache)
    unread = talk.ask(QUESTIONS[1])
    assert "".join(talk.ask(QUESTIONS[0])) == "Rome."
    assert [*unread] == []
    assert [message["content"] for message in talk.messages] == [QUESTIONS[0], "Rome."]


def test_a_question_that_is_no_text_leaves_the_conversation_as_it_was(with_cache: Conversation) -> None:
    talk = other(with_cache)
    with pytest.raises(ValueError, match="lone surrogate"):
        talk.ask("caf\udce9")
    assert talk.messages == [] and not talk.engine.has_work
