# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests in vLLM's environment share: its engine in this process, and one random checkpoint."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is imported, by the tests below
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session", autouse=True)
def _what_is_imported_is_no_garbage() -> Iterator[None]:
    """Keep modules out of the collections of garbage with which vLLM begins and ends an engine.

    They are most of what a small engine costs. vLLM freezes what was imported too, but only while an engine lives.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("freeze", "unfreeze"):
            patch.setattr(gc, name, lambda: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def served_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.vllm_engines import save_served_checkpoint

    return save_served_checkpoint(tmp_path_factory.mktemp("served"), seed=1)
