# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The gated attention layer, and its softmax over blocks of cached keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwen35.layers.attention import _RunningSoftmax
from support.compare import assert_close
from support.full_width import check_full_width_layer


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
