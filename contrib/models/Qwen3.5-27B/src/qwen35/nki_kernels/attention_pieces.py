# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: buffers taken in turn, parts of the head dim, constants made on chip.

A contraction over the head dim E is one matmul of E rows, or two accumulating ones of 128: `parts(E)` of `width(E)`.
"""

from dataclasses import dataclass
from typing import Any

from .common import Tensor
from .nki_seam import nisa, nl

TILE = 128
"""Tokens of a tile: partitions of SBUF, rows and columns of the Tensor engine."""

HEAD_DIMS = (64, 128, 256)
"""What the kernels take; every published checkpoint has 256."""

PSUM_BANK_BYTES = 2048
"""Of a partition (nki/guides/architecture/trainium_inferentia2_arch.rst, PSUM)."""

MASKED = -1e30
"""The score of a hidden key, or what is added to it: exp gives 0, and bfloat16 and float32 hold it."""


@dataclass
class Pool(nl.NKIObject):
    """Buffers of one shape, taken in turn: writing to one waits for what used it that many turns ago."""

    tiles: list[Any]
    taken: int = 0


def make_pool(count: int, shape: tuple[int, ...], dtype: Any, buffer: Any) -> Pool:
    """`count` buffers."""
    tiles = []
    for _ in range(count):
        tiles.append(nl.ndarray(shape, dtype=dtype, buffer=buffer))
    return Pool(tiles=tiles)


def take(pool: Pool) -> Tensor:
    """The buffer that was taken longest ago."""
    pool.taken += 1
    return pool.tiles[(pool.taken - 1) % len(pool.tiles)]


def restart(pool: Pool) -> None:
    """Take the first buffer next, so that each step of a loop takes the same ones."""
    pool.taken = 0


def item_bytes(dtype: Any) -> int:
    """Bytes of an element of the types that the attention kernels take."""
    return 4 if dtype == nl.float32 else 2


def parts(E: int) -> int:
    """Accumulating matmuls that contract over a head dim."""
    return (E + TILE - 1) // TILE


def width(E: int) -> int:
    """Rows of each of them."""
    return min(E, TILE)


def check_heads(N: int, M: int, E: int) -> None:
    """Head counts and head dim that the kernels take."""
    assert E in HEAD_DIMS, f"head_dim is {E}: 64, 128 or 256 is needed"
    assert N % M == 0, f"{N} query heads are not a multiple of {M} key-value heads"


def check_dtypes(q: Any, k: Any, v: Any) -> None:
    """Types of queries, keys and values."""
    assert q == k and k == v, f"q, k, v are {q}, {k}, {v}: one type is needed"
    assert q == nl.float32 or q == nl.bfloat16, f"q is {q}: float32 or bfloat16 is needed"


def check_cache(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, bucket: int
) -> None:
    """Shapes of new tokens and of a cache with a slot for each row, and the type of the cache."""
    B, _, S, E = q.shape
    M = k.shape[1]
    slots, _, P, _ = k_cache.shape
    assert k.shape == (B, M, S, E), f"k has shape {k.shape}, expected {(B, M, S, E)} from q"
    assert v.shape == k.shape, f"v has shape {v.shape}, k {k.shape}: they must be equal"
    assert slots >= B and k_cache.shape == (slots, M, P, E), f"k_cache has shape {k_cache.shape}, k {k.shape}"
    assert v_cache.shape == k_cache.shape, f"v_cache has shape {v_cache.shape}, k_cache {k_cache.shape}"
    assert lengths.shape == (B,), f"lengths has shape {lengths.shape}, expected {(B,)} from q"
    assert bucket % TILE == 0 and bucket <= P, f"bucket={bucket}: a multiple of {TILE} up to {P} is needed"
    check_dtypes(q.dtype, k_cache.dtype, v_cache.dtype)


def make_identity(size: int, dtype: Any) -> Tensor:
    """The identity [size, size]."""
    ones = nl.ndarray((size, size), dtype=dtype, buffer=nl.sbuf)
    identity = nl.ndarray((size, size), dtype=dtype, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0, engine=nisa.engine.vector)
    nisa.affine_select(
        dst=identity,
        pattern=[[-1, size]],
        channel_multiplier=1,
        on_true_tile=ones,
        on_false_value=0.0,
        cmp_op=nl.equal,
    )
    return identity
