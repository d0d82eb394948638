# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a decoding step of a DeltaNet layer reads from HBM and writes to it, and which part of it a core takes.

Letters as in `decode_layer`.
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


def heads_per_group(run: int) -> int:
    """n: the largest of 4, 2 and 1 that divides the number of heads whose states follow each other in HBM."""
    return 4 if run % 4 == 0 else 2 if run % 2 == 0 else 1


# --- Convolution -----------------------------------------------------------------------------------------------------
def _segments(box: Box, H: int) -> list[tuple[int, int, int]]:
    """Runs of a sequence's channels that follow each other in HBM, as (row, first head in [q | k | v], heads).

    The row is the partition of the first head, whose 128 channels it holds. A box with all heads has one segment,
    another one has a segment each for q, k and v.
    """
    Hk = H // box.R
    if heads_per_sequence(box) == H:
        return [(0, 0, rows_per_sequence(box))]
    return [
        (0, box.k0, box.nk),
        (box.nk, Hk + box.k0, box.nk),
        (2 * box.nk, 2 * Hk + first_head(box), heads_per_sequence(box)),
    ]


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
        x: [rows of all sequences, T, 128] in qkv.dtype, the inputs of this step.
        history: [rows of all sequences, 128, 3] in conv_state.dtype, the inputs before it.
        weight: [rows of one sequence, 128, 4] in conv_weight.dtype.
    """
    T, Ch = qkv.shape[1], qkv.shape[2]
    rows = rows_per_sequence(box)
    x = nl.ndarray((box.nb * rows, T, PARTITIONS), dtype=qkv.dtype, buffer=nl.sbuf)
    history = nl.ndarray((box.nb * rows, PARTITIONS, 3), dtype=conv_state.dtype, buffer=nl.sbuf)
    weight = nl.ndarray((rows, PARTITIONS, 4), dtype=conv_weight.dtype, buffer=nl.sbuf)
    for segment in _segments(box=box, H=H):
        row, head, heads = segment
        nisa.dma_copy(
            dst=weight[row : row + heads, :, :],
            src=conv_weight.ap(pattern=[[4 * PARTITIONS, heads], [1, 4 * PARTITIONS]], offset=4 * head * PARTITIONS),
        )
    for transfer in _transfers(box=box, H=H):
        row, sequence, sequences, head, heads = transfer
        nisa.dma_copy(
            dst=x[row : row + sequences * heads, :, :],
            src=qkv.ap(
                pattern=[[T * Ch, sequences], [PARTITIONS, heads], [Ch, T], [1, PARTITIONS]],
                offset=sequence * T * Ch + head * PARTITIONS,
            ),
        )
        nisa.dma_copy(
            dst=history[row : row + sequences * heads, :, :],
            src=conv_state.ap(
                pattern=[[3 * Ch, sequences], [3 * PARTITIONS, heads], [1, 3 * PARTITIONS]],
                offset=3 * (sequence * Ch + head * PARTITIONS),
            ),
        )
    return x, history, weight


def store_conv_state(new_conv: Tensor, x: Tensor, history: Tensor, box: Box, H: int) -> None:
    """Store the last 3 inputs of [history | x]. GpSimd joins them, since it would be idle meanwhile."""
    T, Ch = x.shape[1], new_conv.shape[1]
    new = nl.ndarray(history.shape, dtype=new_conv.dtype, buffer=nl.sbuf)
    for w in range(3):
        source = history[:, :, T + w] if T + w < 3 else x[:, T + w - 3, :]
        nisa.tensor_copy(dst=new[:, :, w], src=source, engine=nisa.engine.gpsimd)
    for transfer in _transfers(box=box, H=H):
        row, sequence, sequences, head, heads = transfer
        # Cores that split the value heads of one key head both load its q and k; core 0 stores them.
        if box.r0 == 0 or head >= 2 * (H // box.R):
            nisa.dma_copy(
                dst=new_conv.ap(
                    pattern=[[3 * Ch, sequences], [3 * PARTITIONS, heads], [1, 3 * PARTITIONS]],
                    offset=3 * (sequence * Ch + head * PARTITIONS),
                ),
                src=new[row : row + sequences * heads, :, :],
            )


# --- Gates -----------------------------------------------------------------------------------------------------------
def load_gates(box: Box, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gates before their activation and the parameters of each head, all on one partition.

    Returns:
        raw: [1, 2, T, sequences x heads] in a.dtype, a and b.
        per_head: [1, 2, heads of one sequence] float32, A_log and dt_bias.
    """
    T, H = a.shape[1], a.shape[2]
    heads, first, count = heads_per_sequence(box), first_head(box), box.nb * heads_per_sequence(box)
    raw = nl.ndarray((1, 2, T, count), dtype=a.dtype, buffer=nl.sbuf)
    per_head = nl.ndarray((1, 2, heads), dtype=nl.float32, buffer=nl.sbuf)
    gates, parameters = (a, b), (A_log, dt_bias)
    for which in range(2):
        nisa.dma_copy(
            dst=raw.ap(pattern=[[2 * T * count, 1], [heads, box.nb], [count, T], [1, heads]], offset=which * T * count),
            src=gates[which].ap(pattern=[[H, 1], [T * H, box.nb], [H, T], [1, heads]], offset=box.b0 * T * H + first),
        )
        nisa.dma_copy(dst=per_head[:, which, :], src=parameters[which].ap(pattern=[[H, 1], [1, heads]], offset=first))
    return raw, per_head


