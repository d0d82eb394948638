# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""fp8 checkpoints in the published form, by a quantiser in NumPy that shares nothing with the package's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from qwen35.serving.loading import MINI_CHECKPOINT

from .models import TINY, random_weights

MULTIPLES = dict(
    hidden_size=256,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    rope_parameters={**TINY["rope_parameters"], "mrope_section": [3, 3, 2]},
)
"""Sizes of a random model whose matrices have whole blocks: transformers takes others for other blocks."""

BLOCK = 128
OWN_MATRICES = ("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight")
"""How the names of the matrices end that published checkpoints have in fp8."""

PUBLISHED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_published_in_fp8(name: str) -> bool:
    return name.endswith(OWN_MATRICES) and "visual" not in name


def quantise_blocks(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as a publisher quantises it: a scale for each block of 128 x 128, its largest element at 448."""
    values = weight.float().numpy()
    rows, columns = (-(-size // BLOCK) for size in values.shape)
    scales = np.empty((rows, columns), np.float32)
    quantised = np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            place = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            # What divides is what is written.
            scale = torch.tensor(np.abs(values[place]).max() / 448).to(scale_dtype).float().numpy()
            scales[i, j] = scale
            quantised[place] = np.clip(values[place] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    as_bytes = torch.from_numpy(quantised.view(np.uint8).copy())
    return as_bytes.view(torch.float8_e4m3fn), torch.from_numpy(scales).to(scale_dtype)


def dequantise_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """W [rows, columns] float32, element by element."""
    values = weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = scale.float().numpy()
    spread = np.repeat(np.repeat(scales, BLOCK, 0), BLOCK, 1)[: values.shape[0], : values.shape[1]]
    return torch.from_numpy(values * spread)


def published(
    weights: dict[str, torch.Tensor],
    scale_dtype: torch.dtype = torch.bfloat16,
    chosen: Callable[[str], bool] = is_published_in_fp8,
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, those that are `chosen` in fp8 with their scales beside them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if chosen(name):
            found[name], found[f"{name}_scale_inv"] = quantise_blocks(tensor, scale_dtype)
        else:
            found[name] = tensor
    return found


def not_converted(weights: Iterable[str]) -> list[str]:
    """The modules that are not in fp8, by the names of their weights, as published lists have them."""
    return [
        name.removesuffix(".weight") for name in weights if name.endswith(".weight") and not is_published_in_fp8(name)
    ]


def save_published(
    path: Path, seed: int = 0, shards: int = 1, scale_dtype: torch.dtype = torch.bfloat16, **overrides: Any
) -> dict[str, torch.Tensor]:
    """Write a random fp8 checkpoint, in one file or several, and return its tensors."""
    sizes = {**MULTIPLES, **overrides}
    tensors = published(random_weights(seed, **sizes), scale_dtype)
    fields = {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"], "dtype": "bfloat16"}
    listed = not_converted(tensors)
    config = {**fields, **TINY, **sizes, "quantization_config": {**PUBLISHED, "modules_to_not_convert": listed}}
    write(path, tensors, config, shards)
    return tensors


def save_published_mini(path: Path) -> dict[str, torch.Tensor]:
    """Write the mini, vision encoder included, as an fp8 checkpoint, and return its tensors."""
    shutil.copytree(MINI_CHECKPOINT, path)
    config = json.loads((path / "config.json").read_text())
    tensors = published(load_file(path / "model.safetensors"))
    config["quantization_config"] = {**PUBLISHED, "modules_to_not_convert": not_converted(tensors)}
    write(path, tensors, config)
    return tensors


def write(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 1) -> None:
    """A checkpoint's files; of several shards, a weight and its scales are in different ones."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a published checkpoint without fp8, float32 where it was."""
    return {
        name: dequantise_blocks(tensor, tensors[f"{name}_scale_inv"]) if f"{name}_scale_inv" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


def quantise_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix rounded to fp8, and a scale for each row, its largest element at 240; W = weight * scale, float32."""
    values = weight.float().numpy()
    largest = np.abs(values).max(1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(240), np.float32(1))
    quantised = np.clip(values / scale, -240, 240).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(quantised.astype(np.float32)), torch.from_numpy(scale)


def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, those that are kept in fp8 as their rounding stands for, in float32."""
    return {
        name: torch.mul(*quantise_rows(tensor)) if is_published_in_fp8(name) else tensor
        for name, tensor in weights.items()
    }
