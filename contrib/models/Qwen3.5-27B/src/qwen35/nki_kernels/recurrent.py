# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule of one head, token by token: kernels to check the others against, not for speed.

Letters: S tokens, K key dim and V value dim, both 128, n = V / cores the value channels of this core. The specification
is `qwen35.ops.recurrent_gated_delta_rule`.
"""

from typing import Any

from .common import PARTITIONS, Tensor, make_ones_and_identity
from .nki_seam import nisa, nki, nl


@nki.jit
def deltanet_recurrent_fwd(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """`deltanet_recurrent_fwd_state` from a state of zeros; the final state is not retransposed.

    Args:
        query, key, value, g, beta: as there.

    Returns:
        output: [S, 128] in query.dtype.
    """
    output, _ = _recurrent_head(query=query, key=key, value=value, g=g, beta=beta, initial_state=None)
    return output


@nki.jit
def deltanet_recurrent_fwd_state(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule of one (batch, head) pair, token by token, with the state in SBUF.

    Dimensions:
        S: tokens, any number; K = V = 128.

    Args:
        query: [S, 128] any float dtype, l2-normalised and scaled by K^-0.5.
        key: [S, 128], l2-normalised.
        value: [S, 128].
        g: [S, 128] (the value repeated) or [S, 1], log-decay <= 0.
        beta: [S, 128] (the value repeated) or [S, 1], in [0, 1].
        initial_state: [128, 128] float32, [K, V].

    Returns:
        output: [S, 128] in query.dtype.
        final_state: [128, 128] float32.

    Notes:
        Launch grid: none, 1, or 2 for LNC=2, which splits the value channels; the cores exchange nothing.
        Operands are converted to float32 on chip and all products are float32. exp(g) of any g <= 0 is finite; there is
        no division. Every instruction of a token waits for the one before it.

    Pseudocode:
        for t in tokens:
            u = beta_t (v_t - exp(g_t) S^T k_t)
            o_t = exp(g_t) S^T q_t + (k_t . q_t) u
            S = exp(g_t) S + k_t u^T
    """
    output, final_state = _recurrent_head(
        query=query, key=key, value=value, g=g, beta=beta, initial_state=initial_state
    )
    return output, final_state


def _recurrent_head(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Any
) -> tuple[Tensor, Tensor]:
    """Output and final state of the head; `initial_state` may be None for zeros.

    Up to 128 tokens are transposed to columns at once, then taken one by one. A column of the state never meets another
    one, so each core takes its share of the value channels.
    """
    tokens = query.shape[0]
    assert query.shape[1] == PARTITIONS and value.shape[1] == PARTITIONS, "K and V must be 128"
    n = PARTITIONS // nl.num_programs(0)
    first_channel = nl.program_id(0) * n
    output = nl.ndarray((tokens, PARTITIONS), dtype=query.dtype, buffer=nl.shared_hbm)
    final_state = nl.ndarray((PARTITIONS, PARTITIONS), dtype=nl.float32, buffer=nl.shared_hbm)
    ones, identity = make_ones_and_identity()
    S = nl.ndarray((PARTITIONS, n), dtype=nl.float32, buffer=nl.sbuf)
    if initial_state != None:  # noqa: E711 ('is' is no NKI operator: nki/migration/index.rst, Language restrictions)
        assert initial_state.dtype == nl.float32, f"initial_state is {initial_state.dtype}: float32 is needed"
        nisa.dma_copy(dst=S, src=initial_state[:, first_channel : first_channel + n])
    else:
        nisa.memset(dst=S, value=0.0)

    for first in range(0, tokens, PARTITIONS):
        some = min(PARTITIONS, tokens - first)
        # k, q, v, exp(g) and beta of a token as columns; the two gates hold their value on every partition.
        columns = nl.ndarray((PARTITIONS, 5, some), dtype=nl.float32, buffer=nl.sbuf)
        sources = (key, query, value, g, beta)
        for which in range(5):
            source, channels, offset = sources[which], PARTITIONS, 0
            if which == 2:
                channels, offset = n, first_channel
            width = source.shape[1]
            loaded = nl.ndarray((some, channels), dtype=source.dtype, buffer=nl.sbuf)
            rows = nl.ndarray((some, channels), dtype=nl.float32, buffer=nl.sbuf)
            transposed = nl.ndarray((channels, some), dtype=nl.float32, buffer=nl.psum)
            nisa.dma_copy(
                dst=loaded,
                src=source.ap(
                    pattern=[[width, some], [1 if width > 1 else 0, channels]], offset=first * width + offset
                ),
            )
            nisa.tensor_copy(dst=rows, src=loaded)
            nisa.nc_transpose(dst=transposed, data=rows, engine=nisa.engine.tensor)
            nisa.activation(dst=columns[0:channels, which, :], op=nl.exp if which == 3 else nl.copy, data=transposed)
        products = nl.ndarray((PARTITIONS, some), dtype=nl.float32, buffer=nl.sbuf)
        k_dot_q = nl.ndarray((PARTITIONS, some), dtype=nl.float32, buffer=nl.psum)
        outputs = nl.ndarray((n, some), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=products, data1=columns[:, 0, :], data2=columns[:, 1, :], op=nl.multiply)
        nisa.nc_matmul(dst=k_dot_q, stationary=ones, moving=products, is_stationary_onezero=True)
        for t in range(some):
            S = _recurrent_token(S=S, columns=columns, k_dot_q=k_dot_q, outputs=outputs, identity=identity, t=t)
        transposed = nl.ndarray((some, n), dtype=nl.float32, buffer=nl.psum)
        rows = nl.ndarray((some, n), dtype=query.dtype, buffer=nl.sbuf)
        nisa.nc_transpose(dst=transposed, data=outputs, engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=rows, src=transposed)
        nisa.dma_copy(dst=output[first : first + some, first_channel : first_channel + n], src=rows)
    nisa.dma_copy(dst=final_state[:, first_channel : first_channel + n], src=S)
    return output, final_state


