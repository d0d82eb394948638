# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Every kernel of this package, with small arguments, and what launching costs NKI's compiler."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import qwen35.nki_kernels
from nki_emulator.jit import Kernel
from support.kernel_cases import make_case


def all_kernels() -> dict[str, Kernel]:
    """Everything that `nki.jit` decorates in `qwen35.nki_kernels`, by its name."""
    found = {}
    for info in pkgutil.iter_modules(qwen35.nki_kernels.__path__):
        module = importlib.import_module(f"qwen35.nki_kernels.{info.name}")
        found.update({name: value for name, value in vars(module).items() if isinstance(value, Kernel)})
    return found


def small_arguments(name: str, dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    """Arguments for a launch of the kernel of that name, its options left out."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if name == "attention_prefill":
        return [normal(1, 2, 128, 256), normal(1, 1, 128, 256), normal(1, 1, 128, 256)]
    if name in ("attention_decode", "attention_continuation"):
        S = 2 if name == "attention_decode" else 128
        new = [normal(2, heads, S, 256) for heads in (2, 1, 1)]
        lengths = torch.tensor([256, 70], dtype=torch.int32)
        cached = [normal(3, 1, 384, 256), normal(3, 1, 384, 256), lengths]
        slots = [] if name == "attention_decode" else [torch.tensor([2, 0], dtype=torch.int32)]
        return [*new, *cached, *slots, 256]
    if name == "deltanet_commit_layer":
        tokens = [normal(*shape, dtype=torch.float32) for shape in ((2, 2, 1, 128), (2, 2, 2, 128), (2, 2, 2))]
        state = normal(2, 2, 128, 128, dtype=torch.float32)
        return [*tokens, state, normal(2, 2, 512), normal(2, 512, 3), torch.tensor([1, 2], dtype=torch.int32)]
    if name in ("deltanet_decode_layer", "deltanet_verify_layer"):
        T = 1 if name == "deltanet_decode_layer" else 3
        activations = [normal(2, T, 512), normal(2, T, 256), normal(2, T, 2), normal(2, T, 2), normal(512, 4)]
        float32 = [normal(*shape, dtype=torch.float32) for shape in ((2,), (2,), (128,), (2, 2, 128, 128))]
        return [*activations, normal(2, 512, 3), *float32]
    if name == "deltanet_looped_chunked_layer_state":
        case = make_case(B=1, S=1024, R=1, K=128, V=128, dtype=dtype, state=True)
        assert case.state is not None
        return [*case.tensors, case.state]
    case = make_case(B=2, S=128, R=2, K=128, V=128, dtype=dtype, state=True)
    assert case.state is not None
    lengths = torch.tensor([128, 70], dtype=torch.int32)
    heads = [x[0, :, 0] for x in (case.q, case.k, case.v)]
    heads += [x[0, :, :1].contiguous() for x in (case.g, case.beta)]
    return {
        "deltanet_chunk_step": [*case.tensors, case.state],
        "deltanet_fused_chunked_layer": [*case.tensors],
        "deltanet_fused_chunked_layer_state": [*case.tensors, case.state],
        "deltanet_fused_chunked_layer_ragged": [*case.tensors, case.state, lengths],
        "deltanet_fused_chunked_fwd": [*heads, case.state[0, 0], lengths[1:]],
        "deltanet_recurrent_fwd": heads,
        "deltanet_recurrent_fwd_state": [*heads, case.state[0, 0]],
    }[name]


def addresses(array: np.ndarray) -> np.ndarray:
    """Of every element of a view."""
    found = np.array([array.__array_interface__["data"][0]], np.int64)
    for size, stride in zip(array.shape, array.strides, strict=True):
        found = (found[:, None] + stride * np.arange(size, dtype=np.int64)).ravel()
    return found


@dataclass
class Launches:
    """Launches of kernels, and the programs that NKI compiles for them.

    compiled: one entry for each compilation of NKI 0.3.0. It keeps programs by their inputs' shapes and dtypes and by
        compile-time values (nki/get-started/nki-language-guide.rst, Kernel Caching), and never finds that of a call
        with a None among its arguments (release-notes/components/nki.rst, 0.4.0, Bug Fixes).
    grids: the grid of each launch.
    """

    compiled: list[Hashable] = field(default_factory=list)
    grids: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key = (kernel.function.__qualname__, kernel.grid, *map(_key, args), *((k, _key(v)) for k, v in kwargs.items()))
        self.grids.append(kernel.grid)
        if key not in self.compiled:
            self.compiled.append(key)


def _key(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if value is None:
        return object()  # equal to no other
    hash(value)
    return value


@contextmanager
def recorded_launches() -> Iterator[Launches]:
    """Launches of any kernel within the block; each runs as it would without."""
    launches = Launches()
    call = Kernel.__call__

    def record(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
        launches.add(kernel, args, kwargs)
        return call(kernel, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "__call__", record)
        yield launches
