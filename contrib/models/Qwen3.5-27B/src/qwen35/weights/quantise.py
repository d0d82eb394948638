# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint written again with its matrices in fp8, some rows of one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import torch
from tqdm import tqdm

from ..fp8_form import CHANNEL_METHOD, FP8, Fp8Form, is_fp8_matrix
from .checkpoint import INDEX_FILE, SINGLE_FILE, CheckpointReader, TensorSpec, lay_out
from .fp8 import channel_rows, row_pieces

_FORM = Fp8Form(None, ())
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Quantised:
    """What was written: how many matrices are in fp8, and bytes of all tensors before and after."""

    matrices: int
    bytes_before: int
    bytes_after: int
    quantization_config: dict[str, object]
    """For config.json."""


def quantise_checkpoint(reader: CheckpointReader, directory: Path) -> Quantised:
    """Write the tensors of a checkpoint to files of the same names in `directory`, which is there; index any shards.

    A matrix of a layer, as `is_fp8_matrix`, becomes X.weight in float8_e4m3fn and X.weight_scale [rows, 1] float32, as
    `quantise_per_channel` rounds it. All other tensors are copied.

    Raises:
        OSError: the disk has too little room; raised before anything is written.
        ValueError: there is no matrix to quantise; or one is of another dtype, no matrix, or has NaN or infinities.
    """
    files: dict[str, dict[str, TensorSpec]] = {}
    for name in reader:
        files.setdefault(reader.file_of(name).name, {}).update(_specs(name, reader.spec(name)))
    written = {name: spec for specs in files.values() for name, spec in specs.items()}
    matrices = [name for name, spec in written.items() if spec.dtype == FP8]
    if not matrices:
        raise ValueError(f"{reader.directory} has no matrix of a layer to quantise; name a Qwen3.5 checkpoint")
    _require_room(directory, sum(lay_out(specs).nbytes for specs in files.values()))
    nbytes = sum(spec.nbytes for spec in written.values())
    with closing(reader), tqdm(total=nbytes, desc="Quantising", unit="B", unit_scale=True, delay=1) as bar:
        for file, specs in files.items():
            _write_file(reader, directory / file, specs, bar)
    if files.keys() != {SINGLE_FILE}:
        weight_map = {name: file for file, specs in files.items() for name in specs}
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    before = sum(reader.spec(name).nbytes for name in reader)
    return Quantised(len(matrices), before, nbytes, _quantization_config(written))


def _specs(name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
    """What is written of a tensor."""
    if not is_fp8_matrix(name):
        return {name: spec}
    if len(spec.shape) != 2 or spec.dtype not in _DTYPES:
        raise ValueError(
            f"{name} is {spec.dtype} of shape {list(spec.shape)}, not a matrix of bfloat16, float16 or float32; "
            "use the unquantised checkpoint"
        )
    scale = TensorSpec(_FORM.scale_shape(spec.shape), torch.float32)
    return {name: TensorSpec(spec.shape, FP8), _FORM.scale_name(name): scale}


def _quantization_config(written: Mapping[str, TensorSpec]) -> dict[str, object]:
    kept = [
        name.removesuffix(".weight")
        for name, spec in written.items()
        if name.endswith(".weight") and len(spec.shape) > 1 and spec.dtype != FP8
    ]
    return {
        "quant_method": CHANNEL_METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": kept,
    }


def _require_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"{directory}: the checkpoint in fp8 needs {needed} bytes, the disk has {free} free; "
            f"make room for {needed - free} more or choose another disk"
        )


def _write_file(reader: CheckpointReader, path: Path, specs: Mapping[str, TensorSpec], bar: tqdm[None]) -> None:
    layout = lay_out(specs)
    with path.open("wb") as file:
        file.write(layout.header)
        for name, spec in specs.items():
            if name not in reader:
                continue  # scales, written with their weight
            if spec.dtype != FP8:
                _write(file, layout.offsets[name], _rows(reader[name]), bar)
                continue
            scale = torch.empty(spec.shape[0], 1)
            _write(file, layout.offsets[name], channel_rows(name, reader[name], scale), bar)
            _write(file, layout.offsets[_FORM.scale_name(name)], _rows(scale), bar)


def _rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor of any shape in pieces, in the order of memory."""
    flat = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.reshape(tensor.shape[0], -1)
    yield from (flat[part] for part in row_pieces(flat))


def _write(file: BufferedWriter, offset: int, pieces: Iterator[torch.Tensor], bar: tqdm[None]) -> None:
    file.seek(offset)
    for piece in pieces:
        bar.update(file.write(piece.contiguous().view(torch.uint8).numpy().data))
