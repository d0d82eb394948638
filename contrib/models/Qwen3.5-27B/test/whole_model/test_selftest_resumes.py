# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 selftest` killed in the middle: the same command goes on, and says what was cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.applications import needs_stand_ins
from support.faults import SRC

pytestmark = [pytest.mark.slow, needs_stand_ins]


def start(found: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qwen35.cli", "selftest", "--tp", "1", "--output", str(found)]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def until_it_runs(found: Path, check: str, process: subprocess.Popen[str]) -> int:
    """Wait for the process of a check, and give its number."""
    running = found / "checks" / check / "running.json"
    end = time.monotonic() + 180
    while True:
        assert time.monotonic() < end and process.poll() is None, f"{check} did not start"
        if running.exists() and (number := json.loads(running.read_text())["process"]) is not None:
            return int(number)
        time.sleep(0.2)


def is_running(process: int) -> bool:
    try:
        return b"selftest.child" in Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False


def results(found: Path) -> dict[str, dict[str, object]]:
    content: dict[str, dict[str, object]] = json.loads((found / "results.json").read_text())["results"]
    return content


def test_after_a_kill_it_goes_on_and_ends_what_was_left(tmp_path: Path) -> None:
    killed = start(tmp_path)
    child = until_it_runs(tmp_path, "decode", killed)
    killed.kill()
    killed.wait()
    before = (tmp_path / "checks" / "fused" / "result.json").stat().st_mtime_ns
    assert is_running(child)
    again = start(tmp_path)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0 and not is_running(child)
    assert (tmp_path / "checks" / "fused" / "result.json").stat().st_mtime_ns == before
    assert "this is the second attempt" in str(results(tmp_path)["decode"]["note"])
    assert {result["status"] for result in results(tmp_path).values()} == {"passed"}
    assert "[10] mini-tp1: passed" in output


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_end_it_leaves_no_process_and_a_report(end: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    child = until_it_runs(tmp_path, "fused", process)
    process.send_signal(end)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4 and not is_running(child)
    assert results(tmp_path)["environment"]["status"] == "passed"
    assert results(tmp_path)["fused"]["status"] == "not run"
    assert "## What was not checked" in output and (tmp_path / "selftest-report.tar.gz").exists()