# --- State -----------------------------------------------------------------------------------------------------------
def _state_transfers(hbm: Tensor, tile: Tensor, box: Box, group: int, token: int) -> list[tuple[Tensor, Tensor]]:
    """Views of one group's states in HBM and on chip, in pairs that a transfer connects.

    Args:
        hbm: [B, T, H, K, V] float32.
        tile: [128, groups, n, V] float32, packed as `decode_layer` describes.
        token: which of the T states.
    """
    T, H = hbm.shape[1], hbm.shape[2]
    n, heads = tile.shape[2], heads_per_sequence(box)
    block = PARTITIONS // n
    # Heads of a group lie side by side in HBM, unless the states of other tokens lie between two sequences.
    length = n
    if T > 1 and group * n // heads != (group * n + n - 1) // heads:
        length = 1
    transfers = []
    for start in range(0, n, length):
        column = group * n + start
        sequence, head = box.b0 + column // heads, first_head(box) + column % heads
        far = hbm.ap(
            pattern=[[n * PARTITIONS, length * block], [1, n * PARTITIONS]],
            offset=((sequence * T + token) * H + head) * PARTITIONS * PARTITIONS,
        )
        transfers.append((far, tile[start * block : (start + length) * block, group, :, :]))
    return transfers


def load_state(state: Tensor, tile: Tensor, box: Box, group: int) -> None:
    """One group of heads of state [B, 1, H, K, V] float32 to the packed tile."""
    for views in _state_transfers(hbm=state, tile=tile, box=box, group=group, token=0):
        nisa.dma_copy(dst=views[1], src=views[0])


def store_state(states: Tensor, tile: Tensor, box: Box, group: int, token: int) -> None:
    """One group of heads of the packed tile to a token of states [B, T, H, K, V] float32."""
    for views in _state_transfers(hbm=states, tile=tile, box=box, group=group, token=token):
        nisa.dma_copy(dst=views[0], src=views[1])


# --- Output ----------------------------------------------------------------------------------------------------------
def load_output_gate(box: Box, z: Tensor, norm_weight: Tensor, tokens: int) -> tuple[list[Tensor], Tensor]:
    """Operands of the gated norm, for blocks of `tokens` tokens, whose outputs are normed together.

    Returns:
        blocks: z of each block, [tokens x sequences x heads, 128] in z.dtype; the last block may have fewer tokens.
        weight: [tokens x sequences x heads, 128] float32, norm_weight repeated on every partition.
    """
    T, width = z.shape[1], z.shape[2]
    heads = heads_per_sequence(box)
    blocks = []
    for t0 in range(0, T, tokens):
        some = min(tokens, T - t0)
        rows = nl.ndarray((some * box.nb * heads, PARTITIONS), dtype=z.dtype, buffer=nl.sbuf)
        nisa.dma_copy(
            dst=rows,
            src=z.ap(
                pattern=[[width, some], [T * width, box.nb], [PARTITIONS, heads], [1, PARTITIONS]],
                offset=(box.b0 * T + t0) * width + first_head(box) * PARTITIONS,
            ),
        )
        blocks.append(rows)
    columns = tokens * box.nb * heads
    weight = nl.ndarray((columns, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=weight, src=norm_weight.ap(pattern=[[0, columns], [1, PARTITIONS]], offset=0))
    return blocks, weight


def store_output(output: Tensor, o_rows: Tensor, gate: Tensor, norm_bias: Tensor, box: Box, t0: int) -> None:
    """Gated RMS norm of the outputs from token t0 on, stored to output [B, T, H V].

    Args:
        o_rows: [tokens x sequences x heads, V] float32 in PSUM.
        gate: the same shape, norm_weight silu(z).
        norm_bias: [tokens x sequences x heads, 1], see `make_norm_bias`.
    """
    T, width = output.shape[1], output.shape[2]
    count, per_token = o_rows.shape[0], box.nb * heads_per_sequence(box)
    squares = nl.ndarray((count, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    scale = nl.ndarray((count, 1), dtype=nl.float32, buffer=nl.sbuf)
    gated = nl.ndarray((count, PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    rows = nl.ndarray((count, PARTITIONS), dtype=output.dtype, buffer=nl.sbuf)
    nisa.activation_reduce(dst=squares, op=nl.square, data=o_rows, reduce_op=nl.add, reduce_res=scale)
    nisa.activation(dst=scale, op=nl.rsqrt, data=scale, scale=1.0 / PARTITIONS, bias=norm_bias)
    # Vector does this while Scalar does the two above. Scalar then applies the scale, in half the time of Vector.
    nisa.tensor_tensor(dst=gated, data1=o_rows, data2=gate, op=nl.multiply)
    nisa.activation(dst=rows, op=nl.copy, data=gated, scale=scale)
    nisa.dma_copy(
        dst=output.ap(
            pattern=[
                [width, count // per_token],
                [T * width, box.nb],
                [PARTITIONS, heads_per_sequence(box)],
                [1, PARTITIONS],
            ],
            offset=(box.b0 * T + t0) * width + first_head(box) * PARTITIONS,
        ),
        src=rows,
    )
