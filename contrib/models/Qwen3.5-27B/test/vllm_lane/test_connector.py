# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler makes our connector, which loads nothing, and takes a failed row's blocks as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams

from qwen35_vllm.connector import RowConnector, connector_output
from support.vllm_engines import GREEDY, add, close, finish, make_engine

pytestmark = pytest.mark.vllm


def test_failed_blocks_are_those_of_all_groups_of_all_requests() -> None:
    assert connector_output([([3, 4], [9]), ([5],)], []).invalid_block_ids == {3, 4, 5, 9}


def test_the_scheduler_has_the_connector_holds_no_block_back_and_ends_failed_requests(served_checkpoint: Path) -> None:
    engine = make_engine(served_checkpoint)
    scheduler: Any = engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler.connector, RowConnector)
    assert not scheduler.recompute_kv_load_failures, "a failed request would be tried again, without end"
    # These two from vLLM 0.33 on, which would wait a step before it gives a block away, or throw tokens away.
    assert not getattr(scheduler, "defer_block_free", False)
    assert not getattr(scheduler, "requires_kv_delivery", False)
    add(engine, "a", [1, 2, 3], GREEDY)
    add(engine, "b", [1, 2, 3], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    outputs = finish(engine)
    assert [outputs[name].num_cached_tokens for name in ("a", "b")] == [0, 0]
    assert [len(outputs[name].outputs[0].token_ids) for name in ("a", "b")] == [8, 2]
    close(engine)
