# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The modelled timeline: invariants over random programs, and dependences."""

from __future__ import annotations

from itertools import pairwise
from time import process_time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_emulator import costs, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from nki_emulator.engine import Instruction, Resource
from support.onchip import items, store

ENGINES = {"vector": nisa.engine.vector, "scalar": nisa.engine.scalar, "gpsimd": nisa.engine.gpsimd}


# A step is (kind, destination slot, source slot): eight slots of 64 columns in one SBUF tile.
STEPS = st.lists(
    st.tuples(st.sampled_from([*ENGINES, "matmul", "load"]), st.integers(0, 7), st.integers(0, 7)),
    min_size=1,
    max_size=40,
)


def program(x: Any, steps: tuple[tuple[str, int, int], ...]) -> Any:
    t = nl.ndarray((128, 512), nl.float32)
    nisa.memset(t, 1.0)
    for kind, to, source in steps:
        dst, src = t[:, 64 * to : 64 * to + 64], t[:, 64 * source : 64 * source + 64]
        if kind == "load":
            nisa.dma_copy(dst=dst, src=x)
        elif kind == "matmul":
            p = nl.ndarray((64, 64), nl.float32, buffer=nl.psum)
            nisa.nc_matmul(p, src, src)
            nisa.tensor_copy(dst[0:64], p)
        else:
            nisa.tensor_copy(dst=dst, src=src, engine=ENGINES[kind])
    return store(t)


@settings(max_examples=40)
@given(steps=STEPS)
def test_timeline_invariants(steps: list[tuple[str, int, int]]) -> None:
    report = emulate(program, np.zeros((128, 64), np.float32), tuple(steps)).report
    core, instructions = report.cores[0], items(report)
    assert core.makespan_ns >= max(use.busy_ns for use in core.engines.values()) - 1e-6
    assert core.makespan_ns <= sum(i.cost_ns for i in instructions) + 1e-6
    assert max(i.cost_ns for i in instructions) / costs.TENSOR_COLD_FACTOR <= report.latency_bound_ns
    assert report.latency_bound_ns <= core.makespan_ns + 1e-6
    assert all(use.utilisation <= 1 + 1e-9 for use in core.engines.values())
    slots: dict[int, Instruction] = {}
    readers: dict[int, list[Instruction]] = {}
    position = 1
    for kind, to, source in steps:
        used = instructions[position : position + (2 if kind == "matmul" else 1)]
        position += len(used)
        first, last = used[0], used[-1]
        if kind != "load":  # read after write
            assert source not in slots or first.start_ns >= slots[source].end_ns - 1e-6
            readers.setdefault(source, []).append(first)
        # Write after read and after write; an engine works in order, so it need not wait for its own results.
        for earlier in [*readers.get(to, []), *([slots[to]] if to in slots else [])]:
            if earlier is first or earlier is last:
                continue
            own = earlier.engine is last.engine and last.call != "dma_copy"
            assert last.start_ns >= (earlier.start_ns + earlier.occupied_ns if own else earlier.end_ns) - 1e-6
        slots[to] = last
        readers[to] = []


@settings(max_examples=30)
@given(requests=st.lists(st.tuples(st.floats(0, 100), st.floats(0.5, 20), st.integers(1, 4)), min_size=1, max_size=30))
def test_gap_filling_never_overlaps(requests: list[tuple[float, float, int]]) -> None:
    resource = Resource(4)
    for ready, duration, copies in requests:
        start, end = resource.place(ready, duration, copies)
        assert start >= ready
        assert end >= start + duration - 1e-9
    for starts, ends in zip(resource._starts, resource._ends, strict=True):
        assert all(s < e for s, e in zip(starts, ends, strict=True))
        assert all(e <= s for e, s in zip(ends[:-1], starts[1:], strict=True))
    busy = sum(d * c for _, d, c in requests)
    assert sum(sum(e) - sum(s) for s, e in zip(resource._starts, resource._ends, strict=True)) == pytest.approx(busy)


def test_independent_engines_overlap_and_one_engine_does_not() -> None:
    def kernel(same: bool) -> None:
        a, b = nl.ndarray((128, 2048), nl.float32), nl.ndarray((128, 2048), nl.float32)
        for i in range(8):
            nisa.memset(a if i % 3 else b, 0.0, engine=nisa.engine.vector if same or i % 3 else nisa.engine.gpsimd)

    together = emulate(kernel, True).report.makespan_ns
    apart = emulate(kernel, False).report.makespan_ns
    assert apart < 0.7 * together


def test_accumulating_matmuls_follow_without_a_gap() -> None:
    def kernel() -> None:
        t = nl.ndarray((128, 512), nl.bfloat16)
        nisa.memset(t, 0.0)
        p = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
        for _ in range(4):
            nisa.nc_matmul(p, t[:, 0:128], t)

    matmuls = items(emulate(kernel).report)[1:]
    assert all(b.start_ns == pytest.approx(a.start_ns + a.occupied_ns) for a, b in pairwise(matmuls))


