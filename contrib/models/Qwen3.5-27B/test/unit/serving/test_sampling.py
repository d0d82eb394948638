# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The tokens that one row draws, against transformers' processors and vLLM's formulas."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen35 import SamplingOptions
from qwen35.serving.sampling import (
    GREEDY,
    Sampler,
    checkpoint_sampling,
    logprobs_of,
    penalized,
    require_finite,
)

LOGITS = torch.tensor([0.0, 2.0, 1.0, 1.9, -1.0])  # probabilities 0.06, 0.41, 0.15, 0.37, 0.02


def draws(options: SamplingOptions, count: int = 200) -> list[int]:
    sampler = Sampler(options)
    return [sampler.sample(LOGITS) for _ in range(count)]


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=9.0, top_k=1)])
def test_greedy_and_the_best_of_one_are_the_largest_logit(options: SamplingOptions) -> None:
    assert {*draws(options, 20)} == {1}


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        (dict(top_k=2), {1, 3}),
        (dict(top_k=3), {1, 2, 3}),
        (dict(top_p=0.5), {1, 3}),
        (dict(top_p=0.4), {1}),
        (dict(top_k=3, top_p=0.8), {1, 3}),  # 0.84 of what top_k leaves: the order matters, 0.8 of all takes three
        (dict(top_k=0, top_p=0.8), {1, 2, 3}),
        (dict(), {0, 1, 2, 3, 4}),
    ],
)
def test_top_k_and_top_p_cut_off_what_is_less_likely(options: dict[str, Any], possible: set[int]) -> None:
    assert {*draws(SamplingOptions(temperature=1.0, seed=0, **options))} == possible


def test_a_high_temperature_makes_unlikely_tokens_likelier() -> None:
    cold, hot = (draws(SamplingOptions(temperature=t, seed=0)).count(4) for t in (0.5, 10.0))
    assert cold < 5 < 20 < hot


def test_a_row_draws_the_same_whoever_draws_beside_it() -> None:
    options = SamplingOptions(temperature=1.0, seed=7)
    alone = draws(options, 30)
    row, neighbour = Sampler(options), Sampler(SamplingOptions(temperature=2.0, seed=8))
    beside = []
    for _ in range(30):
        beside.append(row.sample(LOGITS))
        neighbour.sample(LOGITS)
        torch.rand(3)
    assert beside == alone


def test_without_a_seed_pytorchs_default_generator_gives_one() -> None:
    options = SamplingOptions(temperature=1.0)
    torch.manual_seed(3)
    first = draws(options)
    assert draws(options) != first
    torch.manual_seed(3)
    assert draws(options) == first


def test_bfloat16_logits_are_sampled_in_float32() -> None:
    logits = torch.zeros(50_000, dtype=torch.bfloat16)  # cumulated in bfloat16, these probabilities do not reach 1
    assert 0 <= Sampler(SamplingOptions(temperature=1.0, top_p=0.99, seed=0)).sample(logits) < 50_000


@pytest.mark.parametrize("options", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.1), dict(top_k=-1)])
def test_a_value_out_of_its_range_is_an_error_that_names_it(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        SamplingOptions(**options)


def oracle(options: SamplingOptions, prompt: list[int], logits: torch.Tensor) -> list[int]:
    """Tokens from logits [G, V] by transformers' processors in transformers' order, and vLLM's two penalties."""
    assert options.seed is not None
    generator, generated = torch.Generator().manual_seed(options.seed), []
    for row in logits:
        seen = torch.tensor([[*prompt, *generated]], dtype=torch.long)
        scores = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(seen, row.unsqueeze(0).clone())
        for token in {*generated}:
            scores[0, token] -= options.frequency_penalty * generated.count(token) + options.presence_penalty
        if options.is_greedy:
            generated.append(int(scores.argmax()))
            continue
        processors: list[Any] = [TemperatureLogitsWarper(options.temperature)]
        processors += [TopKLogitsWarper(options.top_k)] if options.top_k else []
        processors += [TopPLogitsWarper(options.top_p), MinPLogitsWarper(options.min_p)]
        for process in processors:
            scores = process(seen, scores)
        generated.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
    return generated


@given(
    st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.0, 1e-6, 1e-4, 0.6, 1.0, 1.0, 3.0]),
        top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-9]),
        top_k=st.sampled_from([0, 1, 5, 20, 10**9]),
        min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.05, 1.5, 0.7]),
        presence_penalty=st.sampled_from([0.0, 1.5, -1.0, 2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.5, -2.0, 2.0]),
        seed=st.integers(-(2**63), 2**64 - 1),
    ),
    st.lists(st.integers(0, 11), max_size=6),
    st.integers(0, 2**16),
)
@settings(max_examples=300)
def test_tokens_are_those_of_transformers_processors_and_of_vllms_penalties(
    options: SamplingOptions, prompt: list[int], seed: int
) -> None:
    logits = 2 * torch.randn(10, 12, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    sampler = Sampler(options, prompt)
    assert [sampler.sample(row) for row in logits] == oracle(options, prompt, logits)
    assert torch.equal(logits, before), "the logits are the caller's"


def test_the_repetition_penalty_is_for_prompt_and_answer_and_the_others_for_the_answer() -> None:
    logits = torch.tensor([4.0, 3.9, -1.0])
    prompt, generated = torch.tensor([0]), torch.tensor([1, 1, 2])
    repeated = penalized(logits, prompt, generated, SamplingOptions(repetition_penalty=2.0))
    assert repeated.tolist() == pytest.approx([2.0, 1.95, -2.0])
    counted = penalized(logits, prompt, generated, SamplingOptions(presence_penalty=1.0, frequency_penalty=0.25))
    assert counted.tolist() == pytest.approx([4.0, 3.9 - 1.0 - 0.5, -1.0 - 1.0 - 0.25])


ANYTHING = st.one_of(
    st.floats(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
    st.just([1.0]),
    st.just("x" * 10_000),
    st.just(10**400),
    st.floats(width=32).map(np.float32),
    st.integers(-128, 127).map(np.int8),
    st.booleans().map(np.bool_),
    st.floats(width=32).map(torch.tensor),
    st.just(np.zeros(3)),
)
FIELDS = [field.name for field in dataclasses.fields(SamplingOptions)]


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=4))
@settings(max_examples=500)
def test_any_value_is_refused_in_a_line_or_draws_tokens(values: dict[str, Any]) -> None:
    try:
        options = SamplingOptions(**values)
    except ValueError as error:
        names = [part.split("=")[0] for part in str(error).split("; ") if "=" in part]
        assert {*names} <= {*values} and "must be" in str(error)
        assert "\n" not in str(error) and len(str(error)) < 150 * len(values)
        return
    assert all(type(getattr(options, name)) in (int, float, type(None)) for name in FIELDS)
    sampler = Sampler(options.of_continuation(3), [0, 1])
    for scale in (1.0, 30.0, 1e4, 0.0):
        assert 0 <= sampler.sample(scale * LOGITS) < 5


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-9, 0.99e-5])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    assert {*draws(SamplingOptions(temperature=temperature), 20)} == {1}


