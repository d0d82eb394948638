# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a DeltaNet layer's decoding step read from HBM and write to it, and which part a core takes.

Letters as in `decode_layer` and `verify_layer`. A *column* is one token of one value head of one sequence, in the order
(sequence, head, token).
"""

from dataclasses import dataclass

from .common import PARTITIONS, Tensor
from .nki_seam import nisa, nl


@dataclass
class Box(nl.NKIObject):
    """The part of a launch that is computed together: sequences x key heads x value heads of each key head.

    b0, nb: first sequence and number of sequences.
    k0, nk: first key head and number of key heads.
    r0, nr: first value head and number of value heads among the R of every key head.
    """

    b0: int
    nb: int
    k0: int
    nk: int
    r0: int
    nr: int
    R: int


def heads_per_sequence(box: Box) -> int:
    """Value heads of the box in one sequence."""
    return box.nk * box.nr


def rows_per_sequence(box: Box) -> int:
    """Rows of 128 channels in one sequence: q and k of the key heads, then v of the value heads."""
    return box.nk * (2 + box.nr)


def first_head(box: Box) -> int:
    """First value head within a sequence. The others follow it: a box has all R value heads, or only one key head."""
    return box.k0 * box.R + box.r0


def share_of_core(B: int, Hk: int, R: int, core: int, cores: int) -> Box:
    """The box of a core: half of the sequences if B is even, else of the key heads, else of the value heads."""
    assert cores == 1 or cores == 2, "launch with grid 2 or without a grid"
    b0, nb, k0, nk, r0, nr = 0, B, 0, Hk, 0, R
    if cores == 2 and B % 2 == 0:
        b0, nb = core * (B // 2), B // 2
    elif cores == 2 and Hk > 1:
        k0, nk = _half(Hk, core)
    elif cores == 2:
        r0, nr = _half(R, core)
        nb = B if nr > 0 else 0
    return Box(b0=b0, nb=nb, k0=k0, nk=nk, r0=r0, nr=nr, R=R)


def _half(count: int, core: int) -> tuple[int, int]:
    """First and number of the items of a core; core 0 takes the odd one."""
    half = (count + 1) // 2
    return core * half, half if core == 0 else count - half


def heads_per_group(box: Box, H: int, most: int, halves: bool) -> int:
    """n: the largest power of two up to `most` that divides the heads whose states follow each other in HBM.

    A group has heads of one sequence, because a matmul multiplies what one of its columns does not need by zero, which
    leaves what is not a number as it is: a broken sequence would break its neighbours. With `halves`, each half of a
    group may have its own sequence: the reader keeps them apart.
    """
    heads, n = heads_per_sequence(box), most
    run = heads * box.nb if heads == H else heads  # those of one sequence may follow those of another
    while run % n != 0 or ((2 if halves else 1) * heads) % n != 0:
        n = n // 2
    return n


def check_layer(H: int, Hk: int, qkv: Tensor, conv_weight: Tensor, conv_state: Tensor, state: Tensor) -> None:
    """Shapes and types of what every decoding kernel takes."""
    assert state.shape[2] == PARTITIONS and state.shape[3] == PARTITIONS, "K and V must be 128"
    assert state.dtype == nl.float32, "state must be float32"
    assert qkv.shape[2] == (2 * Hk + H) * PARTITIONS and H % Hk == 0, "qkv must hold [q | k | v] of whole key heads"
    assert conv_weight.shape[1] == 4, "the convolution must have 4 taps"
    assert conv_state.dtype == qkv.dtype, "conv_state must have the dtype of qkv"


# --- Convolution -----------------------------------------------------------------------------------------------------
def _segments(box: Box, H: int) -> list[tuple[int, int, int]]:
    """Runs of a sequence's channels that follow each other in HBM, as (row, first head in [q | k | v], heads).

    The row is the partition of the first head, whose 128 channels it holds. A box with all heads has one segment;
    another one has a segment for q, one for k, and one for v of every key head, since a transfer to few partitions
    takes as long as its rows one after the other.
    """
    Hk = H // box.R
    if heads_per_sequence(box) == H:
        return [(0, 0, rows_per_sequence(box))]
    segments = [(0, box.k0, box.nk), (box.nk, Hk + box.k0, box.nk)]
    for i in range(box.nk):
        segments.append((2 * box.nk + i * box.nr, 2 * Hk + first_head(box) + i * box.nr, box.nr))
    return segments


def _transfers(box: Box, H: int) -> list[tuple[int, int, int, int, int]]:
    """DMA transfers of all sequences' channels, as (row, first sequence, sequences, first head, heads)."""
    rows = rows_per_sequence(box)
    transfers = []
    for segment in _segments(box=box, H=H):
        row, head, heads = segment
        if heads == rows:
            transfers.append((0, box.b0, box.nb, head, heads))
        else:
            for i in range(box.nb):
                transfers.append((i * rows + row, box.b0 + i, 1, head, heads))
    return transfers


