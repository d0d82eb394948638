# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Text that comes token by token: whole characters, and stop strings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import load_tokenizer, token_ids
from qwen35.serving.text_stream import REPLACEMENT, StopStrings, TextStream

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MINI_CHECKPOINT)


def test_a_character_that_spans_tokens_comes_when_it_is_whole(tokenizer: Any) -> None:
    text = "naïve café, 東京 🚀🏽 done"
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in token_ids(tokenizer, text)]
    assert "🚀" in pieces and pieces[pieces.index("🚀") - 3 : pieces.index("🚀")] == ["", "", ""]  # four bytes
    assert "".join(pieces) == stream.text == text


def test_special_tokens_are_not_shown_wherever_they_come(tokenizer: Any) -> None:
    tokens = token_ids(tokenizer, "<|im_start|>hé<|im_end|>llo<|im_end|>")
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, tokens)) == "héllo"
    assert stream.push(tokens[0]) == ""


def test_pieces_of_any_tokens_make_up_their_text(tokenizer: Any) -> None:
    """Also of tokens that are no text: bytes in any order, special tokens within characters."""

    @settings(max_examples=200, phases=WITHOUT_SHRINKING)
    @given(st.lists(st.integers(0, len(tokenizer) - 1) | st.integers(0, 255), max_size=60))
    def run(tokens: list[int]) -> None:
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert not any(piece.endswith(REPLACEMENT) for piece in pieces)
        assert "".join(pieces) == stream.text == text.rstrip(REPLACEMENT)

    run()


def test_pieces_of_any_text_make_up_the_text(tokenizer: Any) -> None:
    @settings(max_examples=200, phases=WITHOUT_SHRINKING)
    @given(st.text(max_size=40))
    def run(text: str) -> None:
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in token_ids(tokenizer, text)]
        # A text may end in U+FFFD itself, which waits for what may come.
        assert "".join(pieces) == tokenizer.decode(token_ids(tokenizer, text), skip_special_tokens=True).rstrip(
            REPLACEMENT
        )

    run()


def test_a_long_text_is_not_decoded_anew_for_each_token(tokenizer: Any) -> None:
    decoded: list[int] = []

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            decoded.append(len(tokens))
            return tokenizer.decode(tokens, **options)

    stream = TextStream(Counting())
    for token in token_ids(tokenizer, "The capital of France is Paris. 東京 " * 20):
        stream.push(token)
    assert max(decoded) < 12


def test_text_ends_before_a_stop_string_and_what_may_begin_one_waits(tokenizer: Any) -> None:
    text = StopStrings(tokenizer, ["</answer>", "\n\n"])
    pieces = [text.push(token) for token in token_ids(tokenizer, "It is <b>3</b>\nor 4.</answer> More")]
    assert "".join(pieces) == text.text == "It is <b>3</b>\nor 4." and text.stopped
    assert not any("</" in piece and "</b" not in piece for piece in pieces)
    unfinished = StopStrings(tokenizer, "</answer>")
    shown = "".join(unfinished.push(token) for token in token_ids(tokenizer, "3</ans"))
    assert (shown, unfinished.flush(), unfinished.flush(), unfinished.stopped) == ("3", "</ans", "", False)


def test_a_special_token_is_a_stop_string(tokenizer: Any) -> None:
    text = StopStrings(tokenizer, ["<|im_start|>"])
    pieces = [text.push(token) for token in token_ids(tokenizer, "a<|im_end|>b<|im_start|>c")]
    assert text.stopped and "".join(pieces) == "ab"


@pytest.mark.parametrize("stop", ["", ["a", ""], [None], [7]])
def test_stop_strings_that_are_none_are_named(stop: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"stop has .*: give texts of at least one character"):
        StopStrings(tokenizer, stop)


def test_any_text_ends_where_a_stop_string_first_does(tokenizer: Any) -> None:
    letters = st.text("ab<é", min_size=1, max_size=12)

    @settings(max_examples=300, phases=WITHOUT_SHRINKING)
    @given(letters, st.lists(st.text("ab<é", min_size=1, max_size=4), max_size=3))
    def run(text: str, stop: list[str]) -> None:
        found = StopStrings(tokenizer, stop)
        whole = TextStream(tokenizer)
        expected = None
        for token in token_ids(tokenizer, text):
            found.push(token)
            whole.push(token)
            if expected is None and any(s in whole.text for s in stop):
                expected = whole.text[: min(whole.text.find(s) for s in stop if s in whole.text)]
        found.flush()
        assert (found.text, found.stopped) == (whole.text if expected is None else expected, expected is not None)

    run()
