# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Prompts that begin like earlier ones are restored through vLLM's scheduler, and get what they get without that.

The oracle is an engine that reuses nothing, over the same checkpoint and buckets. One request at a time is compared to
the last bit; beside others tokens are, see `support.vllm_schedules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import EngineArgs, SamplingParams, __version__
from vllm.v1.engine.llm_engine import LLMEngine

from qwen35.phase import Phase
from qwen35.serving import prefix_cache
from qwen35_vllm.connector import RowConnector, budget_of
from qwen35_vllm.options import ConfigurationRefused
from support.models import random_prompts, save_checkpoint
from support.simulated_device import faults, host_reads
from support.vllm_engines import (
    GREEDY,
    add,
    close,
    finish,
    make_engine,
    nest_config,
    planner_of,
    require_no_row_left,
    store_of,
    tokens_of,
    two_ranks_behind_a_loaded_model,
    worker_of,
)
from support.vllm_schedules import CHUNK, PREEMPTING, parting, random_schedule, run

pytestmark = pytest.mark.vllm

ALL = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=20)
"""Equal log-probabilities of 20 tokens after each: the logits are equal to the last bit."""

FIRST = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


@pytest.fixture(scope="session")
def drafting_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a random head, so that most of what it drafts depends on all of its keys."""
    path = tmp_path_factory.mktemp("drafting")
    save_checkpoint(path, seed=3, mtp=True)
    nest_config(path)
    return path


@contextmanager
def engine_of(path: Path, qwen35: dict[str, Any] | None = None, device: bool = False, **options: Any) -> Any:
    """An engine with chunks; at the end it has nothing left, and its scheduler knows what the worker keeps."""
    chosen = {"prefill_chunk_size": CHUNK, **(qwen35 or {})}
    if device:
        with two_ranks_behind_a_loaded_model():
            engine = make_engine(path, chosen, **options)
    else:
        engine = make_engine(path, chosen, **options)
    try:
        yield engine
        require_no_row_left(engine)
    finally:
        close(engine)


def cold(path: Path, qwen35: dict[str, Any] | None = None, **options: Any) -> Any:
    return engine_of(path, qwen35, enable_prefix_caching=False, **options)


@pytest.fixture(scope="module")
def oracle(served_checkpoint: Path) -> Iterator[LLMEngine]:
    """It encodes each prompt whole, on the CPU."""
    with cold(served_checkpoint, max_num_seqs=2) as engine:
        yield engine


def ask(engine: LLMEngine, prompt: Sequence[int], params: SamplingParams = GREEDY, **prompted: Any) -> Any:
    """The output of a request alone; `prompted` as in vLLM's prompts."""
    engine.add_request("asked", {"prompt_token_ids": [*prompt], **prompted}, params)
    return finish(engine)["asked"]


def cached(output: Any) -> int:
    """Tokens that vLLM counts as restored."""
    assert output.num_cached_tokens is not None
    return int(output.num_cached_tokens)


def told(output: Any) -> list[Any]:
    """Tokens, and each one's log-probabilities as they are."""
    return [
        (token, {i: entry.logprob for i, entry in logprobs.items()})
        for answer in output.outputs
        for token, logprobs in zip(answer.token_ids, answer.logprobs, strict=True)
    ]


def held(engine: LLMEngine, slot: int, tokens: int) -> list[torch.Tensor]:
    """What a slot holds of so many tokens, on all ranks."""
    model: Any = worker_of(engine)._runner._runner.model
    views = [model.cache_layout.slot(entries, slot) for entries in model.cache_entries()]
    return [state.clone() for view in views for state in view.states] + [
        head[:tokens].clone() for view in views for head in view.key_values
    ]


@pytest.mark.parametrize(
    ("block", "device", "asynchronous"),
    [(None, False, True), (2 * CHUNK, False, False), (None, True, False), (2 * CHUNK, True, True)],
    ids=["a chunk, CPU", "two chunks, CPU, synchronous", "a chunk, device, synchronous", "two chunks, device"],
)
def test_logits_are_those_of_a_cold_run_to_the_last_bit(
    served_checkpoint: Path, oracle: LLMEngine, block: int | None, device: bool, asynchronous: bool
) -> None:
    (base,) = random_prompts([100], seed=5)
    other = random_prompts([100], seed=6)[0]
    sizes = [40, 100, 100, 33, 32, 17, 16, 96, 97]
    prompts = [*(base[:size] for size in sizes), [*base[:50], *other[:40]], [*base[:31], *other[:40]], [base[0] ^ 1]]
    kept = {2 * CHUNK: [0, 32, 96, 32, 0, 0, 0, 64, 96, 32, 0, 0]}.get(
        block or CHUNK, [0, 32, 96, 32, 16, 16, 0, 80, 96, 48, 16, 0]
    )
    options: dict[str, Any] = {"device": device, "async_scheduling": asynchronous, "max_num_seqs": 2}
    with engine_of(served_checkpoint, {"prefix_block_tokens": block}, **options) as warm:
        for prompt, expected in zip(prompts, kept, strict=True):
            found = ask(warm, prompt, ALL)
            assert cached(found) == expected
            assert told(found) == told(ask(oracle, prompt, ALL))


@pytest.mark.parametrize("device", [False, True], ids=["CPU", "device"])
def test_a_restored_row_holds_what_a_cold_one_holds_and_drafts_what_it_drafts(
    drafting_checkpoint: Path, device: bool
) -> None:
    """The head's keys lag by a token: that the pair across a block's end is right shows in the row, and in drafts."""
    (base,) = random_prompts([90], seed=7)
    options: dict[str, Any] = {
        "device": device,
        "max_num_seqs": 2,
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
    }
    with engine_of(drafting_checkpoint, **options) as warm, cold(drafting_checkpoint, **options) as oracle:
        ask(warm, base, FIRST)
        for size, restored in ((90, 80), (81, 80), (80, 64), (65, 64), (33, 32)):
            assert cached(ask(warm, base[:size], FIRST)) == restored
            assert cached(ask(oracle, base[:size], FIRST)) == 0
            for found, expected in zip(held(warm, 0, size), held(oracle, 0, size), strict=True):
                assert torch.equal(found, expected)
            assert told(ask(warm, base[:size], ALL)) == told(ask(oracle, base[:size], ALL))


def test_keys_and_values_in_fp8_and_bfloat16_are_restored_as_they_are(served_checkpoint: Path) -> None:
    (prompt,) = random_prompts([60], seed=8)
    options: dict[str, Any] = {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}
    with engine_of(served_checkpoint, **options) as warm, cold(served_checkpoint, **options) as oracle:
        ask(warm, prompt)
        found = ask(warm, prompt, ALL)
        assert cached(found) == 48 and told(found) == told(ask(oracle, prompt, ALL))


SCHEDULES: dict[str, dict[str, Any]] = {
    "preemption": dict(max_num_seqs=5, max_num_batched_tokens=48, **PREEMPTING),
    "a small budget, no asynchronous scheduling": dict(
        max_num_seqs=3, max_num_batched_tokens=23, async_scheduling=False, blocks=5
    ),
    "on the device, two prompts a call, a small budget": dict(
        max_num_seqs=4, max_num_batched_tokens=96, qwen35={"ctx_batch_size": 2}, device=True, blocks=7
    ),
    "drafts, preemption": dict(max_num_seqs=6, max_num_batched_tokens=64, drafts=3, **PREEMPTING),
}
IN_LANE, OF_EACH = 3, 20


@pytest.fixture(scope="module", params=SCHEDULES)
def engines(
    request: pytest.FixtureRequest, served_checkpoint: Path, drafting_checkpoint: Path
) -> Iterator[tuple[LLMEngine, LLMEngine]]:
    """One that reuses prefixes, and one of a single row that does not."""
    options = dict(SCHEDULES[request.param])
    qwen35, blocks, drafts = options.pop("qwen35", {}), options.pop("blocks", None), options.pop("drafts", 0)
    path = drafting_checkpoint if drafts else served_checkpoint
    if drafts:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    if blocks is not None:
        qwen35 = {**qwen35, "prefix_cache_bytes": blocks * block_bytes(path)}
    with engine_of(path, qwen35, max_model_len=112, **options) as warm:
        with cold(path, max_model_len=112, max_num_seqs=1) as oracle, writes(warm) as restored:
            yield warm, oracle
        assert any(restored), "prompts began alike"


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[pytest.mark.slow] * (number >= IN_LANE)) for number in range(OF_EACH)]
)
def test_each_request_of_a_schedule_gets_the_tokens_it_gets_alone_and_cold(
    engines: tuple[LLMEngine, LLMEngine], number: int
) -> None:
    warm, oracle = engines
    drafted = warm.vllm_config.speculative_config is not None
    seed = number + OF_EACH * warm.vllm_config.scheduler_config.max_num_seqs
    schedule = random_schedule(seed, drafted=drafted, most=8, prefixes=2)
    answers = run(warm, schedule)
    require_no_row_left(warm)
    parted = [found for asked in schedule if (found := parting(oracle, asked, answers[asked.id])) is not None]
    assert parted == []


@contextmanager
def writes(engine: LLMEngine) -> Iterator[list[int]]:
    """The tokens that are restored into rows, one after the other."""
    store, restored = store_of(engine), []
    write = store.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write", lambda slot, keys: restored.append(write(slot, keys)) or restored[-1])
        yield restored


def block_bytes(path: Path) -> int:
    """Bytes of a block of a chunk."""
    budget = budget_of(configured(path, {"prefill_chunk_size": CHUNK}))
    assert budget is not None
    return budget.block_nbytes


def test_a_preempted_request_is_restored_up_to_its_own_prompt(served_checkpoint: Path, oracle: LLMEngine) -> None:
    prompts = [[i + 1] * 40 for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    with engine_of(served_checkpoint, max_num_seqs=4, **PREEMPTING) as warm:
        with writes(warm) as restored:
            for i, prompt in enumerate(prompts):
                add(warm, str(i), prompt, params)
            outputs = finish(warm)
        assert restored and {*restored} == {32}, "none of these begin alike"
        assert {cached(output) for output in outputs.values()} == {0}, "vLLM counts what is restored at first"
        for i, prompt in enumerate(prompts):
            assert tokens_of(outputs[str(i)]) == tokens_of(ask(oracle, prompt, params))


def test_the_budget_is_kept_and_the_least_recently_used_is_dropped(served_checkpoint: Path) -> None:
    first, second, third = random_prompts([40, 40, 70], seed=9)
    size = block_bytes(served_checkpoint)
    with engine_of(served_checkpoint, {"prefix_cache_bytes": 4 * size + size - 1}) as engine:
        for prompt in (first, second):
            ask(engine, prompt)
        assert [cached(ask(engine, prompt)) for prompt in (first, second, first)] == [32, 32, 32]
        ask(engine, third)  # four blocks, of which none is left for others
        assert (len(store_of(engine)), store_of(engine).nbytes) == (4, 4 * size)
        assert [cached(ask(engine, prompt)) for prompt in (third, first, third)] == [64, 0, 32]
        require_no_row_left(engine)


def test_salts_keep_prompts_apart(served_checkpoint: Path) -> None:
    (prompt,) = random_prompts([40], seed=10)
    salts = [{"cache_salt": "mine"}, {"cache_salt": "yours"}, {}]
    with engine_of(served_checkpoint) as engine:
        assert [cached(ask(engine, prompt, GREEDY, **salt)) for salt in salts] == [0, 0, 0]
        assert [cached(ask(engine, prompt, GREEDY, **salt)) for salt in salts] == [32, 32, 32]


def test_log_probabilities_of_a_prompt_are_computed_whole(served_checkpoint: Path) -> None:
    (prompt,) = random_prompts([40], seed=11)
    with engine_of(served_checkpoint, {"prompt_logprobs": True}) as engine:
        outputs = []
        for skip in (None, None, False):
            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, prompt_logprobs=1)
            params.skip_reading_prefix_cache = params.skip_reading_prefix_cache if skip is None else skip
            outputs.append(ask(engine, prompt, params))
        assert [cached(output) for output in outputs] == [0, 0, 0]
        assert outputs[1].prompt_logprobs == outputs[0].prompt_logprobs == outputs[2].prompt_logprobs
        assert len(outputs[0].prompt_logprobs) == 40
        skipping = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, skip_reading_prefix_cache=True)
        assert [cached(ask(engine, prompt, params)) for params in (skipping, GREEDY)] == [0, 32]


def test_answers_to_one_prompt_each_get_a_row(served_checkpoint: Path, oracle: LLMEngine) -> None:
    (prompt,) = random_prompts([60], seed=12)
    params = SamplingParams(temperature=1, seed=3, max_tokens=6, ignore_eos=True, n=3)
    with engine_of(served_checkpoint) as warm:
        expected = tokens_of(ask(oracle, prompt, params))
        with writes(warm) as restored:
            assert [tokens_of(ask(warm, prompt, params)) for _ in range(2)] == [expected] * 2
        assert restored == [48] * 3


@pytest.mark.skipif(__version__.startswith("0.23"), reason="its scheduler fails at the second part of an input")
def test_a_streamed_input_begins_anew_with_what_is_known_of_it(served_checkpoint: Path, oracle: LLMEngine) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def stream(engine: LLMEngine) -> list[int]:
        """The answers to the three parts of an input, all in one request."""
        tokens: list[int] = []
        for part, last in (([*range(40)], False), ([5, 7, 9], False), ([6, 7, 9], False), ([3], True)):
            request = engine.input_processor.process_inputs(
                "s", {"prompt_token_ids": part}, params, supported_tasks=("generate",), resumable=not last
            )
            request.external_req_id = "s"
            engine.output_processor.add_request(request, None, None, 0)
            request.prompt_token_ids = [*part]  # in a process of its own the scheduler has its own list
            engine.engine_core.add_request(request)
            for _ in range(8):  # idle ones, too
                for output in engine.step():
                    tokens = list(output.outputs[0].token_ids)
        return tokens

    with engine_of(served_checkpoint, max_num_seqs=2) as warm:
        with writes(warm) as restored:
            found = stream(warm)
        assert found == stream(oracle) and len(found) == 12
        assert restored == [32, 32], "of its second and third part"


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_aborts_at_any_step_leave_nothing_behind(
    served_checkpoint: Path, oracle: LLMEngine, asynchronous: bool
) -> None:
    base = random_prompts([70], seed=13)[0]
    options: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 20, "async_scheduling": asynchronous}
    with engine_of(served_checkpoint, **options) as engine:
        expected = tokens_of(ask(oracle, base))
        for after in range(7):
            prompts = [[*base[:32], after, *base[33:]], [*base[:50], after], base]  # the third waits
            for i, prompt in enumerate(prompts):
                add(engine, f"{after}-{i}", prompt, GREEDY)
            for _ in range(after):
                engine.step()
            engine.abort_request([f"{after}-{i}" for i in range(3)])
            finish(engine)
            assert tokens_of(ask(engine, base)) == expected
            require_no_row_left(engine)


def test_a_reset_forgets_everything_and_gives_the_memory_back(served_checkpoint: Path) -> None:
    prompt, other = random_prompts([60, 40], seed=14)
    with engine_of(served_checkpoint) as engine:
        ask(engine, prompt)
        assert cached(ask(engine, prompt)) == 48
        assert engine.reset_prefix_cache(reset_connector=True)
        assert len(planner_of(engine).index) == 0
        ask(engine, other)
        assert len(store_of(engine)) == 2, "those of the other prompt"
        assert [cached(ask(engine, prompt)) for _ in range(2)] == [0, 48]
        add(engine, "running", [*prompt, *other], GREEDY)
        engine.step()
        engine.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        finish(engine)
        assert cached(ask(engine, prompt)) == 48, "it was encoded after the reset"


def spoil(slot: int, phase: Phase, call: int = 0) -> Any:
    """A fault: the logits of a slot are no numbers in a call of a phase, counted from 0."""
    calls = iter(range(1 << 30))

    def fault(of: Phase, slots: list[int], logits: torch.Tensor) -> None:
        if of is phase and slot in slots and next(calls) == call:
            logits[slots.index(slot)] = torch.nan

    return fault


def refuse(slot: int, phase: Phase) -> Any:
    """A fault: calls of a phase that have a slot raise."""

    def fault(of: Phase, slots: list[int], logits: torch.Tensor) -> None:
        if of is phase and slot in slots:
            raise RuntimeError("the device says no")

    return fault


def model_of(engine: LLMEngine) -> Any:
    return worker_of(engine)._runner._runner.model


@pytest.fixture(scope="module", params=[False, True], ids=["logits", "tokens on the device"])
def device_engine(request: pytest.FixtureRequest, served_checkpoint: Path) -> Iterator[LLMEngine]:
    """On the device, which chooses tokens or leaves logits to be read; prompts take several steps."""
    qwen35 = {"on_device_sampling": True} if request.param else {}
    with engine_of(served_checkpoint, qwen35, device=True, max_num_seqs=2, max_num_batched_tokens=20) as engine:
        yield engine


@pytest.mark.parametrize(
    ("fault", "stored"),
    [
        (partial(spoil, 0, Phase.CONTEXT_ENCODING), 0),
        (partial(spoil, 0, Phase.CONTINUATION, 1), 2),
        (partial(refuse, 0, Phase.CONTEXT_ENCODING), 0),
        (partial(refuse, 0, Phase.CONTINUATION), 1),
    ],
    ids=["no numbers, first piece", "no numbers, third piece", "raises, first piece", "raises, second piece"],
)
def test_nothing_of_a_failed_call_is_kept(
    device_engine: LLMEngine, oracle: LLMEngine, fault: Callable[[], Any], stored: int
) -> None:
    """With tokens chosen on the device, too, where logits are else not read."""
    (prompt,) = random_prompts([70], seed=15)
    device_engine.reset_prefix_cache(reset_connector=True)
    with faults(model_of(device_engine), fault()):
        assert ask(device_engine, prompt).outputs[0].finish_reason == "error"
    ask(device_engine, [1])  # with which the scheduler hears of the steps that were under way
    require_no_row_left(device_engine)
    found = ask(device_engine, prompt)
    assert cached(found) == stored * CHUNK and tokens_of(found) == tokens_of(ask(oracle, prompt))
    assert cached(ask(device_engine, prompt)) == 64


def test_logits_are_read_in_steps_that_store_and_in_no_other(device_engine: LLMEngine) -> None:
    on_device = worker_of(device_engine)._runner._runner.device_is_greedy
    (prompt,) = random_prompts([50], seed=16)
    reads = host_reads(model_of(device_engine))
    for is_known in (False, True):
        reads.clear()
        assert cached(ask(device_engine, prompt)) == 48 * is_known
        whole = [shape for shape in reads if shape.numel() > shape[0]]
        assert bool(whole) == (not is_known or not on_device)


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
def test_a_block_that_cannot_be_stored_is_encoded_by_whoever_counts_on_it(
    served_checkpoint: Path, oracle: LLMEngine, asynchronous: bool
) -> None:
    prompt = random_prompts([70], seed=17)[0]
    options: dict[str, Any] = {"async_scheduling": asynchronous, "max_num_seqs": 2, "max_num_batched_tokens": 32}
    with engine_of(served_checkpoint, **options) as engine:
        expected = tokens_of(ask(oracle, prompt))
        to_host, calls = prefix_cache._to_host, iter(range(1 << 30))
        each = len(held(engine, 0, 1))  # tensors of a block

        def fail(view: torch.Tensor) -> torch.Tensor:
            if next(calls) // each == 1:  # in the second block
                raise MemoryError("no room")
            return to_host(view)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefix_cache, "_to_host", fail)
            add(engine, "first", prompt, GREEDY)
            add(engine, "second", prompt, GREEDY)  # which waits: the budget is for one
            outputs = finish(engine)
        assert [tokens_of(outputs[name]) for name in ("first", "second")] == [expected] * 2
        assert tokens_of(ask(engine, prompt)) == expected
        require_no_row_left(engine)
        assert cached(ask(engine, prompt)) == 64


def test_a_row_that_cannot_be_restored_ends_alone(served_checkpoint: Path, oracle: LLMEngine) -> None:
    prompt, other = random_prompts([70, 30], seed=18)
    with engine_of(served_checkpoint, max_num_seqs=2) as engine:
        expected = [tokens_of(ask(oracle, each)) for each in (prompt, other)]
        ask(engine, prompt)
        store = store_of(engine)
        with pytest.MonkeyPatch.context() as patch:

            def fail(slot: int, keys: Sequence[bytes]) -> int:
                raise RuntimeError("the device says no")

            patch.setattr(store, "write", fail)
            add(engine, "restored", prompt, GREEDY)
            add(engine, "other", other, GREEDY)
            outputs = finish(engine)
        assert outputs["restored"].outputs[0].finish_reason == "error"
        assert tokens_of(outputs["other"]) == expected[1]
        assert [tokens_of(ask(engine, each)) for each in (prompt, other)] == expected


def configured(path: Path, qwen35: dict[str, Any] | None = None, **arguments: Any) -> Any:
    chosen = {"max_model_len": 128, "max_num_seqs": 2, "dtype": "float32", "skip_tokenizer_init": True, **arguments}
    return EngineArgs(model=str(path), additional_config={"qwen35": qwen35 or {}}, **chosen).create_engine_config()


@pytest.mark.parametrize(
    ("qwen35", "arguments", "reused"),
    [
        ({"prefill_chunk_size": 16}, {}, True),
        ({"prefill_chunk_size": 16}, {"enable_prefix_caching": True}, True),
        ({"prefill_chunk_size": 16}, {"enable_prefix_caching": False}, False),
        ({"prefill_chunk_size": 16, "prefix_cache_bytes": 0}, {}, False),
        ({"prefill_chunk_size": 16, "prefix_cache_bytes": 1 << 20}, {"enable_prefix_caching": False}, False),
        ({}, {}, False),
    ],
    ids=str,
)
def test_vllm_s_own_switch_decides(
    served_checkpoint: Path, qwen35: dict[str, Any], arguments: dict[str, Any], reused: bool
) -> None:
    from vllm.platforms import current_platform

    config = configured(served_checkpoint, qwen35, **arguments)
    for _ in range(2):  # the hook may be called again
        assert (budget_of(config) is not None) is reused
        assert config.cache_config.enable_prefix_caching is False, "vLLM's own, whose blocks mean nothing here"
        assert config.kv_transfer_config.kv_connector == RowConnector.__name__
        current_platform.check_and_update_config(config)


def test_what_a_model_cannot_have_is_told_before_anything_starts(served_checkpoint: Path) -> None:
    with pytest.raises(ConfigurationRefused, match=r"prefix_cache_bytes=100 holds no block: one of 16 tokens takes \d"):
        configured(served_checkpoint, {"prefill_chunk_size": 16, "prefix_cache_bytes": 100})
    with pytest.raises(ConfigurationRefused, match="prefix_block_tokens=20 must be a multiple of"):
        configured(served_checkpoint, {"prefill_chunk_size": 16, "prefix_block_tokens": 20})
