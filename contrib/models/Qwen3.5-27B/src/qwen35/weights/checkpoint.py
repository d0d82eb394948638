# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Safetensors on disk: every header of a checkpoint checked at once, tensors read and written one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint on disk that cannot be read; lists every problem found, each with file and remedy."""

    def __init__(self, directory: Path, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(f"cannot read the checkpoint {directory}:\n" + "\n".join(f"  - {line}" for line in problems))


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, as a file's header gives them."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointReader(Mapping[str, torch.Tensor]):
    """The tensors of a directory with `model.safetensors`, or with an index and its shards, under their own names.

    Construction reads headers only. Each indexing reads the tensor anew; one file is open at a time.

    Raises:
        CheckpointError: at construction; files are missing, truncated or corrupt, or the index does not fit them.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._specs: dict[str, TensorSpec] = {}
        self._files: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        problems: list[str] = []
        index = self._read_index(problems)
        for file in sorted(set(index.values())) if index or problems else [SINGLE_FILE]:
            try:
                specs = _read_header(self.directory / file)
            except ValueError as error:
                problems.append(str(error))
                index = {name: shard for name, shard in index.items() if shard != file}  # one problem, not one a tensor
                continue
            for name, spec in specs.items():
                if name in self._files:
                    problems.append(f"{name} is both in {self._files[name]} and in {file}; delete the stale file")
                self._specs[name], self._files[name] = spec, file
        for name, file in index.items():
            if name not in self._files:
                problems.append(f"{INDEX_FILE} puts {name} in {file}, which lacks it; download both again")
        if problems:
            raise CheckpointError(self.directory, problems)

    def _read_index(self, problems: list[str]) -> dict[str, str]:
        """The index, tensor -> file, without the files that are missing; empty where a single file needs no index."""
        if not self.directory.is_dir():
            problems.append("no such directory; download the checkpoint and pass its directory")
            return {}
        if (self.directory / SINGLE_FILE).exists():
            return {}
        path = self.directory / INDEX_FILE
        if not path.exists():
            remedy = "download the safetensors files"
            if any(self.directory.glob("pytorch_model*.bin*")):
                remedy = "it has pytorch_model.bin, which is not read: convert it to safetensors with save_pretrained"
            problems.append(f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; {remedy}")
            return {}
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
            if not weight_map or {*map(type, weight_map), *map(type, weight_map.values())} != {str}:
                raise TypeError("weight_map does not map names to files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{INDEX_FILE} is corrupt ({type(error).__name__}: {error}); download it again")
            return {}
        missing = sorted({file for file in weight_map.values() if not (self.directory / file).exists()})
        if missing:
            problems.append(f"{INDEX_FILE} names files that are missing: {', '.join(missing)}; download them")
        return {name: file for name, file in weight_map.items() if file not in missing}

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of `name`, from its header."""
        return self._specs[name]

    def file_of(self, name: str) -> Path:
        """The file that holds `name`."""
        return self.directory / self._files[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, safe_open(self.directory / file, framework="pt"))
        tensor: torch.Tensor = self._open[1].get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def close(self) -> None:
        """Close the open file; reading a tensor opens it again."""
        self._open = None

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_header(path: Path) -> dict[str, TensorSpec]:
    """The specs in a safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes without gaps.

    Raises:
        ValueError: the file is of another format, corrupt or truncated.
    """
    size = path.stat().st_size
    again = f"the download is incomplete, fetch {path.name} again"
    with path.open("rb") as file:
        start = file.read(8)
        if (start + file.read(len(_LFS_POINTER) - 8)) == _LFS_POINTER:
            raise ValueError(f"{path.name} is a git-lfs pointer, not the file itself; run git lfs pull")
        length = int.from_bytes(start, "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"{path.name} is truncated: its header needs {8 + length} bytes, it has {size}; {again}")
        file.seek(8)
        header = file.read(length)
    try:
        specs, end = {}, 0
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                spec = TensorSpec(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
                begin, stop = entry["data_offsets"]
                if stop - begin != spec.nbytes:
                    raise ValueError(f"{name} has {stop - begin} bytes, its shape and dtype need {spec.nbytes}")
                specs[name], end = spec, max(end, stop)
    except KeyError as error:
        raise ValueError(f"{path.name} has a corrupt header or a dtype torch lacks ({error}); {again}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} has a corrupt header ({error}); {again}") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path.name} is truncated or corrupt: its header says {8 + length + end} bytes, it has {size}; {again}"
        )
    return specs


@dataclass(frozen=True)
class FileLayout:
    """Where everything is in a safetensors file, as follows from the specs of its tensors alone."""

    header: bytes  # what the file starts with
    offsets: dict[str, int]  # of each tensor's first byte, from the start of the file
    nbytes: int  # of the whole file


def lay_out(specs: Mapping[str, TensorSpec]) -> FileLayout:
    """The layout of a file with tensors of these specs.

    The format allows no gaps, and readers that map the file want each tensor aligned to its dtype. Tensors of larger
    dtypes therefore come first.
    """
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec, begin, end = specs[name], end, end + specs[name].nbytes
        entries[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
    return FileLayout(header, offsets, len(header) + end)
