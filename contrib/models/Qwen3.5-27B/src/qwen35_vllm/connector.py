# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connector, for two things so far: a request whose work fails ends alone, and metrics of rows.

vLLM has no field for it in what a worker returns. But a connector may report blocks whose contents were not loaded, and
under the policy "fail" the scheduler ends the requests that have them, with the finish reason "error", and goes on with
the others. A row that failed is that: one block, whose contents nobody knows.

Restoring rows from earlier prompts has its place here, too: `get_num_new_matched_tokens` and the metadata of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA
from vllm.v1.outputs import KVConnectorOutput

from .row_metrics import RowPromMetrics, RowStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput


def use_connector(vllm_config: VllmConfig) -> None:
    """Let vLLM's scheduler make this connector; the platform refuses another one before."""
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=RowConnector.__name__,
        kv_connector_module_path=__name__,
        # As a consumer of loaded blocks vLLM would hold every block back for a step before the next request gets it.
        kv_role="kv_producer",
        kv_load_failure_policy="fail",
    )


def failed_blocks(block_ids: Iterable[tuple[list[int], ...]]) -> KVConnectorOutput:
    """What tells the scheduler to end the requests that have these blocks, one list of ids a group of the cache."""
    return KVConnectorOutput(invalid_block_ids={block for groups in block_ids for ids in groups for block in ids})


class RowConnector(KVConnectorBase_V1, SupportsHMA):
    """Loads and saves nothing."""

    @property
    def requires_kv_delivery(self) -> bool:
        # Else the tokens of a request that is preempted while a step is in flight would be thrown away, and drawn anew.
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> RowStats:
        return RowStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> RowPromMetrics:
        return RowPromMetrics(*arguments)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing was matched."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: no layer of vLLM's runs."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no layer of vLLM's runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: no layer of vLLM's runs."""

    def wait_for_save(self) -> None:
        """Nothing: no layer of vLLM's runs."""
