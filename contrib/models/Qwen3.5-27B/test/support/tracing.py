# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Applications as NxD traces them: the module of every bucket, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qwen35 import NeuronQwen35ForCausalLM, OnDeviceSamplingConfig
from support.applications import SMALL, application

OPTIONS = {
    "one slot": dict(batch_size=1),
    "plain delta rule": dict(batch_size=1, deltanet_kernel="torch"),
    "buckets": dict(batch_size=2, enable_bucketing=True),
    "continuous": dict(batch_size=4, ctx_batch_size=1, is_continuous_batching=True, enable_bucketing=True),
    "two rows, four slots": dict(
        batch_size=2, ctx_batch_size=1, kv_cache_batch_size=4, max_batch_size=4, is_continuous_batching=True
    ),
    "prompts in chunks": dict(batch_size=2, prefill_chunk_size=128, enable_bucketing=True),
    "drafts": dict(batch_size=2, prefill_chunk_size=128, enable_bucketing=True, num_speculative_tokens=3),
    "drafts, plain delta rule": dict(batch_size=1, deltanet_kernel="torch", num_speculative_tokens=1),
    "drafts for two rows of four slots": dict(
        batch_size=2,
        ctx_batch_size=1,
        kv_cache_batch_size=4,
        max_batch_size=4,
        is_continuous_batching=True,
        num_speculative_tokens=7,
    ),
    "sampled tokens and logits": dict(
        batch_size=2, on_device_sampling_config=OnDeviceSamplingConfig(), output_logits=True, on_cpu=True
    ),
}
"""Options of `small_application` by what they change of the submodels."""


def small_application(**options: Any) -> NeuronQwen35ForCausalLM:
    """A small text model for a device, with a context of 512 tokens."""
    return application(SMALL, seq_len=512, max_context_length=512, **options)


def traced(app: NeuronQwen35ForCausalLM) -> Iterator[tuple[str, Any, Any, Any]]:
    """(submodel and bucket, module, aliases, sample inputs) in the order in which NxD's ModelBuilder makes them."""
    for wrapper in app.models:
        instance = wrapper.get_model_instance()
        with torch.device("meta"):
            instance.load_module()
        for i, inputs in enumerate(wrapper.input_generator()):
            module, aliases = instance.get(i)
            yield f"{wrapper.tag}, bucket {module.n_positions}", module, aliases, inputs
