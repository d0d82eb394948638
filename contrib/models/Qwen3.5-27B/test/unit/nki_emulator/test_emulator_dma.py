# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""DMA transfers, the exchange between two cores, and the barrier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, data, store, tile


def test_dma_copy_converts_and_reshapes() -> None:
    x = data((6, 8))

    def kernel(a: Any) -> Any:
        out = nl.ndarray((4, 12), nl.bfloat16, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a)
        return out

    y = emulate(kernel, x).outputs
    assert y.tobytes() == x.reshape(4, 12).astype(BF16).tobytes()


@pytest.mark.parametrize("shape", [(16, 128), (5, 3, 16), (6, 2, 4, 8)])
def test_dma_transpose_swaps_first_and_last_axes(shape: tuple[int, ...]) -> None:
    x = data(shape, BF16)
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}[len(shape)]

    def kernel(a: Any) -> Any:
        t = nl.ndarray(tuple(shape[i] for i in order), a.dtype)
        nisa.dma_transpose(dst=t, src=a, axes=order)
        return store(t)

    np.testing.assert_array_equal(emulate(kernel, x).outputs, x.transpose(order))


def test_gather_scatter_and_accumulate_by_dma() -> None:
    x, rows = data((10, 4)), np.int32([[3], [0], [9]])

    def kernel(a: Any, r: Any) -> Any:
        index = tile(r)
        picked = nl.ndarray((3, 4), a.dtype)
        nisa.dma_copy(dst=picked, src=a.ap(pattern=[[4, 3], [1, 4]], vector_offset=index))
        out = nl.ndarray((10, 4), a.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a)
        there = out.ap(pattern=[[4, 3], [1, 4]], vector_offset=index)
        nisa.dma_compute(dst=there, srcs=[there, picked], reduce_op=nl.add)
        return out, store(picked)

    out, picked = emulate(kernel, x, rows).outputs
    expected = x.copy()
    expected[rows[:, 0]] *= 2
    np.testing.assert_array_equal(picked, x[rows[:, 0]])
    np.testing.assert_array_equal(out, expected)


def test_out_of_bounds_rows_are_skipped_when_asked() -> None:
    x, rows = data((4, 3)), np.int32([[1], [7]])

    def kernel(a: Any, r: Any) -> Any:
        picked = nl.ndarray((2, 3), a.dtype)
        nisa.memset(picked, 0.0)
        source = a.ap(pattern=[[3, 2], [1, 3]], vector_offset=tile(r))
        nisa.dma_copy(dst=picked, src=source, oob_mode=nisa.oob_mode.skip)
        return store(picked)

    np.testing.assert_array_equal(emulate(kernel, x, rows).outputs, np.stack([x[1], np.zeros(3, np.float32)]))


def test_sendrecv_swaps_tiles() -> None:
    def kernel() -> Any:
        me = nl.program_id(0)
        mine, other = nl.ndarray((4, 4), nl.float32), nl.ndarray((4, 4), nl.float32)
        nisa.memset(mine, float(me + 1))
        nisa.sendrecv(src=mine, dst=other, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
        out = nl.ndarray((2, 4, 4), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out[me], src=other)
        return out

    out = emulate(kernel, grid=2).outputs
    assert out[:, 0, 0].tolist() == [2.0, 1.0]


def test_barrier_makes_the_other_core_s_writes_visible() -> None:
    def kernel() -> Any:
        me = nl.program_id(0)
        shared = nl.ndarray((2, 1, 4), nl.float32, buffer=nl.shared_hbm)
        out = nl.ndarray((2, 1, 4), nl.float32, buffer=nl.shared_hbm)
        t = nl.ndarray((1, 4), nl.float32)
        nisa.memset(t, float(me + 1))
        nisa.dma_copy(dst=shared[me], src=t)
        nisa.core_barrier(shared, (0, 1))
        nisa.dma_copy(dst=out[me], src=shared[1 - me])
        return out

    assert emulate(kernel, grid=2).outputs[:, 0, 0].tolist() == [2.0, 1.0]
