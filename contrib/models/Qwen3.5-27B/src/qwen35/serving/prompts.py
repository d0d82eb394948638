# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: the tokenizer, the chat template, batches of prompts, and text that comes token by token.

Letters: B prompts, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..vision.processing import VisionProcessor, media_of

Messages = Sequence[Mapping[str, Any]]
"""A conversation: messages with `role` and `content`."""

REPLACEMENT = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""


def load_tokenizer(model_path: Path) -> Any:
    """The checkpoint's tokenizer, set to right padding."""
    return AutoTokenizer.from_pretrained(model_path, padding_side="right")


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, with no special tokens but those it spells out."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(tokenizer: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [B, S] int64, right-padded.

    Raises:
        ValueError: a prompt is empty.
    """
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} is empty: give at least one token to continue")
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }


def encode_chat(
    tokenizer: Any, processor: VisionProcessor, conversations: Sequence[Messages]
) -> dict[str, torch.Tensor]:
    """Conversations in the checkpoint's chat template, up to where the assistant speaks, with their media.

    A message's content is a text, or a list of {"type": "text", "text": ...}, {"type": "image", "image": a path, a
    Pillow image or an array} and {"type": "video", "video": a path, a directory of frames or a list of them}.

    Returns:
        input_ids and attention_mask [B, S] int64, right-padded, and of `VisionInputs` the tensors there are.

    Raises:
        VisionInputError: an image or a video cannot be used; all are listed.
    """
    images, videos = media_of(message for conversation in conversations for message in conversation)
    media = processor(images, videos)
    texts = [chat_text(tokenizer, conversation) for conversation in conversations]
    tensors = {name: value for name, value in vars(media).items() if isinstance(value, torch.Tensor)}
    return {**encode(tokenizer, processor.expand_placeholders(texts, media)), **tensors}


def chat_text(tokenizer: Any, messages: Messages) -> str:
    """A conversation in the checkpoint's chat template, up to where the assistant speaks."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def as_chat(tokenizer: Any, prompt: str) -> str:
    """One user turn in the checkpoint's chat template, up to where the assistant speaks."""
    return chat_text(tokenizer, [{"role": "user", "content": prompt}])


class TextStream:
    """The text of tokens that come one by one, in pieces of whole characters, without special tokens.

    A character may span tokens: its bytes wait until it is whole. A token costs the decoding of a few tokens, however
    long the text is: those since the last whole character, and those of the piece before it, because some tokenizers
    decode the first token of a text in another way than the rest.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.text = ""
        """All pieces so far."""
        self._tokenizer = tokenizer
        self._before: list[int] = []  # the tokens of the last piece
        self._waiting: list[int] = []  # those since

    def push(self, token: int) -> str:
        """What this token completes; empty when it leaves a character open, or is a special token."""
        self._waiting.append(token)
        before, both = self._decode(self._before), self._decode([*self._before, *self._waiting])
        if len(both) <= len(before) or both.endswith(REPLACEMENT):
            return ""
        self._before, self._waiting = self._waiting, []
        piece = both[len(before) :]
        self.text += piece
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
