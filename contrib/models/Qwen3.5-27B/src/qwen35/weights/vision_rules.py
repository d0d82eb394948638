# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder's tensors: from a checkpoint to the layout that the vision modules read.

Letters: D hidden, E head dim, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..configuration_qwen35_vl import Qwen35VisionConfig
from .conversion import BUFFERS, Build, ConversionError, LazyStateDict, Rule, RuleSet, convert, rank_major

_PREFIXES = ("model.visual.", "visual.")


def adjacent_pairs(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """qkv rows [3 * D, ...] with dims i and i + E/2 of each query and key head side by side; value rows stay in place.

    A rotary angle turns these two dims together, so as neighbours they are one complex number. Attention scores do not
    change: query and key have the same order of dims.
    """
    query_key, value = qkv.split([qkv.shape[0] * 2 // 3, qkv.shape[0] // 3])
    pairs = query_key.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return torch.cat([pairs, value])


def qkv_by_rank(qkv: torch.Tensor, ranks: int) -> torch.Tensor:
    """qkv rows [3 * D, ...] with the heads of rank 0 first: q_0 | k_0 | v_0 | q_1 | ..."""
    return rank_major(qkv.chunk(3), ranks)


def vision_plan(config: Qwen35VisionConfig, dtype: torch.dtype, qkv: Build) -> list[Rule]:
    """How each tensor of a vision module is built; `qkv` orders the rows of the fused query, key and value."""
    c, hidden, merged = config, config.hidden_size, config.hidden_size * config.merge_unit
    rules: list[Rule] = []

    def add(name: str, *shape: int, build: Build | None = None) -> None:
        rules.append(Rule.of_one(name, shape, dtype, build))

    def add_linear(name: str, wide: int, narrow: int, build: Build | None = None) -> None:
        add(f"{name}.weight", wide, narrow, build=build)
        add(f"{name}.bias", wide, build=build)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", hidden)
        add(f"{name}.bias", hidden)

    # A convolution whose stride is its kernel is a product with each patch.
    kernel = (c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size)
    add("patch_embed.proj.weight", hidden, *kernel, build=lambda w: w.flatten(1))
    add("patch_embed.proj.bias", hidden)
    add("pos_embed.weight", c.num_position_embeddings, hidden)
    for i in range(c.depth):
        add_norm(f"blocks.{i}.norm1")
        add_norm(f"blocks.{i}.norm2")
        add_linear(f"blocks.{i}.attn.qkv", 3 * hidden, hidden, build=qkv)
        add_linear(f"blocks.{i}.attn.proj", hidden, hidden)
        add_linear(f"blocks.{i}.mlp.linear_fc1", c.intermediate_size, hidden)
        add_linear(f"blocks.{i}.mlp.linear_fc2", hidden, c.intermediate_size)
    add_norm("merger.norm")
    add_linear("merger.linear_fc1", merged, merged)
    add_linear("merger.linear_fc2", c.out_hidden_size, merged)
    return rules


def convert_vision_checkpoint(
    source: Mapping[str, torch.Tensor], config: Qwen35VisionConfig, dtype: torch.dtype, qkv: Build
) -> LazyStateDict:
    """Compare the checkpoint's `model.visual.*` or `visual.*` with the plan, then return the targets unbuilt.

    Args:
        source: HF tensors, of a `CheckpointReader` or a dict; others than the vision encoder's are not looked at.
        config: what the vision encoder must be.
        dtype: of every target.
        qkv: `adjacent_pairs` or `qkv_by_rank`, bound to the configuration.

    Raises:
        ConversionError: as `RuleSet.match`.
    """
    rule_set = RuleSet(vision_plan(config, dtype, qkv), _PREFIXES, BUFFERS)
    if all(rule_set.plain_name(name) is None for name in source):
        raise ConversionError([f"no tensor starts with {' or '.join(_PREFIXES)}; use a vision-language checkpoint"])
    return convert(source, rule_set)
