# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 selftest`: its arguments, and what it leaves; whole runs are in whole_model/test_selftest_faults.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qwen35.cli import main
from qwen35.selftest import run
from qwen35.selftest.outcome import Result, Status


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "3"], "tp_degree=3"),
        (["--model", "somewhere"], "--model somewhere with --tier 1: a checkpoint is for --tier 3"),
        (["--model", "nowhere", "--tier", "3"], "--model nowhere: no config.json there"),
        (["--output", __file__], "this is no directory"),
        (["--json", "nowhere/out.json"], "--json nowhere/out.json: cannot be written"),
        (["--json", "."], "--json .: cannot be written"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["selftest", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_limit_is_a_time(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["selftest", f"--time-limit={minutes}"])
    assert "must be more than 0" in capsys.readouterr().err


def test_the_exit_status_is_that_of_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_in_child(folder: Path, *args: object) -> Result:
        (folder / "log.txt").write_text("")
        return Result(Status.FAILED, 1, "no") if folder.name == "decode" else Result(Status.PASSED, 1)

    monkeypatch.setattr(run, "run_in_child", run_in_child)
    arguments = ["selftest", "--tp", "1", "--output", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]
    assert main(arguments) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["status"] == 1 and found["settings"]["kernels"]["deltanet_kernel"] == "torch"
    assert found["results"]["decode"]["status"] == "failed"
    assert "# qwen35 selftest, tier 1" in capsys.readouterr().out


def test_a_run_outlives_its_terminal_and_leaves_its_page(tmp_path: Path) -> None:
    arguments = ["--tp", "1", "--time-limit", "0.001", "--output", str(tmp_path / "out")]
    code = "import sys; from qwen35.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "selftest", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        assert ran.stdout is not None and ran.stderr is not None
        ran.stdout.readline()
        ran.stdout.close()
        errors = ran.stderr.read().decode()
    assert ran.returncode == 4, errors
    assert errors == "" and (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_session_is_an_interrupt(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_in_child(folder: Path, *args: object) -> Result:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    before = signal.getsignal(number)
    monkeypatch.setattr(run, "run_in_child", run_in_child)
    assert main(["selftest", "--tp", "1", "--output", str(tmp_path / "out")]) == 4
    assert (tmp_path / "out" / "report.md").exists() and signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_in_child(folder: Path, *args: object) -> Result:
        os.kill(os.getpid(), signal.SIGHUP)
        (folder / "log.txt").write_text("")
        return Result(Status.PASSED, 1)

    monkeypatch.setattr(run, "run_in_child", run_in_child)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        assert main(["selftest", "--tp", "1", "--output", str(tmp_path / "out")]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