def test_a_numpy_number_is_kept_as_pythons() -> None:
    options = SamplingOptions(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint8(7))
    assert [type(value) for value in (options.temperature, options.top_k, options.seed)] == [float, int, int]


def test_continuations_draw_from_seeds_of_their_own() -> None:
    options = SamplingOptions(temperature=1.0, seed=2**64 - 1)
    assert [options.of_continuation(i).seed for i in range(3)] == [2**64 - 1, 0, 1]
    assert SamplingOptions(seed=-1).of_continuation(1).seed == 0
    assert SamplingOptions(temperature=1.0).of_continuation(5) == SamplingOptions(temperature=1.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_numbers_are_counted(value: float) -> None:
    logits = torch.zeros(9)
    require_finite(logits)
    logits[3:5] = value
    with pytest.raises(ValueError, match=r"2 of 9 logits are nan or infinite: .* try torch_dtype=float32"):
        require_finite(logits)


def test_logprobs_are_of_the_distribution_of_the_model() -> None:
    found = logprobs_of(LOGITS, 2, 3)
    expected = [math.log(math.exp(x) / sum(map(math.exp, LOGITS.tolist()))) for x in LOGITS.tolist()]
    assert found.chosen == pytest.approx(expected[2])
    assert [token for token, _ in found.top] == [1, 3, 2]
    assert [value for _, value in found.top] == pytest.approx([expected[token] for token in (1, 3, 2)])
    assert logprobs_of(LOGITS, 0, 0).top == () and len(logprobs_of(LOGITS, 0, 99).top) == 5


def checkpoint_with(fields: Any, path: Path) -> Path:
    (path / "generation_config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "eos_token_id": [1, 2]},
            SamplingOptions(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1),
        ),
        ({"do_sample": True, "repetition_penalty": 1.05}, SamplingOptions(1.0, top_k=50, repetition_penalty=1.05)),
        ({"do_sample": True, "top_k": 0, "top_p": None}, SamplingOptions(temperature=1.0)),
        ({"temperature": 0.6, "repetition_penalty": 1.1}, SamplingOptions(repetition_penalty=1.1)),
        ({"num_beams": 1, "typical_p": 1.0, "max_new_tokens": 9}, SamplingOptions()),
        ({}, SamplingOptions()),
    ],
)
def test_a_checkpoints_sampling_is_read_as_transformers_reads_it(
    fields: dict[str, Any], options: SamplingOptions, tmp_path: Path
) -> None:
    assert checkpoint_sampling(checkpoint_with(fields, tmp_path)) == options


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_sample": True, "temperature": "hot"}, r"generation_config.json: temperature='hot': must be 0 \(greedy\)"),
        ({"do_sample": True, "top_p": 2, "top_k": 1.5}, r"top_p=2: must be in \(0, 1\]; top_k=1.5: must be 0 \(off\)"),
        ({"do_sample": "yes"}, r"do_sample='yes': must be true or false"),
        ({"num_beams": 4}, r"num_beams=4 is not supported: remove it, or give the sampling options yourself"),
        ({"no_repeat_ngram_size": 3}, r"no_repeat_ngram_size=3 is not supported"),
        ({"repetition_penalty": 0}, r"repetition_penalty=0: must be in \[0\.01, 100\]"),
        ([1], r"holds a list, not an object; download it again"),
        ('{"temperature": ', r"is not valid JSON .*; download it again"),
        ('{"do_sample": true, "temperature": NaN}', r"temperature=nan: must be 0 \(greedy\) or positive"),
        ('{"x": ' + "[" * 100_000, r"is not valid JSON \(nested more than"),
    ],
)
def test_wrong_values_of_a_checkpoint_get_one_line(fields: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint_sampling(checkpoint_with(fields, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_sampling_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"generation_config.json is missing: give the sampling options"):
        checkpoint_sampling(tmp_path)
