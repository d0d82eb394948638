# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the table of kernels: bounds by hand, errors against float64, and no modelled time below its bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from bench_kernels import CASES, Row, attention, continuation, decoding, recurrent
from qwen35.nki_kernels.nki_seam import EMULATED

BFLOAT16 = 2.0**-8  # of one rounding; two follow each other


@pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")
@pytest.mark.parametrize(
    ("kernel", "sizes", "moved"),
    [
        # q and the output of 6 heads, k and v of one: 128 tokens of 256 in bfloat16
        (attention, (128,), 2 * (6 + 6 + 1 + 1) * 128 * 256),
        # q, k, v and the output in bfloat16; g and beta; the state in and out
        (recurrent, (8,), 4 * 8 * 128 * 2 + 2 * 8 * 4 + 2 * 128 * 128 * 4),
        # as the first for 2 rows of 4 tokens, the caches of both, and a length of each
        (decoding, (2, 256, 4), 2 * (2 * (6 + 6 + 1 + 1) * 4 * 256 + 2 * 2 * 256 * 256) + 2 * 4),
        # one row of 128 tokens, with its length and its slot
        (continuation, (128, 256), 2 * ((6 + 6 + 1 + 1) * 128 * 256 + 2 * 256 * 256) + 2 * 4),
    ],
    ids=["attention", "recurrent", "decoding", "continuation"],
)
def test_a_kernel_is_exact_to_bfloat16_and_slower_than_its_bounds(
    kernel: Callable[..., Row], sizes: tuple[int, ...], moved: int
) -> None:
    row = kernel(*sizes)
    assert row.hbm_bound_us == pytest.approx(moved / (2 * 362.5e3))  # 0.36 TB/s for each of two cores
    assert 0 < row.error < 2 * BFLOAT16
    assert row.modelled_us >= max(row.hbm_bound_us, row.latency_bound_us, row.tensor_bound_us) > 0
    assert row.launch_us == 29  # of two cores


def test_the_ratio_is_to_the_larger_bound_and_a_piece_is_what_one_core_does() -> None:
    row = Row(cores=2, pieces=6, modelled_us=30, launch_us=29, hbm_bound_us=5, latency_bound_us=10, error=0)
    assert row.bound_ratio == 3 and replace(row, hbm_bound_us=15).bound_ratio == 2
    assert replace(row, tensor_bound_us=20).bound_ratio == 1.5
    assert row.core_us == 10


@pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")
def test_the_tensor_bound_is_of_visible_tiles() -> None:
    # 2 chunks of 128 queries see 1 and 2 tiles of their own, and a chunk after 256 tokens 2 more; 6 heads, 2 cores
    assert attention(256).tensor_bound_us == pytest.approx(6 * 3 / 2 * 512 / 2.4e3)
    assert continuation(128, 256).tensor_bound_us == pytest.approx(6 * 3 / 2 * 512 / 2.4e3)


def test_both_ways_to_invert_a_chunk_and_the_shapes_of_the_published_port_have_rows() -> None:
    assert {f"1 head, 1 core, {n} tokens" for n in (128, 256, 512)} <= CASES.keys()
    assert {"the same 512, plain inverse", "the same step, plain inverse"} <= CASES.keys()
