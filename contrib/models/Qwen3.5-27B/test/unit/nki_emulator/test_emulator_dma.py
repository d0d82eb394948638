# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""DMA transfers, the exchange between two cores, and the barrier."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nki_emulator import NkiValidationError, NkiWarning, costs, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import BF16, data, items, store, tile


def test_dma_copy_converts_and_reshapes() -> None:
    x = data((6, 8))

    def kernel(a: Any) -> Any:
        out = nl.ndarray((4, 12), nl.bfloat16, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=a)
        return out

    with pytest.warns(
        NkiWarning, match="float32 becomes bfloat16 with dge_mode=unknown; the compiler may choose hwdge"
    ):
        y = emulate(kernel, x).outputs
    assert y.tobytes() == x.reshape(4, 12).astype(BF16).tobytes()


@pytest.mark.parametrize(
    ("dtype", "mode"),
    [("float32", nisa.dge_mode.unknown), ("bfloat16", nisa.dge_mode.swdge), ("bfloat16", nisa.dge_mode.none)],
)
def test_a_copy_without_a_cast_or_with_a_mode_is_not_warned_of(dtype: str, mode: Any) -> None:
    def kernel(a: Any) -> None:
        nisa.dma_copy(dst=nl.ndarray((6, 8), dtype), src=a, dge_mode=mode)

    assert emulate(kernel, data((6, 8))).report.warnings == ()


@pytest.mark.parametrize(("partitions", "engines"), [(1, 1), (8, 1), (9, 2), (80, 10), (128, 16)])
def test_an_engine_serves_eight_partitions(partitions: int, engines: int) -> None:
    def kernel(a: Any) -> None:
        nisa.dma_copy(dst=nl.ndarray((partitions, 1024), nl.float32), src=a)

    copy = items(emulate(kernel, data((partitions, 1024))).report)[0]
    assert copy.busy_ns == pytest.approx(copy.occupied_ns * engines / costs.DMA_ENGINES)
    expected = partitions / engines * (4096 / costs.DMA_ENGINE_BYTES_PER_NS + costs.DMA_RUN_NS)
    assert copy.occupied_ns == pytest.approx(expected)


def test_short_runs_cost_their_elements() -> None:
    def kernel(a: Any) -> None:
        t = nl.ndarray((128, 256), nl.bfloat16)
        nisa.dma_copy(dst=t, src=a.ap(pattern=[[512, 128], [2, 256]]))
        nisa.dma_copy(dst=t, src=a[:, 0:256])

    short, long = (i.occupied_ns for i in items(emulate(kernel, data((128, 512), BF16)).report))
    payload = 8 * 512 / costs.DMA_ENGINE_BYTES_PER_NS
    assert short - payload == pytest.approx(8 * 256 * costs.DMA_ELEMENT_NS)
    assert long - payload == pytest.approx(8 * costs.DMA_RUN_NS)


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


def test_a_partly_skipped_gather_keeps_what_the_tile_held() -> None:
    def kernel(a: Any, r: Any, skip: bool) -> None:
        index, rounds = tile(r), [nl.ndarray((2, 12288), nl.float32) for _ in range(18)]  # 48 KiB of a quadrant
        sink = nl.ndarray((2, 1), nl.float32)
        for t in rounds * 2:
            source = a.ap(pattern=[[12288, 2], [1, 12288]], vector_offset=index)
            nisa.dma_copy(dst=t, src=source, oob_mode=nisa.oob_mode.skip)
            nisa.tensor_copy(dst=sink, src=t[:, 0:1])

    x = np.zeros((4, 12288), np.float32)
    emulate(kernel, x, np.int32([[1], [2]]), False)
    with pytest.raises(NkiValidationError, match="live in sbuf"):
        emulate(kernel, x, np.int32([[1], [7]]), True)
