# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a self-test leaves in its directory, so that it goes on after whatever ended it.

`checks/NAME/` has check.json, what was asked; log.txt, what was printed; work/, what was compiled; outcome.json by the
check's process and, once it has ended, result.json. `running.json` is there while it runs. A file has another name
until it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..serving.compiled import COMPILER_ENVIRONMENT, software
from .outcome import Result, Status
from .plan import Check

MOST_ATTEMPTS = 2
"""Of a check during which the self-test itself ended, as when the machine died."""

CHILD_MODULE = "qwen35.selftest.child"


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Make the directory, and keep other self-tests out of it: they would end each other's checks.

    Raises:
        ValueError: one runs there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--output {directory}: another self-test runs there; wait for it, or name another directory"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


class Journal:
    """Of one directory.

    A result counts only for the same check of the same software and compiler environment.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        environment = {name: os.environ.get(name) for name in (*COMPILER_ENVIRONMENT, "NEURON_LOGICAL_NC_CONFIG")}
        self._made_of = {"software": software(), "environment": environment}

    def folder(self, check: Check) -> Path:
        return self.directory / "checks" / check.name

    def result(self, check: Check, limit_s: float) -> Result | None:
        """What an earlier run found, or None where the check is to be run: one that was ended, when it may now take
        longer."""
        kept = _read(self.folder(check) / "result.json")
        if kept is not None and kept.get("key") == self._key(check):
            result = Result(**{**kept["result"], "status": Status(kept["result"]["status"])})
            return None if result.status is Status.TIMED_OUT and limit_s > kept.get("limit_s", 0.0) else result
        attempts, _ = self._cut_off(check)
        if attempts >= MOST_ATTEMPTS:
            note = f"the self-test ended {attempts} times while this ran"
            result = Result(Status.DIED, error=f"{note}: the machine, or what runs the self-test, was stopped")
            self.finish(check, result, limit_s)
            return result
        return None

    def begin(self, check: Check) -> str:
        """Note that a check starts, in a folder of its own; what was left there goes, its processes too.

        Returns:
            What a reader should know of earlier attempts; empty as a rule.
        """
        attempts, process = self._cut_off(check)
        _end_left_over(process, self.folder(check))
        shutil.rmtree(self.folder(check), ignore_errors=True)
        (self.folder(check) / "work").mkdir(parents=True)
        content = {"name": check.name, "kind": check.kind.value, "arguments": check.arguments}
        write_json(self.folder(check) / "check.json", content)
        self._note_running(check, attempts + 1, None)
        return "the self-test ended while this ran before: this is the second attempt" if attempts else ""

    def started(self, check: Check, process: int) -> None:
        """Note the process of a check that has begun."""
        self._note_running(check, self._cut_off(check)[0], process)

    def finish(self, check: Check, result: Result, limit_s: float) -> None:
        """Keep a result of a check that had `limit_s` seconds; it is there, whole, or not at all."""
        folder = self.folder(check)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "result.json", {"key": self._key(check), "limit_s": limit_s, "result": as_json(result)})
        (folder / "running.json").unlink(missing_ok=True)

    def abandon(self, check: Check) -> None:
        """Forget a check that was cut: it runs anew next time, and that it was cut is not held against it."""
        (self.folder(check) / "running.json").unlink(missing_ok=True)

    def _note_running(self, check: Check, attempt: int, process: int | None) -> None:
        content = {"key": self._key(check), "attempt": attempt, "process": process}
        write_json(self.folder(check) / "running.json", content)

    def _cut_off(self, check: Check) -> tuple[int, int | None]:
        """How often the check was begun and not ended, and its last process."""
        left = _read(self.folder(check) / "running.json")
        if left is None or left.get("key") != self._key(check):
            return 0, None
        return int(left["attempt"]), left["process"]

    def _key(self, check: Check) -> str:
        asked = {"kind": check.kind.value, "arguments": check.arguments, **self._made_of}
        return hashlib.sha256(json.dumps(asked, sort_keys=True, default=dict).encode()).hexdigest()


def as_json(result: Result) -> dict[str, Any]:
    """A result in values that JSON has."""
    return {**asdict(result), "status": result.status.value}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content, default=dict, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is nothing, or nothing that can be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _end_left_over(process: int | None, folder: Path) -> None:
    """End the processes of an earlier attempt, if they still run: they hold the device."""
    if process is None:
        return
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        if CHILD_MODULE.encode() in command and str(folder).encode() in command:
            os.killpg(process, signal.SIGKILL)
    except (OSError, ProcessLookupError):
        return
