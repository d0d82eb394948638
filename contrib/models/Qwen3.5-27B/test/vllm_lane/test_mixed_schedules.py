# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random schedules with everything at once: pictures, shared prefixes, drafts, preemption, aborts and small budgets.

The oracle is an engine of one row over the same checkpoint, that reuses no prefixes and drafts nothing, and has each
request alone. Float32; tokens are compared, and log-probabilities where they are asked for: `support.vllm_schedules`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import EngineArgs, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from qwen35_vllm.connector import budget_of
from support.vl_cases import END, IMAGE, START
from support.vllm_engines import (
    add,
    close,
    finish,
    make_engine,
    require_no_row_left,
    save_served_vl_checkpoint,
    two_ranks_behind_a_loaded_model,
)
from support.vllm_schedules import CHUNK, PICTURES, Answer, Asked, parting, random_schedule, run, watched

pytestmark = pytest.mark.vllm

LENGTH = 112
"""Answers to long prompts reach it."""

ONE_BY_ONE: dict[str, Any] = {"async_scheduling": False}

PREEMPTING: dict[str, Any] = {"block_size": 16, "num_gpu_blocks_override": 9}
"""Eight blocks of 16 tokens for rows that grow to seven."""


@dataclass(frozen=True)
class Case:
    """An engine: the checkpoint, whether it is on the device, drafts a step, blocks of prompts kept, and arguments."""

    head: str
    device: bool
    drafts: int
    blocks: int
    arguments: dict[str, Any]
    qwen35: dict[str, Any] = field(default_factory=dict)


CASES = {
    "two drafts, preemption, two prompts a call": Case(
        "often right", False, 2, 9, dict(max_num_seqs=5, max_num_batched_tokens=64, **PREEMPTING), {"ctx_batch_size": 2}
    ),
    "three drafts, preemption, a budget that is no multiple of the chunk, no asynchronous scheduling": Case(
        "random", False, 3, 14, dict(max_num_seqs=4, max_num_batched_tokens=23, **ONE_BY_ONE, **PREEMPTING)
    ),
    "on the device, three drafts, preemption": Case(
        "often right", True, 3, 5, dict(max_num_seqs=6, max_num_batched_tokens=48, **PREEMPTING)
    ),
    "one draft, the least budget, no asynchronous scheduling": Case(
        "often right", False, 1, 6, dict(max_num_seqs=2, max_num_batched_tokens=CHUNK, **ONE_BY_ONE)
    ),
    "three drafts, preemption": Case(
        "often right", False, 3, 5, dict(max_num_seqs=6, max_num_batched_tokens=48, **PREEMPTING)
    ),
    "on the device, one draft, preemption, two prompts a call, no asynchronous scheduling": Case(
        "random",
        True,
        1,
        14,
        dict(max_num_seqs=5, max_num_batched_tokens=64, **ONE_BY_ONE, **PREEMPTING),
        {"ctx_batch_size": 2},
    ),
    "on the device, two drafts, the least budget": Case(
        "often right", True, 2, 6, dict(max_num_seqs=3, max_num_batched_tokens=CHUNK)
    ),
    "on the device, no drafts, preemption, tokens chosen there": Case(
        "random",
        True,
        0,
        9,
        dict(max_num_seqs=4, max_num_batched_tokens=40, **PREEMPTING),
        {"on_device_sampling": True},
    ),
}
OF_EACH = 25
"""Schedules: 100 on the CPU stand-ins and 100 on the simulated device with two ranks."""

