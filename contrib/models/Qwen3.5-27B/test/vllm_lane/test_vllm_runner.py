# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a step calls and reads, and what becomes of a request whose work fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from qwen35.phase import Phase
from support.models import TINY, random_prompts
from support.simulated_device import faults, host_reads
from support.vllm_engines import (
    GREEDY,
    add,
    answers,
    close,
    finish,
    make_engine,
    require_no_row_left,
    tokens_of,
    two_ranks_behind_a_loaded_model,
    worker_of,
)

pytestmark = pytest.mark.vllm

SLOTS, CHUNK, V = 4, 16, TINY["vocab_size"]
SEEDED = SamplingParams(temperature=1, seed=1, max_tokens=8, ignore_eos=True)


@contextmanager
def on_device(path: Path, **options: Any) -> Iterator[LLMEngine]:
    """Without prefix reuse: prompts that are asked again are encoded again."""
    chosen = {"prefill_chunk_size": CHUNK, "prefix_cache_bytes": 0, **options.pop("qwen35", {})}
    with two_ranks_behind_a_loaded_model():
        engine = make_engine(path, chosen, **options)
    try:
        yield engine
    finally:
        close(engine)


def model_of(engine: LLMEngine) -> Any:
    return worker_of(engine)._runner._runner.model


@pytest.mark.parametrize(
    ("params", "reads_logits"),
    [
        ([GREEDY] * 3, False),
        ([GREEDY, GREEDY, SEEDED], True),
        ([GREEDY, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1), GREEDY], True),
        ([GREEDY, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, frequency_penalty=1), GREEDY], True),
        ([GREEDY, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logit_bias={3: 9.0}), GREEDY], True),
        ([GREEDY, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, allowed_token_ids=[3]), GREEDY], True),
        ([GREEDY, SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[3], min_tokens=4), GREEDY], True),
    ],
    ids=["greedy", "one drawn", "logprobs", "penalty", "logit_bias", "allowed_token_ids", "min_tokens"],
)
def test_logits_stay_on_the_device_when_every_row_wants_the_most_likely_token(
    served_checkpoint: Path, params: list[SamplingParams], reads_logits: bool
) -> None:
    prompts = random_prompts([5, 20, 40])
    with on_device(served_checkpoint, qwen35={"on_device_sampling": True}) as engine:
        found = answers(engine, prompts, params)
        reads = host_reads(model_of(engine))
        # Of a bucket's batch: ids [B], one number a row, or logits [B, 1, V].
        assert {shape.numel() // shape[0] for shape in reads} == ({1, V} if reads_logits else {1})
    with on_device(served_checkpoint) as engine:
        assert answers(engine, prompts, params) == found


def pieces_of(engine: LLMEngine, prompts: list[list[int]]) -> dict[int, list[int]]:
    """Sizes of the pieces that each slot's prompt was encoded in."""
    runner, pieces = worker_of(engine)._runner._runner, {slot: [] for slot in range(SLOTS)}
    encode = runner.encode

    def record(rows: Any, *args: Any) -> Any:
        before = [row.cached for row in rows]
        outputs = encode(rows, *args)
        for row, cached in zip(rows, before, strict=True):
            pieces[row.slot].append(row.cached - cached)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "encode", record)
        answers(engine, prompts)
    return pieces


@pytest.mark.parametrize("budget", [16, 23, 37, 128])
def test_prompts_are_cut_at_multiples_of_the_chunk_whatever_the_scheduler_grants(
    served_checkpoint: Path, budget: int
) -> None:
    prompts = random_prompts([50, 33, 16, 3])
    engine = make_engine(served_checkpoint, {"prefill_chunk_size": CHUNK}, max_num_batched_tokens=budget)
    found = pieces_of(engine, prompts)
    close(engine)
    assert list(found.values()) == [[16, 16, 16, 2], [16, 16, 1], [16], [3]]


def fail_slots(*slots: int, phase: Phase, how: Callable[[torch.Tensor], None]) -> Any:
    """A fault of calls in a phase that have these slots: `how` gets the logits of the first of them."""

    def fault(of: Phase, called: list[int], logits: torch.Tensor) -> None:
        here = [called.index(slot) for slot in slots if slot in called]
        if of is phase and here:
            how(logits[here[0]])

    return fault


def raise_error(_: torch.Tensor) -> None:
    raise RuntimeError("the device says no")


def no_numbers(logits: torch.Tensor) -> None:
    logits.fill_(torch.nan)


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize("phase", [Phase.CONTEXT_ENCODING, Phase.CONTINUATION, Phase.TOKEN_GENERATION])
def test_a_row_without_finite_logits_ends_alone_with_an_error(
    served_checkpoint: Path, phase: Phase, async_scheduling: bool
) -> None:
    prompts = random_prompts([40, 20, 30])
    with on_device(served_checkpoint, async_scheduling=async_scheduling) as engine:
        alone = [answers(engine, [prompt])[0] for prompt in prompts]
        for i, prompt in enumerate(prompts):
            add(engine, str(i), prompt, GREEDY)
        with faults(model_of(engine), fail_slots(1, phase=phase, how=no_numbers)):
            outputs = finish(engine)
        assert outputs["1"].outputs[0].finish_reason == "error"
        assert [tokens_of(outputs[str(i)])[0] for i in (0, 2)] == [alone[0], alone[2]]
        require_no_row_left(engine)
        assert answers(engine, prompts) == alone, "the slot was left as it was"


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize(
    ("phase", "failed"), [(Phase.CONTEXT_ENCODING, {"1"}), (Phase.TOKEN_GENERATION, {"0", "1", "2"})]
)
def test_a_call_that_fails_ends_the_requests_in_it_and_no_other(
    served_checkpoint: Path, phase: Phase, failed: set[str], async_scheduling: bool
) -> None:
    prompts = random_prompts([40, 20, 30, 10])
    with on_device(served_checkpoint, async_scheduling=async_scheduling, max_num_seqs=3) as engine:
        alone = [answers(engine, [prompt])[0] for prompt in prompts]
        for i, prompt in enumerate(prompts):
            add(engine, str(i), prompt, GREEDY)
        once = [raise_error]

        def fail_once(logits: torch.Tensor) -> None:
            # When all three decode: a call of fewer rows would fail fewer.
            if phase is Phase.CONTEXT_ENCODING or len(worker_of(engine)._runner.rows.free_slots) == 0:
                for how in once:
                    once.clear()
                    how(logits)

        with faults(model_of(engine), fail_slots(1, phase=phase, how=fail_once)):
            outputs = finish(engine)
        ended = {i for i, output in outputs.items() if output.outputs[0].finish_reason == "error"}
        assert ended == failed
        for i in {"0", "1", "2", "3"} - failed:
            assert tokens_of(outputs[i])[0] == alone[int(i)]
        require_no_row_left(engine)
        assert answers(engine, prompts) == alone


def test_fewer_slots_than_sequences_are_refused(served_checkpoint: Path) -> None:
    from qwen35_vllm.runner import StepRunner

    engine = make_engine(served_checkpoint, max_num_seqs=2)
    config, model = engine.vllm_config, model_of(engine)
    config.scheduler_config.max_num_seqs = 3
    with pytest.raises(ValueError, match=r"max_num_seqs=3 exceeds the kv_cache_batch_size=2 .*: pass --max-num-seqs 2"):
        StepRunner(config, model)
    close(engine)
