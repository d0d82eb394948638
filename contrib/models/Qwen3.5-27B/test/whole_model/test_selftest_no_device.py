# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 selftest` where NxDI is installed and neuron-ls finds no device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen35.nxdi import NXDI_AVAILABLE
from support.faults import run_with_fault
from support.models import NO_NXDI

pytestmark = [pytest.mark.nxdi, pytest.mark.skipif(not NXDI_AVAILABLE, reason=NO_NXDI)]


def test_without_a_device_there_is_nothing_to_run_and_no_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("of an earlier run")
    ended = run_with_fault("no_device", "selftest", "--output", str(tmp_path), scratch=tmp_path)
    assert ended.status == 3, ended.errors
    assert "neuron-ls ended with 1 and said: error: No neuron devices were found on the machine" in ended.output
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["environment"] and not (tmp_path / "settings.json").exists()
