# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The attention kernel of continued prompts in the emulator, against softmax attention in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nki_emulator
from nki_emulator import costs
from qwen35.nki_kernels.attention_continuation import STEP_TILES, attention_continuation
from qwen35.nki_kernels.attention_pieces import TILE
from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.ops import cached_attention
from support.compare import assert_close

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

STEP = STEP_TILES * TILE

# Largest error relative to the largest output. float32: sums over 256 dimensions and thousands of keys bring 1e-6.
# bfloat16: inputs are exact, p and the output are rounded once each, 4e-3 apiece at worst and 3e-3 seen.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@dataclass(frozen=True)
class Case:
    """Arguments of a launch; slots are taken from the last down, and have 128 positions beyond the bucket."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    slots: Tensor
    bucket: int

    def run(self, grid: int | None = 2, **options: Any) -> Any:
        tensors = (self.q, self.k, self.v, self.k_cache, self.v_cache, self.lengths, self.slots)
        return nki_emulator.emulate(attention_continuation, *tensors, self.bucket, grid=grid, **options)

    def check(self, grid: int | None = 2, atol: float | None = None) -> None:
        result = self.run(grid, timed=False)
        caches = (x[self.slots] for x in (self.k_cache, self.v_cache))
        tensors = (x.double() for x in (self.q, self.k, self.v, *caches))
        expected = cached_attention(*tensors, self.lengths)
        limit = TOLERANCE[self.q.dtype] * float(expected.abs().max()) if atol is None else atol
        assert_close(result.outputs, expected, atol=limit, label="out against float64")
        assert result.report.warnings == ()


def make_case(
    lengths: list[int],
    bucket: int,
    S: int = TILE,
    M: int = 1,
    G: int = 2,
    E: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 2.0,
) -> Case:
    """Normal q, k, v; `spread` is the standard deviation of the scores after scaling."""
    rng = torch.Generator().manual_seed(bucket + S)
    B = len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    cache = (B + 1, M, bucket + TILE, E)
    q = (spread * normal(B, M * G, S, E).float()).to(dtype)
    new = normal(B, M, S, E), normal(B, M, S, E)
    row_values = torch.tensor(lengths, dtype=torch.int32), torch.arange(B, 0, -1, dtype=torch.int32)
    return Case(q, *new, normal(*cache), normal(*cache), *row_values, bucket)


@DTYPES
@pytest.mark.parametrize("S", [128, 640])
@pytest.mark.parametrize("bucket", [256, STEP + 384])
def test_matches_softmax_attention(bucket: int, S: int, dtype: torch.dtype) -> None:
    make_case([bucket - 5], bucket, S, dtype=dtype).check()


@DTYPES
@pytest.mark.parametrize("E", [64, 128])
def test_matches_at_smaller_head_dims(E: int, dtype: torch.dtype) -> None:
    make_case([300, 640], 640, 256, M=2, E=E, dtype=dtype).check()


@pytest.mark.parametrize("grid", [None, 1, 2])
def test_any_grid_covers_all_rows_and_heads(grid: int | None) -> None:
    make_case([200, 0, 3], 256, M=2, G=3).check(grid)


def test_a_launch_of_one_row_leaves_the_second_core_nothing_to_do() -> None:
    make_case([200, 0], 256, G=1, E=64).check(grid=2)


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 2 * STEP + 128), min_size=1, max_size=2),
    tiles=st.integers(1, 3),
    grid=st.sampled_from([1, 2]),
)
def test_matches_at_any_lengths(lengths: list[int], tiles: int, grid: int) -> None:
    make_case(lengths, 2 * STEP + 128, tiles * TILE, E=64).check(grid)


@pytest.mark.parametrize("spread", [0.0, 100.0])
def test_equal_and_extreme_scores(spread: float) -> None:
    case = make_case([2200], STEP + 256, 256, dtype=torch.float32, spread=spread)
    # A score of 400 carries 256 roundings of products of its size: 2e-5 absolute, hence relative in exp.
    case.check(atol=(1e-5 if spread == 0.0 else 1e-4) * float(case.v_cache.abs().max()))


def test_a_later_step_may_hold_the_largest_score_by_far() -> None:
    case = make_case([2 * STEP], 2 * STEP, dtype=torch.float32)
    case.k_cache[:, :, STEP + 7] = 20 * case.q[:, :1, 5]  # what was summed before gets a weight of about zero
    case.check(atol=1e-4 * float(case.v_cache.abs().max()))


def test_what_is_hidden_changes_nothing() -> None:
    case = make_case([70, 0], 256)
    before = case.run(timed=False).outputs
    for cache in (case.k_cache, case.v_cache):
        cache[2, :, 70:] = cache[:2] = 50.0  # the rows are in slots 2 and 1
    assert torch.equal(case.run(timed=False).outputs, before)


def test_the_program_is_the_same_for_every_length_and_the_work_is_not() -> None:
    # The emulator runs the body of the loop again for each step, and refuses one that differs from the first.
    case = make_case([0], 4 * STEP, E=64)
    counts = []
    for length in (0, 1, STEP, STEP + 1, 4 * STEP):
        case.lengths[0] = length
        counts.append(sum(sum(use.instructions for use in core.engines.values()) for core in case.run().report.cores))
    body = counts[1] - counts[0]
    assert body > 0 and counts == [counts[0] + steps * body for steps in (0, 1, 1, 2, 4)]


def test_a_step_of_the_27b_model_keeps_the_tensor_engine_busy() -> None:
    # One rank of four, 512 tokens: a step is 12 rows of 4 blocks on each core, 853 ns of matmuls each. A quarter more
    # are transposes of p; the rest waits for keys and values as a step begins, half as much with 1,024 tokens.
    case = make_case([STEP], 2 * STEP, 512, G=6)
    first = case.run().report.makespan_ns
    case.lengths[0] = 2 * STEP
    assert case.run().report.makespan_ns - first < 1.5 * 12 * 4 * 2048 / costs.TENSOR_GHZ


@pytest.mark.slow
def test_1024_tokens_on_65536_cached_take_less_than_half_more_than_their_matmuls() -> None:
    rows = 24  # of each core: 8 tiles of queries, 6 heads, 2 cores
    tiles = rows * 65536 // TILE + 3 * sum(range(1, 9))  # of 128 queries and 128 keys; 512 columns of matmuls each
    report = make_case([65536], 65536, 1024, G=6).run().report
    assert report.makespan_ns < 1.5 * tiles * 512 / costs.TENSOR_GHZ


@pytest.mark.slow
def test_the_largest_chunk_fits() -> None:
    report = make_case([100], STEP, 2048, G=6).run().report
    assert all(core.peak_sbuf_bytes < costs.SBUF_PARTITION_BYTES for core in report.cores)


def test_is_written_in_nki() -> None:
    assert nki_emulator.lint_kernel(attention_continuation) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"S": 200}, "S=200: a multiple of 128 up to 2048"),
        ({"S": 1152, "dtype": torch.float32}, "S=1152: a multiple of 128 up to 1024"),
        ({"S": 2048, "G": 13}, "13312 queries of a key-value head on a core: at most 12288"),
        ({"E": 96}, "head_dim is 96"),
        ({"bucket": 200}, "bucket=200: a multiple of 128"),
    ],
)
def test_rejects_other_shapes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        make_case(**{"lengths": [1], "bucket": 128, **options}).run()
