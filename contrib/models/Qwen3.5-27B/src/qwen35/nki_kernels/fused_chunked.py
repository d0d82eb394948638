# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Context encoding: whole sequences of a gated DeltaNet layer in one launch, and the same for a single head.

The specification is `qwen35.ops.chunk_gated_delta_rule`, with g = beta = 0 from the valid length on.

There is a kernel for each set of inputs, because the cache of compiled kernels of NKI 0.3.0 misses whenever an argument
is None (release-notes/components/nki.rst, 0.4.0, Bug Fixes): every call would compile anew.
"""

from typing import Any

from .chunk_pieces import TILED, check_inputs
from .chunked import delta_rule
from .common import Tensor
from .nki_seam import nki, nl

CHUNK = 128
"""C: fills the rows and columns of the Tensor engine and halves the sequential steps of 64."""


@nki.jit
def deltanet_fused_chunked_layer(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, inverse: str = TILED
) -> tuple[Tensor, Tensor]:
    """`deltanet_fused_chunked_layer_ragged` from states of zeros, for sequences of S valid tokens."""
    return _layer(q=q, k=k, v=v, g=g, beta=beta, initial_state=None, valid_lengths=None, inverse=inverse)


@nki.jit
def deltanet_fused_chunked_layer_state(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, inverse: str = TILED
) -> tuple[Tensor, Tensor]:
    """`deltanet_fused_chunked_layer_ragged` for sequences of S valid tokens."""
    return _layer(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, valid_lengths=None, inverse=inverse)


@nki.jit
def deltanet_fused_chunked_layer_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    valid_lengths: Tensor,
    inverse: str = TILED,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule of all heads of a layer over whole sequences.

    Pseudocode, per core with its heads, K^T and Q^T products once per key head:

        for each sequence b:
            S = initial_state[b]                                       # float32, in SBUF to the end
            for each chunk of 128 tokens:
                g, beta = 0 where token >= valid_lengths[b]
                D_ij = exp(sum of g over j < t <= i)                   # i >= j, one sum for each pair
                w = beta / |k|^2
                T = (I + tril(K K^T * D, -1) diag(w))^-1               # float32, merged from halves
                U = diag(w) T (diag|k| V - diag(d) K S)
                O = diag(K^-0.5 / |q|) (tril(Q K^T * D) U + diag(d) Q S)
                S = d_C S + K^T diag(e) U

    Dimensions:
        B batch, S tokens, Hk key heads, H = Hk R value heads (value head h reads key head h // R), K and V up to 128.

    Args:
        q, k: [B, S, Hk, K] float32 or bfloat16, raw: l2norm of both and the K^-0.5 scale of q are applied here.
        v: [B, S, H, V], the same type.
        g: [B, S, H] float32, log-decay <= 0.
        beta: [B, S, H] float32, in [0, 1].
        initial_state: [B, H, K, V] float32.
        valid_lengths: [B] int32: tokens from there on act as g = 0 and beta = 0.
        inverse: how (I - A)^-1 of a chunk is computed, "tiled" on sub-arrays of the Tensor engine, or "plain" on the
            whole of it, which takes longer and needs nothing that no page promises; compile-time.

    Returns:
        o: [B, S, H, V] in the type of v; finite but meaningless from the valid length on.
        final_state: [B, H, K, V] float32, after the last valid token.

    Notes:
        Launch grid: none, 1, or 2 for LNC=2, which splits the value heads; the cores exchange nothing.
        S is any length; whole chunks are processed, and the rows missing from the last one are zeros made on chip.
        No exponent is positive, so no gate overflows. Gates, D, A, T and the state are float32; with bfloat16 inputs
        the operands of the other products are rounded: 5e-3 to 9e-3 of the largest output, 4e-2 with equal keys and
        beta near 1. float32 inputs: 5e-7 and 3e-6, in 1.5 times the time.
        Time, modelled by nki_emulator and not measured on a device, bfloat16, 12 value and 4 key heads, two cores:
        58 us for 512 tokens, relying on sub-arrays of the Tensor engine working side by side; 112 us with the plain
        inverse.
        Loops are unrolled over S, so code grows with it; that of `looped_chunked` does not.
    """
    return _layer(
        q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, valid_lengths=valid_lengths, inverse=inverse
    )


def _layer(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Any, valid_lengths: Any, inverse: str
) -> tuple[Tensor, Tensor]:
    """`deltanet_fused_chunked_layer_ragged`; a state or lengths that are None mean zeros and S."""
    B, H, K, V = v.shape[0], v.shape[2], k.shape[3], v.shape[3]
    check_inputs(q, k, v, g, beta, initial_state, valid_lengths, inverse)
    o = nl.ndarray(v.shape, dtype=v.dtype, buffer=nl.shared_hbm)
    final_state = nl.ndarray((B, H, K, V), dtype=nl.float32, buffer=nl.shared_hbm)
    delta_rule(q, k, v, g, beta, initial_state, valid_lengths, o, final_state, CHUNK, inverse)
    return o, final_state


@nki.jit
def deltanet_fused_chunked_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    valid_length: Tensor,
    inverse: str = TILED,
) -> tuple[Tensor, Tensor]:
    """`deltanet_fused_chunked_layer_ragged` for one head of one sequence; of two cores, one has nothing to do.

    Args:
        query, key: [S, K] float32 or bfloat16, raw as there.
        value: [S, V], the same type.
        g, beta: [S, 1] float32.
        initial_state: [K, V] float32.
        valid_length: [1] int32.
        inverse: as there.

    Returns:
        output: [S, V] in the type of value.
        final_state: [K, V] float32.
    """
    S, K = key.shape
    V = value.shape[1]
    q, k, v = query.reshape((1, S, 1, K)), key.reshape((1, S, 1, K)), value.reshape((1, S, 1, V))
    g, beta = g.reshape((1, S, 1)), beta.reshape((1, S, 1))
    state = initial_state.reshape((1, 1, K, V))
    check_inputs(q, k, v, g, beta, state, valid_length, inverse)
    output = nl.ndarray((S, V), dtype=value.dtype, buffer=nl.shared_hbm)
    final_state = nl.ndarray((K, V), dtype=nl.float32, buffer=nl.shared_hbm)
    o, final = output.reshape((1, S, 1, V)), final_state.reshape((1, 1, K, V))
    delta_rule(q, k, v, g, beta, state, valid_length, o, final, CHUNK, inverse)
    return output, final_state
