# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The decoding attention kernel in the emulator, against softmax attention in float64."""

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
from qwen35.nki_kernels.attention_decode import SEGMENT, attention_decode
from qwen35.nki_kernels.attention_pieces import TILE
from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.ops import cached_attention
from support.compare import assert_close

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

# Largest error relative to the largest output. float32: sums over 256 dimensions and thousands of keys bring 1e-6.
# bfloat16: inputs are exact, p and the output are rounded once each, 4e-3 apiece at worst and 4e-3 seen.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@dataclass(frozen=True)
class Case:
    """Arguments of a launch; the cache has a slot more than there are rows, and 128 positions beyond the bucket."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lengths: Tensor
    bucket: int

    def run(self, grid: int | None = 2, **options: Any) -> Any:
        tensors = (self.q, self.k, self.v, self.k_cache, self.v_cache, self.lengths)
        return nki_emulator.emulate(attention_decode, *tensors, self.bucket, grid=grid, **options)

    def check(self, grid: int | None = 2, atol: float | None = None) -> None:
        result = self.run(grid, timed=False)
        tensors = (x.double() for x in (self.q, self.k, self.v, self.k_cache, self.v_cache))
        expected = cached_attention(*tensors, self.lengths)
        limit = TOLERANCE[self.q.dtype] * float(expected.abs().max()) if atol is None else atol
        assert_close(result.outputs, expected, atol=limit, label="out against float64")
        assert result.report.warnings == ()


def make_case(
    lengths: list[int],
    bucket: int,
    T: int = 1,
    M: int = 1,
    G: int = 6,
    E: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    spread: float = 2.0,
) -> Case:
    """Normal q, k, v; `spread` is the standard deviation of the scores after scaling."""
    rng = torch.Generator().manual_seed(bucket + T)
    B = len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    cache = (B + 1, M, bucket + TILE, E)
    q = (spread * normal(B, M * G, T, E).float()).to(dtype)
    new = normal(B, M, T, E), normal(B, M, T, E)
    return Case(q, *new, normal(*cache), normal(*cache), torch.tensor(lengths, dtype=torch.int32), bucket)


@DTYPES
@pytest.mark.parametrize("bucket", [128, 384, 1280])
def test_matches_softmax_attention(bucket: int, dtype: torch.dtype) -> None:
    make_case([bucket - 5], bucket, dtype=dtype).check()


@DTYPES
@pytest.mark.parametrize("E", [64, 128])
def test_matches_at_smaller_head_dims(E: int, dtype: torch.dtype) -> None:
    make_case([300, 640], 640, T=2, M=2, G=2, E=E, dtype=dtype).check()


@pytest.mark.parametrize("grid", [None, 1, 2])
def test_any_grid_covers_all_rows_and_heads(grid: int | None) -> None:
    make_case([200, 256, 3], 256, M=2, G=3).check(grid)


@DTYPES
@pytest.mark.parametrize("T", [2, 4, 8])
def test_new_tokens_see_each_other_from_left_to_right(T: int, dtype: torch.dtype) -> None:
    make_case([100, 0], 256, T=T, dtype=dtype).check()


@pytest.mark.parametrize("T", [1, 8])
def test_segments_and_cores_merge(T: int) -> None:
    bucket = 2 * (2 * SEGMENT + 3) * TILE  # at least three segments for each of two cores; more queries shorten them
    make_case([bucket - 1], bucket, T=T, E=64, dtype=torch.float32).check()


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 640), min_size=1, max_size=3),
    T=st.integers(1, 8),
    M=st.integers(1, 2),
    G=st.integers(1, 6),
    grid=st.sampled_from([1, 2]),
)
def test_matches_at_any_lengths(lengths: list[int], T: int, M: int, G: int, grid: int) -> None:
    make_case(lengths, 640, T, M, G, E=64).check(grid)


@pytest.mark.parametrize("spread", [0.0, 100.0])
def test_equal_and_extreme_scores(spread: float) -> None:
    case = make_case([600], 640, T=3, dtype=torch.float32, spread=spread)
    # A score of 400 carries 256 roundings of products of its size: 2e-5 absolute, hence relative in exp.
    case.check(atol=(1e-5 if spread == 0.0 else 1e-4) * float(case.v_cache.abs().max()))


def test_what_is_hidden_changes_nothing() -> None:
    case = make_case([70, 0], 256, T=2)
    before = case.run(timed=False).outputs
    for cache in (case.k_cache, case.v_cache):
        cache[0, :, 70:] = cache[1:] = 50.0
    assert torch.equal(case.run(timed=False).outputs, before)


def test_a_decoding_step_of_the_27b_model_is_bound_by_hbm() -> None:
    # One rank of four reads 33.5 MB of 32,768 positions: 46.3 us at the 0.3625 TB/s of each core. The rest is the way
    # of the last values through the engines and the exchange.
    case = make_case([32768], 32768)
    report = case.run().report
    assert report.makespan_ns / 1e3 < 1.3 * 2 * 32768 * 512 / (2 * costs.HBM_BYTES_PER_NS * 1e3)


def test_is_written_in_nki() -> None:
    assert nki_emulator.lint_kernel(attention_decode) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [1], "bucket": 200}, "multiple of 128"),
        ({"lengths": [1], "bucket": 128, "E": 96}, "head_dim is 96"),
        ({"lengths": [1], "bucket": 128, "T": 9, "G": 1}, "T=9: 1 to 8"),
        ({"lengths": [1], "bucket": 128, "T": 8, "G": 7}, "56 queries of a key-value head"),
        ({"lengths": [1] * 11, "bucket": 128, "T": 8, "G": 6}, "528 queries in all rows"),
    ],
)
def test_rejects_other_shapes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        make_case(**options).run()
