# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Rooflines of 27B against arithmetic written out here."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35.memory.fit import count_resident
from qwen35.planning.work import tokens_per_step, work_of
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


def test_weights_in_fp8_halve_what_a_token_reads_of_the_layers_and_leave_its_products() -> None:
    fp8 = work_of(of_27b(weights_dtype="fp8"))
    assert (fp8.token_flops, fp8.pair_flops, fp8.head_flops) == (WORK.token_flops, WORK.pair_flops, WORK.head_flops)
    assert fp8.state_bytes == WORK.state_bytes and fp8.token_bytes == WORK.token_bytes
    head = 2 * 248320 * 5120 // 4
    assert (fp8.weight_bytes - head) / (WORK.weight_bytes - head) == pytest.approx(0.5, abs=0.003)  # scales and gates
    assert fp8.tpot(0) == pytest.approx(9.4e-3, abs=0.05e-3)  # modelled; 17.8 ms in bfloat16


def test_keys_and_values_in_fp8_halve_what_a_cached_token_costs() -> None:
    assert 2 * work_of(of_27b(kv_cache_dtype="fp8")).token_bytes == WORK.token_bytes


# --- Drafts ----------------------------------------------------------------------------------------------------------

ACCEPTANCE = (0.85, 0.75, 0.65)
DRAFTING = work_of(of_27b(num_speculative_tokens=3))


def test_three_drafts_a_step_give_a_token_in_7_3_ms_in_place_of_17_8() -> None:
    tokens = 1 + 0.85 + 0.85 * 0.75 + 0.85 * 0.75 * 0.65
    assert tokens_per_step(ACCEPTANCE) == pytest.approx(tokens)
    assert 1e3 * WORK.tpot(0) == pytest.approx(17.8, abs=0.05)
    assert 1e3 * DRAFTING.step(0) / tokens == pytest.approx((17.8 + 3 * 1.17) / 2.90, abs=0.05)  # 7.3


def test_a_draft_is_bound_by_reading_the_head_and_the_output_head() -> None:
    layer = 3 * 5120 * 17408 + 5120 * 256 * (3 * 24 + 2 * 4)  # query, gate and output of 24 heads; keys, values of 4
    matrices = (5120 * 10240 + layer) / 4
    norms = 5 * 5120 + 2 * 256
    head = 2 * matrices + 4 * norms + 4  # norms in float32; the rank's number
    lm_head = 2 * 5120 * 248320 / 4
    cached = 2 * 256 * 2
    for context in (0, 32768):
        seconds = 3 * (head + lm_head + context * cached) / (2.9e12 / 4)
        assert DRAFTING.draft(context) == pytest.approx(seconds, rel=1e-9)
    assert DRAFTING.drafting is not None
    assert DRAFTING.drafting.token_flops == 2 * matrices
    assert DRAFTING.drafting.kv_cache == cached * (32768 + 128)


def test_a_verification_reads_what_one_token_does_and_computes_what_four_do() -> None:
    one_token = 3 * 16 * 2 * 256 * 2 / (2.9e12 / 4)  # three more are in the cache
    assert DRAFTING.verification(0) == pytest.approx(WORK.tpot(0) + one_token)
    rows = 512  # where products take longer than bytes
    flops = rows * 4 * (WORK.token_flops + WORK.head_flops)
    assert DRAFTING.verification(0, rows) == pytest.approx(flops / (667e12 / 4), rel=1e-4)


@given(
    acceptance=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    context=st.integers(0, 32768),
    most=st.integers(1, 300),
)
@settings(max_examples=30)
def test_one_more_row_than_the_break_even_batch_takes_longer_with_drafts(
    acceptance: list[float], context: int, most: int
) -> None:
    rows = DRAFTING.break_even(acceptance, context, most)
    tokens = tokens_per_step(acceptance)
    assert 0 <= rows <= most
    if rows:
        assert DRAFTING.step(context, rows) / tokens <= WORK.tpot(context, rows)
    if rows < most:
        assert DRAFTING.step(context, rows + 1) / tokens > WORK.tpot(context, rows + 1)


def test_drafts_pay_while_bytes_are_what_takes_time() -> None:
    """Up to some 50 rows four tokens each wait for the weights; and every row's states are read once a step."""
    assert DRAFTING.break_even(ACCEPTANCE, 0, 512) == 512
    assert 50 < DRAFTING.break_even((0.5, 0.5, 0.5), 0, 512) < 512
    assert DRAFTING.break_even((0.0, 0.0, 0.0), 0, 512) == 0, "wrong drafts are read for nothing"


def test_what_drafts_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_speculative_tokens=0 drafts nothing: set it to 1 or more"):
        WORK.step(0)
