# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The order of things around checks: limits, what is kept, what is left behind. The checks are not run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen35.device_settings import read_settings
from qwen35.selftest import run
from qwen35.selftest.outcome import Result, Status
from qwen35.selftest.plan import Options, announced
from qwen35.selftest.run import Finished, Limits, announcement, run_selftest
from qwen35.selftest.verdict import ExitStatus

OPTIONS, LIMITS = Options(2, 1), Limits(3600, 900)
FEW = ["environment", "fused", "decode", "mini-tp1"]
PASSED = Result(Status.PASSED, 1.0)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checks that run; all pass."""
    names: list[str] = []
    ends(monkeypatch, names, lambda name: PASSED)
    return names


def ends(monkeypatch: pytest.MonkeyPatch, names: list[str], result: Callable[[str], Result]) -> None:
    """Let a process of a check end so, at once."""

    def run_in_child(folder: Path, limit_s: float, started: Callable[[int], None]) -> Result:
        names.append(folder.name)
        (folder / "log.txt").write_text("")
        return result(folder.name)

    monkeypatch.setattr(run, "run_in_child", run_in_child)


def selftest(directory: Path, limits: Limits = LIMITS) -> Finished:
    return run_selftest(OPTIONS, limits, directory, lambda line: None)


def test_all_is_announced_run_and_left_in_the_directory(ran: list[str], tmp_path: Path) -> None:
    lines: list[str] = []
    finished = run_selftest(OPTIONS, LIMITS, tmp_path, lines.append)
    assert finished.status is ExitStatus.ALL_WORKS
    assert ran == [check.name for check in announced(OPTIONS)] == [*finished.results]
    assert [line for line in lines if "12 compiled programs" in line]
    assert read_settings(tmp_path / "settings.json").kernels["deltanet_kernel"] == "fused"
    assert (tmp_path / "report.md").read_text() == finished.page
    assert json.loads((tmp_path / "results.json").read_text())["status"] == 0
    assert (tmp_path / "selftest-report.tar.gz").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_was_found_before_does_not_run_again_but_the_machine_is_looked_at(ran: list[str], tmp_path: Path) -> None:
    first = selftest(tmp_path)
    count = len(ran)
    lines: list[str] = []
    again = run_selftest(OPTIONS, LIMITS, tmp_path, lines.append)
    assert again.results == first.results and ran[count:] == ["environment"]
    told = [line for line in lines if line.startswith("[")]
    assert [line.endswith(", found by an earlier run") for line in told] == [False] + [True] * (len(first.results) - 1)


def test_it_goes_on_where_it_was_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names: list[str] = []

    def dies_with_the_machine(name: str) -> Result:
        if name == "decode":
            raise SystemExit
        return PASSED

    ends(monkeypatch, names, dies_with_the_machine)
    with pytest.raises(SystemExit):
        selftest(tmp_path)
    before = len(names)
    ends(monkeypatch, names, lambda name: PASSED)
    finished = selftest(tmp_path)
    assert names[before : before + 2] == ["environment", "decode"]
    assert len(names) == before + len(announced(OPTIONS)) - before + 2
    assert "second attempt" in finished.results["decode"].note


def test_what_the_time_limit_has_no_room_for_is_said_and_runs_the_next_time(ran: list[str], tmp_path: Path) -> None:
    finished = selftest(tmp_path, Limits(11, 900))  # the estimate of a kernel is 10 s, of the mini 30
    assert finished.status is ExitStatus.CUT_SHORT
    left = [name for name, result in finished.results.items() if result.status is Status.NOT_RUN]
    assert left == ["mini-tp1", "mini-tp2"] and not (tmp_path / "settings.json").exists()
    assert "## What was not checked" in finished.page
    assert selftest(tmp_path).status is ExitStatus.ALL_WORKS and ran[-2:] == left


def test_a_check_that_the_limit_of_all_ends_is_cut_and_not_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []
    ends(monkeypatch, names, lambda name: Result(Status.TIMED_OUT, 60.0) if name == "mini-tp1" else PASSED)
    cut = selftest(tmp_path, Limits(60, 900)).results["mini-tp1"]
    assert cut.status is Status.NOT_RUN and "time limit ended it" in cut.error
    again = selftest(tmp_path, Limits(3600, 60)).results["mini-tp1"]
    assert again.status is Status.TIMED_OUT


def test_a_real_checkpoint_may_take_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits: dict[str, float] = {}

    def run_in_child(folder: Path, limit_s: float, started: Callable[[int], None]) -> Result:
        limits[folder.name] = limit_s
        (folder / "log.txt").write_text("")
        return PASSED

    monkeypatch.setattr(run, "run_in_child", run_in_child)
    run_selftest(Options(1, 3, tmp_path / "model"), Limits(36000, 900), tmp_path / "out", lambda line: None)
    assert limits["checkpoint"] > 35000 and limits["server"] == limits["fused"] == 900


def test_settings_of_an_earlier_run_do_not_outlive_a_run_that_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []
    (tmp_path / "settings.json").write_text("of an earlier run")
    ends(monkeypatch, names, lambda name: Result(Status.FAILED, 1, "no") if "mini" in name else PASSED)
    assert selftest(tmp_path).status is ExitStatus.NOTHING_WORKS
    assert not (tmp_path / "settings.json").exists()


def test_an_interrupt_leaves_a_report_of_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names: list[str] = []

    def interrupted(name: str) -> Result:
        if name == "mini-tp2":
            raise KeyboardInterrupt
        return PASSED

    ends(monkeypatch, names, interrupted)
    finished = selftest(tmp_path)
    assert finished.status is ExitStatus.CUT_SHORT and names[-1] == "mini-tp2"
    assert read_settings(tmp_path / "settings.json").made["generated_at_tp_degree"] == 1


def test_what_would_not_fit_is_said_before_anything_starts(tmp_path: Path) -> None:
    text = "\n".join(announcement(OPTIONS, Limits(90, 900), tmp_path))
    assert "these would not fit the time limit: mini-tp1, mini-tp2" in text
    assert "would not fit" not in "\n".join(announcement(OPTIONS, LIMITS, tmp_path))


def test_on_a_device_the_estimate_says_what_it_rests_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NXDI_AVAILABLE", True)
    text = "\n".join(announcement(OPTIONS, LIMITS, tmp_path))
    assert "assumed: nobody has measured it" in text and "13 minutes" in text


def test_one_directory_has_one_self_test_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused: list[str] = []

    def starts_another(name: str) -> Result:
        with pytest.raises(ValueError, match="another self-test runs there") as error:
            selftest(tmp_path)
        refused.append(str(error.value))
        return PASSED

    (tmp_path / "settings.json").write_text("of an earlier run")
    ends(monkeypatch, [], starts_another)
    assert selftest(tmp_path).status is ExitStatus.ALL_WORKS
    assert len(refused) == len(announced(OPTIONS)) and str(tmp_path) in refused[0]
    ends(monkeypatch, [], lambda name: PASSED)
    assert selftest(tmp_path).status is ExitStatus.ALL_WORKS


def test_a_check_that_was_ended_runs_again_when_it_may_take_longer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []
    ends(monkeypatch, names, lambda name: Result(Status.TIMED_OUT, 60.0) if name == "decode" else PASSED)
    assert selftest(tmp_path, Limits(3600, 60)).results["decode"].status is Status.TIMED_OUT
    ends(monkeypatch, names, lambda name: PASSED)
    before = len(names)
    assert selftest(tmp_path, Limits(3600, 60)).results["decode"].status is Status.TIMED_OUT
    assert names[before:] == ["environment"]  # the machine is looked at each time
    assert selftest(tmp_path, Limits(3600, 900)).results["decode"].status is Status.PASSED
    assert "decode" in names[before:]


def test_a_failure_on_a_full_disk_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names: list[str] = []
    free = run.LEAST_FREE_BYTES
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    def fills_the_disk(name: str) -> Result:
        nonlocal free
        if name == "decode":
            free = run.LEAST_FREE_BYTES - 1
            return Result(Status.FAILED, 1, "OSError: [Errno 28] No space left on device")
        return PASSED

    ends(monkeypatch, names, fills_the_disk)
    finished = selftest(tmp_path)
    assert finished.results["decode"].status is Status.NOT_RUN and names[-1] == "decode"
    assert "free some of the disk" in finished.results["decode"].error
    assert finished.status is ExitStatus.CUT_SHORT and finished.settings is None
    free = run.LEAST_FREE_BYTES
    ends(monkeypatch, names, lambda name: PASSED)
    assert selftest(tmp_path).status is ExitStatus.ALL_WORKS


def test_an_interrupt_is_not_called_a_time_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(name: str) -> Result:
        raise KeyboardInterrupt

    ends(monkeypatch, [], interrupted)
    assert "time limit" not in selftest(tmp_path).page
