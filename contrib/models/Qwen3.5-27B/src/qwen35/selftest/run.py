# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Running the checks one after the other, within a time limit, whatever becomes of each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..device_settings import DeviceSettings, write_settings
from ..nxdi import NXDI_AVAILABLE
from .archive import write_archive
from .child import run_in_child
from .journal import Journal, alone_in, as_json, write_json
from .outcome import Result, Status
from .plan import SECONDS_A_PROGRAM, TIERS, Check, Conclusion, Findings, Kind, Options, announced, checks, conclude
from .report import as_page, one_line_of
from .verdict import ExitStatus, exit_status, settings_of

Say = Callable[[str], None]

SETTINGS_FILE = "settings.json"

LEAST_FREE_BYTES = 200_000_000
"""Of the disk: a failure with less says nothing of the machine. The mini's weights, for every rank, are 40 MB."""


@dataclass(frozen=True)
class Limits:
    """In seconds: of all checks, and of one; a real checkpoint may take all the time that is left."""

    all_s: float
    check_s: float


@dataclass(frozen=True)
class Finished:
    """What a self-test came to.

    Attributes:
        settings: None where the mini did not generate.
        results: by the name of the check, in the order of the checks.
        page: the report.
    """

    status: ExitStatus
    settings: DeviceSettings | None
    results: dict[str, Result]
    page: str


def run_selftest(options: Options, limits: Limits, directory: Path, say: Say) -> Finished:
    """Run what `plan.checks` asks for, in processes of their own, and leave report and settings in `directory`.

    What an earlier run of the same software has found there counts. An interrupt ends the check that runs, and leaves
    a report of the others.

    Raises:
        ValueError: another self-test runs in `directory`.
        OSError: something there cannot be written.
    """
    with alone_in(directory):
        return _run_all(options, limits, directory, say)


def _run_all(options: Options, limits: Limits, directory: Path, say: Say) -> Finished:
    journal = Journal(directory)
    (directory / SETTINGS_FILE).unlink(missing_ok=True)  # whatever happens: no settings of an earlier run stay
    for line in announcement(options, limits, directory):
        say(line)
    results: dict[str, Result] = {}
    start, interrupted = time.monotonic(), False
    deadline = start + limits.all_s
    done: list[Check] = []
    for check in checks(options, Findings(results)):
        if check.name in results:
            continue
        done.append(check)
        if interrupted:
            results[check.name] = Result(Status.NOT_RUN, error="the self-test was interrupted")
            continue
        kept: Result | None = None
        try:
            if check.kind is not Kind.ENVIRONMENT:  # the machine may have another driver since, or no device
                kept = journal.result(check, limits.check_s)
            results[check.name] = kept or _run_check(journal, check, deadline, limits.check_s)
        except KeyboardInterrupt:
            interrupted = True
            journal.abandon(check)
            results[check.name] = Result(Status.NOT_RUN, error="interrupted")
        of_earlier = ", found by an earlier run" if kept is not None else ""
        say(f"[{len(done)}] {one_line_of(check, results[check.name])}{of_earlier}")
    return _finish(options, directory, done, results, say)


def announcement(options: Options, limits: Limits, directory: Path) -> Iterator[str]:
    """What will run, for how long, and what that estimate rests on."""
    planned = announced(options)
    programs = sum(check.programs for check in planned)
    total = sum(check.seconds(NXDI_AVAILABLE) for check in planned)
    where = "on Neuron devices" if NXDI_AVAILABLE else "without a device: on CPU stand-ins of NxDI, kernels emulated"
    tiers = "; ".join(f"tier {tier}: {what}" for tier, what in TIERS.items() if tier <= options.tier)
    yield f"qwen35 selftest {where}; {tiers}"
    yield f"in {directory}; the same command goes on there after a crash"
    yield f"{len(planned)} checks, {programs} compiled programs; more only where one fails, to find what works instead:"
    width = max(len(check.name) for check in planned)
    for check in planned:
        count = f"{check.programs} program{'s'[: check.programs != 1]}" if check.programs else "no program"
        yield f"  {check.name:{width}}  {count:11}  about {check.seconds(NXDI_AVAILABLE):4.0f} s  {check.what}"
    if NXDI_AVAILABLE:
        basis = (
            f"{SECONDS_A_PROGRAM} s a program, assumed: nobody has measured it. The one published time is 13 minutes, "
            "for 27B with a context of 128 tokens"
        )
    else:
        basis = "what two shared cores took"
    yield f"about {total / 60:.0f} min in all ({basis})"
    yield f"time limit {limits.all_s / 60:g} min, {limits.check_s / 60:g} min a check"
    beyond = [check.name for check, end in _ends(planned) if end > limits.all_s]
    if beyond:
        yield f"by that estimate these would not fit the time limit: {', '.join(beyond)}"


def _ends(planned: list[Check]) -> Iterator[tuple[Check, float]]:
    end = 0.0
    for check in planned:
        end += check.seconds(NXDI_AVAILABLE)
        yield check, end


def _run_check(journal: Journal, check: Check, deadline: float, check_s: float) -> Result:
    """The result of a check, which is kept unless the time limit or a full disk made it."""
    remaining = deadline - time.monotonic()
    if check.seconds(NXDI_AVAILABLE) > remaining:
        return Result(Status.NOT_RUN, error=f"{max(0.0, remaining):.0f} s of the time limit were left")
    if full := _full_disk(journal.directory):
        return Result(Status.NOT_RUN, error=full)
    note = journal.begin(check)
    limit = remaining if check.kind is Kind.CHECKPOINT else min(check_s, remaining)
    result = run_in_child(journal.folder(check), limit, lambda pid: journal.started(check, pid))
    if result.status is Status.TIMED_OUT and limit == remaining:
        journal.abandon(check)
        return Result(Status.NOT_RUN, result.seconds, f"the time limit ended it after {result.seconds:.0f} s")
    if result.status.is_failure and (full := _full_disk(journal.directory)):
        journal.abandon(check)
        return Result(Status.NOT_RUN, result.seconds, full)
    result = Result(result.status, result.seconds, result.error, result.values, note)
    journal.finish(check, result, check_s)
    if check.kind is Kind.MODEL and result.status is Status.PASSED:
        shutil.rmtree(journal.folder(check) / "work", ignore_errors=True)  # the mini's weights, for every rank
    return result


def _full_disk(directory: Path) -> str:
    """What to say where a check would fail, or has failed, for want of room; empty where there is some."""
    free = shutil.disk_usage(directory).free
    return f"{free / 1e6:.0f} MB are free in {directory}: free some of the disk" if free < LEAST_FREE_BYTES else ""


def _finish(options: Options, directory: Path, done: list[Check], results: dict[str, Result], say: Say) -> Finished:
    """Write settings, report and archive."""
    conclusion: Conclusion = conclude(options, results)
    settings, status = settings_of(conclusion, options, results), exit_status(conclusion, results)
    if settings is not None:
        write_settings(directory / SETTINGS_FILE, settings)
    page = as_page(options, done, results, conclusion, settings, status, directory)
    unfinished = directory / ".report.md"
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(directory / "report.md")
    content = {"status": int(status), "results": {name: as_json(result) for name, result in results.items()}}
    write_json(directory / "results.json", content)
    archive = write_archive(directory, [name for name, result in results.items() if result.status.is_failure])
    say(f"to send: {archive}")
    return Finished(status, settings, results, page)
