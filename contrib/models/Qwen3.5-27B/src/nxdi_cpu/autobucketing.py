# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Sequence-length buckets of the two submodels; stands in for NxDI's `modules.autobucketing`."""

from __future__ import annotations

from math import log2

from .config import InferenceConfig

_SMALLEST_BUCKET = 128


def generate_buckets(min_length: int, max_length: int) -> list[int]:
    """Powers of two from `min_length` on, then `max_length` itself."""
    if min_length == max_length:
        return [max_length]
    return [2**i for i in range(int(log2(min_length)), round(log2(max_length)))] + [max_length]


def generate_buckets_for_cte(inference_config: InferenceConfig) -> list[int]:
    """Prompt lengths that context encoding is compiled for."""
    neuron_config = inference_config.neuron_config
    if not neuron_config.enable_bucketing:
        return [neuron_config.max_context_length]
    return neuron_config.context_encoding_buckets or generate_buckets(
        _SMALLEST_BUCKET, neuron_config.max_context_length
    )


def generate_buckets_for_tkg(inference_config: InferenceConfig) -> list[int]:
    """Cache lengths that token generation is compiled for."""
    neuron_config = inference_config.neuron_config
    if not neuron_config.enable_bucketing:
        return [neuron_config.max_length]
    return neuron_config.token_generation_buckets or generate_buckets(_SMALLEST_BUCKET, neuron_config.max_length)
