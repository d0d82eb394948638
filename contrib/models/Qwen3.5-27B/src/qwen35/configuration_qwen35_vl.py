# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Configuration of the vision encoder: the checkpoint's `vision_config`, under its own field names."""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .configuration_qwen35 import Qwen35ConfigError, Qwen35InferenceConfig, as_dict, is_number, is_size, read_config
from .error_text import shown

_MODEL_TYPES = ("qwen3_5_vision", "qwen3_5")  # older dumps carry the type of the whole model
MEDIA_TOKENS = ("image_token_id", "video_token_id")
"""The fields that name the placeholders of images and of videos."""

_MOST_BLOCKS = 1 << 10  # so that listing the tensors of a mistaken depth takes no time
_PIXELS = ("patch_size", "temporal_patch_size")  # transformers 5 also writes them as a list with one entry an axis

QWEN35_VISION_PRESETS: dict[str, dict[str, Any]] = {
    "27B": dict(
        depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=5120,
        num_position_embeddings=2304, patch_size=16, temporal_patch_size=2, spatial_merge_size=2,
    ),
}  # fmt: skip
"""The `vision_config` of published checkpoints, beside the text configs of `QWEN35_PRESETS`."""


@dataclass(frozen=True)
class Qwen35VisionConfig:
    """Sizes of the vision encoder; published checkpoints differ in them.

    Raises:
        Qwen35ConfigError: naming every field that is wrong or unsupported.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int  # width of the text decoder
    num_position_embeddings: int  # entries of the learned position grid, a square
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        problems = [
            f"vision_config.{name}={shown(value)} must be a positive integer; take it from the checkpoint's config.json"
            for name, value in sizes.items()
            if not is_size(value)
        ]
        if not problems and self.depth > _MOST_BLOCKS:
            problems.append(f"vision_config.depth={self.depth} must be at most {_MOST_BLOCKS}; correct config.json")
        if self.hidden_act != "gelu_pytorch_tanh":
            problems.append(
                f"vision_config.hidden_act={shown(self.hidden_act)} is not supported, only 'gelu_pytorch_tanh': "
                "the MLP is written for it"
            )
        if not is_number(self.rope_theta) or self.rope_theta <= 0:
            problems.append(f"vision_config.rope_theta={shown(self.rope_theta)} must be a positive number")
        if not problems and self.hidden_size % (4 * self.num_heads):
            problems.append(
                f"vision_config.hidden_size={self.hidden_size} is not a multiple of 4 * num_heads={self.num_heads}; "
                "a head rotates one half for rows and one for columns, both in pairs: correct config.json"
            )
        if not problems and self.grid_side**2 != self.num_position_embeddings:
            problems.append(
                f"vision_config.num_position_embeddings={self.num_position_embeddings} is not a square; "
                "the positions form a square grid: correct config.json"
            )
        if problems:
            raise Qwen35ConfigError(problems)

    @classmethod
    def from_dict(cls, vision_config: Any) -> Qwen35VisionConfig:
        """From the `vision_config` of a config.json of transformers 4.57 or 5, or from the object they make of it.

        Raises:
            Qwen35ConfigError: naming every field that is missing, wrong or unsupported.
        """
        given = as_dict(vision_config, "vision_config")
        rope = as_dict(given.get("rope_parameters"), "vision_config.rope_parameters")
        own = {f.name: f.default for f in fields(cls)}
        values = {name: given[name] for name in own if name in given}
        values |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        problems = [
            f"vision_config.{name} is missing; take it from the checkpoint's config.json"
            for name, default in own.items()
            if name not in values and default is MISSING
        ]
        for name in _PIXELS:
            size = values.get(name)
            if isinstance(size, list | tuple):
                if len(size) > 0 and all(side == size[0] for side in size):
                    values[name] = size[0]
                else:
                    problems.append(f"vision_config.{name}={shown(size)} is not supported: patches are square")
        model_type = given.get("model_type", _MODEL_TYPES[0])
        if model_type not in _MODEL_TYPES:
            problems.append(f"vision_config.model_type={shown(model_type)} is not one of {', '.join(_MODEL_TYPES)}")
        if given.get("deepstack_visual_indexes"):
            problems.append(
                f"vision_config.deepstack_visual_indexes={shown(given['deepstack_visual_indexes'])} is not supported: "
                "Qwen3.5 has no deepstack mergers; use a Qwen3.5 checkpoint"
            )
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            problems.append(f"vision_config.rope_parameters: rope_type={shown(rope['rope_type'])} must be 'axial'")
        if problems:
            raise Qwen35ConfigError(problems)
        return cls(**values)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Qwen35VisionConfig:
        """Read the `vision_config` of `path`/config.json.

        Raises:
            Qwen35ConfigError: there is none, or it cannot run.
        """
        vision = read_config(path).get("vision_config")
        if not vision:
            raise Qwen35ConfigError([f"{path}/config.json has no vision_config; use a vision-language checkpoint"])
        return cls.from_dict(vision)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Rows, and columns, of the learned position grid."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels * frames * height * width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token of the decoder."""
        return self.spatial_merge_size**2


class Qwen35VLInferenceConfig(Qwen35InferenceConfig):
    """The configuration of a vision-language checkpoint: text fields flat, `vision_config` as a dict.

    Raises:
        Qwen35ConfigError: as for text, and when the checkpoint has no vision encoder or no placeholder tokens.
    """

    def add_derived_config(self) -> None:
        super().add_derived_config()
        self.takes_images = True  # in the JSON, where a compiled model says which of the two classes runs it

    def validate_config(self) -> None:
        super().validate_config()
        problems = [
            f"{name} is missing: use a vision-language checkpoint"
            for name in MEDIA_TOKENS
            if getattr(self, name, None) is None
        ]
        problems += [
            f"{name}={getattr(self, name)} is outside vocab_size={self.vocab_size}; correct config.json"
            for name in MEDIA_TOKENS
            if (getattr(self, name, None) or 0) >= self.vocab_size
        ]
        if self.neuron_config.async_mode:
            problems.append("async_mode=True: NxDI queues a step with the rotary position of the last; set it to False")
        if self.vision_config is None:
            problems.append("vision_config is missing: use a vision-language checkpoint, or NeuronQwen35ForCausalLM")
        else:
            problems += _problems_of_vision(self.vision_config)
        if problems:
            raise Qwen35ConfigError(problems)

    @property
    def vision(self) -> Qwen35VisionConfig:
        assert self.vision_config is not None
        return Qwen35VisionConfig.from_dict(self.vision_config)


def _problems_of_vision(vision_config: dict[str, Any]) -> list[str]:
    try:
        Qwen35VisionConfig.from_dict(vision_config)
    except Qwen35ConfigError as error:
        return error.problems
    return []
