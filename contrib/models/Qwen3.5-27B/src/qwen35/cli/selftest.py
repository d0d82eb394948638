# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 selftest`: what works on this machine, and device settings with which it does."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..nxdi import NXDI_AVAILABLE
from .options import existing, options_from, positive

if TYPE_CHECKING:
    from .options import Commands

MOST_MINUTES = 10_000.0

EXIT_STATUS = """\
exit status:
  0  all checks passed
  1  something failed, and settings.json says what works instead
  2  bad arguments
  3  nothing generates: no settings
  4  the time limit, a full disk or an interrupt left checks out; the same command goes on with them
"""


@dataclass(frozen=True)
class SelftestOptions:
    """The options of `qwen35 selftest`."""

    tp: int
    tier: int
    time_limit: float
    check_limit: float
    output: Path
    model: Path | None
    json: Path | None


def add_parser(commands: Commands) -> None:
    """Add `selftest` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "selftest",
        help="find out what works on this machine",
        description="Check kernels and features one by one, and write device settings that were seen to work.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)
    tp = 4 if NXDI_AVAILABLE else 2
    parser.add_argument(
        "--tp", type=positive, default=tp, metavar="N", help=f"a tensor-parallel degree beside 1 ({tp})"
    )
    parser.add_argument(
        "--tier",
        type=int,
        choices=(1, 2, 3),
        default=1,
        help="1: environment, default kernels, the mini; 2: all kernels and features; 3: vLLM, a real checkpoint (1)",
    )
    parser.add_argument(
        "--time-limit", type=_minutes, default=60.0, metavar="MINUTES", help="of all checks that run now (60)"
    )
    parser.add_argument(
        "--check-limit", type=_minutes, default=15.0, metavar="MINUTES", help="of one check, then it is ended (15)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("qwen35-selftest"),
        metavar="DIR",
        help="report, settings and logs; what was found there before counts (qwen35-selftest)",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a real checkpoint, with --tier 3")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON there, too")


def _run(args: argparse.Namespace) -> int:
    from ..configuration_qwen35 import Qwen35InferenceConfig
    from ..selftest.cases import ModelCase
    from ..selftest.journal import as_json, write_json
    from ..selftest.plan import Options
    from ..selftest.run import Limits, run_selftest
    from ..serving.loading import MINI_CHECKPOINT

    options = options_from(SelftestOptions, args)
    if options.model is not None:
        if options.tier < 3:
            raise ValueError(f"--model {options.model} with --tier {options.tier}: a checkpoint is for --tier 3")
        existing(options.model)
    # A degree that the mini does not take is refused here.
    Qwen35InferenceConfig.from_pretrained(MINI_CHECKPOINT, neuron_config=ModelCase(options.tp).neuron_config())
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output}: this is no directory; name another one")
    if options.json is not None:
        _require_writable(options.json, options.output)
    model = None if options.model is None else options.model.resolve()
    limits = Limits(60 * options.time_limit, 60 * options.check_limit)
    asked = Options(options.tp, options.tier, model)
    with _ends_as_interrupts():
        finished = run_selftest(asked, limits, options.output.resolve(), _say)
    _say(f"\n{finished.page}".rstrip("\n"))
    if options.json is not None:
        results = {name: as_json(result) for name, result in finished.results.items()}
        settings = None if finished.settings is None else finished.settings.content
        write_json(options.json, {"status": int(finished.status), "settings": settings, "results": results})
    return int(finished.status)


@contextmanager
def _ends_as_interrupts() -> Iterator[None]:
    """Being asked to end, or losing the terminal, is an interrupt, too; what is ignored, as by nohup, stays so."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """Print a line, if there is still somebody to read it: report.md will have all that matters."""
    try:
        print(line, flush=True)
    except UnicodeEncodeError:
        print(line.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _require_writable(file: Path, made: Path) -> None:
    """Refuse, before an hour of checks, a file that cannot be written; the directory `made` will be there by then."""
    folder = file.resolve().parent
    fits = folder == made.resolve() or (folder.is_dir() and os.access(folder, os.W_OK))
    if file.is_dir() or not fits:
        raise ValueError(f"--json {file}: cannot be written; name a file in a directory that is there")


def _minutes(text: str) -> float:
    """An argument that is a time: more than none."""
    value = float(text)
    if not 0 < value <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0, and at most {MOST_MINUTES:,.0f}")
    return value
