# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A converted checkpoint split into one file per rank, with one of the model's tensors in memory at a time.

NxD's own code splits, preshard hooks included. NxD runs it on the whole model, and holds the tensors of every rank in
memory. Here it runs on one part of the model after the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..error_text import first_three
from ..nxdi import KVCacheManager, NeuronApplicationBase, as_rank, invoke_preshard_hook, shard_children
from .checkpoint import TensorSpec, lay_out, read_header
from .conversion import LazyStateDict

_PIECE = 1 << 26
"""Bytes made contiguous at a time: a quarter of the columns of the 27B embedding is 636 MB."""


@dataclass(frozen=True)
class _Part:
    """What is split in one step: a module with a preshard hook and all its children, or another's own parameters."""

    prefix: str
    module: nn.Module
    weights: dict[str, nn.Parameter]  # by full name
    has_hook: bool


class StreamedSharding(NeuronApplicationBase):
    """An application that shards by `write_rank_files`; its `get_state_dict` returns a `LazyStateDict`."""

    def shard_weights(
        self, compiled_model_path: str | os.PathLike[str], debug: bool = False, pre_shard_weights_hook: Any = None
    ) -> None:
        """Write `weights/tp{rank}_sharded_checkpoint.safetensors` for each local rank, if save_sharded_checkpoint.

        Raises:
            OSError, ValueError: as `write_rank_files`.
        """
        neuron_config = self.neuron_config
        if "NXD_LAYOUT_TRANSFORMATION_OPTIONS" in os.environ:  # asks NxDI to rewrite its files in a device's layout
            super().shard_weights(compiled_model_path, debug, pre_shard_weights_hook)
            return
        if pre_shard_weights_hook:
            pre_shard_weights_hook(self)
        if neuron_config.skip_sharding or not neuron_config.save_sharded_checkpoint:
            return
        module = self._module_of_a_rank()
        checkpoint = self.checkpoint_loader_fn()
        assert isinstance(checkpoint, LazyStateDict), "get_state_dict gives this, and nothing after it casts"
        first = neuron_config.start_rank_id
        ranks = range(first, first + neuron_config.local_ranks_size)
        directory = Path(compiled_model_path) / "weights"
        write_rank_files(checkpoint, module, ranks, neuron_config.tp_degree, directory)

    def load(
        self,
        compiled_model_path: str | os.PathLike[str],
        start_rank_id: int | None = None,
        local_ranks_size: int | None = None,
        skip_warmup: bool = False,
    ) -> None:
        """NxDI's, once the files of the local ranks have what the modules declare: NxDI compares no dtype, and bfloat16
        weights under modules that scale fp8 ones would run.

        Raises:
            ValueError: as `check_rank_file`.
        """
        neuron_config = self.neuron_config
        if neuron_config.save_sharded_checkpoint:
            specs = _specs(_parts(self._module_of_a_rank()))
            first = neuron_config.start_rank_id if start_rank_id is None else start_rank_id
            size = neuron_config.local_ranks_size if local_ranks_size is None else local_ranks_size
            for rank in range(first, first + size):
                check_rank_file(Path(compiled_model_path) / "weights" / _file_name(rank), specs)
        super().load(compiled_model_path, start_rank_id, local_ranks_size, skip_warmup)

    def _module_of_a_rank(self) -> nn.Module:
        """The module as it is traced, in the shapes of one rank, on the meta device."""
        instance = self.models[0].get_model_instance()
        with as_rank(0, self.neuron_config.tp_degree), torch.device("meta"):
            instance.load_module()
        module: nn.Module = instance.module
        return module


