# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A conversation over one loaded model: each turn goes on from the longest beginning that is already encoded."""

from __future__ import annotations

from collections.abc import Iterator

from .engine import Qwen35Engine, Request
from .generation import SamplingOptions, TextGenerator
from .prefix_cache import PrefixCache

CHUNK_SIZE = 128
"""Tokens of a prompt encoded at a time, and the grain at which a turn takes up what was encoded before."""


class Conversation:
    """The turns so far, and the engine that answers the next.

    Without `prefill_chunk_size` each turn is encoded anew; otherwise it takes up blocks kept in `cache_bytes` of host
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
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        request = Request(prompt, self.max_new_tokens, self.sampling, self.generator.eos_token_ids)
        return self._answer(messages, self.engine.add(request))

    def _answer(self, messages: list[dict[str, str]], request_id: int) -> Iterator[str]:
        tokens: list[int] = []
        said = ""
        for output in self.engine.stream(request_id):
            if output.token is None:
                continue
            tokens.append(output.token)
            text = self.generator.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # a character may span tokens
                yield text[len(said) :]
                said = text
        self.messages = [*messages, {"role": "assistant", "content": said}]
