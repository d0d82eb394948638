# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Exit statuses, and settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen35.device_settings import read_settings, write_settings
from qwen35.selftest.outcome import Result, Status
from qwen35.selftest.plan import Conclusion, Kernels, Options
from qwen35.selftest.verdict import EMULATED, ExitStatus, exit_status, settings_of

WORKS = Conclusion(Kernels("fused"), 2, {})
NOTHING = Conclusion(None, 0, {})


@pytest.mark.parametrize(
    ("conclusion", "statuses", "expected"),
    [
        (WORKS, [Status.PASSED, Status.ABSENT], ExitStatus.ALL_WORKS),
        (WORKS, [Status.PASSED, Status.DIED], ExitStatus.SETTINGS_NEEDED),
        (WORKS, [Status.PASSED, Status.TIMED_OUT], ExitStatus.SETTINGS_NEEDED),
        (WORKS, [Status.FAILED, Status.NOT_RUN], ExitStatus.CUT_SHORT),
        (NOTHING, [Status.PASSED, Status.NOT_RUN], ExitStatus.CUT_SHORT),
        (NOTHING, [Status.FAILED, Status.NOT_RUN], ExitStatus.NOTHING_WORKS),
        (NOTHING, [Status.FAILED], ExitStatus.NOTHING_WORKS),
    ],
)
def test_the_exit_status_is_of_the_worst(conclusion: Conclusion, statuses: list[Status], expected: ExitStatus) -> None:
    assert exit_status(conclusion, {str(i): Result(status) for i, status in enumerate(statuses)}) is expected


def test_settings_are_what_a_configuration_takes(tmp_path: Path) -> None:
    attention = {"context_encoding": "nki", "continuation": "torch", "token_generation": "nki"}
    failing = {"vision": "mini-vision: it said so", "prefix_cache": "mini-prefix-cache: no configuration asks for it"}
    conclusion = Conclusion(Kernels("chunked", "plain", attention), 4, failing)
    settings = settings_of(conclusion, Options(4, 2), {"environment": Result(Status.PASSED)})
    assert settings is not None
    write_settings(tmp_path / "settings.json", settings)
    found = read_settings(tmp_path / "settings.json")
    assert found.kernels == {
        "deltanet_kernel": "chunked",
        "deltanet_inverse": "plain",
        "attention_kernel": {"context_encoding": "auto", "continuation": "torch", "token_generation": "auto"},
    }
    assert found.failing == {"vision": "mini-vision: it said so"}
    assert found.made["generated_at_tp_degree"] == 4 and found.made["device"] == EMULATED


def test_there_are_none_where_nothing_generated() -> None:
    assert settings_of(NOTHING, Options(4, 1), {"environment": Result(Status.PASSED)}) is None
