# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5's vision encoder: patches of images and video frames -> tokens of the text decoder.

`NeuronQwen35VisionModel` runs on the host's CPU, where the encoder takes no HBM from the decoder.
`NeuronQwen35VisionForImageEncoding` is the NxDI application of the same weights, traced for each bucket of patches.
Both equal transformers' `Qwen3_5VisionModel`. Each frame attends to itself alone.

Letters: P patches of all images and frames, N images and videos, D hidden, H heads, E head dim, M patches a merged
token.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import asdict, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

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
from ..weights.vision_rules import adjacent_pairs, convert_vision_checkpoint, qkv_by_rank
from .positions import FramePositions, checked_grids, frame_positions

NORM_EPS = 1e-6  # transformers' Qwen3_5VisionBlock; not in config.json
PADDING_SEGMENT = -1

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


class _VisionWeights(nn.Module):
    """The parameters under the checkpoint's own names, without a forward pass.

    `column` and `row` make the linear layers of which ranks hold whole rows and whole columns.
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


class NeuronQwen35VisionModel(_VisionWeights):
    """The vision encoder on the CPU.

    Frames of one size are attended to in one call, whichever images they belong to. The arithmetic is in `dtype`, or in
    float32 where this CPU has no units for it; weights stay in `dtype`.

    Args:
        config: sizes of the encoder.
        dtype: of the weights and of the output, float32 or bfloat16.
        compute_dtype: of the arithmetic; by default what is faster on this CPU.
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
        """The encoder with the `model.visual.*` or `visual.*` of `source`, read one at a time.

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
        # Frames of one length side by side, so that a run of them is a view.
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
            # By rows, in place: on a CPU, fresh memory for all patches costs as much as the arithmetic on it.
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
    """What this CPU multiplies `dtype` in: float32 where it has no bfloat16 units.

    Without them PyTorch's bfloat16 products run at a fraction of the float32 rate.
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
        if neuron.torch_dtype not in DTYPES.values():
            problems.append(f"torch_dtype={neuron.torch_dtype} is not supported; set it to bfloat16 or float32")
        if problems:
            raise Qwen35ConfigError(problems)


class Qwen35VisionEncoder(_VisionWeights):
    """The traced module: every shape follows from the bucket, heads and MLP columns are split over the ranks."""

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
            segments: [P] int32, the frame of each patch; padding has one of its own.
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
        # In float32, which a compiler that lowers layer_norm to its steps would not choose by itself.
        return F.layer_norm(x.float(), (x.shape[-1],), norm.weight.float(), norm.bias.float(), NORM_EPS).to(x.dtype)


class Qwen35VisionModelWrapper(ModelWrapper):
    """Computes positions on the host and pads everything to the bucket."""

    def get_model_instance(self) -> EncoderModelInstance:
        return EncoderModelInstance(model_cls=self.model_cls, config=self.config)

    def input_generator(self) -> list[tuple[torch.Tensor, ...]]:
        """One tuple of sample inputs a bucket: a single row of blocks."""
        vision = self.config.vision
        return [
            self.bucket_inputs(
                torch.zeros(bucket, vision.patch_dim),
                torch.tensor([[1, vision.spatial_merge_size, bucket // vision.spatial_merge_size]]),
            )
            for bucket in self.neuron_config.buckets
        ]

    def get_target_bucket(self, *args: torch.Tensor, strategy: str = "first_fit") -> int:
        """The smallest bucket that holds the patches of args[0].

        Raises:
            ValueError: there are more patches than in the largest bucket.
        """
        patches, buckets = args[0].shape[0], self.neuron_config.buckets
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
