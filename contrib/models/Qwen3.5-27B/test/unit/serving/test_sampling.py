# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The tokens that one row draws. That they follow their distribution is shown with a model, in test_engine.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen35 import SamplingOptions
from qwen35.serving.sampling import GREEDY, Sampler

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
