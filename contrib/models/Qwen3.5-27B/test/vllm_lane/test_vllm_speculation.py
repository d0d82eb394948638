# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""--speculative-config: drafts change no token of any request, whoever is beside it, and vLLM counts them right.

The oracle is an engine without speculation, over the same checkpoint, that has each request alone. What is compared is
token ids, in float32, see `support.vllm_schedules`; log-probabilities are within 1e-4, as other numbers of tokens in a
call sum in another order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine

from qwen35.serving.loading import MINI_CHECKPOINT
from support.models import TINY, random_prompts, save_checkpoint
from support.speculation import save_markov_checkpoint
from support.vllm_engines import (
    GREEDY,
    add,
    answers,
    close,
    engine_of,
    finish,
    make_engine,
    nest_config,
    require_no_row_left,
    worker_of,
)
from support.vllm_schedules import CHUNK, PREEMPTING, parting, random_schedule, run

pytestmark = pytest.mark.vllm

LENGTH = 112
"""Answers to long prompts reach it."""

LOGPROB_TOLERANCE = 1e-4
JSON = {"type": "object", "properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"], "additionalProperties": False}
XGRAMMAR = {"backend": "xgrammar", "disable_any_whitespace": True}


def drafts(number: int) -> dict[str, Any]:
    return {"method": "mtp", "num_speculative_tokens": number}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The mini, whose head is trained; a random head; and heads that are right always, or often."""
    root = tmp_path_factory.mktemp("drafting")
    save_checkpoint(root / "random", seed=3, mtp=True)
    save_markov_checkpoint(root / "right", seed=4)
    save_markov_checkpoint(root / "often", seed=5, branch=0.1)
    tiny = {name: root / name for name in ("random", "right", "often")}
    for path in tiny.values():
        nest_config(path)
    return {"mini": MINI_CHECKPOINT, **tiny}


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mini, three drafts": dict(of="mini", number=3, max_num_seqs=4, max_num_batched_tokens=64),
    "mini, two drafts, preemption, no asynchronous scheduling": dict(
        of="mini", number=2, max_num_seqs=5, max_num_batched_tokens=48, async_scheduling=False, **PREEMPTING
    ),
    "random head, one draft, the least budget": dict(of="random", number=1, max_num_seqs=2, max_num_batched_tokens=16),
    "random head, four drafts, preemption": dict(
        of="random", number=4, max_num_seqs=6, max_num_batched_tokens=64, **PREEMPTING
    ),
    "a head that is right, seven drafts, two prompts a call": dict(
        of="right",
        number=7,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        qwen35={"prefill_chunk_size": CHUNK, "ctx_batch_size": 2},
    ),
    "a head that is often right, three drafts, preemption": dict(
        of="often", number=3, max_num_seqs=5, max_num_batched_tokens=40, **PREEMPTING
    ),
    "a head that is often right, five drafts, prompts in one piece": dict(
        of="often", number=5, max_num_seqs=3, max_num_batched_tokens=256, qwen35={}
    ),
}
SCHEDULES = 29
"""Of each configuration: 203 in all, of which 42 are in the lane and the rest with -m slow."""


OF_THE_MINI = [name for name in CONFIGURATIONS if CONFIGURATIONS[name]["of"] == "mini"]


def numbers(in_lane: int) -> list[Any]:
    """Of schedules; those after the first few are slow."""
    return [pytest.param(number, marks=[pytest.mark.slow] * (number >= in_lane)) for number in range(SCHEDULES)]


@pytest.fixture(scope="module")
def engines(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[tuple[LLMEngine, LLMEngine]]:
    """One that drafts, and one of a single row that does not."""
    given: dict[str, Any] = {"qwen35": {"prefill_chunk_size": CHUNK}, **CONFIGURATIONS[request.param]}
    path, number = checkpoints[given.pop("of")], given.pop("number")
    drafting = make_engine(path, max_model_len=LENGTH, speculative_config=drafts(number), **given)
    assert drafting.vllm_config.scheduler_config.async_scheduling == given.get("async_scheduling", True)
    plain = make_engine(path, {"prefill_chunk_size": CHUNK}, max_model_len=LENGTH, max_num_seqs=1)
    yield drafting, plain
    close(drafting)
    close(plain)


# The engines have a mark of their own: with one for both, pytest makes them anew for each number.
@pytest.mark.parametrize("number", numbers(in_lane=8))
@pytest.mark.parametrize("engines", [name for name in CONFIGURATIONS if name not in OF_THE_MINI], indirect=True)
def test_each_request_gets_the_tokens_it_gets_alone_without_drafts(
    engines: tuple[LLMEngine, LLMEngine], number: int
) -> None:
    check_schedule(engines, number)


@pytest.mark.parametrize("number", numbers(in_lane=1))  # it takes longer
@pytest.mark.parametrize("engines", OF_THE_MINI, indirect=True)
def test_each_request_to_the_mini_does_too(engines: tuple[LLMEngine, LLMEngine], number: int) -> None:
    check_schedule(engines, number)


def check_schedule(engines: tuple[LLMEngine, LLMEngine], number: int) -> None:
    drafting, plain = engines
    seed = number + SCHEDULES * drafting.vllm_config.scheduler_config.max_num_seqs
    schedule = random_schedule(seed, drafted=True, most=5 if number < 8 else 12)
    answers = run(drafting, schedule)
    require_no_row_left(drafting)
    parted = [found for asked in schedule if (found := parting(plain, asked, answers[asked.id])) is not None]
    assert parted == []


def both(path: Path, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **options: Any) -> list[Any]:
    """The outputs with three drafts, and those without."""
    found = []
    for speculative in (drafts(3), None):
        with engine_of(path, {"prefill_chunk_size": CHUNK}, speculative_config=speculative, **options) as engine:
            for i, (prompt, of_prompt) in enumerate(zip(prompts, params, strict=True)):
                add(engine, str(i), prompt, of_prompt)
            outputs = finish(engine)
            found.append([outputs[str(i)].outputs for i in range(len(prompts))])
    return found


def test_logprobs_are_the_main_model_s(checkpoints: dict[str, Path]) -> None:
    """Of rows that want different numbers of them, and accept different numbers of drafts."""
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=4),
        SamplingParams(temperature=1, seed=2, max_tokens=12, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=5, max_tokens=12, ignore_eos=True, logprobs=0),
    ]
    drafted, plain = both(checkpoints["often"], random_prompts([5, 20, 40, 9]), params)
    for (found,), (expected,), wanted in zip(drafted, plain, params, strict=True):
        assert found.token_ids == expected.token_ids
        if wanted.logprobs is None:
            assert found.logprobs is None
            continue
        for own, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert own.keys() == other.keys() and len(own) in (wanted.logprobs, wanted.logprobs + 1)
            for token, entry in own.items():
                assert entry.logprob == pytest.approx(other[token].logprob, abs=LOGPROB_TOLERANCE)
                assert entry.rank == other[token].rank


def test_the_answers_of_n_are_those_without_drafts(checkpoints: dict[str, Path]) -> None:
    final = RequestOutputKind.FINAL_ONLY
    params = SamplingParams(n=3, temperature=1, seed=7, max_tokens=16, ignore_eos=True, output_kind=final)
    drafted, plain = both(checkpoints["mini"], random_prompts([20, 9], vocab_size=1000), [params] * 2)
    assert [[o.token_ids for o in each] for each in drafted] == [[o.token_ids for o in each] for each in plain]
    assert len({tuple(o.token_ids) for o in drafted[0]}) == 3


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["asynchronous", "synchronous"])
def test_structured_answers_and_stop_strings_are_those_without_drafts(async_scheduling: bool) -> None:
    greedy, prompt = SamplingParams(temperature=0, max_tokens=30), "The capital of France is"
    bound = StructuredOutputsParams(json=JSON)
    params = [
        greedy,
        SamplingParams(temperature=0, max_tokens=30, structured_outputs=bound),
        SamplingParams(temperature=1, seed=3, max_tokens=30, structured_outputs=bound),
        SamplingParams(
            temperature=1, seed=4, max_tokens=30, structured_outputs=StructuredOutputsParams(regex="[a-c]{9}")
        ),
        SamplingParams(temperature=0, max_tokens=30, stop=["is"]),
    ]
    found = []
    for speculative in (drafts(3), None):
        with engine_of(
            MINI_CHECKPOINT,
            max_model_len=96,
            max_num_seqs=len(params),
            skip_tokenizer_init=False,
            structured_outputs_config=XGRAMMAR,
            async_scheduling=async_scheduling,
            speculative_config=speculative,
        ) as engine:
            for i, each in enumerate(params):
                engine.add_request(str(i), prompt, each)
            outputs = finish(engine)
            found.append([(o.text, o.finish_reason) for i in range(len(params)) for o in outputs[str(i)].outputs])
    assert found[0] == found[1]
    assert json.loads(found[0][1][0])["a"] in ("x", "yes") and len(found[0][3][0]) == 9


def test_greedy_rows_are_one_program_a_step_and_others_two(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    drawn = SamplingParams(temperature=1, seed=1, max_tokens=16, ignore_eos=True)
    with engine_of(checkpoints["right"], speculative_config=drafts(3)) as engine:
        runner, calls = worker_of(engine)._runner._runner, []
        for name in ("decode", "speculate", "verify", "draft"):
            run_it = getattr(runner, name)
            monkeypatch.setattr(runner, name, lambda rows, *a, n=name, r=run_it: (calls.append(n), r(rows, *a))[1])
        answers(engine, random_prompts([5, 9]), greedy)
        # The first of 16 tokens comes with the prompt; a fifth step is scheduled before the end of the fourth is known.
        assert calls[:5] == ["draft", *["speculate"] * 4] and {*calls[5:]} <= {"speculate"}
        calls.clear()
        answers(engine, random_prompts([5, 9]), [greedy, drawn])
        assert calls[:3] == ["draft", "verify", "draft"] and "decode" not in calls


def counted(engine: LLMEngine) -> tuple[int, list[int], list[int]]:
    """What vLLM has counted: steps with drafts, and drafts and accepted ones by place."""
    found = {metric.name: metric for metric in engine.get_metrics()}
    steps = found["vllm:spec_decode_num_drafts"].value
    accepted = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return steps, [found["vllm:spec_decode_num_draft_tokens"].value], accepted


def test_vllm_s_metrics_are_what_the_model_accepted(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with engine_of(checkpoints["often"], speculative_config=drafts(3), disable_log_stats=False) as engine:
        before = counted(engine)
        runner, right, lengths = worker_of(engine)._runner._runner, [], []
        speculate = runner.speculate

        def record(rows: Any) -> Any:
            (row,) = rows
            drafted, left = len(row.drafts), lengths[-1] + 24 - len(row.tokens)  # of the answer, before this step
            (chosen,) = speculate(rows)
            right.append((drafted, len(chosen) - 1) if len(chosen) <= left else (left, left))
            return [chosen]

        monkeypatch.setattr(runner, "speculate", record)
        # With one row, no step is run for a request that has ended: vLLM would not count it.
        given = []
        for prompt in random_prompts([5, 30, 1]):
            lengths.append(len(prompt))
            given += answers(engine, [prompt], greedy)
        steps, (drafted,), accepted = counted(engine)
    assert all(len(tokens) == 24 for tokens in given)
    assert 0 < accepted[2] - before[2][2] < accepted[0] - before[2][0] < len(right), "right and wrong drafts"
    ended = len(right) - (steps - before[0])
    assert 0 <= ended <= 3, "a step that was queued when its request ended is not counted"
    if ended == 0:
        assert drafted - before[1][0] == sum(number for number, _ in right)
        assert [new - old for new, old in zip(accepted, before[2], strict=True)] == [
            sum(number > place for _, number in right) for place in range(3)
        ]


def test_places_that_pad_a_first_step_are_not_counted_as_drafts(checkpoints: dict[str, Path]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with engine_of(checkpoints["right"], speculative_config=drafts(3), disable_log_stats=False) as engine:
        before = counted(engine)
        add(engine, "long", random_prompts([5])[0], greedy)
        for _ in range(4):
            engine.step()
        add(engine, "one token", [3], greedy)  # beside a row that decodes, vLLM pads its first step
        finish(engine)
        after = counted(engine)
    assert after[1][0] - before[1][0] == sum(after[2]) - sum(before[2]), "all drafts of this head are right"


def test_a_call_that_fails_ends_the_requests_in_it_and_no_other(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=1, seed=1, max_tokens=8, ignore_eos=True)
    prompts = random_prompts([40, 20, 30])
    for call in ("verify", "draft"):
        with engine_of(checkpoints["random"], speculative_config=drafts(2), max_num_seqs=2) as engine:
            alone = [answers(engine, [prompt], params)[0] for prompt in prompts]
            runner, failing = worker_of(engine)._runner._runner, [True]
            run_it = getattr(runner, call)

            def fail_once(rows: Any, run_it: Any = run_it, failing: list[bool] = failing) -> Any:
                if len(rows) == 2 and failing:
                    failing.clear()
                    raise RuntimeError("the device says no")
                return run_it(rows)

            monkeypatch.setattr(runner, call, fail_once)
            for i, prompt in enumerate(prompts):
                add(engine, str(i), prompt, params)
            outputs = finish(engine)
            assert [outputs[str(i)].outputs[0].finish_reason for i in range(3)] == ["error", "error", "length"]
            assert [*outputs["2"].outputs[0].token_ids] == alone[2]
            assert answers(engine, prompts, params) == alone, "a slot was left as it was"


def test_a_checkpoint_of_text_alone_drafts_except_in_0_23(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", seed=3, mtp=True)
    if vllm.__version__.startswith("0.23."):  # its own configuration of drafts does not know `qwen3_5_text`
        with pytest.raises(NotImplementedError, match="Unsupported speculative method: 'mtp'"):
            make_engine(tmp_path / "checkpoint", speculative_config=drafts(2))
        return
    drafted, plain = both(tmp_path / "checkpoint", random_prompts([5, 20]), [GREEDY] * 2)
    assert [answer[0].token_ids for answer in drafted] == [answer[0].token_ids for answer in plain]


@pytest.mark.parametrize("options", [{"min_p": 0.1}, {"logit_bias": {3: 1.0}}], ids=str)
def test_what_vllm_refuses_with_drafts(checkpoints: dict[str, Path], options: dict[str, Any]) -> None:
    with engine_of(checkpoints["random"], speculative_config=drafts(1)) as engine:
        with pytest.raises((ValueError, VLLMValidationError), match="not yet supported with speculative decoding"):
            add(engine, "refused", [1, 2, 3], SamplingParams(max_tokens=4, **options))
        assert max(answers(engine, [[1, 2, 3]])[0]) < TINY["vocab_size"]
