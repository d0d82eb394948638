# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""From a whole checkpoint to the tensors of one rank; stands in for NxD's `trace.trace`."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import nn

from .layers import BaseParallelLinear, ParallelEmbedding, SPMDRank, divide, require_inert
from .quantization import BaseQuantizeParallelLinear

_SHARDED_MODULES = (BaseParallelLinear, BaseQuantizeParallelLinear, ParallelEmbedding, SPMDRank)

Checkpoint = MutableMapping[str, torch.Tensor]


def invoke_preshard_hook(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Let modules rewrite their tensors (padding, KV replication) before the split; a hook ends the descent."""
    hook: Any = getattr(module, "preshard_hook", None)
    if hook is not None:
        hook(checkpoint, prefix + "weight")
        return
    for name, child in module.named_children():
        invoke_preshard_hook(child, checkpoint, f"{prefix}{name}.")


def shard_children(
    module: nn.Module,
    checkpoint: Checkpoint,
    prefix: str,
    dtype: torch.dtype | None,
    rank: int,
    tp_degree: int,
    is_lora_cpu_shard: bool = False,
) -> None:
    """Replace each sharded tensor of `checkpoint` by the block of `rank`, a copy that does not keep the whole alive.

    Raises:
        ValueError: a block has not the shape of its parameter.
    """
    require_inert("shard_children", is_lora_cpu_shard=is_lora_cpu_shard)
    for name, child in module.named_children():
        shard_children(child, checkpoint, f"{prefix}{name}.", dtype, rank, tp_degree)
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
    shard_children(model, checkpoint, "", None, rank, tp_degree)
