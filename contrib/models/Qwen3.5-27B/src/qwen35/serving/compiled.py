# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Compiled models on disk: written whole, found again by all that they depend on, made by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..json_files import read_object
from ..kernel_selection import select_deltanet_inverse, select_deltanet_kernel

if TYPE_CHECKING:
    from ..modeling_qwen35 import NeuronQwen35ForCausalLM

RECORD_FILE = "depends_on.json"
"""Beside the programs of a compiled model: what they were made of."""

SOFTWARE = (
    "torch", "torch-neuronx", "neuronx-cc", "neuronx-distributed", "neuronx-distributed-inference", "nki-library",
)  # fmt: skip
"""Distributions whose versions change what is compiled; beside them, the sources of this package."""

COMPILER_ENVIRONMENT = (
    "NEURON_CC_FLAGS", "NEURON_PLATFORM_TARGET_OVERRIDE", "XLA_FLAGS",
    "XLA_HANDLE_SPECIAL_SCALAR", "UNSAFE_FP8FNCAST",
)  # fmt: skip
"""Variables that the compiler and its frameworks read; the last two change what becomes of fp8."""

Progress = Callable[[str], None]
"""Told what is done now, a line at a time."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory that becomes `output` when it is complete, and is gone when it fails.

    Raises:
        FileExistsError: `output` is there already.
    """
    if output.exists():
        raise FileExistsError(f"OUTPUT={output} exists already: name a new directory")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=_unfinished(output)) as scratch:
        write(Path(scratch) / "partial")
        (Path(scratch) / "partial").rename(output)


def _unfinished(output: Path) -> str:
    """How the names of directories begin that would have become `output`."""
    return f".{output.name}."


def compile_whole(model: NeuronQwen35ForCausalLM, output: Path, progress: Progress) -> None:
    """Compile a model to the new directory `output`, with the weights of every rank and a record of what it is made of.

    One process at a time does so. What one that was killed has left unfinished there is removed.

    Raises:
        FileExistsError: `output` is there already.
        ValueError: see `NeuronQwen35ForCausalLM.compile`.
    """
    model.neuron_config.save_sharded_checkpoint = True
    output.parent.mkdir(parents=True, exist_ok=True)
    with _alone(output.parent / f"{_unfinished(output)}lock", progress):
        for left in output.parent.iterdir():
            if left.name.startswith(_unfinished(output)) and left.is_dir():
                progress(f"removing {left}, which was not finished")
                shutil.rmtree(left)
        record = depends_on(model)  # as it is now: files that change meanwhile are found changed

        def write(path: Path) -> None:
            start = time.monotonic()
            progress(f"compiling to {output}")
            model.compile(str(path))
            (path / RECORD_FILE).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            progress(f"compiled in {time.monotonic() - start:.0f} s")

        write_whole(output, write)


def compile_once(model: NeuronQwen35ForCausalLM, directory: Path, progress: Progress) -> None:
    """Compile a model to `directory`, unless it is there already or another process makes it meanwhile.

    Raises:
        FileExistsError: something else is there.
        ValueError: see `NeuronQwen35ForCausalLM.compile`.
    """
    if is_compiled(directory):
        return
    try:
        compile_whole(model, directory, progress)
    except FileExistsError:
        if not is_compiled(directory):
            raise


def depends_on(model: NeuronQwen35ForCausalLM) -> dict[str, Any]:
    """All that a compiled model depends on, in values that JSON has: two with the same are the same."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    checkpoint = Path(config.pop("_name_or_path", model.model_path))  # where it lies does not matter
    config["neuron_config"].pop("device_settings", None)  # nor which file chose the kernels: they are there
    return {
        "checkpoint": weight_files(checkpoint),
        "config": config,
        "kernels": [select_deltanet_kernel(model.config).value, select_deltanet_inverse(model.config).value],
        "software": software(),
        "environment": {name: os.environ.get(name) for name in COMPILER_ENVIRONMENT},
    }


def software() -> dict[str, str | None]:
    """Versions of what changes a compiled model, None of what is not installed, and a digest of this package."""
    return {name: _version(name) for name in SOFTWARE} | {"qwen35": _source_digest()}


def weight_files(checkpoint: Path) -> dict[str, list[int]]:
    """The identity of a checkpoint's weights: of each file bytes and time of change, in ns.

    Not their content: reading 56 GB takes minutes.
    """
    files = sorted(path for pattern in WEIGHT_FILES for path in checkpoint.glob(pattern))
    return {path.name: [(status := path.stat()).st_size, status.st_mtime_ns] for path in files}


def record_of(compiled_path: Path) -> Mapping[str, Any]:
    """What a compiled model was made of; empty for one that was compiled without a record.

    Raises:
        ValueError: the record is corrupt.
    """
    return read_object(compiled_path / RECORD_FILE)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


@cache
def _source_digest() -> str:
    """Of the sources of this package: a version may have many while it is worked on."""
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def place_of(model: NeuronQwen35ForCausalLM, cache_dir: Path) -> Path:
    """The directory of `cache_dir` where a model is when it is compiled: its name, and a digest of `depends_on`."""
    text = json.dumps(depends_on(model), sort_keys=True)
    name = re.sub(r"[^\w.-]+", "-", Path(model.model_path).name).strip("-.") or "model"
    return cache_dir / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def is_compiled(directory: Path) -> bool:
    """Whether a compiled model is there: what is not whole has another name."""
    return (directory / "neuron_config.json").exists()


@contextmanager
def _alone(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock, which the system takes back from a process that ends, however it ends; remove its file after."""
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(f"waiting for another process, which compiles this and holds {lock}")
                fcntl.flock(file, fcntl.LOCK_EX)
            if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))):
                continue  # whoever held it has removed it: the next one locks another file
            try:
                yield
            finally:
                lock.unlink()
            return
