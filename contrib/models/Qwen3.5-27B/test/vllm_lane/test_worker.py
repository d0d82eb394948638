# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Requests through vLLM's engine get the tokens that the engine of this package gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qwen35 import Qwen35Engine
from qwen35.serving.request import Request
from support.models import load_neuron, random_prompts
from support.vllm_engines import answers, close, make_engine, require_no_row_left

pytestmark = pytest.mark.vllm


def test_prompts_of_any_length_get_their_tokens(served_checkpoint: Path) -> None:
    prompts = random_prompts([1, 15, 16, 17, 32, 33, 64, 100])
    engine = make_engine(served_checkpoint, {"prefill_chunk_size": 16}, max_num_batched_tokens=64)
    try:
        found = answers(engine, prompts)
        require_no_row_left(engine)
    finally:
        close(engine)
    own = Qwen35Engine(load_neuron(served_checkpoint, prefill_chunk_size=16, batch_size=4, is_continuous_batching=True))
    ids = [own.add(Request(prompt, max_new_tokens=8)) for prompt in prompts]
    expected = [[output.token for output in own.stream(i)] for i in ids]
    assert found == expected
