# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5's vision encoder as an NxDI application, traced for each bucket of patches.

The weights are those of `encoder`, under the same names. Positions are computed on the host.

Letters: P patches of all images and frames, N images and videos, E head dim, M patches per merged token.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..configuration_qwen35 import DTYPES, Qwen35ConfigError
from ..configuration_qwen35_vl import Qwen35VisionConfig
from ..nxdi import (
    VISION_ENCODER_MODEL_TAG,
    ColumnParallelLinear,
    EncoderModelInstance,
    InferenceConfig,
    ModelWrapper,
    NeuronConfig,
    RowParallelLinear,
    get_tensor_model_parallel_size,
)
from ..weights.checkpoint import CheckpointReader
from ..weights.sharding import StreamedSharding
from ..weights.vision_rules import convert_vision_checkpoint, qkv_by_rank
from .encoder import NORM_EPS, VisionWeights
from .positions import checked_grids, frame_positions

PADDING_SEGMENT = -1


class Qwen35VisionInferenceConfig(InferenceConfig):
    """The `vision_config` of a checkpoint, flat, plus `neuron_config`, whose buckets are numbers of patches.

    Raises:
        Qwen35ConfigError: naming every field that is wrong or unsupported.
    """

    _name_or_path: str

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], neuron_config: NeuronConfig) -> Qwen35VisionInferenceConfig:
        """Read `path`/config.json of a vision-language checkpoint."""
        vision = asdict(Qwen35VisionConfig.from_pretrained(path))
        return cls(neuron_config, load_config=lambda config: vars(config).update(vision, _name_or_path=str(path)))

    @property
    def vision(self) -> Qwen35VisionConfig:
        own = vars(self)
        return Qwen35VisionConfig(**{f.name: own[f.name] for f in fields(Qwen35VisionConfig)})

    def get_required_attributes(self) -> list[str]:
        return [f.name for f in fields(Qwen35VisionConfig)]

    def validate_config(self) -> None:
        """Raises: Qwen35ConfigError: one line for each problem of the run settings."""
        super().validate_config()
        vision, neuron, problems = self.vision, self.neuron_config, []
        uneven = [bucket for bucket in neuron.buckets if bucket % vision.merge_unit]
        if uneven:
            problems.append(f"buckets={uneven} must be multiples of the {vision.merge_unit} patches of a merged token")
        for size, what in ((vision.num_heads, "num_heads"), (vision.intermediate_size, "intermediate_size")):
            if size % neuron.tp_degree:
                problems.append(f"tp_degree={neuron.tp_degree} does not divide vision_config.{what}={size}; lower it")
        if neuron.quantized:
            problems.append(
                "weights_dtype='fp8' is not supported: the vision encoder stays in torch_dtype; leave it out"
            )
        if neuron.torch_dtype not in DTYPES.values():
            problems.append(f"torch_dtype={neuron.torch_dtype} is not supported; set it to bfloat16 or float32")
        if problems:
            raise Qwen35ConfigError(problems)


class Qwen35VisionEncoder(VisionWeights):
    """The traced module of a rank. The bucket gives every shape; heads and MLP columns are split over the ranks."""

    def __init__(self, config: Qwen35VisionInferenceConfig) -> None:
        dtype = config.neuron_config.torch_dtype
        column = partial(ColumnParallelLinear, gather_output=False, dtype=dtype)
        super().__init__(config.vision, dtype, column, partial(RowParallelLinear, input_is_parallel=True, dtype=dtype))
        self.config = config.vision
        self.heads = config.vision.num_heads // get_tensor_model_parallel_size()

    def forward(
        self,
        pixel_values: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        angles: torch.Tensor,
        segments: torch.Tensor,
    ) -> torch.Tensor:
        """Merged tokens [P / M, out_hidden_size] of a bucket of P patches.

        Args:
            pixel_values: [P, patch_dim] in torch_dtype.
            indices, weights: [P, 4] int32 and float32, the entries of the position grid to sum (`FramePositions`).
            angles: [P, E / 2] float32, rotary.
            segments: [P] int32, the number of the frame of each patch; PADDING_SEGMENT for padding.
        """
        hidden = self.patch_embed.proj(pixel_values)
        hidden = hidden + (self.pos_embed(indices).float() * weights[..., None]).sum(1).to(hidden.dtype)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        same_segment = segments[:, None] == segments[None, :]
        for block in self.blocks:
            hidden = hidden + block.attn.proj(
                self._attention(self._norm(hidden, block.norm1), block.attn, cos, sin, same_segment)
            )
            inner = block.mlp.linear_fc1(self._norm(hidden, block.norm2))
            hidden = hidden + block.mlp.linear_fc2(F.gelu(inner, approximate="tanh"))
        merged = self._norm(hidden, self.merger.norm).view(-1, self.config.hidden_size * self.config.merge_unit)
        return self.merger.linear_fc2(F.gelu(self.merger.linear_fc1(merged)))

    def _attention(
        self, x: torch.Tensor, attn: Any, cos: torch.Tensor, sin: torch.Tensor, same_segment: torch.Tensor
    ) -> torch.Tensor:
        qkv = attn.qkv(x).view(-1, 3, self.heads, self.config.head_dim)
        q, k, v = qkv.unbind(1)
        q, k = (self._rotate(part, cos, sin).transpose(0, 1) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(0, 1), attn_mask=same_segment)
        return mixed.transpose(0, 1).flatten(1)

    @staticmethod
    def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    @staticmethod
    def _norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
        # Cast to float32 here: a compiler that splits layer_norm into its steps would take them in the input's dtype.
        return F.layer_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.bias.float(), NORM_EPS).to(x.dtype)


