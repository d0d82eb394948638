# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint drafts for itself: our drafts and tokens are those of the float64 oracle, step by step.

Prompts are bare facts, chats and questions about pictures, runs of at most 64 tokens. Nothing counts after an end
token.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mini_facts import all_facts
from mini_images import Split
from qwen35 import Qwen35Engine, Qwen35NeuronConfig, Qwen35VLInferenceConfig, Request
from qwen35.modeling_qwen35_vl import NeuronQwen35VLForCausalLM
from qwen35.serving.loading import MINI_CHECKPOINT
from qwen35.serving.runner import ModelRunner, Row
from support.mtp_oracle import HeadShape, MtpHead, Speculation, speculate
from support.speculation import decode_with_drafts

transformers = pytest.importorskip("transformers", minversion="5.0")
from support.oracle import transformers_model  # noqa: E402
from train_mini_mtp import MAX_NEW_TOKENS, Prompt, picture_prompts, text_prompts  # noqa: E402

K = 3
ENDS = json.loads((MINI_CHECKPOINT / "generation_config.json").read_text())["eos_token_id"]


def load(**options: Any) -> NeuronQwen35VLForCausalLM:
    neuron_config = Qwen35NeuronConfig(
        torch_dtype=torch.float32, on_cpu=True, seq_len=512, prefill_chunk_size=32, **options
    )
    config = Qwen35VLInferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=neuron_config)
    model = NeuronQwen35VLForCausalLM(str(MINI_CHECKPOINT), config)
    model.to_cpu()
    return model


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """One of each kind."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_CHECKPOINT)
    kinds: dict[str, Prompt] = {}
    for prompt in (*text_prompts(tokenizer, all_facts(), Split.HELD_OUT), *picture_prompts(tokenizer, Split.HELD_OUT)):
        kinds.setdefault(prompt.kind, prompt)
    return [*kinds.values()]


def media(prompt: Prompt) -> dict[str, torch.Tensor]:
    if prompt.seen is None:
        return {}
    names = ("pixel_values_videos", "video_grid_thw") if prompt.seen.is_clip else ("pixel_values", "image_grid_thw")
    return dict(zip(names, (prompt.seen.pixels, torch.tensor([prompt.seen.grid])), strict=True))


@pytest.fixture(scope="module")
def expected(prompts: list[Prompt]) -> list[Speculation]:
    head_shape = HeadShape.of(json.loads((MINI_CHECKPOINT / "config.json").read_text())["text_config"])
    weights, model = load_file(MINI_CHECKPOINT / "model.safetensors"), transformers_model(MINI_CHECKPOINT)
    return [
        speculate(model, MtpHead(weights, head_shape), prompt.ids, K, MAX_NEW_TOKENS, ENDS, **media(prompt))
        for prompt in prompts
    ]


def test_drafts_and_tokens_are_the_oracles_step_by_step(prompts: list[Prompt], expected: list[Speculation]) -> None:
    model = load(batch_size=1, num_speculative_tokens=K)
    runner = ModelRunner(model)
    for prompt, oracle in zip(prompts, expected, strict=True):
        drafts: list[list[int]] = []
        row = Row(0, [*prompt.ids], placed=runner.place(prompt.ids, media(prompt)))
        new = len(oracle.tokens)
        decoded = decode_with_drafts(model, [row], new, lambda _, row, drafts=drafts: drafts.append([*row.drafts]))
        assert decoded.tokens == [oracle.tokens], prompt.kind
        assert drafts == [step.drafts for step in oracle.steps], prompt.kind


def test_the_engine_gives_as_many_tokens_a_step_as_the_oracle(
    prompts: list[Prompt], expected: list[Speculation]
) -> None:
    engine = Qwen35Engine(load(batch_size=4, num_speculative_tokens=K))
    requests = [Request(prompt.ids, MAX_NEW_TOKENS, eos_token_ids=ENDS, media=media(prompt)) for prompt in prompts]
    ids = [engine.add(request) for request in requests]
    for request_id, oracle in zip(ids, expected, strict=True):
        assert [output.token for output in engine.stream(request_id)] == oracle.tokens
    counted, steps = engine.acceptance, [step for run in expected for step in run.steps]
    assert counted.steps == len(steps) and counted.tokens == sum(len(run.tokens) - 1 for run in expected)
    assert counted.accepted == [sum(step.accepted > place for step in steps) for place in range(K)]
    assert counted.tokens_per_step >= 2.0, str(counted)
