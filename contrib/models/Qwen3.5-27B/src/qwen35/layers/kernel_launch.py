# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Launching the kernels from the model, on a device or in the emulator.

Every launch has a grid of the physical cores that a logical core has: NKI takes a launch without one for LNC=1, and
a grid that differs from the LNC in use is an error at run time (nki/api/nki/__init__.py, jit). No argument is None, for
which NKI 0.3.0 compiles on every call (see `nki_kernels.fused_chunked`).

Letters: B batch, S or T tokens, H value heads, Hk key heads, K key dim, V value dim, Ch conv channels, W conv kernel;
of attention N query heads, M KV heads, E head dim, P positions of the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..kernel_selection import ATTENTION_TILE, DeltaNetInverse, DeltaNetKernel
from ..nki_kernels.attention_continuation import attention_continuation
from ..nki_kernels.attention_decode import attention_decode
from ..nki_kernels.attention_prefill import attention_prefill
from ..nki_kernels.chunked import deltanet_chunk_step
from ..nki_kernels.commit_layer import deltanet_commit_layer
from ..nki_kernels.decode_layer import deltanet_decode_layer
from ..nki_kernels.fused_chunked import CHUNK, deltanet_fused_chunked_layer, deltanet_fused_chunked_layer_state
from ..nki_kernels.library_mlp import library_mlp
from ..nki_kernels.looped_chunked import LOOP_TOKENS, deltanet_looped_chunked_layer_state
from ..nki_kernels.recurrent import deltanet_recurrent_fwd_state
from ..nki_kernels.verify_layer import deltanet_verify_layer
from ..ops import l2norm


