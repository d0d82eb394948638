# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random schedules of requests over vLLM's engine, and what each request gets alone.

A call with other neighbours may run in another bucket, which sums in another order, and a resumed request has its
answer encoded in pieces: rounding of some 1e-6. So a greedy pair may part where the two best log-probabilities are
closer than 1e-4; such pairs are printed, and there must be few. Log-probabilities are compared where a request asks for
them: they show what changes no token.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from support.models import TINY
from support.pictures import picture
from support.vl_cases import END, IMAGE, START, VISION
from support.vllm_engines import add, finish, store_of, worker_of

CHUNK = 16
NEAR_TIE = LOGPROB_TOLERANCE = 1e-4
PREEMPTING = {"block_size": 16, "num_gpu_blocks_override": 13}
"""Twelve blocks of 16 tokens for rows that grow to eight: vLLM must preempt when two or more are long."""

LONGEST, LEAST_ROOM = 100, 12
"""Tokens of a prompt, and those that it leaves in the shortest rows of these tests, of 112."""

_SIZES = [(16, 16), (16, 16), (32, 32), (32, 32), (24, 16), (24, 24), (32, 24), (16, 32)]
PICTURES = [picture(*size, seed=i) for i, size in enumerate(_SIZES)]
"""For `save_served_vl_checkpoint`: of 4 to 16 tokens. The first two, and the next, differ in what is on them alone."""


@dataclass(frozen=True)
class Asked:
    """A request of a schedule: when it comes, what it asks, and when it is aborted, in steps of the engine."""

    id: str
    prompt: list[int]
    params: SamplingParams
    arrival: int
    abort: int | None
    images: Sequence[Image.Image] = ()


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
        ("min_tokens", min(rng.randint(1, options["max_tokens"]), LEAST_ROOM)),
        ("stop_token_ids", rng.sample(range(TINY["vocab_size"]), 8)),
        ("logit_bias", {rng.randrange(TINY["vocab_size"]): rng.uniform(-5, 5)}),
        ("allowed_token_ids", rng.sample(range(TINY["vocab_size"]), 20)),
        ("logprobs", 3),
    ):
        if rng.random() < 0.15 and not (drafted and name in ("min_p", "logit_bias")):
            options[name] = value
    return SamplingParams(**options)


def random_schedule(
    seed: int, drafted: bool = False, most: int = 12, prefixes: int = 0, pictures: bool = False
) -> list[Asked]:
    """2 to `most` requests; `drafted` as in `random_params`.

    With `prefixes`, each prompt begins with some of one of so many texts, and at times ends there. With `pictures`,
    these texts have some of `PICTURES` in them, and so has what follows in every second prompt; and at times a text
    comes with others of the same sizes, which leaves all its tokens as they are. Half of the requests then ask for
    log-probabilities.
    """
    rng = random.Random(seed)
    words = START if pictures else TINY["vocab_size"]
    texts = [[rng.randrange(words) for _ in range(LONGEST)] for _ in range(prefixes)]
    if pictures:
        texts = [_with_pictures(rng, text) for text in texts]
    asked = []
    for i in range(rng.randint(2, most)):
        prompt = [rng.randrange(words) for _ in range(rng.choice([1, CHUNK, rng.randint(1, LONGEST)]))]
        if pictures and rng.random() < 0.5:
            prompt = _with_pictures(rng, prompt)
        if prefixes:
            shared = rng.choice(texts)[: rng.randint(1, LONGEST)]
            if pictures and rng.random() < 0.3:
                shared = [-1 - (-1 - part ^ 1) if -4 <= part < 0 else part for part in shared]
            prompt = [*shared, *prompt[: rng.choice([0, rng.randint(1, LONGEST - len(shared) + 1)])]]
        arrival = rng.randint(0, 20)
        abort = arrival + rng.randint(0, 15) if rng.random() < 0.2 else None
        tokens, images = _placed(prompt) if pictures else (prompt, [])
        params = random_params(rng, drafted)
        if pictures and rng.random() < 0.5:
            params.logprobs = 3
        asked.append(Asked(f"{seed}-{i}", tokens, params, arrival, abort, images))
    return asked


def _with_pictures(rng: random.Random, text: Sequence[int]) -> list[int]:
    """A text with one to three pictures anywhere in it: -1 stands for the first of `PICTURES`, -2 for the second."""
    parts = [*text]
    for _ in range(rng.randint(1, 3)):
        parts.insert(rng.randint(0, len(parts)), -1 - rng.randrange(len(PICTURES)))
    return parts


def _tokens_of(image: Image.Image) -> int:
    return image.width * image.height // (VISION["patch_size"] * VISION["spatial_merge_size"]) ** 2


