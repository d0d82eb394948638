# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics of this model's own on vLLM's /metrics: rows that were compiled, those in use, and what prefixes take.

vLLM lets a KV connector bring metrics: what a worker measured goes with the output of a step to the process that
answers /metrics, where the connector's class says which gauges it sets. Their names begin with vLLM's prefix, by which
vLLM finds what it must take down when a process makes a second engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GAUGES = {
    "qwen35_rows": "Rows of the compiled batch: every step runs all of them.",
    "qwen35_rows_in_use": "Rows that have a request, as the worker has them after its latest step.",
    "qwen35_prefix_cache_bytes": "Host memory of the beginnings of prompts that are kept, on all ranks.",
}


class RowStats(KVConnectorStats):
    """What a step leaves: a number for each of `GAUGES`, by its name, in `data`."""

    @classmethod
    def of(cls, rows: int, in_use: int, prefix_cache_bytes: int) -> RowStats:
        return cls(dict(zip(GAUGES, (rows, in_use, prefix_cache_bytes), strict=True)))

    def reset(self) -> None:
        self.data: dict[str, int | float] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """The later ones: a gauge says how things are."""
        return other

    def reduce(self) -> dict[str, int | float]:
        return self.data

    def is_empty(self) -> bool:
        """For vLLM's log, always: it has the running requests already, and would call these KV transfers."""
        return True


class RowPromMetrics(KVConnectorPromMetrics):
    """Sets the gauges, of each engine from its first step on."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._gauges = {
            name: self._gauge_cls(
                name=f"vllm:{name}", documentation=text, multiprocess_mode="mostrecent", labelnames=labelnames
            )
            for name, text in GAUGES.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._gauges[name].labels(*self.per_engine_labelvalues[engine_idx]).set(value)
