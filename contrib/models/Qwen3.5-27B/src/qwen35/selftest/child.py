# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A check as a process of its own, with all that it starts: one that hangs or dies costs only itself."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .journal import CHILD_MODULE, as_json, write_json
from .outcome import Absent, CheckFailed, Result, Status, Values

LOG_LINES = 12
"""Last lines of a log that are quoted where a process ended without a word."""

ERROR_LINES = 8


def run_in_child(folder: Path, limit_s: float, started: Callable[[int], None]) -> Result:
    """Run the check that `folder`/check.json describes, for `limit_s` seconds at most; then end all its processes.

    They end with this process, too, whatever ends it: they hold the device.

    Args:
        started: is told the process.
    """
    start = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", CHILD_MODULE, str(folder)],
            stdin=subprocess.PIPE,  # which closes when this process ends: see end_with_parent
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **_compiler_places(folder)},
        )
        try:
            started(process.pid)
            process.wait(limit_s)
            in_time = True
        except subprocess.TimeoutExpired:
            in_time = False
        finally:
            _end_group(process)
    seconds = time.monotonic() - start
    outcome = folder / "outcome.json"
    if outcome.exists():
        content = json.loads(outcome.read_text(encoding="utf-8"))
        return Result(**{**content, "status": Status(content["status"]), "seconds": seconds})
    tail = log_tail(folder)
    if not in_time:
        return Result(Status.TIMED_OUT, seconds, f"it did not end within {limit_s:.0f} s\n{tail}".strip())
    return Result(Status.DIED, seconds, f"its process {_how_it_ended(process.returncode)}\n{tail}".strip())


def log_tail(folder: Path) -> str:
    """The last lines of what a check printed."""
    with (folder / "log.txt").open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 20_000))
        lines = log.read().decode(errors="replace").splitlines()
    return "\n".join([line[:300] for line in lines if line.strip()][-LOG_LINES:])


def _compiler_places(folder: Path) -> dict[str, str]:
    """Where the compiler keeps what it makes: below the check's own folder.

    A cache of its own, too: the common one remembers failures, and would give an old one for a compilation that was
    mended (about-neuron/arch/neuron-features/neuron-caching.rst). BASE_COMPILE_WORK_DIR is NxDI's.
    """
    work = folder / "work"
    return {"BASE_COMPILE_WORK_DIR": f"{work / 'compiler'}/", "NEURON_COMPILE_CACHE_URL": str(work / "cache")}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it has started that has not left its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _how_it_ended(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name if -status in [*signal.Signals] else f"signal {-status}"
        return f"was ended by {name}"
    return f"ended with status {status} and gave no result"


# --- In the process --------------------------------------------------------------------------------------------------
def end_with_parent() -> None:
    """End this process and its group when the other end of standard input closes; what is started here gets none."""
    held, nothing = os.dup(sys.stdin.fileno()), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)

    def wait() -> None:
        if not os.read(held, 1):
            os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: Path) -> None:
    """Run a check here and write its outcome."""
    faulthandler.enable()
    asked = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    try:
        result = Result(Status.PASSED, values=_run(asked["kind"], asked["arguments"], folder / "work"))
    except CheckFailed as error:
        result = Result(Status.FAILED, error=str(error), values=error.values)
    except Absent as error:
        result = Result(Status.ABSENT, error=str(error))
    except Exception as error:
        traceback.print_exc()
        result = Result(Status.FAILED, error=_first_lines(error))
    write_json(folder / "outcome.json", as_json(result))


def _run(kind: str, arguments: dict[str, Any], workdir: Path) -> Values:
    # Each kind's modules are imported by its own process alone: what does not import costs one kind of check.
    if kind == "environment":
        from .environment import run_environment_check

        return run_environment_check(workdir)
    if kind == "kernel":
        from .kernel_checks import run_kernel_check

        return run_kernel_check(arguments["kernel"], workdir)
    if kind == "model":
        from .model_checks import ModelCase, run_model_check

        return run_model_check(ModelCase.of_json(arguments), workdir)
    if kind == "server":
        from .server_check import run_server_check

        return run_server_check(arguments["tp_degree"], arguments["kernels"], workdir)
    from .checkpoint_check import run_checkpoint_check

    return run_checkpoint_check(Path(arguments["model"]), arguments["tp_degree"], arguments["kernels"], workdir)


def _first_lines(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    return "\n".join([f"{name}: {lines[0]}" if lines else name, *lines[1:ERROR_LINES]])


if __name__ == "__main__":
    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):  # it is none where somebody runs a check by hand
        end_with_parent()
    main(Path(sys.argv[1]))
