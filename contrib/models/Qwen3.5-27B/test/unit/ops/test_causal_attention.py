# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Causal attention in plain PyTorch, against torch's scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35.ops import causal_attention
from support.compare import assert_close

# Largest error relative to the largest output: sums of some hundred float32 terms in another order bring 1e-6; in
# bfloat16 the output is rounded once, by 2^-9 of itself.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


def make_inputs(
    B: int, N: int, M: int, S: int, E: int, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v; `spread` is the standard deviation of the scores after scaling."""
    q, k, v = (torch.randn(B, heads, S, E) for heads in (N, M, M))
    return (q * spread).to(dtype), k.to(dtype), v.to(dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, in float64."""
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("N", "M"), [(1, 1), (4, 4), (6, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(("S", "E"), [(1, 8), (2, 16), (33, 64), (130, 256)], ids=str)
def test_it_is_scaled_dot_product_attention(S: int, E: int, N: int, M: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(2, N, M, S, E, dtype)
    out, expected = causal_attention(*inputs), sdpa(*inputs)
    assert out.dtype == dtype
    assert_close(out, expected, atol=TOLERANCE[dtype] * float(expected.abs().max()), label="out")


@pytest.mark.parametrize("spread", [0.0, 1e3])
def test_equal_and_extreme_scores_stay_finite(spread: float) -> None:
    inputs = make_inputs(1, 2, 1, 65, 32, torch.float64, spread=spread)
    expected = sdpa(*inputs)
    # A score of 4e3 carries roundings of its size, which are relative in exp.
    assert_close(causal_attention(*inputs), expected, atol=1e-10 * float(expected.abs().max()), label="out")


def test_later_tokens_change_nothing_before_them() -> None:
    q, k, v = make_inputs(1, 4, 2, 20, 16)
    before = causal_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, 12:] = 50.0
    assert_close(causal_attention(q, k, v)[:, :, :12], before[:, :, :12], label="out before the change")


@pytest.mark.parametrize(
    ("k_shape", "v_shape", "message"),
    [
        ((2, 4, 5, 8), (2, 4, 5, 8), "6 query heads are not a multiple of 4 key-value heads"),
        ((2, 3, 4, 8), (2, 3, 5, 8), r"k has shape \[2, 3, 4, 8\], expected \[2, 3, 5, 8\] from q \[2, 6, 5, 8\]"),
        ((2, 3, 5, 8), (2, 2, 5, 8), r"v has shape \[2, 2, 5, 8\], expected \[2, 3, 5, 8\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(k_shape: tuple[int, ...], v_shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_attention(torch.zeros(2, 6, 5, 8), torch.zeros(k_shape), torch.zeros(v_shape))
