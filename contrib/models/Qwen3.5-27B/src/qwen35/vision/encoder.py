# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5's vision encoder on the host: patches of images and video frames -> tokens of the text decoder.

On the host's CPU the encoder takes no HBM from the decoder. `application` runs the same weights on Neuron cores. Both
equal transformers' `Qwen3_5VisionModel`. Each frame attends to itself alone.

Letters: P patches of all images and frames, N images and videos, D hidden, H heads, E head dim, M patches per merged
token.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_qwen35 import DTYPES
from ..configuration_qwen35_vl import Qwen35VisionConfig
from ..weights.checkpoint import CheckpointReader
from ..weights.vision_rules import adjacent_pairs, convert_vision_checkpoint
from .positions import FramePositions, checked_grids, frame_positions

NORM_EPS = 1e-6  # transformers' Qwen3_5VisionBlock; not in config.json

_MLP_ROWS = 1024  # patches whose MLP activations are in memory at a time: 18 MB at 27B's width
_GELU_SCALE = 2 * math.sqrt(2 / math.pi)

Layer = Callable[..., Any]


class _Attention(nn.Module):
    def __init__(self, hidden: int, column: Layer, row: Layer) -> None:
        super().__init__()
        self.qkv, self.proj = column(hidden, 3 * hidden), row(hidden, hidden)


class _MLP(nn.Module):
    def __init__(self, hidden: int, inner: int, outer: int, column: Layer, row: Layer) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = column(hidden, inner), row(inner, outer)


class _Block(nn.Module):
    def __init__(self, config: Qwen35VisionConfig, norm: Layer, column: Layer, row: Layer) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(config.hidden_size), norm(config.hidden_size)
        self.attn = _Attention(config.hidden_size, column, row)
        self.mlp = _MLP(config.hidden_size, config.intermediate_size, config.hidden_size, column, row)


class VisionWeights(nn.Module):
    """The parameters of the encoder under the checkpoint's own names, without a forward pass.

    Args:
        config: sizes of the encoder.
        dtype: of the parameters.
        column: makes a linear layer, given its input and output sizes, whose outputs may be split over the ranks.
        row: the same of a layer whose inputs may be split.
    """

    def __init__(self, config: Qwen35VisionConfig, dtype: torch.dtype, column: Layer, row: Layer) -> None:
        super().__init__()
        norm, merged = partial(nn.LayerNorm, eps=NORM_EPS, dtype=dtype), config.hidden_size * config.merge_unit
        self.patch_embed: Any = nn.Module()
        self.patch_embed.proj = nn.Linear(config.patch_dim, config.hidden_size, dtype=dtype)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size, dtype=dtype)
        self.blocks: Any = nn.ModuleList(_Block(config, norm, column, row) for _ in range(config.depth))
        self.merger: Any = _MLP(merged, merged, config.out_hidden_size, column, row)
        self.merger.norm = norm(config.hidden_size)
        self.requires_grad_(False)


class _Run(NamedTuple):
    """Neighbouring frames of one length: patches `start` to `start + frames * length`."""

    start: int
    frames: int
    length: int