def check_rank_file(path: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Hold the header of a rank's file against the parameters of its module; no tensor is read.

    Raises:
        ValueError: it has not these tensors, shapes and dtypes; the first three differences are named.
    """
    found = read_header(path)
    wrong = [
        f"{name} is {_described(found.get(name))}, the module declares {_described(spec)}"
        for name, spec in specs.items()
        if found.get(name) != spec
    ]
    if wrong:
        raise ValueError(f"{path} was written for another configuration ({first_three(wrong)}); convert it anew")


def _described(spec: TensorSpec | None) -> str:
    return "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"


def _file_name(rank: int) -> str:
    return f"tp{rank}_sharded_checkpoint.safetensors"


def _specs(parts: Iterable[_Part]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(p.shape), p.dtype) for part in parts for name, p in part.weights.items()}


def write_rank_files(
    checkpoint: LazyStateDict, module: nn.Module, ranks: Sequence[int], tp_degree: int, directory: Path
) -> None:
    """Write `directory`/tp{rank}_sharded_checkpoint.safetensors for each of `ranks`; all of them, or nothing.

    Each tensor of `checkpoint` is built once, written for all ranks, and dropped.

    Args:
        checkpoint: the tensors before preshard hooks; left as it is.
        module: the model in the shapes of one rank, on the meta device.

    Raises:
        OSError: the disk has too little room; raised before anything is written.
        ValueError: a parameter has no tensor, or one of another shape or dtype.
    """
    parts = list(_parts(module))
    specs = _specs(parts)
    layout = lay_out(specs)
    needed = layout.nbytes * len(ranks)
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if needed > free:
        raise OSError(
            f"{directory}: the weights of {len(ranks)} ranks need {needed} bytes, the disk has {free} free; "
            f"make room for {needed - free} more or choose another disk"
        )
    with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        unfinished = [Path(scratch, _file_name(rank)) for rank in ranks]
        with ExitStack() as stack, tqdm(total=needed, desc="Sharding", unit="B", unit_scale=True, delay=1) as bar:
            files = {rank: stack.enter_context(path.open("wb")) for rank, path in zip(ranks, unfinished, strict=True)}
            for file in files.values():
                bar.update(file.write(layout.header))

            def write(rank: int, name: str, tensor: torch.Tensor) -> None:
                found = TensorSpec(tuple(tensor.shape), tensor.dtype)
                if found != specs[name]:
                    raise ValueError(
                        f"{name}: the checkpoint gives rank {rank} {found.dtype} {found.shape}, "
                        f"the module declares {specs[name].dtype} {specs[name].shape}"
                    )
                files[rank].seek(layout.offsets[name])
                for rows in tensor.split(max(1, _PIECE * len(tensor) // tensor.nbytes)):
                    bar.update(files[rank].write(rows.contiguous().view(torch.uint8).numpy()))

            for part in parts:
                _split(part, checkpoint.copy(), ranks, tp_degree, write)
        directory.mkdir(exist_ok=True)
        for path in unfinished:
            path.replace(directory / path.name)


def _parts(module: nn.Module, prefix: str = "") -> Iterator[_Part]:
    """The parts of `module` in the order of its children; caches are left out, being state and not weights."""
    if isinstance(module, KVCacheManager):
        return
    has_hook = hasattr(module, "preshard_hook")
    weights = {prefix + name: p for name, p in module.named_parameters(recurse=has_hook)}
    if weights:
        yield _Part(prefix, module, weights, has_hook)
    if not has_hook:  # NxD descends no further either
        for name, child in module.named_children():
            yield from _parts(child, f"{prefix}{name}.")


def _split(
    part: _Part,
    checkpoint: LazyStateDict,
    ranks: Sequence[int],
    tp_degree: int,
    write: Callable[[int, str, torch.Tensor], None],
) -> None:
    """Pass each rank's block of the part's tensors to `write`. Tensors are built into `checkpoint`, a copy to drop."""
    if part.has_hook:
        invoke_preshard_hook(part.module, checkpoint, part.prefix)
    missing = [name for name in part.weights if name not in checkpoint]
    if missing:
        raise ValueError(f"{', '.join(missing)}: no tensor in the checkpoint for these parameters of the model")
    whole = {name: checkpoint[name] for name in part.weights}
    for rank in ranks:
        blocks = dict(whole)
        shard_children(part.module, blocks, part.prefix, None, rank, tp_degree)
        for name in part.weights:
            # Without a local variable for the block: it would keep the block in memory while the next rank's is cut.
            write(rank, name, blocks[name])