def _placed(parts: Sequence[int]) -> tuple[list[int], list[Image.Image]]:
    """The prompt of a text with pictures, as far as it has no more than `LONGEST` tokens, and its images."""
    tokens: list[int] = []
    images: list[Image.Image] = []
    length = 0
    for part in parts:
        length += 1 if part >= 0 else 2 + _tokens_of(PICTURES[-1 - part])
        if length > LONGEST:
            break
        if part >= 0:
            tokens.append(part)
        else:
            tokens += [START, IMAGE, END]
            images.append(PICTURES[-1 - part])
    return tokens, images


@dataclass
class Seen:
    """What happened in the steps of an engine: how many rows were restored and resumed, drafts accepted, items encoded
    and dropped again."""

    restored: int = 0
    resumed: int = 0
    accepted: int = 0
    encoded: int = 0
    dropped: int = 0


@contextmanager
def watched(engine: LLMEngine) -> Iterator[Seen]:
    """Count what happens in the steps of an engine that drafts, reuses prefixes and takes pictures."""
    seen, runner, store = Seen(), worker_of(engine)._runner, store_of(engine)
    update, write, given = runner.rows.update, store.write, runner._given

    def count_scheduled(scheduled: Any) -> Any:
        seen.resumed += len(scheduled.scheduled_cached_reqs.resumed_req_ids)
        seen.encoded += sum(map(len, scheduled.scheduled_encoder_inputs.values()))
        seen.dropped += len(scheduled.free_encoder_mm_hashes)
        return update(scheduled)

    def count_restored(slot: int, keys: Sequence[bytes]) -> int:
        seen.restored += 1
        return write(slot, keys)

    def count_accepted(step: Any, request: Any) -> list[int]:
        tokens = given(step, request)
        seen.accepted += len(tokens) - 1
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.rows, "update", count_scheduled)
        patch.setattr(store, "write", count_restored)
        patch.setattr(runner, "_given", count_accepted)
        yield seen


@dataclass(frozen=True)
class Answer:
    """Tokens, and each one's log-probability where they were asked for."""

    tokens: list[int]
    logprobs: list[float] | None

    @classmethod
    def of(cls, output: RequestOutput) -> Answer:
        answer = output.outputs[0]
        if answer.logprobs is None:
            return cls([*answer.token_ids], None)
        told = zip(answer.token_ids, answer.logprobs, strict=True)
        return cls([*answer.token_ids], [entries[token].logprob for token, entries in told])


def run(engine: LLMEngine, schedule: list[Asked]) -> dict[str, Answer]:
    """What each request has been answered when it is finished or aborted."""
    answers = {asked.id: Answer([], None) for asked in schedule}
    step = 0
    while engine.has_unfinished_requests() or any(asked.arrival >= step for asked in schedule):
        for asked in schedule:
            if asked.arrival == step:
                add(engine, asked.id, asked.prompt, asked.params, asked.images)
        engine.abort_request([asked.id for asked in schedule if asked.abort == step])
        answers |= {output.request_id: Answer.of(output) for output in engine.step()}
        step += 1
    return answers


def parting(engine: LLMEngine, asked: Asked, found: Answer) -> str | None:
    """Where a request got something else than alone; None if nowhere. A near tie of a greedy one is printed instead."""
    params = asked.params.clone()
    params.logprobs = 2
    params.skip_reading_prefix_cache = True  # cold
    add(engine, "alone", asked.prompt, params, asked.images)
    output = finish(engine)["alone"]
    alone, tokens = Answer.of(output), found.tokens
    assert alone.logprobs is not None
    for i, logprob in enumerate(found.logprobs or []):
        if tokens[i : i + 1] != alone.tokens[i : i + 1]:
            break
        if abs(logprob - alone.logprobs[i]) > LOGPROB_TOLERANCE:
            return f"{asked.id}: token {i} of {tokens} has log-probability {logprob}, alone {alone.logprobs[i]}"
    whole = asked.abort is None or len(tokens) == len(alone.tokens)
    if tokens == (alone.tokens if whole else alone.tokens[: len(tokens)]):
        return None
    shorter = min(len(tokens), len(alone.tokens))
    at = next((i for i in range(shorter) if tokens[i] != alone.tokens[i]), shorter)
    what = f"{asked.id}: token {at} of {tokens}, alone {alone.tokens}"
    if params.temperature == 0 and at < shorter:
        best, second = sorted((entry.logprob for entry in output.outputs[0].logprobs[at].values()), reverse=True)[:2]
        if best - second < NEAR_TIE:
            print(f"near tie, {best - second:.1e}: {what}")
            return None
    return what
