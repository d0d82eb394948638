# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Causal softmax attention with shared keys and values, in plain PyTorch: the specification of the prefill kernel.

Letters: B batch, S tokens, N query heads, M key-value heads (N = M G; query head h reads key-value head h // G), E head
dim.
"""

import torch
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the keys up to each query (arXiv 1706.03762, equation 1; arXiv 2305.13245).

    Computed in float32, or in float64 where q is float64. The scores of all tokens, [B, M, G, S, S], are in memory.

    Args:
        q: [B, N, S, E], after its norm and rotary embedding, not scaled.
        k, v: [B, M, S, E].

    Returns:
        out: [B, N, S, E] in q.dtype.

    Raises:
        ValueError: the shapes do not agree, or M does not divide N.
    """
    B, N, S, E = q.shape
    M = k.shape[1]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (B, M, S, E):
            raise ValueError(f"{name} has shape {list(x.shape)}, expected {[B, M, S, E]} from q {list(q.shape)}")
    if N % M:
        raise ValueError(f"{N} query heads are not a multiple of {M} key-value heads")
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(dtype).unflatten(1, (M, N // M))  # [B, M, G, S, E]
    keys, values = k.to(dtype).unsqueeze(2), v.to(dtype).unsqueeze(2)
    scores = queries @ keys.mT * E**-0.5  # [B, M, G, S, S]
    future = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    return (weights @ values).flatten(1, 2).to(q.dtype)
