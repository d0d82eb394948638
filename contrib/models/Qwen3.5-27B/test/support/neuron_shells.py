# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Empty modules in the place of the closed Neuron packages.

The sources of neuronx-distributed and neuronx-distributed-inference are open, and NxDI has a CPU mode, but they import
packages that exist only with the Neuron SDK. With `install()` before the first import, both import and run on any CPU.
Nothing here computes: a shell that a forward pass reaches shows as a TypeError that names `Shell`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch

CLOSED = ("torch_xla", "libneuronxla", "torch_neuronx", "neuronxcc", "neuronx_cc", "neuronxlogger", "nki", "nkilib")
# Not closed, but of no use here: logging to a cloud, and image models.
UNUSED = ("boto3", "botocore", "s3transfer", "awscrt", "torchvision")
PLATFORM = "trn2"


class Shell:
    """Takes any use at import time: called, subscripted, subclassed; as a decorator it returns what it decorates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else Shell()

    def __getattr__(self, name: str) -> Shell:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return Shell()

    def __getitem__(self, key: Any) -> Shell:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __mro_entries__(self, bases: tuple[type, ...]) -> tuple[type, ...]:
        return (object,)

    def __bool__(self) -> bool:
        return False


class _ShellModule(types.ModuleType):
    def __getattr__(self, name: str) -> Shell:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        shell = Shell()
        setattr(self, name, shell)
        return shell


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        known = name.split(".")[0] in CLOSED + UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _ShellModule(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    """Put the shells in place where NxDI's sources are on the path and the Neuron SDK is not; else do nothing."""
    wanted = find_spec("neuronx_distributed_inference") is not None and find_spec("torch_neuronx") is None
    if not wanted:
        return
    os.environ["NXD_CPU_MODE"] = "1"
    os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = PLATFORM
    sys.meta_path.insert(0, _Finder())
    importlib.import_module("torch_neuronx.utils").get_platform_target = lambda: PLATFORM  # type: ignore[attr-defined]
    # torch.classes.neuron.* is registered by the runtime library; only annotations use its names here.
    torch.classes.__dict__["neuron"] = Shell()