def _recurrent_token(S: Tensor, columns: Tensor, k_dot_q: Tensor, outputs: Tensor, identity: Tensor, t: int) -> Tensor:
    """Token t of columns [128, 5, tokens], k, q, v, exp(g) and beta: writes outputs[:, t], returns the new state."""
    n = S.shape[1]
    read = nl.ndarray((n, 2), dtype=nl.float32, buffer=nl.psum)
    decayed = nl.ndarray((n, 2), dtype=nl.float32, buffer=nl.sbuf)
    u = nl.ndarray((n, 1), dtype=nl.float32, buffer=nl.sbuf)
    u_rows = nl.ndarray((PARTITIONS, n), dtype=nl.float32, buffer=nl.psum)
    S_next = nl.ndarray((PARTITIONS, n), dtype=nl.float32, buffer=nl.sbuf)
    eg = columns[:, 3, t : t + 1]
    nisa.nc_matmul(dst=read, stationary=S, moving=columns[:, 0:2, t])
    nisa.tensor_scalar(dst=decayed, data=read, op0=nl.multiply, operand0=columns[0:n, 3, t : t + 1])
    nisa.tensor_scalar(
        dst=u,
        data=decayed[:, 0:1],
        op0=nl.subtract,
        operand0=columns[0:n, 2, t : t + 1],
        reverse0=True,
        op1=nl.multiply,
        operand1=columns[0:n, 4, t : t + 1],
    )
    nisa.nc_matmul(
        dst=u_rows,
        stationary=u.ap(pattern=[[1, n], [0, PARTITIONS]], offset=0),
        moving=identity[0:n, 0:n],
        is_moving_onezero=True,
    )
    nisa.activation(dst=S_next, op=nl.copy, data=S, scale=eg)
    nisa.scalar_tensor_tensor(
        dst=S_next,
        data=u_rows,
        op0=nl.multiply,
        operand0=columns[:, 0, t : t + 1],
        op1=nl.add,
        operand1=S_next,
    )
    nisa.scalar_tensor_tensor(
        dst=outputs[:, t : t + 1],
        data=u,
        op0=nl.multiply,
        operand0=k_dot_q[0:n, t : t + 1],
        op1=nl.add,
        operand1=decayed[:, 1:2],
    )
    return S_next