def prefill(
    kernel: DeltaNetKernel,
    inverse: DeltaNetInverse,
    cores: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract of `ops.chunk_gated_delta_rule`, by a kernel on `cores` physical cores (LNC).

    `inverse` says how FUSED, LOOPED and CHUNKED invert the system of a chunk. LOOPED is FUSED for prompts that are not
    a number of whole iterations.

    On the meta device, where the traced calls are walked without a compiler, shapes and dtypes only.
    """
    if q.is_meta:
        B, _, H, V = v.shape
        return torch.empty_like(v), v.new_empty((B, H, q.shape[3], V), dtype=torch.float32)
    looped = kernel is DeltaNetKernel.LOOPED and q.shape[1] % LOOP_TOKENS == 0
    if kernel in (DeltaNetKernel.FUSED, DeltaNetKernel.LOOPED) and not looped:
        if state is None:
            return deltanet_fused_chunked_layer[cores](q, k, v, g, beta, inverse=inverse.value)
        return deltanet_fused_chunked_layer_state[cores](q, k, v, g, beta, state, inverse=inverse.value)
    if state is None:
        state = q.new_zeros((q.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)
    if looped:
        return deltanet_looped_chunked_layer_state[cores](q, k, v, g, beta, state, inverse=inverse.value)
    if kernel is DeltaNetKernel.CHUNKED:
        return _by_chunks(cores, inverse, q, k, v, g, beta, state)
    return _by_heads(cores, q, k, v, g, beta, state)


def _by_chunks(cores: int, inverse: DeltaNetInverse, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    *tokens, state = tensors
    length = tokens[0].shape[1]
    outputs = []
    # The tokens that pad the last chunk have g = 0 and beta = 0: the state passes through them.
    padded = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, -length % CHUNK)) for x in tokens]
    for chunk in zip(*(x.split(CHUNK, dim=1) for x in padded), strict=True):
        output, state = deltanet_chunk_step[cores](*(x.contiguous() for x in chunk), state, inverse=inverse.value)
        outputs.append(output)
    return torch.cat(outputs, dim=1)[:, :length], state


def _by_heads(cores: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, g, beta, state = tensors
    B, S, H, V = v.shape
    sharing = H // q.shape[2]
    q, k = l2norm(q) * q.shape[-1] ** -0.5, l2norm(k)
    outputs, states = [], []
    for b in range(B):
        for h in range(H):
            output, new_state = deltanet_recurrent_fwd_state[cores](
                q[b, :, h // sharing].contiguous(),
                k[b, :, h // sharing].contiguous(),
                v[b, :, h].float(),
                g[b, :, h : h + 1].contiguous(),
                beta[b, :, h : h + 1].contiguous(),
                state[b, h].contiguous(),
            )
            outputs.append(output)
            states.append(new_state)
    output = torch.stack(outputs).view(B, H, S, V).transpose(1, 2)
    return output.to(v.dtype), torch.stack(states).view_as(state)


def decode(
    cores: int,
    *,
    qkv: torch.Tensor,
    z: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_state: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    recurrent_state: torch.Tensor,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A whole layer between its projections, for one token, by `deltanet_decode_layer`; see there for the tensors.

    Returns the normed output [B, 1, H V], the recurrent state [B, H, K, V] and the conv state [B, Ch, W - 1]; on the
    meta device, shapes and dtypes only.
    """
    if qkv.is_meta:
        return torch.empty_like(z), torch.empty_like(recurrent_state), torch.empty_like(conv_state)
    tensors = (qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, recurrent_state)
    outputs: Any = deltanet_decode_layer[cores](*(x.contiguous() for x in tensors), norm_eps=norm_eps)
    return outputs


def verify(
    cores: int,
    *,
    qkv: torch.Tensor,
    z: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_state: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    norm_weight: torch.Tensor,
    recurrent_state: torch.Tensor,
    norm_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A whole layer between its projections, for T tokens of which a prefix will be kept, by `deltanet_verify_layer`.

    Returns the normed output [B, T, H V], and for `commit` keys [B, T, Hk, K], u [B, T, H, V] and g [B, T, H]; on the
    meta device, shapes and dtypes only.
    """
    if qkv.is_meta:
        B, T, H = a.shape
        K, V = recurrent_state.shape[2:]
        Hk = (qkv.shape[2] - H * V) // (2 * K)
        keys, u, g = (qkv.new_empty(x, dtype=torch.float32) for x in ((B, T, Hk, K), (B, T, H, V), (B, T, H)))
        return torch.empty_like(z), keys, u, g
    tensors = (qkv, z, a, b, conv_weight, conv_state, A_log, dt_bias, norm_weight, recurrent_state)
    outputs: Any = deltanet_verify_layer[cores](*(x.contiguous() for x in tensors), norm_eps=norm_eps)
    return outputs


def commit(
    cores: int,
    *,
    keys: torch.Tensor,
    u: torch.Tensor,
    g: torch.Tensor,
    recurrent_state: torch.Tensor,
    qkv: torch.Tensor,
    conv_state: torch.Tensor,
    accepted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrent and the conv state after the first accepted[b] of `verify`'s tokens, by `deltanet_commit_layer`.

    The states and qkv are what `verify` was given; accepted [B] has any type of integers; what is not accepted must be
    numbers. On the meta device, shapes and dtypes only.
    """
    if qkv.is_meta:
        return torch.empty_like(recurrent_state), torch.empty_like(conv_state)
    tensors = (keys, u, g, recurrent_state, qkv, conv_state, accepted.to(torch.int32))
    outputs: Any = deltanet_commit_layer[cores](*(x.contiguous() for x in tensors))
    return outputs


def attend_prompt(cores: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The contract of `ops.causal_attention`, by `attention_prefill`; on the meta device, shape and dtype only."""
    if q.is_meta:
        return torch.empty_like(q)
    return _cut(attention_prefill[cores](*_padded(q, k, v)), q)


def attend_cached(
    cores: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    bucket: int,
) -> torch.Tensor:
    """The contract of `ops.cached_attention` for up to 8 tokens, by `attention_decode`; row b is in slot b.

    q [B, N, T, E], k and v [B, M, T, E], caches [slots, M, P, E] of which the first `bucket` positions are read,
    lengths [B] int32; on the meta device, shape and dtype only.
    """
    if q.is_meta:
        return torch.empty_like(q)
    tensors = (x.contiguous() for x in (q, k, v, k_cache, v_cache, lengths))
    output: torch.Tensor = attention_decode[cores](*tensors, bucket)
    return output


def continue_cached(
    cores: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    bucket: int,
) -> torch.Tensor:
    """The same for a chunk of a prompt, by `attention_continuation`, with the slots [B] int32 of its rows."""
    if q.is_meta:
        return torch.empty_like(q)
    caches = (k_cache.contiguous(), v_cache.contiguous())
    return _cut(attention_continuation[cores](*_padded(q, k, v), *caches, lengths, slots, bucket), q)


def mlp(
    cores: int,
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """What a rank adds to the MLP of x, by nki-library; see `library_mlp`. On the meta device, shape and dtype only."""
    return torch.empty_like(x) if x.is_meta else library_mlp(cores, x.contiguous(), *weights, scales)


def _padded(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, heads, S, E] with S padded to a multiple of 128: no real token sees what comes after it."""
    return [F.pad(x, (0, 0, 0, -x.shape[2] % ATTENTION_TILE)).contiguous() for x in tensors]


def _cut(padded: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return padded[:, :, : like.shape[2]]
