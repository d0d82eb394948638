# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What becomes of a check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Values = dict[str, Any]
"""What a check measured, by name, in values that JSON has."""


class CheckFailed(Exception):
    """What was computed is not what it should be, in one line; with what else was measured."""

    def __init__(self, problem: str, values: Mapping[str, Any] | None = None) -> None:
        super().__init__(problem)
        self.values = values or {}


class Absent(Exception):
    """What the check is about is not installed here, in one line."""


class Status(str, Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"  # it said why
    DIED = "died"  # its process ended without a word, by a signal or an exit
    TIMED_OUT = "timed out"  # its process was ended
    ABSENT = "absent"  # what it is about is not installed; no failure
    NOT_RUN = "not run"  # no time, no room, or an interrupt; no failure

    @property
    def is_failure(self) -> bool:
        return self in (Status.FAILED, Status.DIED, Status.TIMED_OUT)


@dataclass(frozen=True)
class Result:
    """What a check gave.

    Attributes:
        status: how it ended.
        seconds: that it took.
        error: first what went wrong, in one line, then as much of what was printed last as tells more.
        values: what it measured.
        note: what else a reader should know, such as a first attempt that was cut off.
    """

    status: Status
    seconds: float = 0.0
    error: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
