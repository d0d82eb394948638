# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Operands of a decoding step's state update: convolution, gates, and what multiplies each head's products.

Letters and columns as in `decode_io`; `columns` counts those whose operands are computed together, at most MAX_COLUMNS.
What says nothing else is for one token, where a column is a head.

Numbers that belong to a column, such as its gates, are needed on every partition, to scale tiles of [128, columns].
Matmuls with ones put them there. They share one PSUM bank, `scalars` [128, 512] float32:

    from GATES on    3 x columns: exp(g), -exp(g) beta, beta
    from SQUARES on  3 x columns: k.k, q.q, k.q
    from DECAY on    columns / n: exp(g) of the head whose state a partition holds
    at NORM          1: q.q with columns on partitions
"""

from .common import L2_EPS, PARTITIONS, Tensor
from .decode_io import Box, heads_per_sequence, rows_per_sequence
from .nki_seam import nisa, nl

MAX_COLUMNS = 64
"""Columns of one token done together at most, so that `scalars` has room for them."""

GATES, SQUARES, DECAY, NORM = 0, 3 * MAX_COLUMNS, 6 * MAX_COLUMNS, 511
"""First column of each part of `scalars`."""


def head_mask(ones: Tensor, n: int) -> Tensor:
    """[128, n] float32: 1 where a partition holds the state of head i of a group of n heads, 0 elsewhere."""
    block = PARTITIONS // n
    mask = nl.ndarray((PARTITIONS, n), dtype=nl.float32, buffer=nl.sbuf)
    nisa.affine_select(
        dst=mask,
        pattern=[[-block, n]],
        channel_multiplier=1,
        on_true_tile=ones[:, 0:n],
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    nisa.affine_select(
        dst=mask,
        pattern=[[block, n]],
        channel_multiplier=-1,
        offset=block - 1,
        on_true_tile=mask,
        on_false_value=0.0,
        cmp_op=nl.greater_equal,
    )
    return mask


def head_blocks(n: int) -> Tensor:
    """[1, n, 128] float32, the transpose of `head_mask`."""
    block = PARTITIONS // n
    blocks = nl.ndarray((1, n, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=blocks, value=0.0, engine=nisa.engine.vector)
    for i in range(n):
        nisa.memset(dst=blocks[:, i, i * block : (i + 1) * block], value=1.0, engine=nisa.engine.vector)
    return blocks


# --- Per channel: the channels of a head are on partitions -----------------------------------------------------------
def transpose_taps(x: Tensor, history: Tensor) -> Tensor:
    """[channel, 3 + T, rows] inputs of the convolution in the order of time: in PSUM if T = 1, else float32 in SBUF."""
    rows, T = x.shape[0], x.shape[1]
    taps = 3 + T
    columns = nl.ndarray((PARTITIONS, taps if T > 1 else 1, rows), dtype=nl.float32, buffer=nl.sbuf)
    result = columns
    for first in range(0, taps, 4):
        # Each transpose has room for 128 columns, so that none crosses a PSUM bank.
        transposed = nl.ndarray((PARTITIONS, 4, PARTITIONS), dtype=x.dtype, buffer=nl.psum)
        some = min(4, taps - first)
        for w in range(first, first + some):
            source = history[:, :, w] if w < 3 else x[:, w - 3, :]
            nisa.nc_transpose(dst=transposed[:, w - first, 0:rows], data=source, engine=nisa.engine.tensor)
        if T == 1:
            result = transposed
        else:
            nisa.tensor_copy(dst=columns[:, first : first + some, :], src=transposed[:, 0:some, 0:rows])
    return result


def transpose_weights(weight: Tensor, nb: int) -> Tensor:
    """[channel, 4, nb, rows of a sequence] float32 in SBUF, the same for each of nb sequences."""
    rows = weight.shape[0]
    transposed = nl.ndarray((PARTITIONS, 4, PARTITIONS), dtype=weight.dtype, buffer=nl.psum)
    columns = nl.ndarray((PARTITIONS, 4, nb, rows), dtype=nl.float32, buffer=nl.sbuf)
    for w in range(4):
        nisa.nc_transpose(dst=transposed[:, w, 0:rows], data=weight[:, :, w], engine=nisa.engine.tensor)
    nisa.activation(
        dst=columns,
        op=nl.copy,
        data=transposed.ap(pattern=[[4 * PARTITIONS, PARTITIONS], [PARTITIONS, 4], [0, nb], [1, rows]], offset=0),
    )
    return columns


def convolve(taps: Tensor, weights: Tensor, box: Box, T: int) -> tuple[Tensor, Tensor]:
    """Convolution and SiLU of all T tokens; k and q of a key head are repeated for its value heads.

    Returns:
        kq: [channel, 2, columns] float32, k and q.
        rk_v: [channel, 2, columns] float32, v in the second half; `head_scalars` writes rk to the first.
    """
    nk, nr, nb, heads, per_sequence = box.nk, box.nr, box.nb, heads_per_sequence(box), rows_per_sequence(box)
    rows, pitch, columns = nb * per_sequence, taps.shape[2], nb * heads * T
    products = nl.ndarray((PARTITIONS, T, rows, 4), dtype=nl.float32, buffer=nl.sbuf)
    sums = nl.ndarray((PARTITIONS, T, rows), dtype=nl.float32, buffer=nl.sbuf)
    kq = nl.ndarray((PARTITIONS, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    rk_v = nl.ndarray((PARTITIONS, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(
        dst=products.ap(pattern=[[4 * T * rows, PARTITIONS], [4 * rows, T], [1, 4], [4, rows]], offset=0),
        data1=taps.ap(pattern=[[taps.shape[1] * pitch, PARTITIONS], [pitch, T], [pitch, 4], [1, rows]], offset=0),
        data2=weights.ap(pattern=[[4 * rows, PARTITIONS], [0, T], [rows, 4], [1, rows]], offset=0),
        op=nl.multiply,
    )
    nisa.tensor_reduce(dst=sums, op=nl.add, data=products, axis=3)
    # An instruction takes three axes, so it moves several sequences of one token or several tokens of one sequence. In
    # a column a sequence lies before the head and a token after it.
    several, step, across = (nb, heads, per_sequence) if T == 1 else (T, 1, rows)
    first_rows = (nk, 0)  # of k and q: the rows of q come before those of k
    for i in range(1 if T == 1 else nb):
        for which in range(2):
            nisa.activation(
                dst=kq.ap(
                    pattern=[[2 * columns, PARTITIONS], [step, several], [nr * T, nk], [T, nr]],
                    offset=which * columns + i * heads * T,
                ),
                op=nl.silu,
                data=sums.ap(
                    pattern=[[T * rows, PARTITIONS], [across, several], [1, nk], [0, nr]],
                    offset=i * per_sequence + first_rows[which],
                ),
            )
    for i in range(1 if T == 1 else nb):
        nisa.activation(
            dst=rk_v.ap(
                pattern=[[2 * columns, PARTITIONS], [step, several], [T, heads]], offset=columns + i * heads * T
            ),
            op=nl.silu,
            data=sums.ap(
                pattern=[[T * rows, PARTITIONS], [across, several], [1, heads]], offset=i * per_sequence + 2 * nk
            ),
        )
    return kq, rk_v


def select_channels(kq: Tensor, identity: Tensor, n: int) -> Tensor:
    """k and q in the layout of the packed state, for every head on every block of partitions, in PSUM.

    Returns:
        channels: [128, n, room >= 2 columns] float32. Partition i (128 / n) + p of row j has channel n p + j.
    """
    columns = kq.shape[2]
    # Rows that lie in one PSUM bank of 512 altogether, or whole rows in each of several banks.
    room = 2 * columns if 2 * columns * n <= 512 else 128 if columns <= 64 else 256
    channels = nl.ndarray((PARTITIONS, n, room), dtype=nl.float32, buffer=nl.psum)
    for j in range(n):
        # Columns j, n + j, 2 n + j, ... of the identity select these channels, once for every block of partitions.
        nisa.nc_matmul(
            dst=channels[:, j, 0 : 2 * columns],
            stationary=identity.ap(pattern=[[PARTITIONS, PARTITIONS], [0, n], [n, PARTITIONS // n]], offset=j),
            moving=kq,
            is_stationary_onezero=True,
            accumulate=False,
        )
    return channels


def mask_channels(channels: Tensor, mask: Tensor, columns: int, T: int) -> Tensor:
    """`select_channels` with zeros but for each head on its own block of partitions.

    Returns:
        packed: [128, n, 2, columns] float32: a partition of the block of head i of a group holds its k and q in the
            columns of that head, and zeros in others.
    """
    n, room = channels.shape[1], channels.shape[2]
    packed = nl.ndarray((PARTITIONS, n, 2, columns), dtype=nl.float32, buffer=nl.sbuf)
    # The first rows are masked while the Tensor engine selects the others.
    at_once = min(n, 4) if T == 1 or room == 2 * columns else 1
    for first in range(0, n, at_once):
        if T == 1:  # row, group of k or q, head
            dst = [[2 * columns, at_once], [n, 2 * columns // n], [1, n]]
            data = [[room, at_once], [n, 2 * columns // n], [1, n]]
            keep = [[0, at_once], [0, 2 * columns // n], [1, n]]
        else:  # row and group of k or q, head, token
            dst = [[n * T, at_once * 2 * columns // (n * T)], [T, n], [1, T]]
            data = dst
            keep = [[0, at_once * 2 * columns // (n * T)], [1, n], [0, T]]
        nisa.tensor_tensor(
            dst=packed.ap(pattern=[[2 * n * columns, PARTITIONS], dst[0], dst[1], dst[2]], offset=2 * first * columns),
            data1=channels.ap(pattern=[[n * room, PARTITIONS], data[0], data[1], data[2]], offset=first * room),
            data2=mask.ap(pattern=[[n, PARTITIONS], keep[0], keep[1], keep[2]], offset=0),
            op=nl.multiply,
        )
    return packed


def keys_of_partitions(packed: Tensor, parts: int) -> Tensor:
    """[128, n, groups] float32 of one token: k without the zeros of `packed`, of the head that a partition holds.

    Of `parts` of a group, each may be of another sequence, and is not touched by what the others hold.
    """
    n, columns = packed.shape[1], packed.shape[3]
    groups = columns // n
    rows, width = PARTITIONS // parts, n // parts
    keys = nl.ndarray((PARTITIONS, n, groups), dtype=nl.float32, buffer=nl.sbuf)
    by_group = packed.reshape((PARTITIONS, n, 2, groups, n))
    for part in range(parts):
        mine = nl.ds(part * rows, rows)
        nisa.tensor_reduce(
            dst=keys[mine],
            op=nl.add,
            data=by_group[mine, :, 0, :, part * width : (part + 1) * width],
            axis=3,
        )
    return keys


def multiply_channels(kq: Tensor, ones: Tensor, scalars: Tensor) -> Tensor:
    """The terms k k, q q and k q of each channel, [128, 3, columns] float32; scalars gets their sums, at SQUARES."""
    columns = kq.shape[2]
    squares = nl.ndarray((PARTITIONS, 3, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=squares[:, 0:2, :], op=nl.square, data=kq)
    nisa.tensor_tensor(dst=squares[:, 2, :], data1=kq[:, 0, :], data2=kq[:, 1, :], op=nl.multiply)
    nisa.nc_matmul(
        dst=scalars[:, SQUARES : SQUARES + 3 * columns],
        stationary=ones,
        moving=squares,
        is_stationary_onezero=True,
        accumulate=False,
    )
    return squares


# --- Per head --------------------------------------------------------------------------------------------------------
def gate_steps(raw_gates: Tensor, per_head: Tensor) -> tuple[Tensor, Tensor]:
    """exp(A_log) [1, heads] and softplus(a + dt_bias) [1, sequences, heads], float32; -g is their product."""
    size, heads = raw_gates.shape[2], per_head.shape[2]
    rate = nl.ndarray((1, heads), dtype=nl.float32, buffer=nl.sbuf)
    steps = nl.ndarray((1, size // heads, heads), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(
        dst=steps,
        data1=raw_gates.ap(pattern=[[2 * size, 1], [heads, size // heads], [1, heads]], offset=0),
        data2=per_head.ap(pattern=[[2 * heads, 1], [0, size // heads], [1, heads]], offset=heads),
        op=nl.add,
    )
    nisa.activation(dst=rate, op=nl.exp, data=per_head[:, 0, :])
    nisa.activation(dst=steps, op=nl.softplus, data=steps)
    return rate, steps


def make_gate_rows(raw_gates: Tensor, rate: Tensor, steps: Tensor) -> Tensor:
    """[1, 3, columns] float32 on one partition: exp(g), then -exp(g) beta, then beta. `steps` becomes -g.

    `broadcast_gates` writes the second when it needs it.
    """
    repeats, heads = steps.shape[1], steps.shape[2]
    rows = nl.ndarray((1, 3, repeats * heads), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=rows[:, 2, :], op=nl.sigmoid, data=raw_gates[:, 1, :])
    nisa.tensor_tensor(
        dst=steps,
        data1=steps,
        data2=rate.ap(pattern=[[heads, 1], [0, repeats], [1, heads]], offset=0),
        op=nl.multiply,
    )
    nisa.activation(dst=rows[:, 0, :], op=nl.exp, data=steps, scale=-1.0)
    return rows


def broadcast_gates(gate_rows: Tensor, blocks: Tensor, ones: Tensor, scalars: Tensor, parts: int) -> Tensor:
    """Gates of the columns to all partitions: scalars from GATES on; `parts` as in `keys_of_partitions`.

    Returns:
        decay: [128, columns / n] float32 in PSUM, exp(g) of the head whose state a partition holds; in scalars.
    """
    n, columns = blocks.shape[1], gate_rows.shape[2]
    decay = scalars[:, DECAY : DECAY + columns // n]
    rows, width = PARTITIONS // parts, n // parts
    for i in range(n):
        mine = nl.ds(i // width * rows, rows)
        nisa.nc_matmul(
            dst=decay[mine],
            stationary=blocks[:, i, mine],
            moving=gate_rows.ap(pattern=[[3 * columns, 1], [n, columns // n]], offset=i),
            is_stationary_onezero=True,
            tile_position=(0, i // width * rows),
            tile_size=(32, rows),
            accumulate=i % width != 0,
        )
    nisa.scalar_tensor_tensor(
        dst=gate_rows[:, 1, :],
        data=gate_rows[:, 0, :],
        op0=nl.multiply,
        operand0=-1.0,
        op1=nl.multiply,
        operand1=gate_rows[:, 2, :],
    )
    nisa.nc_matmul(
        dst=scalars[:, GATES : GATES + 3 * columns],
        stationary=ones[0:1, :],
        moving=gate_rows,
        is_stationary_onezero=True,
        accumulate=False,
    )
    return decay


def head_scalars(rk_v: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of S^T k, 1 and S^T q in U and in o. A partition is a channel of v; the others repeat on all partitions.

    Returns:
        write: [128, 3, columns] float32: -eg beta rk^2, rk beta v, and room for the product of the first with S^T k.
        read: [128, 3, columns] float32: k.q times each of the first two, and eg.
    """
    columns = rk_v.shape[2]
    write = nl.ndarray((PARTITIONS, 3, columns), dtype=nl.float32, buffer=nl.sbuf)
    read = nl.ndarray((PARTITIONS, 3, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=rk_v[:, 0, :], op=nl.rsqrt, data=scalars[:, SQUARES : SQUARES + columns], bias=L2_EPS)
    nisa.tensor_tensor(
        dst=write[:, 0:2, :],
        data1=scalars.ap(pattern=[[512, PARTITIONS], [columns, 2], [1, columns]], offset=GATES + columns),
        data2=rk_v.ap(pattern=[[2 * columns, PARTITIONS], [0, 2], [1, columns]], offset=0),
        op=nl.multiply,
    )
    nisa.tensor_copy(dst=read[:, 2, :], src=scalars[:, GATES : GATES + columns], engine=nisa.engine.scalar)
    nisa.tensor_tensor(dst=write[:, 0:2, :], data1=write[:, 0:2, :], data2=rk_v, op=nl.multiply)
    nisa.tensor_tensor(
        dst=read[:, 0:2, :],
        data1=write[:, 0:2, :],
        data2=scalars.ap(pattern=[[512, PARTITIONS], [0, 2], [1, columns]], offset=SQUARES + 2 * columns),
        op=nl.multiply,
    )
    return write, read


def make_norm_bias(squares: Tensor, ones: Tensor, scalars: Tensor, norm_eps: float) -> Tensor:
    """norm_eps K (q.q + eps), [columns, 1] float32: the epsilon of the output norm where q is not normalised."""
    columns = squares.shape[2]
    norm_bias = nl.ndarray((columns, 1), dtype=nl.float32, buffer=nl.sbuf)
    factor = norm_eps * PARTITIONS
    nisa.nc_matmul(
        dst=scalars[0:columns, NORM : NORM + 1],
        stationary=squares[:, 1, :],
        moving=ones[:, 0:1],
        is_moving_onezero=True,
        accumulate=False,
    )
    nisa.activation(
        dst=norm_bias, op=nl.copy, data=scalars[0:columns, NORM : NORM + 1], scale=factor, bias=factor * L2_EPS
    )
    return norm_bias


def make_output_gate(z_rows: Tensor, norm_rows: Tensor) -> Tensor:
    """norm_weight silu(z), [columns, V] float32, from `load_output_gate`'s tiles."""
    gate = nl.ndarray(norm_rows.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=gate, op=nl.silu, data=z_rows)
    nisa.tensor_tensor(dst=gate, data1=gate, data2=norm_rows, op=nl.multiply, engine=nisa.engine.gpsimd)
    return gate
