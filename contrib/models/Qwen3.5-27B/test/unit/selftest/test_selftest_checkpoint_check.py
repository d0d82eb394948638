# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint named by the user: here the mini."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen35 import Qwen35InferenceConfig
from qwen35.configuration_qwen35 import QWEN35_PRESETS
from qwen35.planning.recommended import device_neuron_config
from qwen35.selftest import checkpoint_check
from qwen35.selftest.checkpoint_check import modelled_times, run_checkpoint_check
from qwen35.selftest.outcome import CheckFailed
from qwen35.selftest.plan import ALL_TORCH
from qwen35.serving.loading import MINI_CHECKPOINT
from support.applications import needs_stand_ins

pytestmark = needs_stand_ins


def test_a_checkpoint_answers_and_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_check, "REPEATS", 1)
    values = run_checkpoint_check(MINI_CHECKPOINT, 1, ALL_TORCH.fields, tmp_path)
    assert "Paris" in values["text"] and values["ttft_s"] > 0
    assert "modelled_ttft_s" not in values  # kernel times are of heads of 256 dims


def test_another_answer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_check, "REPEATS", 1)
    monkeypatch.setattr(checkpoint_check, "ANSWER", "Lyon")
    with pytest.raises(CheckFailed, match=r"after 'The capital of France is' it says .*Paris.*without 'Lyon'"):
        run_checkpoint_check(MINI_CHECKPOINT, 1, ALL_TORCH.fields, tmp_path)


def test_of_27b_the_modelled_times_are_those_of_the_plan() -> None:
    neuron_config = device_neuron_config(None, 4, 512, 1, prompt_bucket=256)
    times = modelled_times(Qwen35InferenceConfig(neuron_config, **QWEN35_PRESETS["27B"]).to_json_string())
    # docs/step.md: 21.7 ms a token on 4,096 cached, 152 ms for 1,024 tokens.
    assert 0.020 < times["modelled_tpot_s"] < 0.0217
    assert 0.02 < times["modelled_ttft_s"] < 0.152
