# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Reports and traces of a launch."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nki_emulator import NkiWarning, Report, costs, emulate
from nki_emulator import isa as nisa
from nki_emulator import language as nl
from support.onchip import store, tile


@pytest.fixture
def report() -> Report:
    def kernel(a: Any) -> Any:
        t = tile(a)
        p = nl.ndarray((128, 128), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(p, t, t)
        return store(p)

    with pytest.warns(NkiWarning, match="core 1 writes bytes of .* that core 0 writes"):
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


@pytest.mark.parametrize(("grid", "launch"), [(None, costs.LAUNCH_LNC1_NS), (2, costs.LAUNCH_LNC2_NS)])
def test_the_launch_is_told_apart_from_the_kernel(grid: int | None, launch: float) -> None:
    def kernel() -> None:
        nisa.memset(nl.ndarray((128, 512), nl.float32), 0.0)

    report = emulate(kernel, grid=grid).report
    assert report.launch_ns == launch
    assert report.device_ns == report.launch_ns + report.makespan_ns
    assert report.makespan_ns == max(core.makespan_ns for core in report.cores) < 1000
    data = json.loads(report.to_json())
    assert (data["launch_ns"], data["makespan_ns"]) == (report.launch_ns, report.makespan_ns)
    assert data["device_ns"] == report.device_ns
    assert f"launched by itself {report.device_ns / 1000:.2f} us, of which the launch {launch / 1000:.2f} us" in (
        report.table()
    )


def test_the_latency_bound_is_the_longest_chain_of_data() -> None:
    def kernel(x: Any, independent: int) -> Any:
        t = tile(x)
        for _ in range(3):
            nisa.tensor_scalar(dst=t, data=t, op0=nl.add, operand0=1.0, engine=nisa.engine.vector)
        for _ in range(independent):
            nisa.memset(nl.ndarray((128, 512), nl.float32), 0.0)
        return store(t)

    x = np.zeros((128, 512), np.float32)
    plain, busy = (emulate(kernel, x, n).report for n in (0, 100))
    load, *adds, final = plain.instructions[0]
    assert plain.latency_bound_ns == pytest.approx(load.cost_ns + sum(i.cost_ns for i in adds) + final.cost_ns)
    assert plain.latency_bound_ns == pytest.approx(plain.makespan_ns)
    assert busy.latency_bound_ns == plain.latency_bound_ns < busy.makespan_ns
    assert json.loads(busy.to_json())["latency_bound_ns"] == busy.latency_bound_ns


@pytest.mark.parametrize("how", ["barrier", "sendrecv"])
def test_the_chain_of_data_crosses_from_core_to_core(how: str) -> None:
    def kernel(steps: int) -> None:
        me = nl.program_id(0)
        shared = nl.ndarray((2, 128, 512), nl.float32, buffer=nl.shared_hbm)
        t = nl.ndarray((128, 512), nl.float32)
        nisa.memset(t, 1.0)
        for _ in range(steps if me == 0 else 0):
            nisa.tensor_scalar(dst=t, data=t, op0=nl.multiply, operand0=1.0)
        nisa.dma_copy(dst=shared[me], src=t)
        meeting(me, how, shared, t)
        nisa.dma_copy(dst=shared[me], src=t)

    few, many = (emulate(kernel, n, grid=2).report for n in (1, 51))
    step = next(i for i in few.instructions[0] if i.call == "tensor_scalar").cost_ns
    assert many.latency_bound_ns - few.latency_bound_ns == pytest.approx(50 * step)


def meeting(me: int, how: str, shared: Any, t: Any) -> None:
    if how == "barrier":
        nisa.core_barrier(data=shared, cores=(0, 1))
    else:
        other = nl.ndarray((128, 512), nl.float32)
        nisa.sendrecv(src=t, dst=other, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
        nisa.tensor_copy(dst=t, src=other)


@pytest.mark.parametrize("how", ["barrier", "sendrecv"])
@pytest.mark.parametrize("slow", [0, 1])
def test_the_critical_path_crosses_to_the_core_that_is_waited_for(how: str, slow: int) -> None:
    def kernel() -> None:
        me = nl.program_id(0)
        shared = nl.ndarray((2, 128, 512), nl.float32, buffer=nl.shared_hbm)
        t = nl.ndarray((128, 512), nl.float32)
        nisa.memset(t, 1.0)
        for _ in range(50 if me == slow else 1):
            nisa.tensor_scalar(dst=t, data=t, op0=nl.multiply, operand0=1.0)
        nisa.dma_copy(dst=shared[me], src=t)
        meeting(me, how, shared, t)

    report = emulate(kernel, grid=2).report
    for core in (0, 1):
        path = report.critical_path(core)
        assert path[-1].core == core
        assert sum(i.call == "tensor_scalar" and i.core == slow for i in path) == 50
        assert all(b.start_ns >= a.start_ns for a, b in pairwise(path))
    assert f"vector tensor_scalar of core {slow}" in report.table()


def test_the_critical_path_follows_data_through_shared_hbm() -> None:
    def kernel() -> None:
        me = nl.program_id(0)
        shared = nl.ndarray((128, 512), nl.float32, buffer=nl.shared_hbm)
        t = nl.ndarray((128, 512), nl.float32)
        nisa.memset(t, 1.0)
        if me == 0:
            for _ in range(9):
                nisa.tensor_scalar(dst=t, data=t, op0=nl.multiply, operand0=1.0)
            nisa.dma_copy(dst=shared, src=t)
        nisa.core_barrier(data=shared, cores=(0, 1))
        if me == 1:
            nisa.dma_copy(dst=t, src=shared)

    path = emulate(kernel, grid=2).report.critical_path(1)
    assert [i.call for i in path if i.core == 0].count("tensor_scalar") == 9
    assert [(i.core, i.call) for i in path][-1] == (1, "dma_copy")


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
