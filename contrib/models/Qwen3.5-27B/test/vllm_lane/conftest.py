# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests in vLLM's environment share: its engine in this process, and one random checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is imported, by the tests below
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session")
def served_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.vllm_engines import save_served_checkpoint

    return save_served_checkpoint(tmp_path_factory.mktemp("served"), seed=1)
