# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""fp8 weights: the forms of checkpoints that are read, and what of the model is in fp8.

A matrix in fp8 is a weight [rows, columns] of float8_e4m3fn and a scale for each block of it: W = weight * scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .error_text import shown

FP8 = torch.float8_e4m3fn
FP8_MAX = 240.0
"""Largest magnitude of e4m3 on Trainium 2; the bytes above it, up to torch's 448, are infinity and NaN there.

Values from 248 on would round up to 256, so they are clamped before they are cast.
"""

BLOCK_METHOD, CHANNEL_METHOD = "fp8", "fp8_per_channel"
"""`quant_method` of a config.json: a scale per block, as published; or per row, as `qwen35 quantize` writes it.

The second is a name of its own, so that software which knows only the first refuses it instead of misreading it.
"""

KEPT = {
    "embed_tokens": "a step reads one row of it per token, so that fp8 would save no time",
    "lm_head": "its error goes into the logits as it is, with no later layer to average it",
    "in_proj_a, in_proj_b": "the gates of DeltaNet: a decay is exponentiated at every token; 0.1% of the bytes",
    "conv1d": "four taps per channel, not a matrix product",
    "norms, A_log, dt_bias": "vectors, float32 as ever",
    "mtp.fc": "bfloat16 in the published checkpoints too",
    "visual": "the vision encoder: it runs once per image",
}
"""What stays as it is, by the checkpoint's names, and why."""

MODULES_NOT_CONVERTED = ["lm_head", "in_proj_ba", "fc"]
"""The linear modules of `KEPT` that the ranks have, for NxD's `convert`: names, each of which is also looked for in
whole paths, so that none of them may be part of another module's name."""

_MATRIX = re.compile(
    r"(.+\.)?layers\.\d+\."
    r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj))\.weight"
)


def is_fp8_matrix(name: str) -> bool:
    """Whether a checkpoint's tensor is in fp8 when the weights are: a matrix of a decoder layer, or of an MTP layer."""
    return _MATRIX.fullmatch(name) is not None


@dataclass(frozen=True)
class Fp8Form:
    """How a checkpoint scales its fp8 matrices."""

    block: tuple[int, int] | None
    """Rows and columns of a block; None where each row is one."""
    not_converted: tuple[str, ...]
    """The modules that its config.json says are not in fp8. Releases differ: what is said of a tensor by its dtype and
    its scale counts, this is compared with it only."""

    def scale_name(self, weight: str) -> str:
        """The name of the tensor with the scales of `weight`."""
        return weight + ("_scale" if self.block is None else "_scale_inv")

    def weight_name(self, name: str) -> str | None:
        """The name of the weight that `name` has the scales of, or None where it is no scale."""
        suffix = self.scale_name("")
        return name.removesuffix(suffix) if name.endswith(f".weight{suffix}") else None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales of a matrix [rows, columns]: a block at an edge may be smaller."""
        rows, columns = shape
        if self.block is None:
            return rows, 1
        return -(-rows // self.block[0]), -(-columns // self.block[1])


def parse_fp8(value: Mapping[str, Any]) -> Fp8Form | None:
    """The form that a `quantization_config` describes, or None where it is of another method.

    Raises:
        ValueError: it is fp8 in a way that is not read; the message says which field, and ends before the remedy.
    """
    method = value.get("quant_method")
    if method not in (BLOCK_METHOD, CHANNEL_METHOD):
        return None
    fmt, scheme = value.get("fmt", "e4m3"), value.get("activation_scheme", "dynamic")
    if fmt != "e4m3":
        raise ValueError(f"fmt={shown(fmt)} is not read, only 'e4m3'")
    if scheme != "dynamic":
        raise ValueError(f"activation_scheme={shown(scheme)} is not read: activations are not quantised here")
    listed = value.get("modules_to_not_convert") or []
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"modules_to_not_convert={shown(listed)} must be a list of names")
    if method == CHANNEL_METHOD:
        return Fp8Form(None, tuple(listed))
    block = value.get("weight_block_size")
    if not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise ValueError(f"weight_block_size={shown(block)} must be two sizes, as [128, 128]")
    return Fp8Form((block[0], block[1]), tuple(listed))