def test_reused_memory_waits_for_its_previous_tenant() -> None:
    def kernel(bytes_each: int) -> None:
        for i in range(3):
            t = nl.ndarray((128, bytes_each // 4), nl.float32)
            nisa.memset(t, 0.0, engine=nisa.engine.vector if i % 2 else nisa.engine.gpsimd)
            del t

    small, large = (items(emulate(kernel, size).report) for size in (1024, 150 * 1024))
    assert small[1].start_ns == 0
    assert large[1].start_ns == large[0].end_ns
    assert large[1].cause_kind == "memory"


def test_tiled_matmuls_run_side_by_side() -> None:
    def kernel(tiled: bool) -> None:
        w = nl.ndarray((128, 128), nl.bfloat16)
        x = nl.ndarray((128, 512), nl.bfloat16)
        nisa.memset(w, 0.0)
        nisa.memset(x, 0.0)
        for row in (0, 32, 64, 96):
            p = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
            part = slice(row, row + 32)
            place = {"tile_position": (row, 0), "tile_size": (32, 128)} if tiled else {}
            nisa.nc_matmul(p, w[part], x[part], **place)

    whole, tiles = (emulate(kernel, t).report for t in (False, True))
    starts = {i.start_ns for i in items(tiles) if i.call == "nc_matmul"}
    assert len(starts) == 1
    assert whole.cores[0].engines["tensor"].busy_ns == pytest.approx(4 * tiles.cores[0].engines["tensor"].busy_ns)


def test_time_per_instruction_does_not_grow_with_the_program() -> None:
    def kernel(count: int) -> None:
        t = nl.ndarray((128, 64), nl.float32)
        nisa.memset(t, 0.0)
        for i in range(count):
            nisa.tensor_scalar(t[:, i % 64 : i % 64 + 1], t[:, 0:1], nl.add, 1.0)

    def seconds(count: int) -> float:
        start = process_time()
        emulate(kernel, count)
        return (process_time() - start) / count

    seconds(200)
    # Processor time, so that a busy machine does not matter. Linear work keeps the ratio near 1, quadratic makes it 16.
    assert seconds(8000) < 5 * min(seconds(500) for _ in range(3))


def matmul_durations(pauses: dict[int, int], count: int = 40) -> list[float]:
    """Times of ``count`` matmuls of 512 columns in a row, the k-th after ``pauses[k]`` memsets that it waits for."""

    def kernel() -> None:
        w, x = nl.ndarray((128, 128), nl.bfloat16), nl.ndarray((128, 512), nl.bfloat16)
        nisa.memset(w, 1.0)
        nisa.memset(x, 1.0)
        p = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
        for k in range(count):
            for _ in range(pauses.get(k, 0)):
                nisa.memset(x, 1.0, engine=nisa.engine.vector)
            nisa.nc_matmul(p, w, x, accumulate=k > 0)

    return [i.occupied_ns for i in items(emulate(kernel).report) if i.call == "nc_matmul"]


def test_the_tensor_engine_starts_at_half_speed() -> None:
    full = 512 / costs.TENSOR_GHZ
    times = matmul_durations({})
    slow = [t for t in times if t == pytest.approx(2 * full)]
    assert times == pytest.approx([2 * full] * len(slow) + [full] * (len(times) - len(slow)))
    assert costs.TENSOR_WARM_WINDOW_NS <= sum(slow) < costs.TENSOR_WARM_WINDOW_NS + 2 * full


@pytest.mark.parametrize(("pause_ns", "cools"), [(1000, False), (2000, True), (5000, True)])
def test_the_tensor_engine_cools_down_while_it_waits(pause_ns: float, cools: bool) -> None:
    full, memset = 512 / costs.TENSOR_GHZ, (128 + costs.VECTOR_OVERHEAD_CYCLES) / costs.VECTOR_GHZ
    times = matmul_durations({30: int(pause_ns / memset)})
    assert times[29] == pytest.approx(full)
    assert times[30] == pytest.approx(2 * full if cools else full)
    assert times[-1] == pytest.approx(full)


def test_sub_arrays_side_by_side_warm_up_as_one() -> None:
    def kernel() -> None:
        w, x = nl.ndarray((128, 128), nl.bfloat16), nl.ndarray((128, 512), nl.bfloat16)
        nisa.memset(w, 1.0)
        nisa.memset(x, 1.0)
        for _ in range(8):
            for row in (0, 32, 64, 96):
                p = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
                part = slice(row, row + 32)
                nisa.nc_matmul(p, w[part], x[part], tile_position=(row, 0), tile_size=(32, 128))

    times = [i.occupied_ns for i in items(emulate(kernel, capacity=False).report) if i.call == "nc_matmul"]
    assert times[0:28] == pytest.approx([2 * 512 / costs.TENSOR_GHZ] * 28)  # 7 x 427 ns are less than 3 us
