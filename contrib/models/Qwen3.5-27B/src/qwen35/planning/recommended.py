# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Recommended configurations of 27B on each instance; `qwen35 plan --recommended` says what they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_qwen35 import Qwen35NeuronConfig
from ..hardware import DEFAULT_LNC, TRN2_3XLARGE, TRN2_48XLARGE, Instance


def prompt_bucket_for(seq_len: int) -> int:
    """Tokens of the largest context-encoding bucket, for contexts of `seq_len`.

    On 27B at TP=4 the arithmetic of 1,024 tokens takes 4 times as long as reading the weights, that of 512 twice as
    long: neither waits for memory, and longer chunks would win nothing. A program for 1,024 has at most 1 M
    instructions for its matrix products up to 32K tokens, and one for 512 has 1.2 M at 256K; neuronx-cc gives up at 5 M
    for these and all others. (All modelled.)
    """
    return 1024 if seq_len <= 32768 else 512


FIRST_PROMPT_BUCKET, FIRST_CACHE_BUCKET = 256, 4096
"""Where buckets begin. Up to there a program waits for the weights (modelled, 27B at TP=4): 256 tokens take as long as
one, and 4,096 cached ones add half a percent. Each shorter bucket would be a program more to compile."""


def device_neuron_config(
    instance: Instance | None,
    tp_degree: int,
    seq_len: int,
    batch: int,
    dtype: torch.dtype | None = None,
    prompt_bucket: int | None = None,
    on_cpu: bool = False,
    **other: Any,
) -> Qwen35NeuronConfig:
    """Settings for a device: `batch` sequences of `seq_len` tokens, whose prompts are encoded one at a time.

    bfloat16 by default, or float32 for the same on a CPU. Without an instance nothing is checked before compiling.
    `other` fields of the configuration take the place of those chosen here.
    """
    if prompt_bucket is None:
        prompt_bucket = prompt_bucket_for(seq_len)
    prompt_bucket = min(prompt_bucket, seq_len)
    chosen: dict[str, Any] = dict(
        tp_degree=tp_degree,
        batch_size=batch,
        ctx_batch_size=1,
        is_continuous_batching=batch > 1,
        seq_len=seq_len,
        prefill_chunk_size=prompt_bucket if prompt_bucket < seq_len else None,
        enable_bucketing=True,
        context_encoding_buckets=doubled(FIRST_PROMPT_BUCKET, prompt_bucket),
        token_generation_buckets=doubled(FIRST_CACHE_BUCKET, seq_len),
        torch_dtype=dtype or (torch.float32 if on_cpu else torch.bfloat16),
        logical_nc_config=1 if on_cpu else DEFAULT_LNC.value,
        on_cpu=on_cpu,
        instance=None if instance is None else instance.name,
    )
    return Qwen35NeuronConfig(**chosen | other)


def doubled(first: int, last: int) -> list[int]:
    """Lengths from `first` on, each twice the one before, and `last`."""
    return [*(length for length in (first << i for i in range(last.bit_length())) if length < last), last]


@dataclass(frozen=True)
class Recommended:
    """A configuration of 27B with activations in bfloat16, by name."""

    name: str
    instance: Instance
    tp_degree: int
    seq_len: int
    batch: int
    use: str
    weights_dtype: str | None = None
    kv_cache_dtype: str | None = None

    def neuron_config(self, **other: Any) -> Qwen35NeuronConfig:
        """Its settings, for `Qwen35InferenceConfig`; `other` fields beside them."""
        return device_neuron_config(
            self.instance,
            self.tp_degree,
            self.seq_len,
            self.batch,
            weights_dtype=self.weights_dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            **other,
        )

    @property
    def replicas(self) -> int:
        """Models that the instance has room for."""
        return self.instance.ranks(DEFAULT_LNC.value) // self.tp_degree


RECOMMENDED = {
    entry.name: entry
    for entry in (
        Recommended("trn2.3xlarge", TRN2_3XLARGE, 4, 262144, 1, "the longest context"),
        Recommended("trn2.3xlarge-batch", TRN2_3XLARGE, 4, 32768, 8, "several requests"),
        Recommended("trn2.3xlarge-fp8", TRN2_3XLARGE, 4, 262144, 3, "several long contexts", "fp8"),
        Recommended("trn2.3xlarge-fp8-batch", TRN2_3XLARGE, 4, 32768, 16, "most requests", "fp8"),
        Recommended("trn2.3xlarge-fp8-kv", TRN2_3XLARGE, 4, 262144, 4, "most long contexts", "fp8", "fp8"),
        Recommended("trn2.48xlarge-tp4", TRN2_48XLARGE, 4, 32768, 8, "most requests per second"),
        Recommended("trn2.48xlarge-tp8", TRN2_48XLARGE, 8, 262144, 2, "long contexts, half the time per token of TP=4"),
        Recommended("trn2.48xlarge-tp16", TRN2_48XLARGE, 16, 262144, 1, "least time per token"),
    )
}
