# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Token ids that come one by one to text: in pieces of whole characters, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..error_text import shorten

REPLACEMENT = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""


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


class StopStrings:
    """The text of tokens that come one by one, up to the first of some texts, which ends it.

    Text that may begin a stop string is held back until it is known. A stop string that is one special token is
    recognised by its id, since special tokens are no text.
    Args:
        stop: the texts; none only streams.

    Raises:
        ValueError: one is empty or no text.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str] = ()) -> None:
        texts = check_stop(stop)
        self.text = ""
        """All pieces so far: without the stop string, and without what is held back."""
        self.stopped = False
        """Whether a stop string has come."""
        self._stream = TextStream(tokenizer)
        special = {*tokenizer.all_special_tokens} if texts else set()
        self._ids = {tokenizer.convert_tokens_to_ids(text) for text in texts if text in special}
        self._texts = [text for text in texts if text not in special]
        self._held = ""

    def push(self, token: int) -> str:
        """What can be shown after this token; nothing once it has stopped."""
        if self.stopped:
            return ""
        if token in self._ids:
            self.stopped = True
            return self.flush()
        text = self._held + self._stream.push(token)
        if starts := [start for stop in self._texts if (start := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return self._shown(text[: min(starts)])
        keep = self._beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return self._shown(text[: len(text) - keep])

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        held, self._held = self._held, ""
        return self._shown(held)

    def _shown(self, piece: str) -> str:
        self.text += piece
        return piece

    def _beginning_of_a_stop(self, text: str) -> int:
        """Characters of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._texts), default=1) - 1
        return next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._texts)), 0
        )


def check_stop(stop: str | Sequence[str]) -> list[str]:
    """Stop strings as a list; one text is one of them.

    Raises:
        ValueError: one is empty or no text.
    """
    texts = [stop] if isinstance(stop, str) else [*stop]
    if bad := [text for text in texts if not isinstance(text, str) or not text]:
        raise ValueError(f"stop has {shorten(repr(bad[0]))}: give texts of at least one character")
    return texts
