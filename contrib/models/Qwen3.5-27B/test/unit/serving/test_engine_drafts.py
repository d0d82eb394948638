# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""An engine whose model drafts tokens gives each request the tokens that it gets without drafts, in fewer steps.

The MTP head of these checkpoints is often right: the decoder's branches are so small that the next token depends
mostly on the last one, which the head knows. Tokens without drafts come from an engine without them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase as HypothesisPhase
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35 import FinishReason, NeuronQwen35ForCausalLM, PrefixCache, Qwen35Engine, Request
from qwen35.phase import Phase, Submodel
from qwen35.serving.runner import ModelRunner, Row
from qwen35.serving.sampling import GREEDY, SamplingOptions
from support import vl_cases
from support.models import load_neuron, random_prompts
from support.schedules import Arrival, Case, schedules, schedules_agree
from support.simulated_device import faults, put_on_simulated_device
from support.speculation import save_markov_checkpoint

pytestmark = pytest.mark.usefixtures("backend")

WITHOUT_SHRINKING = (HypothesisPhase.explicit, HypothesisPhase.generate)
SEQ_LEN, STEPS, K = 64, 12, 3
SAMPLING = [
    GREEDY,
    SamplingOptions(temperature=0.3, seed=1),
    GREEDY,
    SamplingOptions(temperature=0.4, top_k=5, presence_penalty=0.5, repetition_penalty=1.1, seed=2),
    SamplingOptions(repetition_penalty=1.2),
]
PROMPTS = random_prompts([1, 2, 7, 8, 9, 16, 33, 40, 3])
PROMPTS += [PROMPTS[6][:16] + PROMPTS[3], PROMPTS[7][:21] + PROMPTS[4]]
CASES: list[Case] = [(prompt, SAMPLING[i % len(SAMPLING)]) for i, prompt in enumerate(PROMPTS)]
OPTIONS: dict[str, dict[str, Any]] = {
    "chunks": dict(batch_size=3, ctx_batch_size=2, is_continuous_batching=True, prefill_chunk_size=8),
    "device, buckets, more slots than rows": dict(
        batch_size=2,
        kv_cache_batch_size=3,
        max_batch_size=3,
        ctx_batch_size=1,
        is_continuous_batching=True,
        prefill_chunk_size=8,
        enable_bucketing=True,
        token_generation_buckets=[16, 32, 64],
        context_encoding_buckets=[8],
    ),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    save_markov_checkpoint(path, seed=1, branch=0.15, num_hidden_layers=2, full_attention_interval=2)
    return path


@pytest.fixture(scope="module")
def model_of(path: Path) -> Callable[[str], NeuronQwen35ForCausalLM]:
    models: dict[str, NeuronQwen35ForCausalLM] = {}

    def get(name: str) -> NeuronQwen35ForCausalLM:
        if name not in models:
            model = load_neuron(path, seq_len=SEQ_LEN, num_speculative_tokens=K, **OPTIONS[name])
            models[name] = put_on_simulated_device(model) if name.startswith("device") else model
        return models[name]

    return get


@pytest.fixture(scope="module")
def plain(path: Path) -> NeuronQwen35ForCausalLM:
    return load_neuron(path, seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def alone(plain: NeuronQwen35ForCausalLM) -> list[list[int]]:
    return [tokens_of(Qwen35Engine(plain), Request(prompt, STEPS, sampling)) for prompt, sampling in CASES]


def tokens_of(engine: Qwen35Engine, request: Request) -> list[int]:
    return [output.token for output in engine.stream(engine.add(request)) if output.token is not None]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_request_alone_gets_its_tokens_in_fewer_steps(
    options: str, model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    engine = Qwen35Engine(model_of(options))
    for (prompt, sampling), tokens in zip(CASES, alone, strict=True):
        assert tokens_of(engine, Request(prompt, STEPS, sampling)) == tokens
    assert 1.3 < engine.acceptance.tokens_per_step < K + 1
    assert all(0 < rate < 1 for rate in engine.acceptance.rates), "some are right and some are wrong, at every place"


@pytest.mark.parametrize("options", OPTIONS)
def test_a_schedule_gives_each_request_what_it_gets_alone(
    options: str, model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    @settings(max_examples=6, phases=WITHOUT_SHRINKING)
    @given(schedules(len(CASES), STEPS), st.booleans())
    def run(schedule: list[Arrival], cached: bool) -> None:
        schedules_agree(model_of(options), CASES, alone, schedule, cached)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_200_schedules_give_each_request_what_it_gets_alone(
    options: str, model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    @settings(max_examples=100, phases=WITHOUT_SHRINKING)
    @given(schedules(len(CASES), STEPS), st.booleans())
    def run(schedule: list[Arrival], cached: bool) -> None:
        schedules_agree(model_of(options), CASES, alone, schedule, cached)

    run()


def programs_of(model: NeuronQwen35ForCausalLM, engine: Qwen35Engine) -> list[Phase]:
    """The programs that a round runs."""
    seen: list[Phase] = []
    with faults(model, lambda phase, slots, outputs: seen.append(phase)):
        engine.step()
    return seen


def test_a_step_of_greedy_rows_is_one_program_and_any_other_two(model_of: Callable[[str], Any]) -> None:
    model = model_of("device, buckets, more slots than rows")
    engine = Qwen35Engine(model)
    engine.add(Request(PROMPTS[0], STEPS))
    assert programs_of(model, engine) == [Phase.CONTEXT_ENCODING, Phase.DRAFT]
    assert programs_of(model, engine) == [Phase.SPECULATION]
    engine.add(Request(PROMPTS[1], 4, SamplingOptions(temperature=1.0, seed=5)))
    assert programs_of(model, engine) == [Phase.SPECULATION, Phase.CONTEXT_ENCODING, Phase.DRAFT]
    assert programs_of(model, engine) == [Phase.VERIFICATION, Phase.DRAFT]


def test_the_end_of_an_answer_cuts_what_a_step_gives(model_of: Callable[[str], Any], alone: list[list[int]]) -> None:
    engine, given = Qwen35Engine(model_of("chunks")), 0
    for case in range(3):
        prompt, sampling = CASES[case]
        for token in {*alone[case][1:]}:
            expected = alone[case][: alone[case].index(token) + 1]
            outputs = [*engine.stream(engine.add(Request(prompt, STEPS, sampling, (token,))))]
            assert [output.token for output in outputs] == expected
            assert [output.finish_reason for output in outputs] == [None] * (len(expected) - 1) + [FinishReason.EOS]
            given += len(expected) - 1
    assert engine.acceptance.tokens == given, "the first token is no step's, and nothing comes after an end"


def test_logprobs_are_those_without_drafts(model_of: Callable[[str], Any], plain: NeuronQwen35ForCausalLM) -> None:
    for sampling in SAMPLING[:2]:
        request = Request(PROMPTS[2], STEPS, sampling, logprobs=2)
        ours, theirs = (
            [*engine.stream(engine.add(request))] for engine in (Qwen35Engine(model_of("chunks")), Qwen35Engine(plain))
        )
        for one, other in zip(ours, theirs, strict=True):
            assert one.token == other.token and one.logprobs is not None and other.logprobs is not None
            assert abs(one.logprobs.chosen - other.logprobs.chosen) < 1e-4  # float32, logits of order ten
            assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]


def test_continuations_of_one_prompt_have_drafts_of_their_own(
    model_of: Callable[[str], Any], plain: NeuronQwen35ForCausalLM
) -> None:
    request = Request(PROMPTS[6], STEPS, SamplingOptions(temperature=0.5, seed=3), n=3)
    tokens: list[list[list[int | None]]] = []
    for model in (model_of("chunks"), plain):
        engine = Qwen35Engine(model)
        outputs = [*engine.stream(engine.add(request))]
        tokens.append([[o.token for o in outputs if o.index == index] for index in range(3)])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("encoded", [16, 17, 33, 40])
def test_drafts_after_a_restored_prompt_are_those_of_an_encoded_one(
    model_of: Callable[[str], Any], encoded: int
) -> None:
    model = model_of("chunks")
    cache, runner = PrefixCache(model, 1 << 20), ModelRunner(model)
    first, prompt = PROMPTS[7][:encoded], [*PROMPTS[7][:encoded], *PROMPTS[2]]

    def drafts(slot: int, tokens: list[int], cached: int = 0) -> list[int]:
        row = Row(slot, [*tokens], cached)
        while row.cached < len(tokens):
            logits = runner.encode([row]).all_logits()
            if row.cached % cache.block == 0:
                cache.store(slot, cache.chain(tokens), row.cached)
        row.tokens.append(int(logits[0].argmax()))
        return runner.draft([row])[0]

    cold = drafts(0, prompt)
    cache = PrefixCache(model, 1 << 20)
    drafts(1, first)
    for slot in (0, 1, 2):
        model.clear_slot(slot)
    restored = cache.restore(2, cache.chain(prompt))
    assert restored == encoded // 8 * 8
    assert drafts(2, prompt, restored) == cold
    head = model.cache_layout.layer_state(model.cache_entries()[0], model.config.num_hidden_layers)
    warm = [entry[2, :, : len(prompt)].clone() for entry in head]
    model.clear_slot(2)
    drafts(2, prompt)
    head = model.cache_layout.layer_state(model.cache_entries()[0], model.config.num_hidden_layers)
    for one, other in zip(warm, head, strict=True):
        assert torch.equal(one, other[2, :, : len(prompt)]), "to the bit, the last places of blocks too"


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase.drafts])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_call_that_fails_ends_its_rows_and_leaves_nothing_to_the_next(
    options: str, phase: Phase, model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    engine, failed = Qwen35Engine(model_of(options)), False

    def fail_once(called: Phase, slots: list[int], outputs: torch.Tensor) -> None:
        nonlocal failed
        if called is phase and not failed:
            failed = True
            raise RuntimeError("the device is gone")

    greedy, drawn = (0, 2), (0, 1)
    first = greedy if phase is Phase.SPECULATION else drawn
    ids = [engine.add(Request(CASES[case][0], STEPS, CASES[case][1])) for case in first]
    with faults(engine.model, fail_once):
        while engine.has_work:
            outputs = engine.step()
            if any(output.error for output in outputs):
                break
    assert failed and any("the device is gone" in (output.error or "") for output in outputs)
    for i in ids:
        engine.cancel(i)
    for case, (prompt, sampling) in enumerate(CASES[:4]):
        assert tokens_of(engine, Request(prompt, STEPS, sampling)) == alone[case]


def test_drafts_after_a_restored_image_are_those_of_an_encoded_one(tmp_path: Path) -> None:
    vl_cases.save_vl_checkpoint(tmp_path, mtp=True)
    options: dict[str, Any] = dict(num_speculative_tokens=K, prefill_chunk_size=8, batch_size=1, seq_len=64)
    model, example = vl_cases.load(str(tmp_path), **options), vl_cases.EXAMPLE[2]
    request = Request(example.ids, STEPS, media=vl_cases.media([example]))
    plain = vl_cases.load(str(tmp_path), **{**options, "num_speculative_tokens": 0})
    expected = tokens_of(Qwen35Engine(plain), request)
    engine = Qwen35Engine(model, PrefixCache(model, 1 << 24))
    seen: list[list[int]] = []
    for _ in range(2):
        request_id = engine.add(request)
        while not any(sequence.is_encoded for sequence in engine._sequences):
            engine.step()
        seen.append([*engine._sequences[0].slot_row.drafts])
        outputs = [*engine.stream(request_id)]
        assert [output.token for output in outputs] == expected[len(expected) - len(outputs) :]
    assert seen[0] == seen[1] and len(seen[0]) == K


def test_logits_that_are_no_numbers_end_their_request_alone(
    model_of: Callable[[str], Any], alone: list[list[int]]
) -> None:
    model = model_of("chunks")
    engine = Qwen35Engine(model)
    ids = [engine.add(Request(CASES[case][0], STEPS)) for case in (0, 2)]
    engine.step()
    norm = model.submodel(Submodel(Phase.SPECULATION)).model.norm
    handle = norm.register_forward_hook(lambda norm, inputs, output: output.index_fill(0, torch.tensor([0]), torch.nan))
    ended = engine.step()
    handle.remove()
    assert [output.finish_reason for output in ended if output.request_id == ids[0]] == [FinishReason.ERROR]
    assert any("logits are nan or infinite" in (output.error or "") for output in ended)
    again = engine.add(Request(CASES[0][0], STEPS))  # in the slot that had no numbers
    outputs = [*ended, *(output for _ in range(3 * STEPS) for output in engine.step())]
    for request_id, case in ((ids[1], 2), (again, 0)):
        tokens = [output.token for output in outputs if output.request_id == request_id]
        assert tokens == alone[case][STEPS - len(tokens) :]
