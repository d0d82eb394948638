# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""From a whole checkpoint to the tensors of one rank, and to a file; stands in for NxD's `trace.trace`."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .layers import BaseParallelLinear, ParallelEmbedding, SPMDRank, divide

_SHARDED_MODULES = (BaseParallelLinear, ParallelEmbedding, SPMDRank)

Checkpoint = MutableMapping[str, torch.Tensor]


def invoke_preshard_hook(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Let modules rewrite their tensors (padding, KV replication) before the split; a hook ends the descent."""
    hook: Any = getattr(module, "preshard_hook", None)
    if hook is not None:
        hook(checkpoint, prefix + "weight")
        return
    for name, child in module.named_children():
        invoke_preshard_hook(child, checkpoint, f"{prefix}{name}.")


def _shard_children(module: nn.Module, checkpoint: Checkpoint, prefix: str, rank: int) -> None:
    """Replace each sharded tensor of `checkpoint` by the block of `rank`, a copy that does not keep the whole alive.

    Raises:
        ValueError: a block has not the shape of its parameter.
    """
    for name, child in module.named_children():
        _shard_children(child, checkpoint, f"{prefix}{name}.", rank)
    if not isinstance(module, _SHARDED_MODULES):
        return
    for name, parameter in module.named_parameters(recurse=False):
        full_name = prefix + name
        if full_name not in checkpoint or not getattr(parameter, "tensor_model_parallel", False):
            continue
        tensor = checkpoint[full_name]
        dim = parameter.partition_dim  # type: ignore[attr-defined]
        size = divide(tensor.shape[dim], parameter.num_partitions)  # type: ignore[attr-defined]
        block = tensor.narrow(dim, rank * size, size)
        if block.shape != parameter.shape:
            raise ValueError(
                f"{full_name}: rank {rank} gets {tuple(block.shape)} of the checkpoint's {tuple(tensor.shape)}, "
                f"the module expects {tuple(parameter.shape)}"
            )
        checkpoint[full_name] = block.clone() if block.numel() != tensor.numel() else block.contiguous()


def get_sharded_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, rank: int, tp_degree: int, is_cached: bool = False
) -> None:
    """Turn `checkpoint` (whole tensors) into the tensors of `rank`, in place; names the model lacks are dropped."""
    if not is_cached:
        invoke_preshard_hook(model, checkpoint, "")
        known = set(model.state_dict())
        for name in [name for name in checkpoint if name not in known]:
            del checkpoint[name]
    _shard_children(model, checkpoint, "", rank)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path`, whole or not at all: under a temporary name in the same directory, then renamed."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor  # the format holds no two names for one storage
        seen.add(storage)
    try:
        save_file(plain, unfinished, metadata=metadata)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