CASES_IN_LANE, IN_LANE = 3, 4
"""A dozen schedules are in the lane, the rest are slow."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixed")
    return {
        name: save_served_vl_checkpoint(root / name, branch) for name, branch in (("random", 1.0), ("often right", 0.2))
    }


ARGUMENTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": LENGTH,
    "skip_tokenizer_init": True,
    "limit_mm_per_prompt": {"image": 8, "video": 0},
}


def engine_of(path: Path, qwen35: dict[str, Any], **arguments: Any) -> LLMEngine:
    return make_engine(path, {"prefill_chunk_size": CHUNK, **qwen35}, **ARGUMENTS, **arguments)


@pytest.fixture(scope="module")
def oracles(checkpoints: dict[str, Path]) -> Iterator[dict[str, LLMEngine]]:
    options: dict[str, Any] = {"max_num_seqs": 1, "enable_prefix_caching": False}
    made = {name: engine_of(path, {}, **options) for name, path in checkpoints.items()}
    yield made
    for engine in made.values():
        close(engine)


def drafting(drafts: int) -> dict[str, Any]:
    """The argument of an engine that drafts so many tokens a step."""
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": drafts}} if drafts else {}


def block_bytes(path: Path, drafts: int) -> int:
    """Of a block of a chunk, with what the head keeps where it drafts."""
    arguments: dict[str, Any] = {**ARGUMENTS, "additional_config": {"qwen35": {"prefill_chunk_size": CHUNK}}}
    config = EngineArgs(str(path), **arguments, **drafting(drafts)).create_engine_config()
    budget = budget_of(config)
    assert budget is not None and budget.block_tokens == CHUNK
    return budget.block_nbytes


@pytest.fixture(scope="module")
def mixed(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[tuple[str, LLMEngine]]:
    """The name of a case and its engine, in whose steps everything must have happened by the end."""
    case = CASES[request.param]
    path = checkpoints[case.head]
    kept = {"prefix_cache_bytes": case.blocks * block_bytes(path, case.drafts)}
    with two_ranks_behind_a_loaded_model() if case.device else nullcontext():
        engine = engine_of(path, {**case.qwen35, **kept}, **drafting(case.drafts), **case.arguments)
    assert engine.vllm_config.scheduler_config.async_scheduling == case.arguments.get("async_scheduling", True)
    with watched(engine) as seen:
        yield request.param, engine
    close(engine)
    print(f"{request.param}: {seen}")
    assert seen.restored and seen.encoded, "prompts begin alike, and have pictures"
    assert seen.accepted or not case.drafts or case.head == "random"
    assert seen.resumed or "preemption" not in request.param


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[pytest.mark.slow] * (number >= IN_LANE)) for number in range(OF_EACH)]
)
@pytest.mark.parametrize(
    "mixed",
    [pytest.param(name, marks=[pytest.mark.slow] * (i >= CASES_IN_LANE)) for i, name in enumerate(CASES)],
    indirect=True,
)
def test_each_request_gets_the_tokens_it_gets_alone_and_cold(
    mixed: tuple[str, LLMEngine], oracles: dict[str, LLMEngine], number: int
) -> None:
    name, engine = mixed
    seed = number + OF_EACH * [*CASES].index(name)
    schedule = random_schedule(seed, drafted=CASES[name].drafts > 0, most=8, prefixes=2, pictures=True)
    answers = run(engine, schedule)
    require_no_row_left(engine)
    oracle = oracles[CASES[name].head]
    parted = [found for asked in schedule if (found := parting(oracle, asked, answers[asked.id])) is not None]
    assert parted == []


def ask(engine: LLMEngine, asked: Asked) -> Any:
    add(engine, "asked", asked.prompt, asked.params, asked.images)
    return finish(engine)["asked"]


@pytest.fixture(scope="module")
def warm(checkpoints: dict[str, Path]) -> Iterator[LLMEngine]:
    made = engine_of(checkpoints["random"], {}, max_num_seqs=2)
    yield made
    close(made)


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
PROMPT = [5, START, IMAGE, END, *range(40), START, IMAGE, END, 7, 9]
ILLUSTRATED = Asked("illustrated", PROMPT, GREEDY, 0, None, [PICTURES[4], PICTURES[2]])


def test_a_prompt_is_restored_past_its_pictures(warm: LLMEngine, oracles: dict[str, LLMEngine]) -> None:
    warm.reset_prefix_cache(reset_connector=True)
    for restored in (0, 64):
        output = ask(warm, ILLUSTRATED)
        assert parting(oracles["random"], ILLUSTRATED, Answer.of(output)) is None
        assert output.num_cached_tokens == restored
    require_no_row_left(warm)


def test_a_restored_row_that_begins_anew_has_its_pictures(warm: LLMEngine, oracles: dict[str, LLMEngine]) -> None:
    ask(warm, ILLUSTRATED)
    with watched(warm) as seen:
        add(warm, "asked", PROMPT, GREEDY, ILLUSTRATED.images)
        warm.step()
        warm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        output = finish(warm)["asked"]
    assert seen.restored == 1 and seen.resumed == 1, "it had blocks that the reset has dropped"
    assert parting(oracles["random"], ILLUSTRATED, Answer.of(output)) is None
    require_no_row_left(warm)
