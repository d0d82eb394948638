# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What is kept between steps: K and V of the attention layers, recurrent and conv state of the DeltaNet layers.

Letters: L cache lines, H value heads and Ch conv channels of this rank, K key dim, V value dim, W conv kernel.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..configuration_qwen35 import Qwen35InferenceConfig
from ..nxdi import KVCacheManager, get_tensor_model_parallel_size

State = tuple[torch.Tensor, torch.Tensor]


class Qwen35CacheManager(KVCacheManager):
    """NxDI's cache manager whose pair for a DeltaNet layer is (recurrent [L, H, K, V] float32, conv [L, Ch, W - 1]).

    NxDI treats its flat `past_key_values` list, two entries a layer, as the state to alias, copy and reset; DeltaNet's
    state in the place of a K/V pair therefore needs no output of its own and no dummy cache.
    """

    def __init__(self, config: Qwen35InferenceConfig, num_kv_head: int, **kwargs: Any) -> None:
        # The base class allocates K and V for every layer it counts: let it count none, then allocate per layer type.
        without_layers = copy.copy(config)
        without_layers.num_hidden_layers = 0
        super().__init__(without_layers, num_kv_head, **kwargs)
        self.config = config
        self.is_linear = [layer_type == "linear_attention" for layer_type in config.layer_types]

        lines = config.neuron_config.kv_cache_batch_size + config.neuron_config.kv_cache_padding_size
        ranks = get_tensor_model_parallel_size()
        recurrent = (
            lines,
            config.linear_num_value_heads // ranks,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        conv = (lines, config.conv_dim // ranks, config.linear_conv_kernel_dim - 1)
        dtype = config.neuron_config.torch_dtype
        self.past_key_values = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=entry_dtype), requires_grad=False)
            for is_linear in self.is_linear
            for shape, entry_dtype in (
                ((recurrent, torch.float32), (conv, dtype))
                if is_linear
                else ((self.k_shape, self.cache_dtype), (self.v_shape, self.cache_dtype))
            )
        )

    def get_kv_by_layer_id(  # type: ignore[override] # NxDI passes keywords, more than are needed
        self,
        idx: int,
        seq_len: int,
        kvcache_buffer: Any = None,
        seq_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> State:
        """The pair of layer `idx` for the rows of the batch, keys and values up to `seq_len`.

        Row b of a full batch is cache line b, as everywhere in NxDI; a smaller batch is looked up by `seq_ids` [B].
        """
        pair = self._fetch_cache(idx, kvcache_buffer)
        if not self.is_linear[idx]:
            pair = pair[0][:, :, :seq_len], pair[1][:, :, :seq_len]
        if seq_ids is None or seq_ids.shape[0] == self.kv_cache_batch_size:
            return pair[0][: self.kv_cache_batch_size], pair[1][: self.kv_cache_batch_size]
        lines = seq_ids.clamp(0, self.kv_cache_batch_size - 1)
        return pair[0].index_select(0, lines), pair[1].index_select(0, lines)

    def update_kv_by_layer_id(  # type: ignore[override]
        self,
        idx: int,
        is_for_context_encoding: bool,
        seq_ids: torch.Tensor,
        position_ids: torch.Tensor,
        kv_per_layer: State,
        kvcache_buffer: Any = None,
        **kwargs: Any,
    ) -> State:
        """The caches of layer `idx` with the rows of `kv_per_layer` at lines `seq_ids` [B]; other lines as they were.

        A row whose id is outside 0..kv_cache_batch_size - 1 fills the compiled batch up and is written nowhere.
        """
        caches = self._fetch_cache(idx, kvcache_buffer)
        seq_ids = torch.where(seq_ids < self.kv_cache_batch_size, seq_ids, -1)
        if not self.is_linear[idx]:
            if is_for_context_encoding:  # token i of a prompt; position_ids hold 0 for padding
                position_ids = torch.arange(kv_per_layer[0].shape[2], device=seq_ids.device).unsqueeze(0)
            elif position_ids.shape[1] > 1:  # the next tokens of one, of which none has position 0
                position_ids = torch.where(position_ids > 0, position_ids, caches[0].shape[2] - 1)
            key, value = (
                write_tokens(cache, rows, seq_ids, position_ids)
                for cache, rows in zip(caches, kv_per_layer, strict=True)
            )
            return key, value
        if caches[0].shape[0] == 1:
            return kv_per_layer[0], kv_per_layer[1].to(caches[1].dtype)  # the only line, and a batch of one is full
        if not is_for_context_encoding and seq_ids.shape[0] == caches[0].shape[0]:
            row_of_line, written = None, seq_ids >= 0  # row b is line b, or is written nowhere
        else:
            hits = torch.arange(caches[0].shape[0], device=seq_ids.device).unsqueeze(1) == seq_ids
            row_of_line = (hits * torch.arange(seq_ids.shape[0], device=seq_ids.device)).sum(dim=1)
            written = hits.any(dim=1)
        recurrent, conv = (
            write_lines(cache, rows if row_of_line is None else rows.index_select(0, row_of_line), written)
            for cache, rows in zip(caches, kv_per_layer, strict=True)
        )
        return recurrent, conv


def write_tokens(
    cache: torch.Tensor, rows: torch.Tensor, seq_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """cache [L, M, P, E] with rows [B, M, S, E] at lines seq_ids [B] and positions [B or 1, S].

    A row with a negative id goes to the last position of the last line, which nothing reads: NxDI lengthens the cache
    when `apply_seq_ids_mask` is set. Whole rows of E are put, as NxDI's `update_cache_const_indices` does for a prompt;
    its `torch.scatter` for a decoding step indexes every single element. In place on a CPU, where a new cache would be
    a copy of the old; a cache that is traced must not change, because it serves the trace of every bucket.
    """
    last_line, last_position = cache.shape[0] - 1, cache.shape[2] - 1
    real = (seq_ids >= 0).unsqueeze(1)
    lines = torch.where(real, seq_ids.unsqueeze(1), last_line)
    positions = torch.where(real, positions, last_position)
    heads = torch.arange(cache.shape[1], device=seq_ids.device)
    indices = (lines.unsqueeze(1).int(), heads.view(1, -1, 1).int(), positions.unsqueeze(1).int())
    return (cache.index_put_ if cache.is_cpu else cache.index_put)(indices, rows.to(cache.dtype))


def write_lines(cache: torch.Tensor, rows: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """cache [L, ...] with line l from rows [L, ...] where written [L] is true.

    Selection instead of a scatter: a state is written whole, and the compiler fuses the choice with what computes it.
    """
    return torch.where(written.view(-1, *[1] * (cache.dim() - 1)), rows.to(cache.dtype), cache)
