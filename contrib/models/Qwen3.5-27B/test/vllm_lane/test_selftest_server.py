# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The self-test's check of `vllm serve` on the mini."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from qwen35.selftest import server_check
from qwen35.selftest.outcome import CheckFailed
from qwen35.selftest.plan import ALL_TORCH
from qwen35.selftest.server_check import run_server_check

pytestmark = pytest.mark.vllm


def test_the_server_answers_with_the_recorded_tokens(tmp_path: Path) -> None:
    values = run_server_check(2, ALL_TORCH.settings, tmp_path)
    assert values["vllm"] and values["ready_s"] > 0


def test_a_server_that_does_not_start_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_check, "MINI_CHECKPOINT", tmp_path)
    with pytest.raises(CheckFailed, match=r"the server ended with status .* before it answered"):
        run_server_check(1, ALL_TORCH.settings, tmp_path)
