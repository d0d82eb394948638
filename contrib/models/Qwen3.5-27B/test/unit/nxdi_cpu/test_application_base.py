# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Loading on a CPU: a process per rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.models import load_neuron
from support.oracle import save_reference


def test_more_ranks_than_processes_is_an_error_that_names_the_launcher(tmp_path: Path) -> None:
    save_reference(tmp_path)
    with pytest.raises(RuntimeError, match="torchrun --nproc-per-node 2"):
        load_neuron(tmp_path, tp_degree=2)
