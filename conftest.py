# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Settings that every test runs under."""

import os

# Before torch and tokenizers start their pools, and for child processes too: small tensors gain nothing from threads,
# and threads that wait for each other on a busy machine cost a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# A shared machine may stall at any time, so no example has a deadline; a fixed seed makes a failure repeatable.
settings.register_profile(
    "qwen35", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("qwen35")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
