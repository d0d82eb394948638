# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Safetensors on disk: every header of a checkpoint checked at once, tensors read and written one at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from ..error_text import first_three, one_line, shown
from ..json_files import parse_json, require_regular

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
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_BELOW_A_BYTE = ("F4", "F6_E2M3", "F6_E3M2")
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors

MTP_NAMES = r"(.+\.)?(mtp|nextn)\w*\."
"""How the names of tensors start that predict several tokens at once: of every publisher and wrapper."""

_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint on disk that cannot be read; lists every problem found, each with file and remedy."""

    def __init__(self, directory: Path, problems: list[str]) -> None:
        self.problems = [*map(one_line, problems)]
        lines = "\n".join(f"  - {line}" for line in self.problems)
        super().__init__(f"cannot read the checkpoint {directory}:\n{lines}")


def is_mtp(name: str) -> bool:
    """Whether a tensor is of the layers that predict several tokens, which decoding one at a time does without."""
    return re.match(MTP_NAMES, name) is not None


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

    Attributes:
        listed_only: tensors that the index lists and no file has -> the file it puts them in. A file of MTP tensors
            alone need not be there at all.

    Raises:
        CheckpointError: at construction, files are missing, truncated or corrupt; at reading, a file has changed since.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._specs: dict[str, TensorSpec] = {}
        self._files: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        problems: list[str] = []
        index = self._read_index(problems)
        absent = {file for file in index.values() if not (self.directory / file).exists()}
        for file in sorted(set(index.values()) - absent) if index or problems else [SINGLE_FILE]:
            try:
                specs = read_header(self.directory / file)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            twice = [name for name in specs if name in self._files]
            if twice:
                others = first_three(sorted({self._files[name] for name in twice}))
                are = "is" if len(twice) == 1 else "are"
                problems.append(f"{first_three(twice)} {are} both in {others} and in {file}; delete the stale file")
            self._specs |= specs
            self._files |= dict.fromkeys(specs, file)
        self.listed_only = {name: file for name, file in index.items() if name not in self._files}
        if problems:
            raise CheckpointError(self.directory, problems)

    def _read_index(self, problems: list[str]) -> dict[str, str]:
        """The index, tensor -> file, without files that are missing and needed; empty for a single file."""
        try:
            if not self.directory.is_dir():
                problems.append("no such directory; download the checkpoint and pass its directory")
                return {}
            if (self.directory / SINGLE_FILE).exists():
                return {}
            weight_map = _weight_map(self.directory / INDEX_FILE)
            missing = {file for file in {*weight_map.values()} if not (self.directory / file).exists()}
        except FileNotFoundError:
            problems.append(_without_weights(self.directory))
            return {}
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return {}
        needed = {file for name, file in weight_map.items() if file in missing and not is_mtp(name)}
        if needed:
            problems.append(f"{INDEX_FILE} names files that are missing: {first_three(sorted(needed))}; download them")
        return {name: file for name, file in weight_map.items() if file not in needed}

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of `name`, from its header."""
        return self._specs[name]

    def file_of(self, name: str) -> Path:
        """The file that holds `name`."""
        return self.directory / self._files[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        file = self._files[name]
        try:
            if self._open is None or self._open[0] != file:
                self._open = (file, safe_open(self.directory / file, framework="pt"))
            tensor: torch.Tensor = self._open[1].get_tensor(name)
        except (SafetensorError, OSError) as error:
            problem = f"{name} cannot be read from {file} ({error}); download the file again"
            raise CheckpointError(self.directory, [problem]) from error
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


def _weight_map(path: Path) -> dict[str, str]:
    """The `weight_map` of an index.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is no JSON, or does not map names to files beside it.
    """
    require_regular(path)
    corrupt = f"{path.name} is corrupt (%s); download it again"
    try:
        index = parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror}); correct its permissions") from error
    except ValueError as error:
        raise ValueError(corrupt % error) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(corrupt % "it has no weight_map from tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_inside(file):
            raise ValueError(corrupt % f"weight_map puts {shown(name)} in {shown(file)}, which is no file beside it")
    return {name: str(PurePosixPath(file)) for name, file in weight_map.items()}


def _is_inside(file: str) -> bool:
    """Whether a name in the index leads to a file in the checkpoint's directory or below it."""
    path = PurePosixPath(file)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in file


def _without_weights(directory: Path) -> str:
    """The problem of a directory with neither weights nor index, with the remedy for what is there instead."""
    found = sorted(path.name for path in directory.iterdir())
    if broken := [name for name in (SINGLE_FILE, INDEX_FILE) if name in found]:
        return f"{broken[0]} is a link to nothing; download it again"
    shards = [name for name in found if name.endswith(".safetensors")]
    if any(name.startswith("pytorch_model") and ".bin" in name for name in found):
        remedy = "it has pytorch_model.bin, which is not read: convert it to safetensors with save_pretrained"
    elif gguf := [name for name in found if name.endswith(".gguf")]:
        remedy = f"it has GGUF files ({first_three(gguf)}), which are not read: use the unquantised checkpoint"
    elif "adapter_model.safetensors" in found:
        remedy = "it has an adapter (adapter_model.safetensors): merge it into its base model and save that"
    elif shards:
        remedy = f"it has {first_three(shards)}: download the index too, or name a single file {SINGLE_FILE}"
    else:
        remedy = "download the safetensors files"
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} is there; {remedy}"


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The specs in a safetensors file: 8 bytes of header length, a JSON header, the tensors' bytes without gaps.

    Raises:
        FileNotFoundError, ValueError: the file cannot be opened, is of another format, corrupt or truncated.
    """
    require_regular(path)
    again = f"the download is incomplete, fetch {path.name} again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if (start + file.read(len(_LFS_POINTER) - 8)) == _LFS_POINTER:
                raise ValueError(f"{path.name} is a git-lfs pointer, not the file itself; run git lfs pull")
            length = int.from_bytes(start, "little")
            if size < 8 or 8 + length > size:
                raise ValueError(
                    f"{path.name} is truncated: its header needs {8 + length} bytes, it has {size}; {again}"
                )
            if length > _LONGEST_HEADER:
                raise ValueError(f"{path.name} has a corrupt header (its length is {length} bytes); {again}")
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror}); correct its permissions") from error
    try:
        specs, end = _parse_header(header)
    except ValueError as error:
        raise ValueError(f"{path.name} has a corrupt header ({error}); {again}") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path.name} is truncated or corrupt: its header says {8 + length + end} bytes, it has {size}; {again}"
        )
    return specs


def _parse_header(header: bytes) -> tuple[dict[str, TensorSpec], int]:
    """The specs in a header, and how many bytes of tensors follow it.

    safetensors' own reader refuses no less; what it would refuse when a tensor is read is refused here.

    Raises:
        ValueError: it is no header of safetensors.
    """
    if header[:1] != b"{":
        raise ValueError("it is not valid JSON: it starts with no object")
    text = header.decode("utf-8")
    entries = parse_json(text)
    json.loads(text, object_pairs_hook=_without_repeats)
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError(f"__metadata__={shown(metadata)} does not map texts to texts")
    specs: dict[str, TensorSpec] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        name.encode("utf-8")  # refuses half a surrogate pair
        if not isinstance(entry, dict):
            raise ValueError(f"{name} is {shown(entry)}, not an object")
        dtype, shape, place = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
        if dtype in _BELOW_A_BYTE:
            raise ValueError(f"{name} is {dtype}: quantised checkpoints are not read, use the unquantised checkpoint")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {shown(dtype)}, which torch lacks")
        if not _are_counts(shape):
            raise ValueError(f"{name} has shape {shown(shape)}, not a list of sizes")
        if not _are_counts(place) or len(place) != 2:
            raise ValueError(f"{name} has data_offsets {shown(place)}, not two places in the file")
        specs[name] = TensorSpec(tuple(shape), _DTYPES[dtype])
        places.append((*place, name))
        if place[1] - place[0] != specs[name].nbytes:
            raise ValueError(f"{name} has {place[1] - place[0]} bytes, its shape and dtype need {specs[name].nbytes}")
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            raise ValueError(f"{name} starts at byte {begin}, what is before it ends at {end}")
        end = stop
    return specs, end


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of an object in JSON; of two values under one name, readers take different ones."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is in it twice")
    return found


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of integers of 0 or more."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


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
