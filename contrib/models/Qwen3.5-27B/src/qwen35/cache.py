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

from .configuration_qwen35 import Qwen35InferenceConfig
from .nxdi import KVCacheManager, get_tensor_model_parallel_size

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

    def get_kv_by_layer_id(self, idx: int, *args: Any, **kwargs: Any) -> State:
        """The pair of layer `idx` for the rows of the batch; row b of a full batch is cache line b."""
        if not self.is_linear[idx]:
            return super().get_kv_by_layer_id(idx, *args, **kwargs)
        recurrent, conv = self._fetch_cache(idx, kwargs.get("kvcache_buffer"))
        seq_ids = kwargs.get("seq_ids")
        if seq_ids is None or seq_ids.shape[0] == recurrent.shape[0]:
            return recurrent, conv
        lines = seq_ids.long().clamp(0, recurrent.shape[0] - 1)
        return recurrent.index_select(0, lines), conv.index_select(0, lines)

    def update_kv_by_layer_id(self, idx: int, *args: Any, **kwargs: Any) -> State:
        """The caches of layer `idx` with the rows of `kv_per_layer` written at the lines `seq_ids`."""
        if not self.is_linear[idx]:
            return super().update_kv_by_layer_id(idx, *args, **kwargs)
        caches, (recurrent, conv) = self._fetch_cache(idx, kwargs.get("kvcache_buffer")), kwargs["kv_per_layer"]
        if recurrent.shape[0] == caches[0].shape[0] and not self.neuron_config.apply_seq_ids_mask:
            return recurrent, conv.to(caches[1].dtype)  # a full batch without masked rows is the new cache
        return (
            write_lines(caches[0], recurrent, kwargs["seq_ids"]),
            write_lines(caches[1], conv, kwargs["seq_ids"]),
        )


def write_lines(cache: torch.Tensor, rows: torch.Tensor, seq_ids: torch.Tensor) -> torch.Tensor:
    """cache [L, ...] with rows [B, ...] at lines seq_ids [B]; an id outside 0..L-1 writes nowhere.

    Selection instead of a scatter, which the Neuron compiler does not take.
    """
    lines = torch.arange(cache.shape[0], device=seq_ids.device)
    if rows.shape[0] == cache.shape[0]:
        chosen, written = rows, seq_ids == lines
    else:
        hits = lines.unsqueeze(1) == seq_ids.unsqueeze(0)
        chosen, written = rows.index_select(0, hits.int().argmax(dim=1)), hits.any(dim=1)
    return torch.where(written.view(-1, *[1] * (cache.dim() - 1)), chosen.to(cache.dtype), cache)
