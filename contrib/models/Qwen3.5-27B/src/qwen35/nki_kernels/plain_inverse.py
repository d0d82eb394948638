# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""T = (I - A)^-1 of a chunk as in `triangular_inverse`, but by matmuls that each take the whole Tensor engine.

Blocks of s = 1, 2, 4, ... are merged up to C, and each matrix is kept as [C, C]. As X inverts the blocks of I - A, what
A X = N has within these blocks is X - I. So N is all that a level computes: with M = N masked to the lower left
quarters of blocks of 2s,

    N (I + M)  and  (I + M)^T N^T

and T^T = I + N^T in the end. Every matmul contracts over all C partitions, and each sum in PSUM is complete before the
next one in its bank begins.
"""

from .chunk_pieces import Constants, Shape, Work, inverse_levels
from .common import Tensor
from .nki_seam import nisa, nl


def mask_plain(shape: Shape, consts: Constants, w: Work, n: Tensor, level: int) -> None:
    """I + M of a level from I + N in PSUM."""
    C, R = shape.C, w.unit.R
    w.step = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.sbuf)
    mask = consts.merge.ap(pattern=[[inverse_levels(shape) * C, C], [0, R], [1, C]], offset=level * C)
    nisa.tensor_tensor(dst=w.step, data1=n, data2=mask, op=nl.multiply, engine=nisa.engine.vector)


def start_plain(shape: Shape, consts: Constants, w: Work) -> None:
    """I + M of the first level, where X = I and N = A: from A^T by multiplying with the identity."""
    C, R = shape.C, w.unit.R
    n = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.psum)
    for r in range(R):
        nisa.nc_matmul(dst=n[:, r], stationary=consts.identity16, moving=consts.identity16, accumulate=False)
        nisa.nc_matmul(dst=n[:, r], stationary=w.A[:, r], moving=consts.blocks, is_moving_onezero=True, accumulate=True)
    mask_plain(shape, consts, w, n, 0)
    w.n_t = w.A


def merge_plain(shape: Shape, consts: Constants, w: Work, level: int) -> None:
    """Level s = 2^level: N (I + M), and its transpose; the last one leaves T^T in w.T."""
    C, R = shape.C, w.unit.R
    step, n_t = w.step, w.n_t
    merged_t = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.psum)
    if level == inverse_levels(shape) - 1:
        for r in range(R):
            nisa.nc_matmul(dst=merged_t[:, r], stationary=consts.identity16, moving=consts.identity16, accumulate=False)
            nisa.nc_matmul(dst=merged_t[:, r], stationary=step[:, r], moving=n_t[:, r], accumulate=True)
        nisa.tensor_copy(dst=w.T, src=merged_t, engine=nisa.engine.scalar)
    else:
        merged = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.psum)
        for r in range(R):
            nisa.nc_matmul(dst=merged[:, r], stationary=consts.identity16, moving=consts.identity16, accumulate=False)
            nisa.nc_matmul(dst=merged[:, r], stationary=n_t[:, r], moving=step[:, r], accumulate=True)
            nisa.nc_matmul(dst=merged_t[:, r], stationary=step[:, r], moving=n_t[:, r], accumulate=False)
        mask_plain(shape, consts, w, merged, level + 1)
        w.n_t = nl.ndarray((C, R, C), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_copy(dst=w.n_t, src=merged_t, engine=nisa.engine.scalar)
