# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Configurations of the mini that are checked: what the plan says and `model_checks` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import torch

from ..configuration_qwen35 import FP8_NAME, Qwen35NeuronConfig
from ..hardware import DEFAULT_LNC
from ..nxdi import NXDI_AVAILABLE

SEQ_LEN, PROMPT_BUCKET = 256, 128
"""One bucket of prompts and one of cached positions, both multiples of what the attention kernels take."""

BUCKETS = {"looped": 512, "recurrent": 32}
"""Of prompts, where the kernel encodes no shorter ones itself, or goes token by token."""

DRAFTS = 3
ROWS = 4


class Feature(str, Enum):
    """What a case runs beside kernels; the value is its name in the settings."""

    GENERATION = "generation"  # prompts one after the other
    CHUNKED_PROMPTS = "chunked_prompts"  # prompts longer than the bucket, by prefill_chunk_size
    BATCH = "batch"  # four requests at a time
    PREFIX_CACHE = "prefix_cache"  # states restored
    VISION = "vision"
    SPECULATION = "speculation"
    FP8_WEIGHTS = "fp8_weights"
    FP8_CACHE = "fp8_cache"


_FURTHER_PROGRAMS = {
    Feature.CHUNKED_PROMPTS: 1,
    Feature.PREFIX_CACHE: 1,
    Feature.VISION: 1,
    Feature.SPECULATION: 3,
}
"""Beside a prompt and a decoding step."""


@dataclass(frozen=True)
class ModelCase:
    """A configuration of the mini; the fields are those of `Qwen35NeuronConfig`.

    Attributes:
        kernels: deltanet_kernel, deltanet_inverse, attention_kernel by phase.
    """

    tp_degree: int
    kernels: Mapping[str, Any] = field(default_factory=dict)
    feature: Feature = Feature.GENERATION

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "feature": self.feature.value}

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> ModelCase:
        return cls(fields["tp_degree"], fields["kernels"], Feature(fields["feature"]))

    @property
    def programs(self) -> int:
        """How many are compiled: a test holds it against the submodels' buckets."""
        return 2 + _FURTHER_PROGRAMS.get(self.feature, 0)

    def neuron_config(self) -> Qwen35NeuronConfig:
        """The mini's settings."""
        bucket = BUCKETS.get(self.kernels.get("deltanet_kernel", ""), PROMPT_BUCKET)
        seq_len = max(SEQ_LEN, bucket)
        in_pieces = self.feature in (Feature.CHUNKED_PROMPTS, Feature.PREFIX_CACHE)
        rows = ROWS if self.feature is Feature.BATCH else 1
        return Qwen35NeuronConfig(
            tp_degree=self.tp_degree,
            batch_size=rows,
            ctx_batch_size=1,
            is_continuous_batching=rows > 1,
            seq_len=seq_len,
            max_context_length=bucket,
            prefill_chunk_size=bucket if in_pieces else None,
            enable_bucketing=True,
            context_encoding_buckets=[bucket],
            token_generation_buckets=[seq_len],
            torch_dtype=torch.bfloat16 if NXDI_AVAILABLE else torch.float32,
            logical_nc_config=DEFAULT_LNC.value if NXDI_AVAILABLE else 1,
            on_cpu=not NXDI_AVAILABLE,
            num_speculative_tokens=DRAFTS if self.feature is Feature.SPECULATION else 0,
            weights_dtype=FP8_NAME if self.feature is Feature.FP8_WEIGHTS else None,
            kv_cache_dtype=FP8_NAME if self.feature is Feature.FP8_CACHE else None,
            **self.kernels,
        )
