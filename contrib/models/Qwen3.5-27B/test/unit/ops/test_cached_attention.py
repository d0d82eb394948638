# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Attention to a cache in plain PyTorch, against torch's scaled_dot_product_attention row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35.ops import cached_attention, causal_attention
from support.compare import assert_close

# Largest error relative to the largest output: sums of some hundred float32 terms in another order bring 1e-6; in
# bfloat16 the output is rounded once, by 2^-9 of itself.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(lengths: list[int], N: int, M: int, S: int, P: int, E: int, dtype: torch.dtype) -> Inputs:
    """Normal tensors; the cache has a slot more than there are rows."""
    B = len(lengths)
    q, k, v = (torch.randn(B, heads, S, E).to(dtype) for heads in (N, M, M))
    caches = (torch.randn(B + 1, M, P, E).to(dtype) for _ in range(2))
    return q, k, v, *caches, torch.tensor(lengths)  # type: ignore[return-value] # two caches


def sdpa(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """torch's own, in float64, of each row with the visible part of its slot."""
    rows = []
    for b, length in enumerate(lengths.tolist()):
        keys, values = (torch.cat((cache[b, :, :length], new[b]), 1) for cache, new in ((k_cache, k), (v_cache, v)))
        S = q.shape[2]
        mask = torch.ones(S, length + S, dtype=torch.bool).tril(length)
        row = (x.unsqueeze(0).double() for x in (q[b], keys, values))
        rows.append(F.scaled_dot_product_attention(*row, attn_mask=mask, enable_gqa=True))
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("N", "M"), [(1, 1), (6, 2), (6, 1)], ids=str)
@pytest.mark.parametrize(("S", "P", "E"), [(1, 16, 8), (4, 130, 64)], ids=str)
def test_it_is_scaled_dot_product_attention(S: int, P: int, E: int, N: int, M: int, dtype: torch.dtype) -> None:
    inputs = make_inputs([P, 5, 0], N, M, S, P, E, dtype)
    out, expected = cached_attention(*inputs), sdpa(*inputs)
    assert out.dtype == dtype
    assert_close(out, expected, atol=TOLERANCE[dtype] * float(expected.abs().max()), label="out")


def test_with_nothing_cached_it_is_causal_attention() -> None:
    q, k, v, *rest = make_inputs([0, 0], 4, 2, 9, 12, 16, torch.float64)
    assert_close(cached_attention(q, k, v, *rest), causal_attention(q, k, v), atol=1e-13, label="out")


def test_positions_beyond_the_length_change_nothing() -> None:
    inputs = make_inputs([7], 2, 1, 3, 20, 16, torch.float32)
    before = cached_attention(*inputs)
    for cache in inputs[3:5]:
        cache[0, :, 7:] = 50.0
    assert torch.equal(cached_attention(*inputs), before)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (1, (1, 1, 2, 16), r"k has shape \[1, 1, 2, 16\], expected \[1, 1, 3, 16\]"),
        (4, (2, 1, 19, 16), r"v_cache has shape \[2, 1, 19, 16\], expected \[1 or more, 1, 20, 16\]"),
        (5, (2,), r"lengths has shape \[2\], expected \[1\]"),
    ],
)
def test_rejects_shapes_that_do_not_agree(index: int, shape: tuple[int, ...], message: str) -> None:
    inputs = list(make_inputs([7], 2, 1, 3, 20, 16, torch.float32))
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        cached_attention(*inputs)


def test_rejects_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key-value heads"):
        cached_attention(*make_inputs([7], 3, 2, 3, 20, 16, torch.float32))