class Qwen35VisionModelWrapper(ModelWrapper):
    """Computes positions on the host and pads all inputs to the bucket."""

    def get_model_instance(self) -> EncoderModelInstance:
        return EncoderModelInstance(model_cls=self.model_cls, config=self.config)

    def input_generator(self) -> list[tuple[torch.Tensor, ...]]:
        """One tuple of sample inputs per bucket: an image of a single row of merged tokens."""
        vision = self.config.vision
        return [
            self.bucket_inputs(
                torch.zeros(bucket, vision.patch_dim),
                torch.tensor([[1, vision.spatial_merge_size, bucket // vision.spatial_merge_size]]),
            )
            for bucket in self.neuron_config.buckets
        ]

    def get_target_bucket(self, *args: torch.Tensor, strategy: str = "first_fit") -> int:
        """The smallest bucket that holds the patches of pixel_values, the first of the inputs.

        Raises:
            ValueError: there are more patches than in the largest bucket.
        """
        pixel_values, *_ = args
        patches, buckets = pixel_values.shape[0], self.neuron_config.buckets
        fitting = [bucket for bucket in buckets if patches <= bucket]
        if not fitting:
            raise ValueError(
                f"{patches} patches exceed the largest vision bucket ({max(buckets)}): add a bucket, or lower "
                "max_pixels of the processor"
            )
        return int(min(fitting))

    def bucket_inputs(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The arguments of `Qwen35VisionEncoder.forward`, padded to the bucket.

        Raises:
            ValueError: pixel_values and grid_thw do not fit each other, or no bucket.
        """
        grids = checked_grids(pixel_values, grid_thw, self.config.vision)
        frames = [frame_positions(h, w, self.config.vision) for count, h, w in grids for _ in range(count)]
        indices, weights, angles = (torch.cat(parts) for parts in zip(*frames, strict=True))
        lengths = torch.tensor([len(frame.indices) for frame in frames])
        segments = torch.arange(len(frames), dtype=torch.int32).repeat_interleave(lengths)
        padding = self.get_target_bucket(pixel_values) - len(pixel_values)
        rows = (pixel_values.to(self.neuron_config.torch_dtype), indices.int(), weights, angles)
        return *(F.pad(t, (0, 0, 0, padding)) for t in rows), F.pad(segments, (0, padding), value=PADDING_SEGMENT)

    def forward(self, *args: Any, pad_type: str = "first_fit") -> Any:
        """Merged tokens [P / M, out_hidden_size] of pixel_values [P, patch_dim] and grid_thw [N, 3].

        Raises:
            RuntimeError: no weights were loaded.
            ValueError: the inputs do not fit each other, or no bucket.
        """
        if self.model is None:
            raise RuntimeError("forward called before the weights were loaded: call to_cpu() or load() first")
        pixel_values, grid_thw = args
        output = self._forward(*self.bucket_inputs(pixel_values, grid_thw))
        tokens: torch.Tensor = output[0] if isinstance(output, list | tuple) else output
        return tokens[: len(pixel_values) // self.config.vision.merge_unit]


class NeuronQwen35VisionForImageEncoding(StreamedSharding):
    """The vision encoder as an NxDI application: `compile`, `load` (or `to_cpu`), then call it."""

    _model_cls = Qwen35VisionEncoder

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        wrapper = Qwen35VisionModelWrapper(
            config=self.config,
            model_cls=self._model_cls,
            tag=VISION_ENCODER_MODEL_TAG,
            compiler_args=self.get_compiler_args(),
            priority_model_idx=0,
        )
        self.models.append(wrapper)

    def get_compiler_args(self) -> str:
        return "--auto-cast=none --model-type=transformer -O1"

    @classmethod
    def get_config_cls(cls) -> type[Qwen35VisionInferenceConfig]:
        return Qwen35VisionInferenceConfig

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Merged tokens [P / M, out_hidden_size]; arguments as of `NeuronQwen35VisionModel.forward`."""
        tokens: torch.Tensor = self.models[0](pixel_values, grid_thw)
        return tokens

    @classmethod
    def get_state_dict(
        cls, model_name_or_path: str | os.PathLike[str], config: Qwen35VisionInferenceConfig
    ) -> MutableMapping[str, torch.Tensor]:
        """The vision tensors in the Neuron layout, each read and converted when it is asked for.

        Raises:
            CheckpointError: a file is missing, truncated or no checkpoint.
            ConversionError: vision tensors are missing, unexpected or mis-shaped; all are listed.
        """
        neuron = config.neuron_config
        by_rank = partial(qkv_by_rank, ranks=neuron.tp_degree)
        return convert_vision_checkpoint(
            CheckpointReader(model_name_or_path), config.vision, neuron.torch_dtype, by_rank
        )

    @staticmethod
    def update_state_dict_for_tied_weights(state_dict: MutableMapping[str, torch.Tensor]) -> None:
        """Nothing is tied."""
