# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random schedules: whoever is beside a request, and however its prompt is cut, it gets the tokens that it gets alone.

Requests arrive, are aborted, wait for rows, are preempted and resumed. Float32; what is compared is token ids, see
`support.vllm_schedules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from support.vllm_engines import close, make_engine, require_no_row_left, two_ranks_behind_a_loaded_model
from support.vllm_schedules import CHUNK, PREEMPTING, Asked, parting, random_schedule, run

pytestmark = pytest.mark.vllm

LENGTH = 128

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "one row": dict(max_num_seqs=1, max_num_batched_tokens=64),
    "two rows, the least budget": dict(max_num_seqs=2, max_num_batched_tokens=16),
    "three rows, a budget that is no multiple of the chunk": dict(max_num_seqs=3, max_num_batched_tokens=23),
    "four rows, two prompts a call": dict(
        max_num_seqs=4, max_num_batched_tokens=96, qwen35={"prefill_chunk_size": CHUNK, "ctx_batch_size": 2}
    ),
    "five rows, preemption": dict(max_num_seqs=5, max_num_batched_tokens=64, **PREEMPTING),
    "six rows, preemption, no asynchronous scheduling": dict(
        max_num_seqs=6, max_num_batched_tokens=48, async_scheduling=False, **PREEMPTING
    ),
    "seven rows, prompts in one piece": dict(max_num_seqs=7, max_num_batched_tokens=256, qwen35={}),
    "eight rows": dict(max_num_seqs=8, max_num_batched_tokens=128),
    "eight rows, as many blocks as for three": dict(max_num_seqs=8, num_gpu_blocks_override=4),
    "four rows, preemption, on the device": dict(
        max_num_seqs=4, max_num_batched_tokens=40, on_device=True, **PREEMPTING
    ),
}
SCHEDULES = 20
"""Of each configuration; the first few in the lane, the rest with -m slow."""

IN_LANE = 4


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def engine(request: pytest.FixtureRequest, served_checkpoint: Path) -> Iterator[LLMEngine]:
    options = {"qwen35": {"prefill_chunk_size": CHUNK}, "max_model_len": LENGTH, **CONFIGURATIONS[request.param]}
    if options.pop("on_device", False):
        with two_ranks_behind_a_loaded_model():
            made = make_engine(served_checkpoint, **options)
    else:
        made = make_engine(served_checkpoint, **options)
    yield made
    close(made)


@pytest.mark.parametrize(
    "number", [*range(IN_LANE), *(pytest.param(i, marks=pytest.mark.slow) for i in range(IN_LANE, SCHEDULES))]
)
def test_each_request_gets_the_tokens_it_gets_alone(engine: LLMEngine, number: int) -> None:
    schedule = random_schedule(number + SCHEDULES * engine.vllm_config.scheduler_config.max_num_seqs)
    answers = run(engine, schedule)
    require_no_row_left(engine)
    parted = [found for asked in schedule if (found := parting(engine, asked, answers[asked.id])) is not None]
    assert parted == []


def test_requests_were_preempted(engine: LLMEngine, request: pytest.FixtureRequest) -> None:
    preempted: list[str] = []
    scheduler: Any = engine.engine_core.engine_core.scheduler
    preempt = scheduler._preempt_request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            scheduler,
            "_preempt_request",
            lambda asked, *args, **kwargs: (preempted.append(asked.request_id), preempt(asked, *args, **kwargs))[1],
        )
        long = [
            Asked(f"long-{i}", [i + 1] * 40, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True), 0, None)
            for i in range(4)
        ]
        answers = run(engine, long)
    require_no_row_left(engine)
    assert bool(preempted) == ("preemption" in request.node.callspec.id)
    assert [found for asked in long if (found := parting(engine, asked, answers[asked.id])) is not None] == []
