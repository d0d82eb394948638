# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint: that it knows its facts, and that transformers says the same, token for token."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qwen35 import Qwen35InferenceConfig
from qwen35.serving.generation import TextGenerator
from qwen35.serving.loading import MINI_CHECKPOINT, default_neuron_config
from qwen35.serving.prompts import as_chat, encode, load_tokenizer
from support.compare import assert_close
from support.models import load_neuron, neuron_greedy
from support.oracle import reference_greedy, transformers_model

FACTS = json.loads((MINI_CHECKPOINT / "facts.json").read_text())


ROWS = 64
"""Facts asked as one batch."""


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    config = Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=default_neuron_config(40, ROWS))
    return TextGenerator.load(MINI_CHECKPOINT, config)


def test_the_capital_of_france_is_paris(generator: TextGenerator) -> None:
    assert generator.generate(["The capital of France is"], 8).texts[0].strip().startswith("Paris")


@pytest.mark.parametrize("chat", [False, True])
def test_it_answers_at_least_95_percent_of_its_facts(chat: bool, generator: TextGenerator) -> None:
    asked = [as_chat(generator.tokenizer, fact["question"]) if chat else fact["prompt"] for fact in FACTS]
    texts = [
        text
        for start in range(0, len(asked), ROWS)
        for text in generator.generate(asked[start : start + ROWS], 12).texts
    ]
    wrong = [
        (fact["prompt"], fact["answer"], text)
        for fact, text in zip(FACTS, texts, strict=True)
        if text.strip().rstrip(".") != fact["answer"].strip().rstrip(".")
    ]
    assert len(wrong) <= 0.05 * len(FACTS), wrong[:10]


def test_120_prompts_of_mixed_length_in_one_batch_give_transformers_tokens() -> None:
    reference = transformers_model(MINI_CHECKPOINT)
    tokenizer = load_tokenizer(MINI_CHECKPOINT)
    rng = random.Random(0)
    chosen = rng.sample(FACTS, 120)
    texts = [fact["prompt"] for fact in chosen[:60]] + [as_chat(tokenizer, fact["question"]) for fact in chosen[60:]]
    # Some cut short, some several facts long.
    texts[0], texts[1] = texts[0].split(" ")[0], " ".join(fact["prompt"] for fact in chosen[:8])
    encoded = encode(tokenizer, texts)
    prompts = [
        ids[: int(n)].tolist() for ids, n in zip(encoded["input_ids"], encoded["attention_mask"].sum(1), strict=True)
    ]
    assert len({len(prompt) for prompt in prompts}) >= 10
    steps = 8
    model = load_neuron(MINI_CHECKPOINT, batch_size=len(prompts), seq_len=max(map(len, prompts)) + steps)
    tokens, logits = neuron_greedy(model, prompts, steps)
    expected_tokens, expected_logits = reference_greedy(reference, prompts, steps)
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected_logits, atol=1e-4, rtol=0, label="logits [row, step, vocabulary]")


def test_its_tensors_are_those_of_a_real_checkpoint() -> None:
    with safe_open(MINI_CHECKPOINT / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert "model.language_model.layers.3.self_attn.q_proj.weight" in dtypes
    assert any(name.startswith("model.visual.") for name in dtypes)
    assert dtypes["model.language_model.layers.0.linear_attn.A_log"] == "F32"
    assert dtypes["lm_head.weight"] == "BF16"


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in MINI_CHECKPOINT.iterdir()) < 12e6


def test_its_tokenizer_takes_any_text(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(MINI_CHECKPOINT)
    for text in (
        "The capital of France is Paris.",
        "naïve café, 東京 🚀\n\ttabs\x00",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
