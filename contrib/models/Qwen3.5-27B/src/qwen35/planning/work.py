# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank computes and moves, and the least times that follow: rooflines.

A time is the larger of products over peak arithmetic and bytes over peak bandwidth; collectives, launches and waits
can only add to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..hardware import rank_bandwidth, rank_flops
from ..layers.cache import Qwen35CacheManager
from ..memory.counting import count_weights, count_whole_deltanet, rank_module
from ..nxdi import NeuronBaseForCausalLM


@dataclass(frozen=True)
class Work:
    """What a rank computes and moves, from the shapes of its parameters and caches. The times are modelled."""

    token_flops: int
    """Per token: 2 for each weight of the layers' matrices, and three products with the state of each DeltaNet head."""
    pair_flops: int
    """Per token and token it attends to: the products with its key and its value, in all attention layers."""
    head_flops: int
    """Per sequence and step: the output head, of the last token alone."""
    weight_bytes: int
    """Read by every program: all but the embedding, of which a token needs one row."""
    state_bytes: int
    """Per sequence: recurrent and conv state, read and written."""
    token_bytes: int
    """Per token in the KV cache."""
    flops_per_second: float
    bytes_per_second: float

    def ttft(self, tokens: int, chunk: int, rows: int = 1) -> float:
        """Least seconds for `rows` prompts of `tokens` each, encoded at most `chunk` tokens at a time."""
        seconds = 0.0
        for start in range(0, tokens, chunk):
            length = min(chunk, tokens - start)
            pairs = length * start + length * (length + 1) // 2
            flops = length * self.token_flops + pairs * self.pair_flops + self.head_flops
            seconds += self._seconds(rows * flops, start + length, rows)
        return seconds

    def tpot(self, context: int, rows: int = 1) -> float:
        """Least seconds for a token of each of `rows` sequences that have `context` tokens in the cache."""
        flops = self.token_flops + context * self.pair_flops + self.head_flops
        return self._seconds(rows * flops, context, rows)

    def _seconds(self, flops: int, cached: int, rows: int) -> float:
        moved = self.weight_bytes + rows * (2 * self.state_bytes + cached * self.token_bytes)
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


def work_of(model: NeuronBaseForCausalLM, copies: int = 1) -> Work:
    """What a rank computes and moves, with `copies` of DeltaNet's heads over all ranks: 1 or `tp_degree`."""
    module: Any = rank_module(model)
    config, neuron = model.config, model.neuron_config
    weights = count_weights(module)
    deltanet = weights.deltanet if copies == 1 else count_whole_deltanet(module)
    cache: Qwen35CacheManager = module.kv_mgr
    states = [cache.layer_state(i) for i in config.linear_attention_layers]
    key_values = [entry for i in config.full_attention_layers for entry in cache.layer_state(i)]
    products = sum(
        parameter.numel() * (copies if ".linear_attn." in name else 1)
        for name, parameter in module.layers.named_parameters()
        if parameter.dim() == 2 and not name.endswith(".scale")
    )
    return Work(
        token_flops=2 * products + 6 * copies * sum(recurrent[0].numel() for recurrent, _ in states),
        pair_flops=4 * sum(module.layers[i].self_attn.gate_proj.weight.shape[0] for i in config.full_attention_layers),
        head_flops=2 * module.lm_head.weight.numel(),
        weight_bytes=weights.total - weights.embedding - weights.deltanet + deltanet,
        state_bytes=copies * sum(recurrent[0].nbytes + conv[0].nbytes for recurrent, conv in states),
        token_bytes=sum(entry[0, :, 0].nbytes for entry in key_values),
        flops_per_second=rank_flops(neuron.logical_nc_config, neuron.torch_dtype),
        bytes_per_second=rank_bandwidth(neuron.logical_nc_config),
    )
