# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The partial rotary embedding with multimodal axes, against transformers' own."""

from __future__ import annotations

import pytest
import torch

from qwen35.layers.rope import Qwen35RotaryEmbedding, apply_partial_rotary, mrope_axes
from support.compare import assert_close
from support.models import TINY

transformers = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
from transformers import Qwen3_5TextConfig  # noqa: E402

ROTARY_DIM, SECTION = 8, (2, 1, 1)


def ours() -> Qwen35RotaryEmbedding:
    return Qwen35RotaryEmbedding(ROTARY_DIM, 10000.0, SECTION)


@pytest.mark.parametrize("axes", [1, 3], ids=["text", "media"])
def test_cosines_and_sines_equal_transformers(axes: int) -> None:
    positions = torch.randint(0, 1000, (2, 7) if axes == 1 else (2, 3, 7))
    theirs = transformers.Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(**TINY))
    x = torch.empty(0)
    expected = theirs(x, positions if axes == 1 else positions.transpose(0, 1))
    for name, actual, reference in zip(("cos", "sin"), ours()(x, positions), expected, strict=True):
        # Angles of up to 1000 in float32 are off by 6e-5 at most.
        assert_close(actual, reference, atol=1e-4, label=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated_as_by_transformers(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 2, 4, 7, 32).to(dtype)
    cos, sin = ours()(query, torch.arange(7).expand(2, 7))
    expected = transformers.apply_rotary_pos_emb(query.float(), key.float(), cos, sin)
    for name, x, reference in zip(("query", "key"), (query, key), expected, strict=True):
        rotated = apply_partial_rotary(x, cos, sin)
        assert rotated.dtype == dtype
        assert torch.equal(rotated[..., ROTARY_DIM:], x[..., ROTARY_DIM:]), "dims beyond rotary_dim are not rotated"
        # Computed in float32 and rounded once.
        assert_close(
            rotated, reference.to(dtype), atol=1e-6, rtol=2.0**-7 if dtype == torch.bfloat16 else 0, label=name
        )


def test_the_axes_interleave_until_a_section_is_used_up() -> None:
    assert mrope_axes((11, 11, 10)) == [0, 1, 2] * 10 + [0, 1]
    assert mrope_axes((4, 2, 1)) == [0, 1, 2, 0, 1, 0, 0]
