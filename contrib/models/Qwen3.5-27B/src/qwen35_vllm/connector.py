# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV connector, for three things: prefix reuse, metrics of rows, and that a request whose work fails ends alone.

Prefix reuse: the scheduler asks how many tokens of a prompt can be restored, and counts them as computed; what a step
restores, stores and drops goes to the worker as the step's metadata (see `prefixes`). vLLM's own prefix caching is off:
its blocks would be shared by rows.

Failures: vLLM has no field for one in what a worker returns. But a connector may report blocks whose contents were not
loaded, and under the policy "fail" the scheduler ends the requests that have them, with the finish reason "error", and
goes on with the others. A row that failed is that: one block, whose contents nobody knows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.outputs import KVConnectorOutput

from qwen35.serving.prefix_cache import Chain, Medium

from .prefixes import PrefixBudget, PrefixPlanner, StepPlan
from .row_metrics import RowPromMetrics, RowStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


def reuses_prefixes(vllm_config: VllmConfig) -> bool:
    """Whether --enable-prefix-caching, which is vLLM's default, asks for it."""
    chosen = vllm_config.kv_transfer_config
    # Of a configuration that was seen before, it was said there: vLLM's own caching has been switched off since.
    return vllm_config.cache_config.enable_prefix_caching if chosen is None else budget_of(vllm_config) is not None


def use_connector(vllm_config: VllmConfig, budget: PrefixBudget | None) -> None:
    """Let vLLM's scheduler make this connector; the platform refuses another one before."""
    vllm_config.kv_transfer_config = KVTransferConfig(
        kv_connector=RowConnector.__name__,
        kv_connector_module_path=__name__,
        # As a consumer of loaded blocks vLLM would hold every block back for a step before the next request gets it,
        # for loads that are not ordered against its steps; here a step restores its rows itself.
        kv_role="kv_producer",
        kv_load_failure_policy="fail",
        kv_connector_extra_config={} if budget is None else asdict(budget),
    )


def budget_of(vllm_config: VllmConfig) -> PrefixBudget | None:
    """What `use_connector` was given."""
    chosen = vllm_config.kv_transfer_config
    return PrefixBudget(**chosen.kv_connector_extra_config) if chosen and chosen.kv_connector_extra_config else None


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler's side of the connector tells the worker with a step."""

    plan: StepPlan = field(default_factory=StepPlan)


def plan_of(scheduled: SchedulerOutput) -> StepPlan:
    """The plan of a step; an empty one for a step that no connector saw."""
    metadata = scheduled.kv_connector_metadata
    return metadata.plan if isinstance(metadata, StepMetadata) else StepPlan()


@dataclass
class LostBlocks(KVConnectorWorkerMetadata):
    """Blocks of prompts that a step was to store, and has not."""

    keys: list[bytes]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, LostBlocks)
        return LostBlocks(self.keys + other.keys)


def connector_output(
    failed: Iterable[tuple[list[int], ...]], lost: list[bytes], rows: RowStats | None = None
) -> KVConnectorOutput:
    """What tells the scheduler to end requests, and its side of the connector what the worker lacks and counts.

    Args:
        failed: the blocks of vLLM's cache that the failed requests have, one list of ids a group of the cache.
        lost: see `LostBlocks`.
        rows: for vLLM's metrics.
    """
    return KVConnectorOutput(
        invalid_block_ids={block for groups in failed for ids in groups for block in ids},
        kv_connector_worker_meta=LostBlocks(lost) if lost else None,
        kv_connector_stats=rows,
    )


class RowConnector(KVConnectorBase_V1, SupportsHMA):
    """The scheduler's side; the worker reads the metadata of a step itself, and makes no connector.

    Attributes:
        planner: None where no prefixes are reused.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        budget = budget_of(vllm_config)
        self.planner = None if budget is None else PrefixPlanner(budget)
        self._media: dict[str, list[MultiModalFeatureSpec]] = {}

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

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens of a prompt the step that is being scheduled would restore; asked again until it does."""
        if self.planner is None:
            return 0, False
        known = _restorable(self.planner, _chain(self.planner, request), request)
        return max(len(known) * self.planner.block - num_computed_tokens, 0), False

    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[Any, int]:
        """Of the metrics of vLLM 0.33: blocks are in the host's memory."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        return {CacheHitSource.HOST: num_external_tokens} if num_external_tokens else {}

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """A request gets a row in the step that is being scheduled.

        An input that is streamed gets one anew for each of its parts, and vLLM counts on the old one: it is restored
        though nothing was matched.
        """
        self._media[request.request_id] = request.mm_features
        if self.planner is not None:
            chain = _chain(self.planner, request)
            self.planner.begin(request.request_id, chain, _restorable(self.planner, chain, request))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        # vLLM 0.33 takes away the data of items whose tokens are restored. The row needs their grids, for positions,
        # and their pixels where it has less than was planned, or begins anew after a preemption, with less known.
        for new in scheduler_output.scheduled_new_reqs:
            new.mm_features = self._media[new.req_id]
        self._media.clear()
        if self.planner is None:
            return StepMetadata()
        cached = scheduler_output.scheduled_cached_reqs
        before = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        before |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            self.planner.encode(request_id, before[request_id] + tokens)
        return StepMetadata(self.planner.take_plan())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        lost = connector_output.kv_connector_worker_meta
        if self.planner is not None and isinstance(lost, LostBlocks):
            self.planner.lose(lost.keys)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.planner is not None:
            self.planner.end(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Forget all prefixes; the worker gives their memory back with the next step."""
        if self.planner is not None:
            self.planner.reset()
        return True

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing: no layer of vLLM's runs."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no layer of vLLM's runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: no layer of vLLM's runs."""

    def wait_for_save(self) -> None:
        """Nothing: no layer of vLLM's runs."""


def _chain(planner: PrefixPlanner, request: Request) -> Chain:
    media = [
        Medium(feature.mm_position.offset, sha256(feature.identifier.encode(errors="surrogatepass")).digest())
        for feature in request.mm_features
    ]
    return planner.chain(request.request_id, request.prompt_token_ids or (), media, request.cache_salt or None)


def _restorable(planner: PrefixPlanner, chain: Chain, request: Request) -> list[bytes]:
    params = request.sampling_params
    # Log-probabilities of a prompt need the logits of all its tokens.
    if request.skip_reading_prefix_cache or (params is not None and params.prompt_logprobs is not None):
        return []
    return planner.known(chain, request.num_tokens)
