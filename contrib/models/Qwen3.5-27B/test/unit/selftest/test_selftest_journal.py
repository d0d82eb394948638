# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept of a self-test, and what a later run makes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35.selftest.journal import CHILD_MODULE, Journal
from qwen35.selftest.outcome import Result, Status
from qwen35.selftest.plan import Check, Kind

CHECK = Check("fused", Kind.KERNEL, "kernel fused alone", 1, {"kernel": "fused"})
LIMIT_S = 900.0
RESULT = Result(Status.FAILED, 1.5, "one line\nmore", {"error": 1e-3, "measured_us": None}, "a note")


def test_a_finished_check_is_there_for_the_next_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.result(CHECK, LIMIT_S) is None
    assert journal.begin(CHECK) == ""
    journal.finish(CHECK, RESULT, LIMIT_S)
    assert Journal(tmp_path).result(CHECK, LIMIT_S) == RESULT


def test_it_counts_for_the_same_check_of_the_same_software_and_compiler_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(tmp_path).finish(CHECK, RESULT, LIMIT_S)
    assert Journal(tmp_path).result(Check("fused", Kind.KERNEL, "", 1, {"kernel": "chunked"}), LIMIT_S) is None
    with monkeypatch.context() as patch:
        patch.setenv("NEURON_CC_FLAGS", "-O3")
        assert Journal(tmp_path).result(CHECK, LIMIT_S) is None
    with monkeypatch.context() as patch:
        patch.setattr("qwen35.selftest.journal.software", lambda: {"neuronx-cc": "another"})
        assert Journal(tmp_path).result(CHECK, LIMIT_S) is None
    assert Journal(tmp_path).result(CHECK, LIMIT_S) == RESULT


def test_what_was_running_when_the_machine_died_runs_once_more_and_then_counts_as_dead(tmp_path: Path) -> None:
    assert Journal(tmp_path).begin(CHECK) == ""
    again = Journal(tmp_path)
    assert again.result(CHECK, LIMIT_S) is None
    assert "second attempt" in again.begin(CHECK)
    result = Journal(tmp_path).result(CHECK, LIMIT_S)
    assert result is not None and result.status is Status.DIED and "ended 2 times" in result.error


def test_what_the_time_limit_cuts_runs_again_as_if_for_the_first_time(tmp_path: Path) -> None:
    for _ in range(3):
        journal = Journal(tmp_path)
        assert journal.begin(CHECK) == ""
        journal.abandon(CHECK)
        assert journal.result(CHECK, LIMIT_S) is None


def test_a_result_that_is_not_whole_counts_for_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.finish(CHECK, RESULT, LIMIT_S)
    file = journal.folder(CHECK) / "result.json"
    file.write_text(file.read_text()[:-20])
    assert journal.result(CHECK, LIMIT_S) is None


def test_a_process_that_an_earlier_run_left_is_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(CHECK)
    waits = "import time; time.sleep(600)"
    named = [sys.executable, "-S", "-c", waits, "-m", CHILD_MODULE, str(journal.folder(CHECK))]
    other = [sys.executable, "-S", "-c", waits, "something", "else"]
    left, unrelated = (subprocess.Popen(command, start_new_session=True) for command in (named, other))
    try:
        journal.started(CHECK, unrelated.pid)
        Journal(tmp_path).begin(CHECK)
        assert unrelated.poll() is None, "another program's process has the number now"
        journal.started(CHECK, left.pid)
        Journal(tmp_path).begin(CHECK)
        assert left.wait(10) == -9
    finally:
        for process in (left, unrelated):
            process.kill()
            process.wait()


def test_what_a_check_is_asked_is_in_its_folder(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(CHECK)
    asked = json.loads((journal.folder(CHECK) / "check.json").read_text())
    assert asked == {"name": "fused", "kind": "kernel", "arguments": {"kernel": "fused"}}
