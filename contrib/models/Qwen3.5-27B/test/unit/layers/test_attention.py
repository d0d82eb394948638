# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated attention layer, and its softmax over blocks of cached keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35.layers.attention import NeuronQwen35Attention, _RunningSoftmax
from qwen35.ops import cached_attention, causal_attention
from support.compare import assert_close
from support.full_width import check_full_width_layer
from support.models import load_neuron, neuron_greedy, random_prompts, save_heads


def test_a_full_width_layer_of_27b_equals_transformers(tmp_path: Path) -> None:
    check_full_width_layer("full_attention", tmp_path)


@pytest.mark.parametrize("block", [1, 5, 12, 64])
@pytest.mark.parametrize("scale", [1.0, 50.0], ids=["mild scores", "scores that overflow without a maximum"])
def test_a_running_softmax_over_blocks_is_the_softmax_over_all_keys(block: int, scale: float) -> None:
    kv_heads, groups, tokens, cached, dims = 2, 3, 4, 29, 8
    query = scale * torch.randn(1, kv_heads, groups, tokens, dims)
    keys, values = torch.randn(2, 1, kv_heads, tokens + cached, dims)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    filled = torch.arange(cached) < 23  # nothing is in the last places of the cache
    mask = torch.cat([causal, filled.expand(tokens, cached)], dim=1)

    state = _RunningSoftmax(query, keys[:, :, :tokens], values[:, :, :tokens], causal)
    for start in range(tokens, tokens + cached, block):
        columns = slice(start, start + block)
        state.add(keys[:, :, columns], values[:, :, columns], mask[:, columns])
    scores = torch.einsum("bmgse,bmpe->bmgsp", query.double(), keys.double()).masked_fill(~mask, -torch.inf)
    expected = torch.einsum("bmgsp,bmpe->bmgse", scores.softmax(-1), values.double())
    # float32 scores of up to a few hundred: their rounding, 2e-5, is exponentiated.
    assert_close(state.result().double(), expected, atol=1e-4, label="weighted values")


class Specifications:
    """What the kernels compute, in their place: the seam to NxDI is tested where no kernel runs."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def attend_prompt(self, cores: int, *tensors: torch.Tensor) -> torch.Tensor:
        self.calls.append("prompt")
        return causal_attention(*tensors)

    def attend_cached(self, cores: int, *tensors: Any) -> torch.Tensor:
        *tensors, bucket = tensors
        self.calls.append(f"decode {bucket}")
        return cached_attention(*tensors)

    def continue_cached(self, cores: int, *tensors: Any) -> torch.Tensor:
        q, k, v, k_cache, v_cache, lengths, slots, bucket = tensors
        self.calls.append(f"continue {bucket}")
        return cached_attention(q, k, v, k_cache[slots], v_cache[slots], lengths)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, {"prompt", "decode 256"}),
        ({"prefill_chunk_size": 16}, {"prompt", "continue 256", "decode 256"}),
        (
            {"prefill_chunk_size": 16, "is_continuous_batching": True, "ctx_batch_size": 1, "enable_bucketing": True},
            {"prompt", "continue 128", "decode 128"},
        ),
    ],
    ids=["whole", "chunks", "slots"],
)
def test_the_model_gives_the_kernels_what_they_attend_to(
    options: dict[str, Any], calls: set[str], backend: str, tmp_path: Path
) -> None:
    save_heads(tmp_path, 64, num_attention_heads=6)
    prompts = random_prompts([40, 5])
    results, specifications = [], Specifications()
    for kernel in ("nki", "torch"):
        model = load_neuron(tmp_path, batch_size=2, seq_len=256, attention_kernel=kernel, **options)
        for submodel in model.models:
            for module in submodel.model.modules():
                if isinstance(module, NeuronQwen35Attention):
                    module.launches = specifications
        results.append(neuron_greedy(model, prompts, 4))
    assert {*specifications.calls} == calls
    assert torch.equal(results[0][0], results[1][0])
    # float32 sums in another order: 1e-6 of the largest output of a layer, and logits of order one.
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=0)
