# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Parallel linear layers and embedding, with the signatures and weight layouts of NxD's `parallel_layers.layers`.

Every sharded parameter carries the attributes that sharding reads (`partition_dim`, `partition_stride`, ...): rank r of
R holds the r-th of R contiguous blocks. Training-only and sequence-parallel arguments are accepted and must keep their
inert values.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .parallel_state import (
    TensorParallelGroup,
    gather_from_tensor_model_parallel_region,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_size,
    reduce_from_tensor_model_parallel_region,
)


def divide(numerator: int, denominator: int) -> int:
    """Exact quotient.

    Raises:
        ValueError: the division leaves a remainder.
    """
    if numerator % denominator:
        raise ValueError(f"{numerator} is not divisible by {denominator}")
    return numerator // denominator


def get_padding_length(numerator: int, denominator: int) -> int:
    """What to add to `numerator` to make it a multiple of `denominator`."""
    return -numerator % denominator


def set_tensor_model_parallel_attributes(
    tensor: torch.Tensor,
    is_parallel: bool,
    dim: int,
    stride: int,
    num_partitions: int = -1,
    rank_ordering: list[int] | None = None,
) -> None:
    """Mark `tensor` as one of `num_partitions` blocks along `dim`."""
    for name, value in (
        ("tensor_model_parallel", is_parallel),
        ("partition_dim", dim),
        ("partition_stride", stride),
        ("num_partitions", get_tensor_model_parallel_size() if num_partitions == -1 else num_partitions),
        ("rank_ordering", rank_ordering),
    ):
        setattr(tensor, name, value)


def require_inert(owner: str, **arguments: Any) -> None:
    """Refuse arguments that are there for the signature only.

    Raises:
        NotImplementedError: one of `arguments` is not false, zero, None or empty; all such are named.
    """
    active = [f"{name}={value!r}" for name, value in arguments.items() if value]
    if active:
        raise NotImplementedError(f"{owner}: the CPU stand-in does not implement {', '.join(active)}")


def _sharded_parameter(shape: tuple[int, ...], dim: int, partitions: int, dtype: torch.dtype) -> nn.Parameter:
    # Left unwritten: every weight is assigned from a checkpoint, and untouched pages cost no memory.
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    set_tensor_model_parallel_attributes(parameter, True, dim, 1, partitions)
    return parameter


class BaseParallelLayer(nn.Module):
    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device


class BaseParallelLinear(BaseParallelLayer):
    """Base of every module whose leaf parameters are split over the ranks."""


