# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM has this model's own gauges: the rows of the batch, those in use, and the memory of prefixes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from qwen35_vllm.row_metrics import GAUGES, RowStats
from support.vllm_engines import add, close, engine_of, finish, make_engine, worker_of

pytestmark = pytest.mark.vllm


def rows(engine: LLMEngine) -> dict[str, float]:
    return {
        name: sum(metric.value for metric in engine.get_metrics() if metric.name == f"vllm:{name}") for name in GAUGES
    }


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["asynchronous", "synchronous"])
def test_rows_in_use_are_those_of_the_requests(served_checkpoint: Path, async_scheduling: bool) -> None:
    # A second engine in a process registers the gauges anew.
    for _ in range(2):
        engine = make_engine(
            served_checkpoint, max_num_seqs=3, disable_log_stats=False, async_scheduling=async_scheduling
        )
        seen = []
        for i, length in enumerate([4, 8, 30, 30, 30]):
            add(engine, str(i), [1, 2, 3], SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()
            seen.append(rows(engine)["qwen35_rows_in_use"])
        assert max(seen) == 3 and rows(engine)["qwen35_rows"] == 3
        # The last request has its row until vLLM has told of its end, with the next step.
        add(engine, "last", [1, 2, 3], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        finish(engine)
        assert rows(engine) == {"qwen35_rows": 3, "qwen35_rows_in_use": 1, "qwen35_prefix_cache_bytes": 0}
        close(engine)


def test_what_prefixes_take_is_what_the_worker_keeps(served_checkpoint: Path) -> None:
    with engine_of(served_checkpoint, {"prefill_chunk_size": 16}, disable_log_stats=False) as engine:
        add(engine, "one", [*range(40)], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        finish(engine)
        store = worker_of(engine)._runner.prefixes
        assert store is not None
        assert rows(engine)["qwen35_prefix_cache_bytes"] == store.nbytes == 2 * store.block_nbytes


def test_the_later_of_two_steps_counts() -> None:
    assert RowStats.of(4, 1, 8).aggregate(RowStats.of(4, 3, 16)).data == RowStats.of(4, 3, 16).data
