# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Configurations of the mini that are checked: what the plan says and `model_checks` runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


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