class NeuronQwen35VisionModel(VisionWeights):
    """The vision encoder on the CPU.

    One attention call computes all frames of one number of patches, whichever images they belong to.

    Args:
        config: sizes of the encoder.
        dtype: of the weights and of the output, float32 or bfloat16.
        compute_dtype: of the arithmetic; by default `arithmetic_dtype(dtype)`. Weights stay in `dtype`.
    """

    def __init__(
        self, config: Qwen35VisionConfig, dtype: torch.dtype = torch.bfloat16, compute_dtype: torch.dtype | None = None
    ) -> None:
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype={dtype} is not supported; set it to torch.bfloat16 or torch.float32")
        linear = partial(nn.Linear, dtype=dtype)
        super().__init__(config, dtype, linear, linear)
        self.config, self.dtype, self.compute_dtype = config, dtype, compute_dtype or arithmetic_dtype(dtype)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16
    ) -> NeuronQwen35VisionModel:
        """The encoder of a vision-language checkpoint on disk.

        Raises:
            Qwen35ConfigError: config.json has no vision_config, or one that cannot run.
            CheckpointError: a file is missing, truncated or no checkpoint.
            ConversionError: vision tensors are missing, unexpected or mis-shaped; all are listed.
        """
        with CheckpointReader(path) as reader:
            return cls.from_checkpoint(reader, Qwen35VisionConfig.from_pretrained(path), dtype)

    @classmethod
    def from_checkpoint(
        cls, source: Mapping[str, torch.Tensor], config: Qwen35VisionConfig, dtype: torch.dtype = torch.bfloat16
    ) -> NeuronQwen35VisionModel:
        """The encoder with the tensors `model.visual.*` or `visual.*` of `source`, read one at a time.

        Raises:
            ConversionError: vision tensors are missing, unexpected or mis-shaped; all are listed.
        """
        tensors = convert_vision_checkpoint(source, config, dtype, partial(adjacent_pairs, head_dim=config.head_dim))
        with torch.device("meta"):
            model = cls(config, dtype)
        for name in tensors:
            model.load_state_dict({name: tensors[name].contiguous()}, strict=False, assign=True)
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Merged tokens [P / M, out_hidden_size] in `dtype`, in the order of the patches.

        Args:
            pixel_values: [P, channels * frames * height * width of a patch], all images and videos one after another.
            grid_thw: [N, 3] int, frames, rows and columns of patches of each.

        Raises:
            ValueError: the two do not fit each other or the configuration.
        """
        grids = checked_grids(pixel_values, grid_thw, self.config)
        if not grids:
            return torch.zeros(0, self.config.out_hidden_size, dtype=self.dtype)
        # Frames of one length side by side, so that their rows are one view.
        order = sorted(range(len(grids)), key=lambda i: grids[i][1] * grids[i][2])
        patches = [math.prod(grid) for grid in grids]
        if order != list(range(len(grids))):
            images = pixel_values.split(patches)
            pixel_values = torch.cat([images[i] for i in order])
        tokens = self._encode(pixel_values.to(self.compute_dtype), [grids[i] for i in order]).to(self.dtype)
        if order == list(range(len(grids))):
            return tokens
        merged = tokens.split([patches[i] // self.config.merge_unit for i in order])
        return torch.cat([merged[order.index(i)] for i in range(len(grids))])

    def _encode(self, pixel_values: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
        hidden = F.linear(pixel_values, *self._cast(self.patch_embed.proj))
        turns = self._add_positions(hidden, grids)
        runs = list(_runs(grids))
        for block in self.blocks:
            mixed = self._attention(self._norm(hidden, block.norm1), block.attn, turns, runs)
            hidden += F.linear(mixed, *self._cast(block.attn.proj))
            wide, narrow = self._cast(block.mlp.linear_fc1), self._cast(block.mlp.linear_fc2)
            # In place and some rows at a time: memory newly allocated for all patches costs a CPU as much as the
            # arithmetic on it.
            for rows in hidden.split(_MLP_ROWS):
                rows += F.linear(_gelu_tanh_(F.linear(self._norm(rows, block.norm2), *wide)), *narrow)
        merged = self._norm(hidden, self.merger.norm).view(-1, self.config.hidden_size * self.config.merge_unit)
        return F.linear(
            F.gelu(F.linear(merged, *self._cast(self.merger.linear_fc1))), *self._cast(self.merger.linear_fc2)
        )

    def _add_positions(self, hidden: torch.Tensor, grids: list[list[int]]) -> torch.Tensor:
        """Add each patch's position embedding to hidden [P, D]; return its rotary turns [P, E / 2] complex64."""
        table = self.pos_embed.weight.float()
        frames: dict[tuple[int, int], FramePositions] = {}
        turns, start = [], 0
        for count, height, width in grids:
            if (height, width) not in frames:
                frames[height, width] = frame_positions(height, width, self.config)
            at = frames[height, width]
            stop = start + count * height * width
            embedding = F.embedding_bag(at.indices, table, per_sample_weights=at.weights, mode="sum")
            hidden[start:stop].view(count, height * width, -1).add_(embedding)
            turns.append(torch.polar(torch.ones_like(at.angles), at.angles).repeat(count, 1))
            start = stop
        return torch.cat(turns)

    def _attention(self, x: torch.Tensor, attn: Any, turns: torch.Tensor, runs: list[_Run]) -> torch.Tensor:
        """x [P, D], normalised -> [P, D] before the output projection; each frame of each run attends to itself."""
        heads, head_dim = self.config.num_heads, self.config.head_dim
        qkv = F.linear(x, *self._cast(attn.qkv)).view(-1, 3, heads, head_dim)
        query_key = qkv[:, :2]
        pairs = torch.view_as_complex(query_key.float().unflatten(-1, (head_dim // 2, 2)))
        pairs.mul_(turns[:, None, None])
        if qkv.dtype != torch.float32:  # float() made a copy
            query_key.copy_(torch.view_as_real(pairs).flatten(-2))
        mixed = []
        for start, frames, length in runs:
            rows = qkv[start : start + frames * length].view(frames, length, 3, heads, head_dim)
            q, k, v = rows.permute(2, 0, 3, 1, 4)
            mixed.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(frames * length, -1))
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]

    def _norm(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), *self._cast(norm), NORM_EPS)

    def _cast(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return layer.weight.to(self.compute_dtype), layer.bias.to(self.compute_dtype)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The faster of `dtype` and float32 on this CPU.

    On a CPU without bfloat16 units, PyTorch's bfloat16 products run at a fraction of the float32 rate.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return dtype if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32


def _runs(grids: list[list[int]]) -> Iterator[_Run]:
    start = 0
    for length, group in itertools.groupby(grids, key=lambda grid: grid[1] * grid[2]):
        count = sum(frames for frames, _, _ in group)
        yield _Run(start, count, length)
        start += count * length


def _gelu_tanh_(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula, in place: 0.5 * (1 + tanh(u)) = sigmoid(2 * u), of which sigmoid is the cheaper."""
    gate = (x * x).mul_(0.044715 * _GELU_SCALE).add_(_GELU_SCALE).mul_(x).sigmoid_()
    return x.mul_(gate)
