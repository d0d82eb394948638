# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A step by part: against the rooflines of the whole, arithmetic written out here, and the times it rests on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_emulator import costs
from qwen35.planning.kernel_times import TimedKernel, kernel_seconds
from qwen35.planning.step import FILL, MULTIPLIED, STREAMED, Breakdown, not_modelled, step_model_of
from qwen35.planning.work import tokens_per_step
from support.applications import SMALL, application, of_27b

pytestmark = pytest.mark.usefixtures("outside_any_rank")

STEP = step_model_of(of_27b(num_speculative_tokens=3))
ACCEPTANCE = (0.85, 0.75, 0.65)
BANDWIDTH, PEAK = 2.9e12 / 4, 667e12 / 4
PUBLISHED = json.loads((Path(__file__).parents[3] / "benchmarks" / "nki_library_times.json").read_text())["us"]


def modelled(of: Breakdown, name: str) -> float:
    [seconds] = [part.modelled for part in of.parts if part.name == name]
    return seconds


def least(of: Breakdown, name: str) -> float:
    [seconds] = [part.roofline for part in of.parts if part.name == name]
    return seconds


def test_a_decoding_step_of_27b_is_within_1_35_of_its_roofline() -> None:
    step = STEP.decode(4096)
    assert step.ratio <= 1.35 and STEP.with_drafts(ACCEPTANCE, 4096).ratio <= 1.35
    fp8 = step_model_of(of_27b(weights_dtype="fp8")).decode(4096)
    assert 1e3 * fp8.modelled == pytest.approx(12.9, abs=0.05) and fp8.ratio == pytest.approx(1.36, abs=0.005)


@pytest.mark.parametrize("context", [128, 4096, 32768])
@pytest.mark.parametrize("rows", [1, 4])
def test_the_rooflines_of_the_parts_are_that_of_the_whole(context: int, rows: int) -> None:
    """Where every part waits for bytes; the whole leaves out the row of the embedding, 2.5 KB a token."""
    work = STEP.work
    assert STEP.decode(context, rows).roofline == pytest.approx(work.tpot(context, rows), rel=1e-5)
    assert STEP.with_drafts(ACCEPTANCE, context, rows).roofline == pytest.approx(work.step(context, rows), rel=1e-5)


def test_the_rooflines_of_a_prompt_differ_by_what_waits_for_bytes() -> None:
    whole, parts = STEP.work.ttft(1024, 1024), STEP.prompt(1024).roofline
    # Bytes of head, norms, states and cache, 1.0 ms, which the whole hides beneath its products.
    assert whole < parts < whole + 1.02e-3


@given(rows=st.integers(1, 64), context=st.integers(0, 32768), tokens=st.integers(1, 2048))
@settings(max_examples=50)
def test_no_part_is_modelled_below_its_roofline(rows: int, context: int, tokens: int) -> None:
    passes = (STEP.decode(context, rows), STEP.prompt(tokens, rows), STEP.with_drafts(ACCEPTANCE, context, rows))
    for part in (part for of in passes for part in of.parts):
        if part.name not in ("DeltaNet kernels beyond it", "attention beyond it"):  # interpolated
            assert part.modelled >= part.roofline >= 0, part
        assert part.modelled >= 0, part


def test_the_parts_of_a_step_are_what_they_are_by_hand() -> None:
    step = STEP.decode(4096)
    mlp = 2 * 64 * 3 * 5120 * 17408 / 4 / BANDWIDTH
    assert least(step, "weights: MLP") == pytest.approx(mlp)
    assert modelled(step, "weights: MLP") == pytest.approx(mlp / 0.95 + 64 * 8e-6)
    assert least(step, "recurrent and conv state") == pytest.approx(
        2 * 48 * (12 * 128**2 * 4 + 3 * 2560 * 2) / BANDWIDTH
    )
    assert least(step, "KV cache") == pytest.approx(16 * 2 * 4096 * 256 * 2 / BANDWIDTH)
    # 128 all-reduces and the embedding's all-gather; 10 KB each, of which 3/4 come from other ranks.
    exchanged = 2 * 5120 * 0.75 / 100e9
    assert modelled(step, "collectives") == pytest.approx(129 * 10e-6 + (2 * 128 + 1) * exchanged)
    deltanet = sum(modelled(step, name) for name in ("recurrent and conv state", "DeltaNet kernels beyond it"))
    assert deltanet == pytest.approx(48 * kernel_seconds(TimedKernel.DECODE, 1, 12))
    attention = sum(modelled(step, name) for name in ("KV cache", "attention beyond it"))
    assert attention == pytest.approx(16 * 4096 * 4.2e-9), "the kernel is taken from 8,192 cached positions on"
    longer = STEP.decode(32768)
    attention = sum(modelled(longer, name) for name in ("KV cache", "attention beyond it"))
    assert attention == pytest.approx(16 * kernel_seconds(TimedKernel.ATTENTION_CACHED, 1, 32768))


