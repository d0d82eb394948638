# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What a rank holds in memory, counted from its modules."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of a rank, by what they are for."""

    embedding: int
    lm_head: int
    deltanet: int
    attention: int
    mlp: int
    norms: int
    """Between the layers; the norms within a DeltaNet or attention layer are counted there."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


_GROUPS = {
    "embed_tokens": "embedding",
    "lm_head": "lm_head",
    "linear_attn": "deltanet",
    "self_attn": "attention",
    "mlp": "mlp",
}


def count_weights(module: NeuronQwen35Model) -> WeightBytes:
    """The weights of one rank's module, by group."""
    sums = dict.fromkeys((field.name for field in fields(WeightBytes)), 0)
    for name, parameter in module.named_parameters():
        if not name.startswith("kv_mgr."):
            sums[next((group for part, group in _GROUPS.items() if part in name.split(".")), "norms")] += (
                parameter.nbytes
            )
    return WeightBytes(**sums)


def count_whole_deltanet(module: NeuronQwen35Model) -> int:
    """Bytes of the DeltaNet layers if every rank held them whole, as in the published ports."""
    parameters = [p for name, p in module.named_parameters() if ".linear_attn." in name]
    return sum(p.nbytes * getattr(p, "num_partitions", 1) for p in parameters)


def count_bytes(module: NeuronQwen35Model) -> RankBytes:
    """The bytes of a module, on whatever device; its parameters are those of one rank."""
    cache: Any = module.kv_mgr
    return RankBytes(count_weights(module).total, *cache.nbytes())