def load_conv(box: Box, qkv: Tensor, conv_state: Tensor, conv_weight: Tensor, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of the convolution; a partition holds one row, 128 channels of one sequence.

    Returns:
        x, history: see `load_inputs_of_conv`.
        weight: [rows of one sequence, 128, 4] in conv_weight.dtype.
    """
    weight = nl.ndarray((rows_per_sequence(box), PARTITIONS, 4), dtype=conv_weight.dtype, buffer=nl.sbuf)
    for segment in _segments(box=box, H=H):
        row, head, heads = segment
        nisa.dma_copy(
            dst=weight[row : row + heads, :, :],
            src=conv_weight.ap(pattern=[[4 * PARTITIONS, heads], [1, 4 * PARTITIONS]], offset=4 * head * PARTITIONS),
        )
    x, history = load_inputs_of_conv(box=box, qkv=qkv, conv_state=conv_state, H=H, width=PARTITIONS)
    return x, history, weight


def load_inputs_of_conv(box: Box, qkv: Tensor, conv_state: Tensor, H: int, width: int) -> tuple[Tensor, Tensor]:
    """Inputs of the convolution; a partition holds `width` channels of one sequence, a part of a row of 128.

    Returns:
        x: [parts of all sequences, T, width] in qkv.dtype, the inputs of this step.
        history: [parts of all sequences, width, 3] in conv_state.dtype, the inputs before it.
    """
    T, Ch, parts = qkv.shape[1], qkv.shape[2], PARTITIONS // width
    count = box.nb * rows_per_sequence(box) * parts
    x = nl.ndarray((count, T, width), dtype=qkv.dtype, buffer=nl.sbuf)
    history = nl.ndarray((count, width, 3), dtype=conv_state.dtype, buffer=nl.sbuf)
    for transfer in _transfers(box=box, H=H):
        row, sequence, sequences, head, heads = transfer
        mine = nl.ds(row * parts, sequences * heads * parts)
        nisa.dma_copy(
            dst=x[mine, :, :],
            src=qkv.ap(
                pattern=[[T * Ch, sequences], [width, heads * parts], [Ch, T], [1, width]],
                offset=sequence * T * Ch + head * PARTITIONS,
            ),
        )
        nisa.dma_copy(
            dst=history[mine, :, :],
            src=conv_state.ap(
                pattern=[[3 * Ch, sequences], [3 * width, heads * parts], [1, 3 * width]],
                offset=3 * (sequence * Ch + head * PARTITIONS),
            ),
        )
    return x, history


def shift_conv_state(x: Tensor, history: Tensor) -> Tensor:
    """The last 3 inputs of [history | x] of one token, like history. GpSimd joins them: it would be idle meanwhile."""
    new = nl.ndarray(history.shape, dtype=history.dtype, buffer=nl.sbuf)
    for w in range(3):
        source = history[:, :, w + 1] if w < 2 else x[:, 0, :]
        nisa.tensor_copy(dst=new[:, :, w], src=source, engine=nisa.engine.gpsimd)
    return new


def store_conv(new_conv: Tensor, new: Tensor, box: Box, H: int) -> None:
    """Store the conv state [parts of all sequences, width, 3], see `load_inputs_of_conv`, to new_conv [B, Ch, 3]."""
    Ch, width = new_conv.shape[1], new.shape[1]
    parts = PARTITIONS // width
    for transfer in _transfers(box=box, H=H):
        row, sequence, sequences, head, heads = transfer
        # Cores that split the value heads of one key head both load its q and k; core 0 stores them.
        if box.r0 == 0 or head >= 2 * (H // box.R):
            nisa.dma_copy(
                dst=new_conv.ap(
                    pattern=[[3 * Ch, sequences], [3 * width, heads * parts], [1, 3 * width]],
                    offset=3 * (sequence * Ch + head * PARTITIONS),
                ),
                src=new[nl.ds(row * parts, sequences * heads * parts), :, :],
            )


# --- Gates -----------------------------------------------------------------------------------------------------------
def load_gates(box: Box, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gates of one token before their activation and the parameters of each head, all on one partition.

    Returns:
        raw: [1, 2, sequences x heads] in a.dtype, a and b.
        per_head: [1, 2, heads of one sequence] float32, A_log and dt_bias.
    """
    H = a.shape[2]
    heads, first, count = heads_per_sequence(box), first_head(box), box.nb * heads_per_sequence(box)
    raw = nl.ndarray((1, 2, count), dtype=a.dtype, buffer=nl.sbuf)
    per_head = nl.ndarray((1, 2, heads), dtype=nl.float32, buffer=nl.sbuf)
    gates, parameters = (a, b), (A_log, dt_bias)
    for which in range(2):
        nisa.dma_copy(
            dst=raw[:, which, :],
            src=gates[which].ap(pattern=[[H, 1], [H, box.nb], [1, heads]], offset=box.b0 * H + first),
        )
        nisa.dma_copy(dst=per_head[:, which, :], src=parameters[which].ap(pattern=[[H, 1], [1, heads]], offset=first))
    return raw, per_head


# --- State -----------------------------------------------------------------------------------------------------------
def packed_rows(hbm: Tensor, box: Box, n: int, group: int) -> Tensor:
    """One group of heads of a state [B, H, K, V] in HBM as [128, n V]: n rows of a head's matrix for each partition."""
    H, heads, column = hbm.shape[1], heads_per_sequence(box), group * n
    first = (box.b0 + column // heads) * H + first_head(box) + column % heads
    return hbm.ap(pattern=[[n * PARTITIONS, PARTITIONS], [1, n * PARTITIONS]], offset=first * PARTITIONS * PARTITIONS)


def load_states(state: Tensor, box: Box, n: int) -> Tensor:
    """[128, groups, n, V] float32, packed as `decode_layer` describes, from state [B, H, K, V]."""
    groups = box.nb * heads_per_sequence(box) // n
    tile = nl.ndarray((PARTITIONS, groups, n, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    for i in range(groups):
        nisa.dma_copy(dst=tile[:, i, :, :], src=packed_rows(hbm=state, box=box, n=n, group=i))
    return tile


# --- Output ----------------------------------------------------------------------------------------------------------
def load_output_gate(box: Box, z: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Operands of the gated norm.

    Returns:
        rows: [columns, 128] in z.dtype.
        weight: [columns, 128] float32, norm_weight repeated on every partition.
    """
    T, columns = z.shape[1], box.nb * heads_per_sequence(box) * z.shape[1]
    rows = nl.ndarray((columns, PARTITIONS), dtype=z.dtype, buffer=nl.sbuf)
    weight = nl.ndarray((columns, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=rows, src=rows_of_heads(z, box, T))
    nisa.dma_copy(dst=weight, src=norm_weight.ap(pattern=[[0, columns], [1, PARTITIONS]], offset=0))
    return rows, weight


def rows_of_heads(hbm: Tensor, box: Box, T: int) -> Tensor:
    """The box's part of [B, T, H V] or [B, T, H, V] in HBM as rows of V, one for each column."""
    width = hbm.shape[2] if len(hbm.shape) == 3 else hbm.shape[2] * hbm.shape[3]
    return hbm.ap(
        pattern=[[T * width, box.nb], [PARTITIONS, heads_per_sequence(box)], [width, T], [1, PARTITIONS]],
        offset=box.b0 * T * width + first_head(box) * PARTITIONS,
    )


def store_output(output: Tensor, o_rows: Tensor, gate: Tensor, norm_bias: Tensor, box: Box) -> None:
    """Gated RMS norm of the outputs, stored to output [B, T, H V].

    Args:
        o_rows: [columns, V] float32 in PSUM.
        gate: the same shape, norm_weight silu(z).
        norm_bias: [columns, 1], see `make_norm_bias`.
    """
    count = o_rows.shape[0]
    squares = nl.ndarray((count, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    scale = nl.ndarray((count, 1), dtype=nl.float32, buffer=nl.sbuf)
    gated = nl.ndarray((count, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    rows = nl.ndarray((count, PARTITIONS), dtype=output.dtype, buffer=nl.sbuf)
    nisa.activation_reduce(dst=squares, op=nl.square, data=o_rows, reduce_op=nl.add, reduce_res=scale)
    nisa.activation(dst=scale, op=nl.rsqrt, data=scale, scale=1.0 / PARTITIONS, bias=norm_bias)
    # Vector does this while Scalar does the two above. Scalar then applies the scale, in half the time of Vector.
    nisa.tensor_tensor(dst=gated, data1=o_rows, data2=gate, op=nl.multiply)
    nisa.activation(dst=rows, op=nl.copy, data=gated, scale=scale)
    nisa.dma_copy(dst=rows_of_heads(output, box, output.shape[1]), src=rows)
