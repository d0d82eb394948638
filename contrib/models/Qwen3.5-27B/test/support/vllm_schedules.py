# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random schedules of requests over vLLM's engine, and what each request gets alone.

A call with other neighbours may run in another bucket, which sums in another order, and a resumed request has its
answer encoded in pieces: rounding of some 1e-6. So a greedy pair may part where the two best log-probabilities are
closer than 1e-4; such pairs are printed, and there must be few.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from support.models import TINY
from support.vllm_engines import add, finish, tokens_of

CHUNK = 16
NEAR_TIE = 1e-4
PREEMPTING = {"block_size": 16, "num_gpu_blocks_override": 13}
"""Twelve blocks of 16 tokens for rows that grow to eight: vLLM must preempt when two or more are long."""


@dataclass(frozen=True)
class Asked:
    """A request of a schedule: when it comes, what it asks, and when it is aborted, in steps of the engine."""

    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: int
    abort: int | None


def random_params(rng: random.Random, drafted: bool) -> SamplingParams:
    """Greedy or seeded, with what may go with it; `drafted`: what vLLM takes when tokens are drafted."""
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
        if rng.random() < 0.15 and not (drafted and name in ("min_p", "logit_bias")):
            options[name] = value
    return SamplingParams(**options)


def random_schedule(seed: int, drafted: bool = False, most: int = 12, prefixes: int = 0) -> list[Asked]:
    """2 to `most` requests; `drafted` as in `random_params`.

    With `prefixes`, each prompt begins with some of one of so many texts, and at times ends there.
    """
    rng = random.Random(seed)
    texts = [[rng.randrange(TINY["vocab_size"]) for _ in range(100)] for _ in range(prefixes)]
    asked = []
    for i in range(rng.randint(2, most)):
        prompt = [rng.randrange(TINY["vocab_size"]) for _ in range(rng.choice([1, CHUNK, rng.randint(1, 100)]))]
        if prefixes:
            shared = rng.choice(texts)[: rng.randint(1, 100)]
            prompt = [*shared, *prompt[: rng.choice([0, rng.randint(1, 100 - len(shared) + 1)])]]
        arrival = rng.randint(0, 20)
        abort = arrival + rng.randint(0, 15) if rng.random() < 0.2 else None
        asked.append(Asked(f"{seed}-{i}", prompt, random_params(rng, drafted), arrival, abort))
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
    params.skip_reading_prefix_cache = True  # cold
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
