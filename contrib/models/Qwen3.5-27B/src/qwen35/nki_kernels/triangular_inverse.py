# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""T = (I - A)^-1 of a chunk for strictly lower triangular A, by the Tensor engine; letters as in `chunk_pieces`.

T grows from X = I by merging blocks of s = 1, 2, 4, ... With N = A X and M = N masked to the lower left quarters of
blocks of 2s, X (I + M) is the inverse of the blocks of 2s, and A times it is N (I + M). No power of A is formed, so
equal keys lose no precision. One level computes, in transposes, which are what nc_matmul takes as stationary operand,

    (I + M)^T [X^T | N^T]  and  N (I + M)

and nothing else. Diagonal blocks of 32 are packed as [C, heads, 32] and multiplied on sub-arrays
(nki/api/nki/isa/__init__.py, nc_matmul, Tiling mode). The specification is `_inverse` of `qwen35.ops.gated_delta_rule`.

No page shows two uses that this makes of the Tensor engine: sub-arrays whose first row and first column are both not 0,
and a sum in PSUM that the whole array begins and sub-arrays end, block by block. Sums over several row tiles in one
element, of which no page promises an order, are avoided. `plain_inverse` does without all of these.
"""

from typing import Any

from .chunk_pieces import BLOCK, SMALL_LEVELS, Constants, Shape, Work
from .common import Tensor
from .nki_seam import nisa, nl

BLOCK_SHIFT = ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3))
"""[level][head % 4]: in each level the blocks of a head move from partition block p to p xor this. A matmul of block p
into block p' runs on sub-array (p, p'), so four heads with different shifts use all sixteen at once. The shifts are
multiples 1, w, w^2, 1, 1 of the head in GF(4): for each head they sum to 0, that is, blocks end where they began."""

XOR = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))
"""[a][b]: a xor b, as a table because the language guide shows no operators on bits
(nki/get-started/nki-language-guide.rst)."""


def block_slice(p: int) -> slice:
    """Partitions of block p, or its columns."""
    return nl.ds(p * BLOCK, BLOCK)


def block_matmul(dst: Tensor, stationary: Tensor, moving: Tensor, row: int, column: int, accumulate: bool) -> None:
    """One 32x32 sub-array: contract over partition block `row` into partition block `column`."""
    nisa.nc_matmul(
        dst=dst,
        stationary=stationary,
        moving=moving,
        tile_position=(row * BLOCK, column * BLOCK),
        tile_size=(BLOCK, BLOCK),
        accumulate=accumulate,
    )


def head_shift(C: int, level: int, r: int) -> int:
    """How far the blocks of head r of a unit move in a level, within the C / 32 blocks there are."""
    return BLOCK_SHIFT[level][r % 4] % (C // BLOCK)


def place_of(C: int, level: int, r: int, p: int) -> int:
    """Partition block that holds diagonal block p of head r before a level."""
    at = p
    for i in range(level):
        at = XOR[at][head_shift(C, i, r)]
    return at


def mask_step(shape: Shape, consts: Constants, w: Work, n: Tensor, level: int) -> None:
    """I + M of a level from I + N in PSUM."""
    C, R = shape.C, w.unit.R
    w.step = nl.ndarray((C, R, BLOCK), dtype=nl.float32, buffer=nl.sbuf)
    mask = consts.merge.ap(pattern=[[SMALL_LEVELS * BLOCK, C], [0, R], [1, BLOCK]], offset=level * BLOCK)
    nisa.tensor_tensor(dst=w.step, data1=n, data2=mask, op=nl.multiply, engine=nisa.engine.vector)


def identity_plus(shape: Shape, consts: Constants, R: int) -> Tensor:
    """[C, R, 32] float32 in PSUM holding the identity in every block, for matmuls to add to."""
    C = shape.C
    n = nl.ndarray((C, R, BLOCK), dtype=nl.float32, buffer=nl.psum)
    eye = consts.blocks16.ap(pattern=[[BLOCK, C], [0, R], [1, BLOCK]])
    nisa.nc_matmul(dst=n, stationary=consts.identity16, moving=eye, accumulate=False)
    return n


def start_inverse(shape: Shape, consts: Constants, w: Work) -> None:
    """I + A in place of I + N, since X = I: from A^T by multiplying with the identity."""
    C, R = shape.C, w.unit.R
    n = identity_plus(shape, consts, R)
    for r in range(R):
        for p in range(C // BLOCK):
            rows = block_slice(p)
            nisa.nc_matmul(
                dst=n[rows, r],
                stationary=w.A[rows, r, rows],
                moving=consts.blocks[rows],
                is_moving_onezero=True,
                tile_position=(p * BLOCK, p * BLOCK),
                tile_size=(BLOCK, BLOCK),
                accumulate=True,
            )
    mask_step(shape, consts, w, n, 0)


def merge_small(shape: Shape, consts: Constants, w: Work, level: int) -> None:
    """Level s = 2^level on the diagonal blocks; the last one leaves X^T | X instead of X^T | N^T."""
    C, R, last = shape.C, w.unit.R, level == SMALL_LEVELS - 1
    xn = nl.ndarray((C, R, 2, BLOCK), dtype=nl.float32, buffer=nl.psum)
    n: Any = None
    if not last:
        n = identity_plus(shape, consts, R)
    # One product of all blocks after the other: neighbours in the queue then use different sub-arrays.
    for product in range(3 if level == 0 else 2):
        for r in range(R):
            for p in range(C // BLOCK):
                at = place_of(C, level, r, p)
                to = XOR[at][head_shift(C, level, r)]
                rows, out = block_slice(at), block_slice(to)
                step = w.step[rows, r]
                if level == 0:  # X = I and N = A
                    if product == 0:
                        block_matmul(n[out, r], w.A[rows, r, rows], step, at, to, True)
                    elif product == 1:
                        block_matmul(xn[out, r, 0], step, consts.blocks[rows], at, to, False)
                    else:
                        block_matmul(xn[out, r, 1], step, w.A[rows, r, rows], at, to, False)
                elif last:
                    if product == 0:
                        block_matmul(xn[out, r, 1], w.xn[rows, r, 0], step, at, to, False)
                    else:
                        block_matmul(xn[out, r, 0], step, w.xn[rows, r, 0], at, to, False)
                elif product == 0:
                    block_matmul(n[out, r], w.xn[rows, r, 1], step, at, to, True)
                else:
                    block_matmul(xn[out, r], step, w.xn[rows, r], at, to, False)
    if not last:
        mask_step(shape, consts, w, n, level + 1)
    if last:
        w.x = nl.ndarray((C, R, 3, BLOCK), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=w.x[:, :, 0:3:2], src=xn, engine=nisa.engine.scalar)
    else:
        w.xn = nl.ndarray((C, R, 2, BLOCK), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=w.xn, src=xn, engine=nisa.engine.scalar)


def start_pairs(shape: Shape, w: Work) -> None:
    """N = A X between the blocks of 32 of each block of 64, in the rows of blocks 1 and 3.

    The matmul takes the columns of both blocks as stationary, so that no row of PSUM stays unwritten.
    """
    C, R = shape.C, w.unit.R
    n = nl.ndarray((C, R, BLOCK), dtype=nl.float32, buffer=nl.psum)
    for r in range(R):
        for a in range(0, C // BLOCK, 2):
            pair = nl.ds(a * BLOCK, 2 * BLOCK)
            pair_matmul(n[pair, r], w.A[block_slice(a), r, pair], w.x[block_slice(a), r, 2], a)
    w.half = nl.ndarray((C, R, BLOCK), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=w.half, src=n, engine=nisa.engine.scalar)


def merge_pairs(shape: Shape, w: Work) -> None:
    """Blocks of 32 to blocks of 64: X_b N in the rows of block b = 1, 3, its transpose in the rows of a = 0, 2."""
    C, R = shape.C, w.unit.R
    t = nl.ndarray((C, R, BLOCK), dtype=nl.float32, buffer=nl.psum)
    for r in range(R):
        for a in range(0, C // BLOCK, 2):
            b = a + 1
            rows_a, rows_b = block_slice(a), block_slice(b)
            x_t = w.x[rows_b, r, 0]
            n = w.half[rows_b, r]
            block_matmul(t[rows_b, r], x_t, n, b, b, False)
            block_matmul(t[rows_a, r], n, x_t, b, a, False)
    if C > 2 * BLOCK:
        nisa.tensor_copy(dst=w.halves[block_slice(1), :, 0], src=t[block_slice(1)], engine=nisa.engine.scalar)
        nisa.tensor_copy(dst=w.halves[block_slice(2), :, 1], src=t[block_slice(2)], engine=nisa.engine.scalar)
    nisa.tensor_copy(dst=w.x[:, :, 1], src=t, engine=nisa.engine.scalar)


def lay_out_diagonals(shape: Shape, w: Work) -> None:
    """X_0 and X_1, X_2^T and X_3^T, where `Work` has the two halves; what lies beside them is Y or stays zero."""
    for p in range(shape.C // BLOCK):
        nisa.tensor_copy(
            dst=w.halves[block_slice(p), :, p % 2],
            src=w.x[block_slice(p), :, 2 if p < 2 else 0],
            engine=nisa.engine.gpsimd,
        )


def start_halves(shape: Shape, w: Work) -> None:
    """N = A X between the two blocks of 64, in rows 64 to 127."""
    R, half = w.unit.R, 2 * BLOCK
    upper, lower = nl.ds(0, half), nl.ds(half, half)
    n = nl.ndarray((shape.C, R, 2, BLOCK), dtype=nl.float32, buffer=nl.psum)
    for r in range(R):
        nisa.nc_matmul(
            dst=n[lower, r],
            stationary=w.A[upper, r, lower],
            moving=w.halves[upper, r],
            tile_position=(0, half),
            tile_size=(half, half),
            accumulate=False,
        )
    w.half = nl.ndarray((shape.C, R, half), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=w.half[lower], src=n[lower], engine=nisa.engine.scalar)


def pair_matmul(dst: Tensor, stationary: Tensor, moving: Tensor, row: int) -> None:
    """A sub-array of 32 rows and 64 columns: contract over partition block `row` into it and the next one."""
    nisa.nc_matmul(
        dst=dst,
        stationary=stationary,
        moving=moving,
        tile_position=(row * BLOCK, row * BLOCK),
        tile_size=(BLOCK, 2 * BLOCK),
        accumulate=False,
    )


def assemble_blocks(shape: Shape, w: Work) -> None:
    """Diagonal blocks of T^T and those beside them, into w.T, which is zero elsewhere."""
    for p in range(shape.C // BLOCK):
        nisa.tensor_copy(
            dst=w.T[block_slice(p), :, block_slice(p)], src=w.x[block_slice(p), :, 0], engine=nisa.engine.gpsimd
        )
    for a in range(0, shape.C // BLOCK - 1, 2):
        nisa.tensor_copy(
            dst=w.T[block_slice(a), :, block_slice(a + 1)],
            src=w.x[block_slice(a), :, 1],
            engine=nisa.engine.gpsimd,
        )


def merge_halves(shape: Shape, w: Work) -> None:
    """The transpose of X_2 N, the last quarter of T^T."""
    R, half = w.unit.R, 2 * BLOCK
    lower = nl.ds(half, half)
    t = nl.ndarray((half, R, 2, BLOCK), dtype=nl.float32, buffer=nl.psum)
    for r in range(R):
        nisa.nc_matmul(
            dst=t[:, r],
            stationary=w.half[lower, r],
            moving=w.halves[lower, r],
            tile_position=(half, 0),
            tile_size=(half, half),
            accumulate=False,
        )
    nisa.tensor_copy(dst=w.T[0:half, :, half : 2 * half], src=t, engine=nisa.engine.scalar)
