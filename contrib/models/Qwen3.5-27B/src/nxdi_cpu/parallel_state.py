# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel group of this process, and the collectives over it.

Stands in for `neuronx_distributed.parallel_layers.{parallel_state,mappings}`. On Neuron one process drives every rank;
on a CPU each rank is a process of a torch.distributed (gloo) group, and a lone rank needs no group at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist


class TensorParallelGroup(Protocol):
    """What the parallel layers ask of a group; `torch.distributed.ProcessGroup` has it too."""

    def size(self) -> int: ...

    def rank(self) -> int: ...


class _StaticGroup:
    """A group that never communicates: a lone rank, or the shape of one rank of many."""

    def __init__(self, size: int, rank: int) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


_group: TensorParallelGroup | None = None


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    skip_collective_init: bool = False,
    lnc_size: int = 1,
    mesh_only: bool = False,
) -> None:
    """Make the tensor-parallel group of this process: the whole torch.distributed world, or a lone rank.

    Raises:
        ValueError: another kind of parallelism is asked for, or the world is not `tensor_model_parallel_size` wide.
    """
    global _group
    if {pipeline_model_parallel_size, context_parallel_size, expert_model_parallel_size} != {1}:
        raise ValueError("the CPU stand-ins know tensor parallelism only: set pp_degree=1, cp_degree=1 and ep_degree=1")
    if tensor_model_parallel_size == 1:
        _group = _StaticGroup(1, 0)
        return
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != tensor_model_parallel_size:
        raise ValueError(
            f"tp_degree={tensor_model_parallel_size} needs as many processes, this job has {world}: "
            f"start it with 'torchrun --nproc-per-node {tensor_model_parallel_size}'"
        )
    _group = dist.group.WORLD


def model_parallel_is_initialized() -> bool:
    return _group is not None


def destroy_model_parallel() -> None:
    global _group
    _group = None


def get_tensor_model_parallel_group() -> TensorParallelGroup:
    """The group; a lone rank when none was initialised, as NxD falls back to non-parallel layers."""
    return _group if _group is not None else _StaticGroup(1, 0)


def get_tensor_model_parallel_size() -> int:
    return get_tensor_model_parallel_group().size()


def get_tensor_model_parallel_rank() -> int:
    return get_tensor_model_parallel_group().rank()


@contextmanager
def as_rank(rank: int, tp_degree: int) -> Iterator[None]:
    """Build modules with the shapes of rank `rank` of `tp_degree`, without any process group; for sharding on disk."""
    global _group
    previous, _group = _group, _StaticGroup(tp_degree, rank)
    try:
        yield
    finally:
        _group = previous


def reduce_from_tensor_model_parallel_region(
    input_: torch.Tensor, process_group: TensorParallelGroup | None = None
) -> torch.Tensor:
    """Sum of every rank's tensor, in place where there is more than one rank; on the meta device the tensor itself."""
    group = process_group or get_tensor_model_parallel_group()
    if group.size() > 1 and not input_.is_meta:
        dist.all_reduce(input_, group=group)
    return input_


def gather_from_tensor_model_parallel_region(
    input_: torch.Tensor, process_group: TensorParallelGroup | None = None
) -> torch.Tensor:
    """Concatenation of every rank's tensor along the last axis, in rank order."""
    group = process_group or get_tensor_model_parallel_group()
    if group.size() == 1:
        return input_
    parts = [torch.empty_like(input_, memory_format=torch.contiguous_format) for _ in range(group.size())]
    if not input_.is_meta:
        dist.all_gather(parts, input_.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
