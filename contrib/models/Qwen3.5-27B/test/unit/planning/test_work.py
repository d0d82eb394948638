# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Rooflines of 27B against arithmetic written out here."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35.memory.fit import count_resident
from qwen35.planning.work import work_of
from support.applications import of_27b

pytestmark = pytest.mark.usefixtures("outside_any_rank")

WORK = work_of(of_27b())


def test_a_token_at_batch_1_is_bound_by_reading_the_weights() -> None:
    model = of_27b()
    work, weights = work_of(model), count_resident(model).weights
    states = 2 * 48 * (12 * 128 * 128 * 4 + 3 * 2560 * 2)
    moved = weights.total - weights.embedding + states
    assert work.tpot(0) == pytest.approx(moved / (2.9e12 / 4))
    assert work.tpot(32768) == pytest.approx((moved + 16 * 2 * 32768 * 256 * 2) / (2.9e12 / 4))
    assert 0.0170 < work.tpot(0) < 0.0186, "the bound of all 54 GB at 2.9 TB/s"


def test_a_prompt_is_bound_by_its_products() -> None:
    work = work_of(of_27b())
    matrices = 64 * 3 * 5120 * 17408 + 16 * 5120 * 256 * 80 + 48 * 5120 * (2 * 2048 + 3 * 6144 + 96) + 48 * 40960
    state, attention = 48 * 48 * 3 * 128 * 128, 16 * 24 * 2 * 256
    flops = 2 * 2048 * (matrices + state) + 2 * attention * (2048 * 2049 // 2) + 2 * 248320 * 5120
    assert work.ttft(2048, 2048) == pytest.approx(flops / 667e12, rel=1e-6)


@given(tokens=st.integers(1, 5000), chunk=st.integers(1, 3000), rows=st.integers(1, 4))
@settings(max_examples=30)
def test_a_prompt_in_chunks_does_the_same_products_and_reads_the_weights_again(
    tokens: int, chunk: int, rows: int
) -> None:
    work = WORK
    whole, chunks = work.ttft(tokens, tokens, rows), work.ttft(tokens, chunk, rows)
    assert whole <= chunks * (1 + 1e-9)
    assert chunks <= work.ttft(tokens + 1, chunk, rows)
    assert work.ttft(tokens, chunk, rows) <= work.ttft(tokens, chunk, rows + 1)


def test_whole_deltanet_layers_cost_every_rank_all_of_their_work() -> None:
    ours, whole, alone = work_of(of_27b()), work_of(of_27b(), copies=4), work_of(of_27b(tp_degree=1))
    assert whole.state_bytes == alone.state_bytes == 4 * ours.state_bytes
    mlp_and_attention = (alone.token_flops - whole.token_flops) / 3 * 4  # of one rank alone
    assert 4 * ours.token_flops == pytest.approx(alone.token_flops)
    assert mlp_and_attention == pytest.approx(2 * (64 * 3 * 5120 * 17408 + 16 * 5120 * 256 * 80))
