# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens to a cache and to each other, in plain PyTorch: the specification of two kernels.

`nki_kernels.attention_decode` has few new tokens per row, `nki_kernels.attention_continuation` a chunk of a prompt.

Letters: B rows, S new tokens, N query heads, M key-value heads (N = M G; query head h reads key-value head h // G), P
positions of the cache, E head dim.
"""

import torch
from torch import Tensor


def cached_attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the cached keys of a row and its new keys up to each query.

    Formula: arXiv 1706.03762, equation 1, and arXiv 2305.13245. Computed in float32, or in float64 where q is float64;
    all scores, [B, M, G, S, P + S], are in memory.

    Args:
        q: [B, N, S, E], after its norm and rotary embedding, not scaled.
        k, v: [B, M, S, E], of the new tokens, which are not in the cache yet.
        k_cache, v_cache: [slots, M, P, E], row b in slot b; there may be more slots than rows.
        lengths: [B] integer: row b sees cached positions below lengths[b]; what the others hold must be finite.

    Returns:
        out: [B, N, S, E] in q.dtype.

    Raises:
        ValueError: the shapes do not agree, or M does not divide N.
    """
    B, N, S, E = q.shape
    M, P = k.shape[1], k_cache.shape[2]
    for name, x in (("k", k), ("v", v)):
        if x.shape != (B, M, S, E):
            raise ValueError(f"{name} has shape {list(x.shape)}, expected {[B, M, S, E]} from q {list(q.shape)}")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[0] < B or x.shape[1:] != (M, P, E):
            raise ValueError(f"{name} has shape {list(x.shape)}, expected [{B} or more, {M}, {P}, {E}]")
    if lengths.shape != (B,):
        raise ValueError(f"lengths has shape {list(lengths.shape)}, expected [{B}], one for each row of q")
    if N % M:
        raise ValueError(f"{N} query heads are not a multiple of {M} key-value heads")
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = q.to(dtype).unflatten(1, (M, N // M))  # [B, M, G, S, E]
    keys, values = (
        torch.cat((cache[:B].to(dtype), new.to(dtype)), dim=2).unsqueeze(2)
        for cache, new in ((k_cache, k), (v_cache, v))
    )
    cached = (torch.arange(P, device=q.device) < lengths.unsqueeze(1)).unsqueeze(1).expand(B, S, P)
    new = torch.ones(S, S, dtype=torch.bool, device=q.device).tril().expand(B, S, S)
    visible = torch.cat((cached, new), dim=2)[:, None, None]  # [B, 1, 1, S, P + S]
    scores = queries @ keys.mT * E**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (weights @ values).flatten(1, 2).to(q.dtype)
