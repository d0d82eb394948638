# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank holds, counted on its module: weights by what they are for, caches and states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from ..layers.cache import Qwen35CacheManager
from ..nxdi import InferenceConfig, NeuronBaseForCausalLM, NeuronBaseModel, as_rank


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank: its share of the weights, and what it keeps between steps in all slots of the cache."""

    weights: int
    kv_cache: int
    recurrent_state: int
    conv_state: int
    speculation: int
    """What drafting keeps beside the MTP head's keys and values, which are in kv_cache."""

    @property
    def kept(self) -> int:
        """KV cache and states together."""
        return self.kv_cache + self.recurrent_state + self.conv_state + self.speculation

    def __str__(self) -> str:
        drafting = f", verified tokens {self.speculation / 1e9:.3f} GB" if self.speculation else ""
        return (
            f"per rank {self.weights / 1e9:.2f} GB of weights, KV cache {self.kv_cache / 1e9:.3f} GB, recurrent state "
            f"{self.recurrent_state / 1e9:.3f} GB, conv state {self.conv_state / 1e9:.3f} GB{drafting}"
        )


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights of one rank, by what they are for."""

    embedding: int
    lm_head: int
    deltanet: int
    attention: int
    mlp: int
    mtp: int
    """The MTP head, where tokens are drafted."""
    norms: int
    """Between the layers; the norms within a DeltaNet or attention layer are counted there."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


_GROUPS = {
    "mtp": "mtp",  # first: its layer has an attention and an MLP of its own
    "embed_tokens": "embedding",
    "lm_head": "lm_head",
    "linear_attn": "deltanet",
    "self_attn": "attention",
    "mlp": "mlp",
}


@contextmanager
def on_meta_rank(config: InferenceConfig) -> Iterator[None]:
    """Modules built here have the shapes of rank 0 of `tp_degree` and no data: they are on the meta device."""
    with as_rank(0, config.neuron_config.tp_degree), torch.device("meta"), torch.no_grad():
        yield


def rank_module(model: NeuronBaseForCausalLM) -> NeuronBaseModel:
    """The module of one rank of an application, on the meta device; nothing is allocated or read."""
    with on_meta_rank(model.config):
        module: NeuronBaseModel = model._model_cls(model.config)
    return module


def count_weights(module: NeuronBaseModel) -> WeightBytes:
    """Bytes of the weights of a module, on whatever device, by group."""
    sums = dict.fromkeys((field.name for field in fields(WeightBytes)), 0)
    for name, parameter in module.named_parameters():
        if not name.startswith("kv_mgr."):
            sums[next((group for part, group in _GROUPS.items() if part in name.split(".")), "norms")] += (
                parameter.nbytes
            )
    return WeightBytes(**sums)


def count_whole_deltanet(module: NeuronBaseModel) -> int:
    """Bytes of the DeltaNet layers if every rank held them whole, as in the published ports."""
    parameters = [p for name, p in module.named_parameters() if ".linear_attn." in name]
    return sum(p.nbytes * getattr(p, "num_partitions", 1) for p in parameters)


def count_bytes(module: NeuronBaseModel) -> RankBytes:
    """The bytes of a module, on whatever device; its parameters are those of one rank."""
    assert isinstance(module.kv_mgr, Qwen35CacheManager), "the model makes its own"
    return RankBytes(count_weights(module).total, *module.kv_mgr.nbytes())
