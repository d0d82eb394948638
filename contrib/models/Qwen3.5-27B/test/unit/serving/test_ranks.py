# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Running on every rank: what the ranks print."""

from __future__ import annotations

import os

import pytest

from qwen35.nxdi import NeuronConfig
from qwen35.serving.ranks import run_on_every_rank


def speak(text: str) -> None:
    """Of a rank: what a library writes, without Python, and what the command does."""
    os.write(1, b"Rank 0 is connected\n")
    print(text)


def test_standard_output_has_only_what_the_ranks_print(capfd: pytest.CaptureFixture[str]) -> None:
    run_on_every_rank(NeuronConfig(tp_degree=2, on_cpu=True), speak, "caf\u00e9")
    assert capfd.readouterr().out == "caf\u00e9\n" * 2
