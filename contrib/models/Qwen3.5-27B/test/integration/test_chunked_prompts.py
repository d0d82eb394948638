# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts longer than a chunk: cut anywhere, and with what stood at the beginning not forgotten."""

from __future__ import annotations

import pytest
import torch

from qwen35.serving.generation import TextGenerator
from qwen35.serving.prompts import as_chat, token_ids
from qwen35.serving.runner import ModelRunner, Row
from support.integration import Settings, encode_rows

CLOSE = {torch.float32: 1e-6, torch.bfloat16: 0.02}
"""KL in nats of one way to compute against another, by dtype: 30 times what the mini in bfloat16 is off float32."""
FACT = "The number of the locker is 4711."
QUESTION = "What is the number of the locker? Answer with the number alone."
FILLER = "The river was calm, and nobody was in a hurry that day. "


@pytest.fixture(scope="module")
def chunk(generator: TextGenerator, settings: Settings) -> int:
    size = generator.model.config.prefill_chunk_size
    if size is None or 2 * size + 4 > generator.model.neuron_config.seq_len:
        pytest.skip(f"no room for a prompt of several chunks; with room: {settings.compile_command()}")
    return int(size)


@pytest.mark.parametrize(("chunks", "more"), [(0, 4), (1, -1), (1, 0), (1, 1), (2, 3)])
def test_a_prompt_in_chunks_is_as_one_whose_last_tokens_are_decoded(
    generator: TextGenerator, chunk: int, chunks: int, more: int
) -> None:
    text = token_ids(generator.tokenizer, FACT + FILLER * chunk)[: chunks * chunk + more]
    runner = ModelRunner(generator.model)
    (whole,) = encode_rows(runner, [Row(0, text)])
    row = Row(0, text[:-3])
    encode_rows(runner, [row])
    for token in text[-3:]:
        row.tokens.append(token)
        stepped = runner.decode([row]).all_logits()[0].float()
    p, q = (logits.double().log_softmax(0) for logits in (whole, stepped))
    assert float((p.exp() * (p - q)).sum()) < CLOSE[generator.model.neuron_config.torch_dtype]


def test_what_stood_at_the_beginning_is_found_at_the_end(
    generator: TextGenerator, settings: Settings, chunk: int
) -> None:
    new = 16
    room = generator.model.neuron_config.seq_len - new - 1
    line = len(token_ids(generator.tokenizer, FILLER))
    rest = len(token_ids(generator.tokenizer, as_chat(generator.tokenizer, FACT + QUESTION, enable_thinking=False)))
    text = FACT + " " + FILLER * ((room - rest) // (line + 1)) + QUESTION
    prompt = as_chat(generator.tokenizer, text, enable_thinking=False)
    assert chunk < len(token_ids(generator.tokenizer, prompt)) <= room
    result = generator.generate([prompt], new)
    # The mini was trained on sentences: of it only an answer is asked.
    assert "4711" in result.texts[0] if not settings.is_mini else result.tokens[0]
