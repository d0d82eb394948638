# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Texts to tokens and back, with the shipped checkpoint's tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.prompts import REPLACEMENT, TextStream, as_chat, chat_text, encode, load_tokenizer, token_ids

WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MINI_CHECKPOINT)


def test_prompts_become_one_right_padded_batch(tokenizer: Any) -> None:
    texts = ["The capital of France is", "3", "naïve 東京"]
    encoded = encode(tokenizer, texts)
    for text, ids, mask in zip(texts, encoded["input_ids"], encoded["attention_mask"], strict=True):
        tokens = token_ids(tokenizer, text)
        assert ids.tolist() == tokens + [0] * (len(ids) - len(tokens))
        assert mask.tolist() == [1] * len(tokens) + [0] * (len(ids) - len(tokens))
        assert tokenizer.decode(tokens) == text


def test_an_empty_prompt_is_an_error_that_names_it(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty: give at least one token"):
        encode(tokenizer, ["The", ""])


def test_one_question_is_a_conversation_of_one_turn(tokenizer: Any) -> None:
    text = as_chat(tokenizer, "How are you?")
    assert text == chat_text(tokenizer, [{"role": "user", "content": "How are you?"}])
    assert text.startswith("<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n")


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
