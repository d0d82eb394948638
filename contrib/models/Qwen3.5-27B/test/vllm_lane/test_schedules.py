# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random schedules: whoever is beside a request, and however its prompt is cut, it gets the tokens that it gets alone.

Requests arrive, are aborted, wait for rows, are preempted and resumed. Float32; what is compared is token ids. A call
with other neighbours may run in another bucket, which sums in another order, and a resumed request has its answer
encoded in pieces: rounding of some 1e-6. So a greedy pair may part where the two best log-probabilities are closer than
1e-4; such pairs are printed, and there must be few.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from support.models import TINY
from support.vllm_engines import (
    add,
    close,
    finish,
    make_engine,
    require_no_row_left,
    tokens_of,
    two_ranks_behind_a_loaded_model,
)

pytestmark = pytest.mark.vllm

LENGTH, CHUNK = 128, 16
NEAR_TIE = 1e-4
PREEMPTING = {"block_size": 16, "num_gpu_blocks_override": 13}
"""Twelve blocks of 16 tokens for rows that grow to eight: vLLM must preempt when two or more are long."""

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


@dataclass(frozen=True)
class Asked:
    """A request of a schedule: when it comes, what it asks, and when it is aborted, in steps of the engine."""

    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: int
    abort: int | None


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy or seeded, with what may go with it."""
    options: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "ignore_eos": True}
    options |= (
        {"temperature": 0} if rng.random() < 0.5 else {"temperature": rng.uniform(0.3, 1.5), "seed": rng.randrange(99)}
    )
    for name, value in (
        ("top_k", rng.randint(1, 40)),
        ("top_p", rng.uniform(0.5, 1)),
        ("min_p", rng.uniform(0, 0.2)),
        ("repetition_penalty", rng.uniform(0.8, 1.5)),
        ("frequency_penalty", rng.uniform(-0.5, 1)),
        ("presence_penalty", rng.uniform(-0.5, 1)),
        ("min_tokens", rng.randint(1, options["max_tokens"])),
        ("stop_token_ids", rng.sample(range(TINY["vocab_size"]), 8)),
        ("logit_bias", {rng.randrange(TINY["vocab_size"]): rng.uniform(-5, 5)}),
        ("allowed_token_ids", rng.sample(range(TINY["vocab_size"]), 20)),
        ("logprobs", 3),
    ):
        if rng.random() < 0.15:
            options[name] = value
    return SamplingParams(**options)


def random_schedule(seed: int) -> list[Asked]:
    rng = random.Random(seed)
    asked = []
    for i in range(rng.randint(2, 12)):
        prompt = [rng.randrange(TINY["vocab_size"]) for _ in range(rng.choice([1, CHUNK, rng.randint(1, 100)]))]
        arrival = rng.randint(0, 20)
        abort = arrival + rng.randint(0, 15) if rng.random() < 0.2 else None
        asked.append(Asked(f"{seed}-{i}", prompt, random_params(rng), arrival, abort))
    return asked


def run(engine: LLMEngine, schedule: list[Asked]) -> dict[str, list[int]]:
    """The tokens that each request has when it is finished or aborted."""
    tokens: dict[str, list[int]] = {asked.id: [] for asked in schedule}
    step = 0
    while engine.has_unfinished_requests() or any(asked.arrival >= step for asked in schedule):
        for asked in schedule:
            if asked.arrival == step:
                add(engine, asked.id, asked.prompt, asked.params)
        engine.abort_request([asked.id for asked in schedule if asked.abort == step])
        tokens |= {output.request_id: tokens_of(output)[0] for output in engine.step()}
        step += 1
    return tokens


def parting(engine: LLMEngine, asked: Asked, found: list[int]) -> str | None:
    """Where a request got other tokens than alone; None if nowhere. A near tie of a greedy one is printed instead."""
    params = asked.params.clone()
    params.logprobs = 2
    add(engine, "alone", asked.prompt, params)
    answer = finish(engine)["alone"].outputs[0]
    alone = list(answer.token_ids)
    whole = asked.abort is None or len(found) == len(alone)
    if found == (alone if whole else alone[: len(found)]):
        return None
    at = next(
        (i for i, pair in enumerate(zip(found, alone, strict=False)) if pair[0] != pair[1]), min(len(found), len(alone))
    )
    what = f"{asked.id}: token {at} of {found}, alone {alone}"
    assert answer.logprobs is not None
    if params.temperature == 0 and at < min(len(found), len(alone)):
        best, second = sorted((entry.logprob for entry in answer.logprobs[at].values()), reverse=True)[:2]
        if best - second < NEAR_TIE:
            print(f"near tie, {best - second:.1e}: {what}")
            return None
    return what


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
    tokens = run(engine, schedule)
    require_no_row_left(engine)
    parted = [found for asked in schedule if (found := parting(engine, asked, tokens[asked.id])) is not None]
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
        tokens = run(engine, long)
    require_no_row_left(engine)
    assert bool(preempted) == ("preemption" in request.node.callspec.id)
    assert [found for asked in long if (found := parting(engine, asked, tokens[asked.id])) is not None] == []
