# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The shipped MTP head drafts what the shipped model says: by the float64 oracle, on transformers' own model.

A run ends with its end token, or after 64 tokens; nothing counts after it. The mini answers briefly, and after an end
token it repeats one sentence for ever, which any head would learn.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mini_facts import all_facts
from mini_images import Split
from qwen35.serving.loading import MINI_CHECKPOINT
from support.mtp_oracle import (
    HeadShape,
    MtpHead,
    Speculation,
    acceptance,
    conditional_acceptance,
    speculate,
    tokens_a_step,
)

transformers = pytest.importorskip("transformers", minversion="5.0")
from support.oracle import reference_greedy, transformers_model  # noqa: E402
from train_mini_mtp import MAX_NEW_TOKENS, Prompt, picture_prompts, text_prompts  # noqa: E402

K, RUNS_OF_A_KIND = 3, 10
"""Drafts a step, and most runs of a kind of prompt."""
ENDS = json.loads((MINI_CHECKPOINT / "generation_config.json").read_text())["eos_token_id"]


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers_model(MINI_CHECKPOINT)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Some of each kind. None was trained on, but for facts in the bare form in which the mini learnt them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINI_CHECKPOINT)
    kinds: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in (*text_prompts(tokenizer, all_facts(), Split.HELD_OUT), *picture_prompts(tokenizer, Split.HELD_OUT)):
        kinds[prompt.kind].append(prompt)
    assert set(kinds) == {"raw", "chat", "thinking", "begun", "in a row", "image", "clip"}
    return [prompt for of_kind in kinds.values() for prompt in of_kind[:: len(of_kind) // RUNS_OF_A_KIND + 1]]


@pytest.fixture(scope="module")
def runs(model: Any, prompts: list[Prompt]) -> list[Speculation]:
    return [speculate(model, head(), prompt.ids, K, MAX_NEW_TOKENS, ENDS, **media(prompt)) for prompt in prompts]


def head() -> MtpHead:
    """The shipped one, with an empty cache."""
    text_config = json.loads((MINI_CHECKPOINT / "config.json").read_text())["text_config"]
    return MtpHead(load_file(MINI_CHECKPOINT / "model.safetensors"), HeadShape.of(text_config))


def media(prompt: Prompt) -> dict[str, Tensor]:
    """The model's arguments of the prompt's picture or clip."""
    if prompt.seen is None:
        return {}
    names = ("pixel_values_videos", "video_grid_thw") if prompt.seen.is_clip else ("pixel_values", "image_grid_thw")
    return dict(zip(names, (prompt.seen.pixels, torch.tensor([prompt.seen.grid])), strict=True))


def test_a_step_of_three_drafts_gives_at_least_two_tokens(runs: list[Speculation]) -> None:
    assert sum(len(run.steps) for run in runs) > 50
    assert tokens_a_step(runs) >= 2.0


def test_every_draft_is_accepted_more_often_than_not(runs: list[Speculation]) -> None:
    steps = [step for run in runs for step in run.steps]
    assert all(share > 0.5 for share in acceptance(steps, K)), acceptance(steps, K)
    assert all(share > 0.5 for share in conditional_acceptance(steps, K)), conditional_acceptance(steps, K)


def test_its_runs_are_plain_greedy_decoding(model: Any, prompts: list[Prompt], runs: list[Speculation]) -> None:
    text = [(prompt, run) for prompt, run in zip(prompts, runs, strict=True) if prompt.seen is None]
    for prompt, run in text[:: len(text) // 10]:
        (expected,), _ = reference_greedy(model, [prompt.ids], len(run.tokens))
        assert run.tokens == expected.tolist()
        assert run.tokens[-1] in ENDS or len(run.tokens) == MAX_NEW_TOKENS
        assert not set(run.tokens[:-1]) & set(ENDS)


def test_its_tensors_are_those_of_one_layer() -> None:
    with safe_open(MINI_CHECKPOINT / "model.safetensors", "pt") as file:
        own = {name: file.get_slice(name) for name in file.keys() if name.startswith("mtp.")}
    assert len(own) == 15
    assert {tensor.get_dtype() for tensor in own.values()} == {"BF16"}
    assert json.loads((MINI_CHECKPOINT / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 1
