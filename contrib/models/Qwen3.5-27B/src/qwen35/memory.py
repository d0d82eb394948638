# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank holds in memory, counted from its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .modeling_qwen35 import NeuronQwen35Model


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank: its share of the weights, and what it keeps between steps for all lines of the cache."""

    weights: int
    kv_cache: int
    recurrent_state: int
    conv_state: int

    @property
    def kept(self) -> int:
        """KV cache and states together."""
        return self.kv_cache + self.recurrent_state + self.conv_state

    def __str__(self) -> str:
        return (
            f"{self.weights / 1e9:.2f} GB of weights a rank; KV cache {self.kv_cache / 1e9:.3f} GB, recurrent state "
            f"{self.recurrent_state / 1e9:.3f} GB, conv state {self.conv_state / 1e9:.3f} GB"
        )


def count_bytes(module: NeuronQwen35Model) -> RankBytes:
    """The bytes of a module, on whatever device; its parameters are those of one rank."""
    state = module.kv_mgr.past_key_values
    linear, full = module.config.linear_attention_layers, module.config.full_attention_layers
    kept = {id(entry) for entry in state}
    return RankBytes(
        weights=sum(p.nbytes for p in module.parameters() if id(p) not in kept),
        kv_cache=sum(state[2 * i].nbytes + state[2 * i + 1].nbytes for i in full),
        recurrent_state=sum(state[2 * i].nbytes for i in linear),
        conv_state=sum(state[2 * i + 1].nbytes for i in linear),
    )
