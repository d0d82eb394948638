# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A conversation over one loaded model: each turn continues from the longest beginning that is already encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .engine import Qwen35Engine
from .generation import TextGenerator
from .prefix_cache import PrefixCache
from .prompts import Tools, chat_text, system_turn, token_ids
from .request import Request
from .sampling import SamplingOptions
from .text_stream import StopStrings, check_stop

CHUNK_SIZE = 128
"""Tokens of a prompt encoded at a time, and of a block that a later turn restores."""


class Conversation:
    """The turns so far, and the engine that answers the next.

    Without `prefill_chunk_size` each turn is encoded anew; otherwise it restores blocks kept in `cache_bytes` of host
    memory.

    Args:
        system: what the conversation begins with.
        stop: texts, the first of which ends an answer before it.
        tools, enable_thinking, chat_template_kwargs: as of `prompts.chat_text`, for every turn.

    Raises:
        ValueError: a stop string is empty.
    """

    def __init__(
        self,
        generator: TextGenerator,
        max_new_tokens: int,
        sampling: SamplingOptions,
        cache_bytes: int,
        *,
        system: str | None = None,
        stop: str | Sequence[str] = (),
        tools: Tools | None = None,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        model = generator.model
        self.cache = PrefixCache(model, cache_bytes) if model.config.prefill_chunk_size is not None else None
        self.engine = Qwen35Engine(model, self.cache)
        self.generator, self.max_new_tokens, self.sampling = generator, max_new_tokens, sampling
        self.stop, self.tools, self.enable_thinking = check_stop(stop), tools, enable_thinking
        self.chat_template_kwargs = chat_template_kwargs
        self.messages: list[dict[str, Any]] = system_turn(system)
        self._interrupted = False
        self._request_id: int | None = None
        """Of the last question: one that nobody reads on is ended by the next."""

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces of whole characters, as its tokens come.

        An answer that is not read to its end, or interrupted, is one turn as far as it came; without any text, the
        conversation is as it was before.

        Raises:
            ValueError: the question is no text, or the conversation does not fit the model's seq_len any more; it is as
                it was before.
        """
        tokenizer = self.generator.tokenizer
        messages = [*self.messages, {"role": "user", "content": question}]
        text = chat_text(
            tokenizer,
            messages,
            tools=self.tools,
            enable_thinking=self.enable_thinking,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        prompt = token_ids(tokenizer, text)
        request_id = self.engine.add(Request(prompt, self.max_new_tokens, self.sampling, self.generator.eos_token_ids))
        if self._request_id is not None:
            self.engine.cancel(self._request_id)
        self._request_id, self._interrupted = request_id, False
        return self._answer(messages, request_id)

    def interrupt(self) -> None:
        """End the answer that is being read after the engine's present round; may be called from a signal's handler."""
        self._interrupted = True

    def _answer(self, messages: list[dict[str, Any]], request_id: int) -> Iterator[str]:
        text = StopStrings(self.generator.tokenizer, self.stop)
        try:
            while self._request_id == request_id and self.engine.has_work and not (self._interrupted or text.stopped):
                for output in self.engine.step():
                    if output.request_id != request_id:
                        continue
                    if output.error is not None:
                        raise ValueError(f"the answer failed: {output.error}")
                    if output.token is not None and (piece := text.push(output.token)):
                        yield piece
            if piece := text.flush():
                yield piece
        except Exception:
            text = StopStrings(self.generator.tokenizer)  # a turn that failed is none
            raise
        finally:
            self.engine.cancel(request_id)
            for _ in self.engine.stream(request_id):
                pass  # what it left is handed out, and nothing runs for it
            text.flush()
            if text.text:
                self.messages = [*messages, {"role": "assistant", "content": text.text}]
