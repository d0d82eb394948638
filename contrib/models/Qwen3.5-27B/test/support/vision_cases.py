# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Random vision encoders of transformers, ours with the same weights, and pixels for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qwen35.configuration_qwen35_vl import Qwen35VisionConfig
from qwen35.vision.encoder import NeuronQwen35VisionModel

pytest.importorskip("transformers", minversion="5.0")  # skips each test module that imports this one
from transformers import Qwen3_5VisionConfig, Qwen3_5VisionModel

TINY = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=24,
    num_position_embeddings=49,
    patch_size=4,
    temporal_patch_size=2,
    spatial_merge_size=2,
    in_channels=3,
)
Grids = Sequence[Sequence[int]]

# float32: outputs are of order one to ten after at most three layers, rounding stays under 1e-5 of that.
CLOSE = dict(atol=1e-4, rtol=1e-5)


def random_reference(seed: int = 0, **overrides: Any) -> Qwen3_5VisionModel:
    """A transformers encoder whose every weight matters: activations of order one, biases and norms included."""
    model = Qwen3_5VisionModel._from_config(
        Qwen3_5VisionConfig(**{**TINY, **overrides}), attn_implementation="sdpa"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("bias") or "pos_embed" in name:
            parameter.data = 0.5 * noise
        else:
            # Queries and keys twice as strong, so that attention is far from uniform.
            parameter.data = noise * (2.0 if "qkv" in name else 1.0) * parameter[0].numel() ** -0.5
    return model


def tensors_of(reference: Qwen3_5VisionModel, prefix: str = "model.visual.") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in reference.state_dict().items()}


def ours_of(reference: Qwen3_5VisionModel, dtype: torch.dtype = torch.float32) -> NeuronQwen35VisionModel:
    config = Qwen35VisionConfig.from_dict(reference.config.to_dict())
    return NeuronQwen35VisionModel.from_checkpoint(tensors_of(reference), config, dtype)


def random_pixels(grids: Grids, config: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    grid_thw = torch.tensor(grids)
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(int(grid_thw.prod(1).sum()), size, generator=generator), grid_thw


@torch.no_grad()
def expected_tokens(reference: Qwen3_5VisionModel, pixels: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    return reference(pixels, grid_thw).pooler_output


def save_checkpoint(path: Path, reference: Qwen3_5VisionModel, prefix: str = "model.visual.") -> None:
    decoder = {"model.language_model.norm.weight": torch.zeros(4)}
    save_file(tensors_of(reference, prefix) | decoder, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"vision_config": reference.config.to_dict()}))
