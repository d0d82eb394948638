# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Requests through vLLM's engine get the tokens that the engine of this package gives them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from qwen35 import Qwen35Engine
from qwen35.serving.request import Request
from qwen35_vllm import worker
from support.models import load_neuron, random_prompts
from support.vllm_engines import GREEDY, add, answers, close, make_engine, require_no_row_left

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


def test_a_block_stands_for_a_row_and_as_many_requests_run_as_there_are_rows(served_checkpoint: Path) -> None:
    engine = make_engine(served_checkpoint, max_num_seqs=3)
    core: Any = engine.engine_core.engine_core
    config = engine.vllm_config
    (group,) = core.scheduler.kv_cache_config.kv_cache_groups
    assert group.kv_cache_spec.block_size == config.model_config.max_model_len
    assert core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks == 3 + 1  # one is vLLM's own
    for i in range(7):
        add(engine, str(i), [1, 2, 3], GREEDY)
    most = 0
    while engine.has_unfinished_requests():
        engine.step()
        most = max(most, len(core.scheduler.running))
    assert most == 3
    require_no_row_left(engine)
    close(engine)


def test_a_model_that_cannot_be_loaded_says_why_and_leaves_no_thread(
    served_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("model.layers.0.mlp.up_proj.weight is missing")

    monkeypatch.setattr(worker, "load_model", fail)
    with pytest.raises(ValueError, match=r"up_proj\.weight is missing"):
        make_engine(served_checkpoint)
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("qwen35-device") and thread.is_alive()
    ]
