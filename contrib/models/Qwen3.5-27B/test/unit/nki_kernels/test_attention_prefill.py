# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The prefill attention kernel in the emulator, against causal softmax attention in float64 and its specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nki_emulator
from nki_emulator import costs
from qwen35.nki_kernels.attention_prefill import attention_prefill
from qwen35.nki_kernels.nki_seam import EMULATED
from qwen35.ops import causal_attention
from support.compare import assert_close

pytestmark = pytest.mark.skipif(not EMULATED, reason="an installed nki needs its own device or simulator")

# Largest error relative to the largest output. float32: sums over 256 dimensions and S keys bring 1e-6.
# bfloat16: inputs are exact, p and the output are rounded once each, 4e-3 apiece at worst and 2e-3 seen.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def make_inputs(
    S: int, G: int, dtype: torch.dtype, B: int = 1, M: int = 1, spread: float = 2.0, E: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v; `spread` is the standard deviation of the scores after scaling."""
    rng = torch.Generator().manual_seed(S + G)
    q, k, v = (torch.randn(B, heads, S, E, generator=rng) for heads in (M * G, M, M))
    return (q * spread).to(dtype), k.to(dtype), v.to(dtype)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over keys up to the query, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    G, S = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ v


def run(q: Tensor, k: Tensor, v: Tensor, grid: int | None = 2) -> Tensor:
    return nki_emulator.emulate(attention_prefill, q, k, v, grid=grid, timed=False).outputs


def check(actual: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, expected in (("float64", naive(q, k, v)), ("causal_attention", causal_attention(q, k, v))):
        limit = TOLERANCE[actual.dtype] * float(expected.abs().max())
        assert_close(actual, expected, atol=limit, label=f"out against {name}")


@DTYPES
@pytest.mark.parametrize("G", [1, 3])
@pytest.mark.parametrize("S", [128, 256, 640])
def test_matches_softmax_attention(S: int, G: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(S, G, dtype)
    check(run(*inputs), *inputs)


@DTYPES
@pytest.mark.parametrize("grid", [None, 1, 2])
def test_any_grid_covers_all_sequences_and_heads(grid: int | None, dtype: torch.dtype) -> None:
    inputs = make_inputs(256, 3, dtype, B=2, M=2)
    check(run(*inputs, grid=grid), *inputs)


@DTYPES
@pytest.mark.parametrize("E", [64, 128])
def test_matches_at_smaller_head_dims(E: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(640, 3, dtype, E=E)
    check(run(*inputs), *inputs)


@pytest.mark.parametrize("spread", [0.0, 100.0])
def test_equal_and_extreme_scores(spread: float) -> None:
    inputs = make_inputs(640, 1, torch.float32, spread=spread)
    # A score of 400 carries 256 roundings of products of its size: 2e-5 absolute, hence relative in exp.
    atol = (1e-5 if spread == 0.0 else 1e-4) * float(inputs[2].abs().max())
    out = run(*inputs)
    assert_close(out, naive(*inputs), atol=atol, label="out against float64")
    assert_close(out, causal_attention(*inputs), atol=2 * atol, label="out against causal_attention")  # rounds as well


def test_later_tokens_change_nothing_before_them() -> None:
    q, k, v = make_inputs(640, 1, torch.bfloat16)
    before = run(q, k, v)
    for x in (q, k, v):
        x[:, :, 600:] = 50.0
    assert_close(run(q, k, v)[:, :, :600], before[:, :, :600], label="out before the change")


def test_is_written_in_nki() -> None:
    assert nki_emulator.lint_kernel(attention_prefill) == []


def test_27b_shape_fits_and_keeps_the_tensor_engine_busy() -> None:
    # One rank of four. The Vector engine, with 122 cycles before each instruction, is busier: 88%.
    q, k, v = make_inputs(2048, 6, torch.bfloat16)
    report = nki_emulator.emulate(attention_prefill, q, k, v, grid=2).report
    for core in report.cores:
        assert core.peak_sbuf_bytes < costs.SBUF_PARTITION_BYTES / 2
        assert core.peak_psum_banks <= costs.PSUM_BANKS
        assert core.engines["tensor"].utilisation > 0.75


@pytest.mark.parametrize(
    ("S", "D", "message"), [(200, 256, "multiple of 128"), (128, 96, "head_dim is 96"), (8192, 256, "up to 4096")]
)
def test_rejects_other_shapes(S: int, D: int, message: str) -> None:
    x = torch.zeros(1, 1, S, D, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=message):
        run(x, x, x)