class ColumnParallelLinear(BaseParallelLinear):
    """y = x W^T with the rows of W [output_size, input_size] split over the ranks."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        stride: int = 1,
        init_method: Callable[[Any], torch.Tensor] | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        skip_bias_add: bool = False,
        pad: bool = False,
        pad_alignment_size_per_rank: int = 1,
        keep_padded_output: bool = False,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        rank_ordering: list[int] | None = None,
    ) -> None:
        super().__init__(device)
        require_inert(
            "ColumnParallelLinear",
            bias_and_padding=bias and pad,
            sequence_parallel_enabled=sequence_parallel_enabled,
            keep_master_weight=keep_master_weight,
            skip_bias_add=skip_bias_add,
            rank_ordering=rank_ordering,
        )
        self.tensor_parallel_group = tensor_model_parallel_group or get_tensor_model_parallel_group()
        ranks = self.tensor_parallel_group.size()
        self.input_size = input_size
        self.pad, self.keep_padded_output, self.gather_output = pad, keep_padded_output, gather_output
        self.pad_size = get_padding_length(output_size, pad_alignment_size_per_rank * ranks) if pad else 0
        self.output_size = output_size + self.pad_size
        self.output_size_per_partition = divide(self.output_size, ranks)
        self.weight = _sharded_parameter((self.output_size_per_partition, input_size), 0, ranks, dtype)
        self.bias = _sharded_parameter((self.output_size_per_partition,), 0, ranks, dtype) if bias else None

    def forward(self, input: torch.Tensor, slice_indices: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight if slice_indices is None else self.weight[slice_indices, :]
        output = F.linear(input, weight, self.bias)
        if not self.gather_output:
            return output
        output = gather_from_tensor_model_parallel_region(output, self.tensor_parallel_group)
        if self.pad_size and not self.keep_padded_output:
            output = torch.narrow(output, -1, 0, self.output_size - self.pad_size)
        return output

    def lay_out_for_decoding(self) -> None:
        """Store the weight column by column; shape and values stay.

        A decoding step is bound by reading weights. With one row of input and more outputs than inputs, PyTorch's CPU
        product reads a column-major weight at twice the rate (21 against 10 GB/s for [5120, 512] on two cores).
        """
        self.weight.data = self.weight.data.t().contiguous().t()

    def preshard_hook(self, model_state_dict: MutableMapping[str, torch.Tensor], prefix: str) -> None:
        """Append the zero rows that make the weight divisible."""
        if self.pad_size:
            model_state_dict[prefix] = F.pad(model_state_dict[prefix], (0, 0, 0, self.pad_size))


class RowParallelLinear(BaseParallelLinear):
    """y = x W^T with the columns of W [output_size, input_size] split over the ranks; the partial sums are reduced."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        stride: int = 1,
        init_method: Callable[..., Any] | None = None,
        sequence_parallel_enabled: bool = False,
        sequence_dimension: int | None = None,
        keep_master_weight: bool = False,
        skip_bias_add: bool = False,
        pad: bool = False,
        reduce_output: bool = True,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        tile_cc: bool = False,
        rank_ordering: list[int] | None = None,
    ) -> None:
        super().__init__(device)
        require_inert(
            "RowParallelLinear",
            sequence_parallel_enabled=sequence_parallel_enabled,
            keep_master_weight=keep_master_weight,
            skip_bias_add=skip_bias_add,
            pad=pad,
            rank_ordering=rank_ordering,
            input_is_not_parallel=not input_is_parallel,
            bias_without_reduction=bias and not reduce_output,
        )
        self.tensor_parallel_group = tensor_model_parallel_group or get_tensor_model_parallel_group()
        ranks = self.tensor_parallel_group.size()
        self.input_size, self.output_size, self.reduce_output = input_size, output_size, reduce_output
        self.reduce_dtype = reduce_dtype or dtype
        self.input_size_per_partition = divide(input_size, ranks)
        self.weight = _sharded_parameter((output_size, self.input_size_per_partition), 1, ranks, dtype)
        # Whole on every rank, added once to the reduced sum.
        self.bias = nn.Parameter(torch.empty(output_size, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, input_: torch.Tensor, slice_indices: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weight if slice_indices is None else self.weight[:, slice_indices]
        if self.tensor_parallel_group.size() == 1:
            return F.linear(input_, weight, self.bias)
        output = F.linear(input_, weight)
        if not self.reduce_output:
            return output
        reduced = reduce_from_tensor_model_parallel_region(output.to(self.reduce_dtype), self.tensor_parallel_group)
        return reduced.to(output.dtype) if self.bias is None else reduced.to(output.dtype) + self.bias


class ParallelEmbedding(BaseParallelLayer):
    """Embedding table [num_embeddings, embedding_dim], split along either axis."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        init_method: Callable[[Any], Any] = nn.init.normal_,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        shard_across_embedding: bool = False,
        pad: bool = False,
        sequence_parallel_enabled: bool = False,
        tensor_model_parallel_group: TensorParallelGroup | None = None,
        use_spmd_rank: bool = False,
        sequence_dimension: int | None = None,
        tile_cc: bool = False,
        rank_ordering: list[int] | None = None,
        collect_output: bool = True,
    ) -> None:
        super().__init__(device)
        require_inert(
            "ParallelEmbedding",
            max_norm=max_norm,
            sparse=sparse,
            sequence_parallel_enabled=sequence_parallel_enabled,
            rank_ordering=rank_ordering,
        )
        self.tensor_model_parallel_group = tensor_model_parallel_group or get_tensor_model_parallel_group()
        ranks = self.tensor_model_parallel_group.size()
        self.shard_across_embedding, self.collect_output, self.pad = shard_across_embedding, collect_output, pad
        self.weight_partition_dim = 1 if shard_across_embedding else 0
        shape = [num_embeddings, embedding_dim]
        self.pad_size = get_padding_length(shape[self.weight_partition_dim], ranks) if pad else 0
        shape[self.weight_partition_dim] += self.pad_size
        self.num_embeddings, self.embedding_dim = shape
        shape[self.weight_partition_dim] = divide(shape[self.weight_partition_dim], ranks)
        self.weight = _sharded_parameter((shape[0], shape[1]), self.weight_partition_dim, ranks, dtype)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if self.shard_across_embedding:
            output = F.embedding(input_, self.weight)
            if not self.collect_output:
                return output
            output = gather_from_tensor_model_parallel_region(output, self.tensor_model_parallel_group)
            return torch.narrow(output, -1, 0, self.embedding_dim - self.pad_size) if self.pad_size else output
        local = input_ - self.tensor_model_parallel_group.rank() * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        output = F.embedding(local * mine, self.weight) * mine.unsqueeze(-1)
        if not self.collect_output:
            return output
        return reduce_from_tensor_model_parallel_region(output, self.tensor_model_parallel_group)

    def preshard_hook(self, model_state_dict: MutableMapping[str, torch.Tensor], prefix: str) -> None:
        """Append the zero rows or columns that make the table divisible."""
        if self.pad_size:
            padding = (0, self.pad_size) if self.shard_across_embedding else (0, 0, 0, self.pad_size)
            model_state_dict[prefix] = F.pad(model_state_dict[prefix], padding)


class SPMDRank(nn.Module):
    """The rank as a value of the traced program: a parameter [world_size] int32 split into one element per rank."""

    def __init__(self, world_size: int, tensor_model_parallel_size: int | None = None) -> None:
        super().__init__()
        self.world_size = world_size
        self.rank = nn.Parameter(torch.zeros(1, dtype=torch.int32), requires_grad=False)
        set_tensor_model_parallel_attributes(self.rank, True, 0, 1, world_size)

    def get_rank(self) -> torch.Tensor:
        return self.rank
