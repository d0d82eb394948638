# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Checks as processes of their own: those that pass, hang, die, or say what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen35.selftest.child import main, run_in_child
from qwen35.selftest.outcome import Result, Status

HANGS = """
import subprocess, sys
print("compiling", flush=True)
compiler = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
open({pid!r}, "w").write(str(compiler.pid))
compiler.wait()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return asked(tmp_path, "environment")


def asked(tmp_path: Path, kind: str, **arguments: Any) -> Path:
    folder = tmp_path / "check"
    (folder / "work").mkdir(parents=True)
    (folder / "check.json").write_text(json.dumps({"name": kind, "kind": kind, "arguments": arguments}))
    return folder


def run(folder: Path, limit_s: float) -> Result:
    return run_in_child(folder, limit_s, lambda process: None)


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let every Python process run `code` when it starts."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]))


def test_a_check_gives_its_values(folder: Path) -> None:
    numbers: list[int] = []
    result = run_in_child(folder, 120, numbers.append)
    assert result.status is Status.PASSED, result.error
    assert result.values["cores"] == os.cpu_count() and result.seconds > 0 and len(numbers) == 1


def test_one_that_hangs_is_ended_with_all_that_it_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(tmp_path, monkeypatch, HANGS.format(pid=str(tmp_path / "pid")))
    result = run(folder, 2)
    assert result.status is Status.TIMED_OUT
    assert result.error.splitlines() == ["it did not end within 2 s", "compiling"]
    compiler = Path(f"/proc/{(tmp_path / 'pid').read_text()}")
    wait_until(lambda: has_ended(compiler), 10, "what it started still runs")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; print('last words', flush=True); os.abort()", "its process was ended by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process was ended by SIGKILL"),
        ("import os; os._exit(70)", "its process ended with status 70 and gave no result"),
    ],
)
def test_one_that_dies_says_how(
    code: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(tmp_path, monkeypatch, code)
    result = run(folder, 60)
    assert result.status is Status.DIED and result.error.splitlines()[0] == words
    assert ("last words" in result.error) == ("last words" in code)


def test_what_goes_wrong_in_a_check_is_its_outcome_with_its_first_lines(tmp_path: Path) -> None:
    folder = asked(tmp_path, "model", tp_degree=3, kernels={}, feature="generation")
    main(folder)
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["status"] == "failed"
    assert outcome["error"].startswith("Qwen35ConfigError: this Qwen3.5 configuration cannot run:")
    assert "tp_degree=3" in outcome["error"]


def test_what_a_failed_check_has_measured_is_in_its_outcome(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen35.selftest.environment.NXDI_AVAILABLE", True)
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    main(folder)
    outcome = json.loads((folder / "outcome.json").read_text())
    assert outcome["status"] == "failed" and outcome["values"]["cores"] == os.cpu_count()


def test_the_compiler_keeps_what_it_makes_in_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; print(os.environ['BASE_COMPILE_WORK_DIR'], os.environ['NEURON_COMPILE_CACHE_URL']); os._exit(1)"
    broken(tmp_path, monkeypatch, code.replace("; os._exit", ", flush=True); os._exit").replace("'])", "']"))
    lines = run(folder, 60).error.splitlines()
    assert lines[-1] == f"{folder}/work/compiler/ {folder}/work/cache"


def test_one_does_not_outlive_the_process_that_runs_it(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "neuron-ls"  # what the check waits for
    program.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 600\n"
    )
    program.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from qwen35.selftest.child import run_in_child\n"
        "run_in_child(Path(sys.argv[1]), 600, lambda process: None)"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)], env={**os.environ, "PATH": path})
    try:
        wait_until(lambda: (tmp_path / "pid").exists(), 60, "the check has not begun")
    finally:
        parent.kill()
        parent.wait()
    started = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}")
    wait_until(lambda: has_ended(started), 10, "what it started still runs")


def wait_until(holds: Callable[[], bool], seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def has_ended(process: Path) -> bool:
    try:
        return "Z" in (process / "stat").read_text().split(")")[-1]
    except OSError:
        return True