def test_a_prompt_multiplies_at_the_share_of_the_peak() -> None:
    prompt = STEP.prompt(1024)
    flops = 2 * 1024 * 64 * 3 * 5120 * 17408 / 4
    assert modelled(prompt, "weights: MLP") == pytest.approx(flops / PEAK / 0.61 + 64 * 8e-6)
    assert modelled(prompt, "collectives") == pytest.approx(129e-5 + 257 * 1024 * 2 * 5120 * 0.75 / 100e9)
    assert prompt.tokens is None


def test_a_step_with_drafts_gives_the_tokens_of_the_acceptance_and_drafts_on_top_of_a_verification() -> None:
    step, plain = STEP.with_drafts(ACCEPTANCE, 4096), STEP.decode(4096)
    assert step.tokens == tokens_per_step(ACCEPTANCE)
    deltanet = sum(modelled(step, name) for name in ("recurrent and conv state", "DeltaNet kernels beyond it"))
    launches = [kernel_seconds(name, 4, 12) for name in (TimedKernel.VERIFY, TimedKernel.COMMIT)]
    assert deltanet == pytest.approx(48 * sum(launches))
    assert modelled(step, "weights: MLP") == modelled(plain, "weights: MLP")
    drafts = modelled(step, "MTP head: 3 drafts")
    # Three times: matrices of 0.212 GB and the output head's 0.636 GB, four fills, five collectives, attention.
    read = (0.2122e9 + 2 * 248320 * 5120 / 4) / BANDWIDTH / 0.95
    assert drafts == pytest.approx(3 * (read + 4 * 8e-6 + 5 * 10e-6 + 4096 * 4.2e-9), rel=0.01)  # exchanged bytes aside


def test_one_rank_exchanges_nothing() -> None:
    alone = step_model_of(of_27b(tp_degree=1)).decode(4096)
    assert modelled(alone, "collectives") == modelled(alone, "logits of all ranks") == 0


def test_whole_deltanet_layers_are_read_and_run_whole() -> None:
    ours, whole = step_model_of(of_27b()), step_model_of(of_27b(), copies=4)
    assert whole.value_heads == 4 * ours.value_heads == 48
    name = "weights: DeltaNet projections"
    assert least(whole.decode(0), name) == pytest.approx(4 * least(ours.decode(0), name), rel=1e-3)  # norms are whole


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(deltanet_kernel="chunked"), "deltanet_kernel='chunked' has no recorded times; 'fused' and 'looped' have"),
        (dict(deltanet_inverse="plain"), "deltanet_inverse='plain' has no recorded times; 'tiled' has"),
        (dict(logical_nc_config=1), "kernel times are recorded in bfloat16 at LNC=2"),
        ({}, "kernel times are recorded with attention heads of 256 dims, not 32"),
    ],
)
def test_what_has_no_kernel_times_is_said_in_a_line(options: dict[str, object], words: str) -> None:
    model = application(SMALL, seq_len=512, **options)
    assert not_modelled(model) == words
    with pytest.raises(ValueError, match=re.escape(words)):
        step_model_of(model)


def test_the_shares_of_bandwidth_and_peak_are_those_of_published_times() -> None:
    def of_label(label: str, letter: str) -> int:
        found = re.search(rf"\b{letter}(\d+)", label)
        assert found is not None
        return int(found[1])

    rows = [
        (6 * of_label(label, "H") * of_label(label, "I"), us)
        for label, us in PUBLISHED.items()
        if label.startswith("mlp_tkg: lnc2")
    ]
    slope, at_no_bytes = np.polyfit(*np.array(rows, dtype=np.float64).T, 1)
    assert len(rows) == 9
    assert 1e6 / slope / BANDWIDTH == pytest.approx(STREAMED.value, abs=0.005)
    assert at_no_bytes - costs.launch_ns(2) / 1e3 == pytest.approx(FILL.value, abs=0.5)

    cte = "mlp_cte: lnc2 B1 S{} H8192 I448 NO_NORM fa0 skipgate0"
    more = PUBLISHED[cte.format(4096)] - PUBLISHED[cte.format(1024)]
    flops = 6 * 8192 * 448 * (4096 - 1024)
    assert flops / (more * 1e-6) / PEAK == pytest.approx(MULTIPLIED.value, abs=0.005)
