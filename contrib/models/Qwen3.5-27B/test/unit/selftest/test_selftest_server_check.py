# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's server in the self-test, where vLLM is not; where it is: vllm_lane/test_selftest_server.py."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from qwen35.selftest.outcome import Absent
from qwen35.selftest.server_check import run_server_check


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_server_is_absent(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="vLLM is not installed here"):
        run_server_check(1, {}, tmp_path)
