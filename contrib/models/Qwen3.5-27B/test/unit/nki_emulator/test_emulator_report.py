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

from nki_emulator import Report, emulate
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
