# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The modelled timeline: invariants over random programs, dependences, costs, reports and traces."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nki_emulator import Report, costs, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from nki_emulator.engine import Instruction, Resource
from support.onchip import store, tile

ENGINES = {"vector": nisa.engine.vector, "scalar": nisa.engine.scalar, "gpsimd": nisa.engine.gpsimd}


def items(report: Report, core: int = 0) -> list[Instruction]:
    return list(report.instructions[core])


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
            nisa.memset(a if i % 2 else b, 0.0, engine=nisa.engine.vector if same or i % 2 else nisa.engine.gpsimd)

    together = emulate(kernel, True).report.makespan_ns
    apart = emulate(kernel, False).report.makespan_ns
    assert apart < 0.7 * together


def test_disjoint_columns_of_one_tile_are_independent() -> None:
    def kernel(disjoint: bool) -> None:
        t = nl.ndarray((128, 2, 1024), nl.float32)
        nisa.memset(t[:, 0], 0.0, engine=nisa.engine.vector)
        nisa.memset(t[:, 1 if disjoint else 0], 0.0, engine=nisa.engine.gpsimd)

    disjoint, same = (items(emulate(kernel, d).report) for d in (True, False))
    assert disjoint[1].start_ns == 0
    assert same[1].start_ns == same[0].end_ns


def test_rows_loaded_into_one_tile_are_independent() -> None:
    def kernel(a: Any) -> None:
        t = nl.ndarray((128, 64), nl.float32)
        for row in range(8):
            nisa.dma_copy(dst=t[row : row + 1], src=a[row : row + 1])
        nisa.tensor_copy(dst=t[32:64], src=t[0:32])
        nisa.memset(t[0:1], 0.0)

    report = emulate(kernel, np.zeros((8, 64), np.float32)).report
    *loads, copy, clear = items(report)
    assert {i.start_ns for i in loads} == {0.0}
    assert copy.start_ns == max(i.end_ns for i in loads)
    assert clear.start_ns > copy.start_ns


def test_accumulating_matmuls_follow_without_a_gap() -> None:
    def kernel() -> None:
        t = nl.ndarray((128, 512), nl.bfloat16)
        nisa.memset(t, 0.0)
        p = nl.ndarray((128, 512), nl.float32, buffer=nl.psum)
        for _ in range(4):
            nisa.nc_matmul(p, t[:, 0:128], t)

    matmuls = items(emulate(kernel).report)[1:]
    assert all(b.start_ns == pytest.approx(a.start_ns + a.occupied_ns) for a, b in pairwise(matmuls))


def test_interleaved_strides_are_independent() -> None:
    def kernel() -> None:
        t = nl.ndarray((128, 512, 2), nl.float32)
        nisa.memset(t[:, :, 0], 0.0, engine=nisa.engine.vector)
        nisa.memset(t[:, :, 1], 0.0, engine=nisa.engine.gpsimd)

    assert items(emulate(kernel).report)[1].start_ns == 0


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


# --- Costs -----------------------------------------------------------------------------------------------------------
def test_a_full_bf16_matmul_runs_at_the_documented_peak() -> None:
    cost = costs.matmul(512, 128, ("bfloat16", "bfloat16"), (False, False))
    assert 2 * 128 * 128 * 512 / cost.busy_ns / 1000 == pytest.approx(79, rel=0.01)  # TFLOPS


@pytest.mark.parametrize(
    ("columns", "dtype", "onezero", "cycles"),
    [
        (512, "bfloat16", False, 512),
        (1, "bfloat16", False, 64),
        (512, "float32", False, 2048),
        (512, "float32", True, 1024),
    ],
)
def test_matmul_cycles(columns: int, dtype: str, onezero: bool, cycles: int) -> None:
    cost = costs.matmul(columns, 128, (dtype, dtype), (onezero, False))
    assert cost.busy_ns * costs.TENSOR_GHZ == pytest.approx(cycles)


@pytest.mark.parametrize(
    ("dtype", "in_psum", "contiguous", "cycles"),
    [
        ("float32", False, True, 1024),
        ("bfloat16", False, True, 256),
        ("bfloat16", True, True, 512),
        ("bfloat16", False, False, 512),
        ("bfloat16", True, False, 1024),
    ],
)
def test_vector_performance_modes(dtype: str, in_psum: bool, contiguous: bool, cycles: int) -> None:
    dst = costs.Tile(1024, dtype, False, True, 2)
    src = costs.Tile(1024, dtype, in_psum, contiguous, 2 if contiguous else 4)
    assert costs.vector_single_input(dst, src, fast_capable=True) == cycles


def test_wide_strides_halve_the_bandwidth() -> None:
    narrow = costs.Tile(100, "float32", False, False, 16)
    wide = costs.Tile(100, "float32", False, False, 20)
    assert costs.strided(100, narrow) == 100
    assert costs.strided(100, narrow, wide) == 200


def test_dma_efficiency_follows_the_documented_curve() -> None:
    def efficiency(chunk: int) -> float:
        total = 128 * chunk
        return total / (16 * 23) / costs.dma_engine_ns(total, chunk, 16)

    assert efficiency(4) < 0.02
    assert efficiency(255) < 0.45
    assert 0.8 < efficiency(2048) < 0.9
    assert efficiency(4096) > 0.9


def test_every_constant_has_a_source() -> None:
    table = costs.constants()
    assert len(table) > 40
    for name, _, unit, source in table:
        assert unit, name
        assert source.startswith(("nki/", "about-neuron/", "inferred")), (name, source)


# --- Reports ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def report() -> Report:
    def kernel(a: Any) -> Any:
        t = tile(a)
        p = nl.ndarray((128, 128), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(p, t, t)
        return store(p)

    return emulate(kernel, np.zeros((128, 128), np.float32), grid=2).report


def test_critical_path_is_a_chain_to_the_end(report: Report) -> None:
    path = report.critical_path()
    assert [i.call for i in path] == ["dma_copy", "nc_matmul", "tensor_copy", "dma_copy"]
    assert path[-1].end_ns == report.cores[0].makespan_ns
    assert all(b.start_ns >= a.start_ns for a, b in pairwise(path))


def test_report_counts_traffic(report: Report) -> None:
    core = report.cores[0]
    assert (core.hbm_bytes_read, core.hbm_bytes_written, core.dma_count) == (65536, 65536, 2)
    assert (core.peak_sbuf_bytes, core.peak_psum_banks) == (512, 1)  # 128 float32: the loaded tile dies first
    assert core.calls == {"dma_copy": 2, "nc_matmul": 1, "tensor_copy": 1}


def test_table_and_json_say_modelled(report: Report) -> None:
    assert "modelled" in report.table()
    data = json.loads(report.to_json())
    assert data["modelled"] is True
    assert data["cores"][1]["engines"]["tensor"]["instructions"] == 1


def test_trace_is_valid_and_its_threads_do_not_overlap(report: Report, tmp_path: Path) -> None:
    report.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == sum(len(i) for i in report.instructions)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    threads: dict[tuple[int, int], float] = {}
    for event in sorted(spans, key=lambda e: e["ts"]):
        key = (event["pid"], event["tid"])
        assert key in named
        assert event["dur"] >= 0
        assert event["ts"] >= threads.get(key, 0.0) - 1e-6
        threads[key] = event["ts"] + event["dur"]


def test_untimed_runs_record_nothing() -> None:
    result = emulate(lambda a: store(tile(a)), np.zeros((4, 4), np.float32), timed=False)
    assert result.report.makespan_ns == 0
    assert result.report.instructions == ((),)


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
