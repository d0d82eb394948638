# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The K/V cache as a flat parameter list; stands in for NxDI's `modules.kvcache.kv_cache_manager`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .attention import KeyValue, determine_sharding_strategy, get_shardable_head_counts
from .config import InferenceConfig
from .layers import divide
from .parallel_state import model_parallel_is_initialized

# NxDI lengthens the cache by this much when sequence ids are masked; writes of masked rows land there.
KV_CACHE_PAD_FOR_SEQ_IDS_MASKING = 128


class KVCacheManager(nn.Module):
    """Two entries per layer in `past_key_values`: K and V, each [slots, KV heads per rank, length, head dim]."""

    def __init__(
        self,
        config: InferenceConfig,
        num_kv_head: int,
        global_rank: nn.Module | None = None,
        attention_chunk_size: int | None = None,
        sliding_window: int | None = None,
        windowed_context_encoding_size: int | None = None,
        layer_to_cache_size_mapping: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.config, self.neuron_config, self.num_kv_head = config, config.neuron_config, num_kv_head
        self.is_continuous_batching = self.neuron_config.is_continuous_batching
        self.kv_cache_batch_size = self.neuron_config.kv_cache_batch_size
        self.kv_cache_padding_size = self.neuron_config.kv_cache_padding_size
        self.batch_size = self.neuron_config.batch_size
        self.cache_dtype = self.neuron_config.attention_dtype or self.neuron_config.torch_dtype
        if self.neuron_config.kv_quant_config is not None:
            self.cache_dtype = self.neuron_config.kv_quant_config.quant_dtype
        self._init_kv_shape(config)
        self.past_key_values = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=self.cache_dtype), requires_grad=False)
            for _ in range(config.num_hidden_layers)
            for shape in (self.k_shape, self.v_shape)
        )

    def _init_kv_shape(self, config: InferenceConfig, layer_to_cache_size_mapping: list[int] | None = None) -> None:
        tp_degree = self.neuron_config.tp_degree
        _, heads = get_shardable_head_counts(
            tp_degree,
            config.num_attention_heads,
            self.num_kv_head,
            determine_sharding_strategy(tp_degree, self.num_kv_head),
        )
        length = self.neuron_config.max_length
        if self.neuron_config.apply_seq_ids_mask:
            length += KV_CACHE_PAD_FOR_SEQ_IDS_MASKING
        self.k_shape = self.v_shape = (
            self.kv_cache_batch_size + self.kv_cache_padding_size,
            divide(heads, tp_degree) if model_parallel_is_initialized() else heads,
            length,
            config.head_dim,
        )

    def _fetch_cache(self, idx: int, kvcache_buffer: Any = None) -> KeyValue:
        cache = self.past_key_values if kvcache_buffer is None else kvcache_buffer
        return cache[2 * idx], cache[2 * idx + 1]

    def get_kv_by_layer_id(
        self,
        idx: int,
        seq_len: int,
        skip_slice: bool = False,
        medusa_metadata: Any = None,
        kvcache_buffer: Any = None,
        seq_ids: torch.Tensor | None = None,
        is_for_speculation: bool = False,
        windowed_context_encoding_window_idx: int = -1,
        **kwargs: Any,
    ) -> KeyValue:
        """K and V of layer `idx` up to `seq_len`; the model's own job here."""
        raise NotImplementedError("get_kv_by_layer_id is not implemented")

    def get_cache(
        self,
        seq_len: int,
        skip_slice: bool = False,
        kvcache_buffer: Any = None,
        seq_ids: torch.Tensor | None = None,
        windowed_context_encoding_window_idx: int = -1,
        **kwargs: Any,
    ) -> list[list[torch.Tensor]]:
        """A pair of tensors for each layer."""
        return [
            list(
                self.get_kv_by_layer_id(
                    idx=idx, seq_len=seq_len, kvcache_buffer=kvcache_buffer, seq_ids=seq_ids, **kwargs
                )
            )
            for idx in range(len(self.past_key_values) // 2)
        ]

    def update_cache(
        self,
        is_for_context_encoding: bool,
        seq_ids: torch.Tensor,
        position_ids: torch.Tensor,
        new_key_values: list[KeyValue],
        seq_len: int,
        scatter_index: torch.Tensor | None = None,
        kv_active_mask: torch.Tensor | None = None,
        kvcache_buffer: Any = None,
        windowed_context_encoding_window_idx: int = -1,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """The flat list of caches with the new rows written; seq_ids [B], position_ids [B, S]."""
        updated: list[torch.Tensor] = []
        for idx, kv_per_layer in enumerate(new_key_values):
            updated += self.update_kv_by_layer_id(
                idx=idx,
                is_for_context_encoding=is_for_context_encoding,
                seq_ids=seq_ids,
                position_ids=position_ids,
                kv_per_layer=kv_per_layer,
                seq_len=seq_len,
                kvcache_buffer=kvcache_buffer,
                **kwargs,
            )
        return updated

    def update_kv_by_layer_id(
        self,
        idx: int,
        is_for_context_encoding: bool,
        seq_ids: torch.Tensor,
        position_ids: torch.Tensor,
        kv_per_layer: KeyValue,
        seq_len: int,
        scatter_index: torch.Tensor | None = None,
        kv_active_mask: torch.Tensor | None = None,
        kvcache_buffer: Any = None,
        windowed_context_encoding_window_idx: int = -1,
        is_valid_window_kv: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> KeyValue:
        """The caches of layer `idx` with the rows of `kv_per_layer` written; the model's own job here."""
        raise NotImplementedError("update_kv_by_layer_id is not implemented")
