# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A conversation over one loaded model: each turn continues from the longest beginning that is already encoded."""

from __future__ import annotations

from collections.abc import Iterator

from .engine import Qwen35Engine
from .generation import TextGenerator
from .prefix_cache import PrefixCache
from .prompts import TextStream, chat_text, token_ids
from .request import Request
from .sampling import SamplingOptions

CHUNK_SIZE = 128
"""Tokens of a prompt encoded at a time, and of a block that a later turn restores."""


class Conversation:
    """The turns so far, and the engine that answers the next.

    Without `prefill_chunk_size` each turn is encoded anew; otherwise it restores blocks kept in `cache_bytes` of host
    memory.
    """

    def __init__(
        self, generator: TextGenerator, max_new_tokens: int, sampling: SamplingOptions, cache_bytes: int
    ) -> None:
        model = generator.model
        self.cache = PrefixCache(model, cache_bytes) if model.config.prefill_chunk_size is not None else None
        self.engine = Qwen35Engine(model, self.cache)
        self.generator, self.max_new_tokens, self.sampling = generator, max_new_tokens, sampling
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces of whole characters, as its tokens come.

        Raises:
            ValueError: the conversation does not fit the model's seq_len any more; it is as it was before.
        """
        tokenizer = self.generator.tokenizer
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = token_ids(tokenizer, chat_text(tokenizer, messages))
        request = Request(prompt, self.max_new_tokens, self.sampling, self.generator.eos_token_ids)
        return self._answer(messages, self.engine.add(request))

    def _answer(self, messages: list[dict[str, str]], request_id: int) -> Iterator[str]:
        stream = TextStream(self.generator.tokenizer)
        for output in self.engine.stream(request_id):
            if output.token is not None and (piece := stream.push(output.token)):
                yield piece
        self.messages = [*messages, {"role": "assistant", "content": stream.text}]
