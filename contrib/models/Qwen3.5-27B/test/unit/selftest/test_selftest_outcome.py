# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Ends of checks."""

from __future__ import annotations

from qwen35.selftest.outcome import Status


def test_what_is_not_there_or_was_not_run_is_no_failure() -> None:
    failures = {status for status in Status if status.is_failure}
    assert failures == {Status.FAILED, Status.DIED, Status.TIMED_OUT}
