# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the GpSimd engine: index patterns, affine masks, partition reductions, gathers. SBUF only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import checks, costs, dtypes, ops
from ..enums import engine as Engine
from ..errors import fail
from ..memory import NkiTensor
from .common import finish

_ISA = checks.ISA


def _affine(
    call: str, out: NkiTensor, pattern: Sequence[Sequence[int]], offset: int, channel_multiplier: int
) -> np.ndarray:
    """``offset + partition * channel_multiplier + pattern`` as int64 ``[P, F]``."""
    dims = [(int(step), int(num)) for step, num in pattern]
    if not 1 <= len(dims) <= 4:
        fail(call, f"pattern has {len(dims)} dimensions", "1 to 4", f"{_ISA}, {call}")
    count = int(np.prod([num for _, num in dims]))
    if count != out.free_size:
        fail(
            call,
            f"pattern {[list(d) for d in dims]} has {count} elements",
            f"dst has {out.free_size} elements per partition",
            f"{_ISA}, {call}, Tile size",
        )
    free = np.zeros(1, dtype=np.int64)
    for step, num in dims:
        free = (free[:, None] + step * np.arange(num, dtype=np.int64)).reshape(-1)
    channels = np.arange(out.partitions, dtype=np.int64)[:, None] * int(channel_multiplier)
    return int(offset) + channels + free


def _finish(call: str, out: NkiTensor, reads: list[Any], name: str | None, factor: float = 1.0) -> None:
    cycles = out.free_size * costs.GPSIMD_CYCLES_PER_ELEMENT * factor
    finish(call, Engine.gpsimd, costs.elementwise(Engine.gpsimd, cycles), reads, [out], name)


def iota(
    dst: Any, pattern: Sequence[Sequence[int]], offset: int = 0, channel_multiplier: int = 0, name: str | None = None
) -> None:
    """``dst[p, ...] = offset + p * channel_multiplier + pattern``, in 32-bit integers, cast to the type of ``dst``.

    Args:
        dst: SBUF ``[P, F]``.
        pattern: up to four ``[step, num]``; the nums multiply to F.
    """
    call = "iota"
    out = checks.tile(call, "dst", dst, checks.SBUF_ONLY, checks.FREE_DIMENSIONS)
    values = _affine(call, out, pattern, offset, channel_multiplier).astype(np.int32)
    out.write(values)
    _finish(call, out, [], name)


def affine_select(
    dst: Any,
    pattern: Sequence[Sequence[int]],
    channel_multiplier: int,
    on_true_tile: Any,
    on_false_value: float,
    cmp_op: Any = ops.EQUAL,
    offset: int = 0,
    name: str | None = None,
) -> None:
    """Keep ``on_true_tile`` where ``offset + p * channel_multiplier + pattern`` compares true with 0.

    Args:
        dst, on_true_tile: SBUF ``[P, F]``.
        pattern: up to four ``[step, num]``; the nums multiply to F.
        on_false_value: constant elsewhere.
        cmp_op: a comparison such as ``nl.greater_equal``.
    """
    call = "affine_select"
    src = checks.tile(call, "on_true_tile", on_true_tile, checks.SBUF_ONLY, checks.FREE_DIMENSIONS)
    out = checks.tile(call, "dst", dst, checks.SBUF_ONLY, checks.FREE_DIMENSIONS)
    checks.elementwise(call, dst=out, on_true_tile=src)
    comparison = ops.op_name(call, "cmp_op", cmp_op)
    if comparison not in ops.COMPARISONS:
        fail(
            call,
            f"cmp_op=nl.{comparison}",
            f"it must be one of {', '.join(sorted(ops.COMPARISONS))}",
            f"{_ISA}, {call}",
        )
    if isinstance(on_false_value, NkiTensor):
        fail(call, f"on_false_value is {on_false_value!r}", "it must be a constant", f"{_ISA}, {call}")
    keep = ops.ARITHMETIC[comparison](_affine(call, out, pattern, offset, channel_multiplier), 0)
    if src.dtype == out.dtype and src.dtype in dtypes.INTEGERS:
        out.write(np.where(keep, src.read(), np.asarray(on_false_value).astype(dtypes.STORAGE[out.dtype])))
    else:
        out.write(np.where(keep, src.read_float(), np.float32(on_false_value)))
    _finish(call, out, [src], name)


def tensor_partition_reduce(dst: Any, op: Any, data: Any, name: str | None = None) -> None:
    """Reduce across partitions; slow, prefer a matmul with ones.

    Args:
        dst: SBUF ``[1, F]``.
        op: add, maximum, bitwise_or or bitwise_and.
        data: SBUF ``[P, F]``.
    """
    call = "tensor_partition_reduce"
    src = checks.tile(call, "data", data, checks.SBUF_ONLY)
    out = checks.tile(call, "dst", dst, checks.SBUF_ONLY)
    checks.same_free_size(call, dst=out, data=src)
    if out.partitions != 1:
        fail(call, f"dst has {out.partitions} partitions", "it has 1", f"{_ISA}, {call}")
    reduction = ops.op_name(call, "op", op)
    if reduction not in ("add", "max", "maximum", "bitwise_or", "bitwise_and"):
        fail(call, f"op=nl.{reduction}", "it must be add, max, bitwise_or or bitwise_and", f"{_ISA}, {call}")
    if reduction in ops.BITVEC:
        checks.integers(call, reduction, data=src, dst=out)
        out.write(ops.BITVEC[reduction].reduce(src.read(), axis=0))  # type: ignore[attr-defined]
    else:
        out.write(ops.ARITHMETIC[reduction].reduce(src.read_float(), axis=0))  # type: ignore[attr-defined]
    _finish(call, out, [src], name, float(costs.PARTITION_REDUCE_FACTOR))


def nc_n_gather(dst: Any, data: Any, indices: Any, name: str | None = None) -> None:
    """Per partition, ``dst = data.flatten()[indices]``.

    Args:
        dst: SBUF ``[P, N]``, type of ``data``.
        data: SBUF ``[P, F]``.
        indices: SBUF uint32 ``[P, N]``.
    """
    call = "nc_n_gather"
    src, index, out = (
        checks.tile(call, n, t, checks.SBUF_ONLY) for n, t in (("data", data), ("indices", indices), ("dst", dst))
    )
    checks.same_partitions(call, dst=out, data=src, indices=index)
    checks.same_free_size(call, dst=out, indices=index)
    checks.same_dtype(call, dst=out, data=src)
    checks.dtype_in(call, "indices", index, ("uint32",))
    where = index.read().astype(np.int64)
    if where.size and where.max() >= src.free_size:
        fail(call, f"index {where.max()}", f"data has {src.free_size} elements per partition", f"{_ISA}, {call}")
    out.write(np.take_along_axis(src.read(), where, axis=1))
    _finish(call, out, [src, index], name)


def local_gather(
    dst: Any,
    src_buffer: Any,
    index: Any,
    num_elem_per_idx: int = 1,
    num_valid_indices: int | None = None,
    name: str | None = None,
) -> None:
    """Gather within each group of 16 partitions, all of which use the same indices.

    The indices of a group are its 16 rows of ``index`` read partition first; partition ``p`` of the group receives
    ``src_buffer[p, i * num_elem_per_idx : (i + 1) * num_elem_per_idx]`` for each index ``i``.

    Args:
        dst: SBUF ``[P, n * num_elem_per_idx]``, type of ``src_buffer``.
        src_buffer: SBUF ``[P, F]``, P a multiple of 16.
        index: SBUF uint16 ``[P, n / 16]``.
        num_elem_per_idx: 1, 2, 4, 8, 16 or 32.
        num_valid_indices: indices used per group; all by default.
    """
    call = "local_gather"
    src, idx, out = (
        checks.tile(call, n, t, checks.SBUF_ONLY)
        for n, t in (("src_buffer", src_buffer), ("index", index), ("dst", dst))
    )
    checks.same_dtype(call, dst=out, src_buffer=src)
    checks.dtype_in(call, "index", idx, ("uint16",))
    if src.partitions != idx.partitions or src.partitions % 16:
        fail(
            call, f"{src.partitions} and {idx.partitions} partitions", "equal, and a multiple of 16", f"{_ISA}, {call}"
        )
    if num_elem_per_idx not in (1, 2, 4, 8, 16, 32):
        fail(call, f"num_elem_per_idx={num_elem_per_idx}", "1, 2, 4, 8, 16 or 32", f"{_ISA}, {call}")
    per_group = idx.free_size * 16
    count = per_group if num_valid_indices is None else int(num_valid_indices)
    if count > min(per_group, 4096):
        fail(call, f"num_valid_indices={count}", f"at most {min(per_group, 4096)} per group", f"{_ISA}, {call}")
    if out.partitions != src.partitions or out.free_size < count * num_elem_per_idx:
        fail(call, f"dst {out!r}", f"it needs {count * num_elem_per_idx} elements per partition", f"{_ISA}, {call}")
    values, indices, result = src.read(), idx.read(), out.read().copy()
    for group in range(0, src.partitions, 16):
        flat = indices[group : group + 16].T.reshape(-1)[:count].astype(np.int64)
        columns = (flat[:, None] * num_elem_per_idx + np.arange(num_elem_per_idx)).reshape(-1)
        if columns.size and columns.max() >= src.free_size:
            fail(call, f"index {flat.max()}", f"src_buffer has {src.free_size} elements", f"{_ISA}, {call}")
        result[group : group + 16, : columns.size] = values[group : group + 16][:, columns]
    out.write(result)
    whole = count * num_elem_per_idx == out.free_size
    _finish(call, out, [src, idx] if whole else [src, idx, out], name)


def nonzero_with_count(
    dst: Any, src: Any, index_offset: int = 0, padding_val: int = -1, name: str | None = None
) -> None:
    """On partitions 0, 16, ..., 112: indices of the non-zero elements, padding, and in the last slot their count.

    Args:
        dst: SBUF int32 ``[P, F + 1]``; other partitions stay.
        src: SBUF float32 or int32 ``[P, F]``.
        index_offset: added to each index.
        padding_val: fills unused slots.
    """
    call = "nonzero_with_count"
    source = checks.tile(call, "src", src, checks.SBUF_ONLY)
    out = checks.tile(call, "dst", dst, checks.SBUF_ONLY)
    checks.same_partitions(call, dst=out, src=source)
    checks.dtype_in(call, "src", source, ("float32", "int32"))
    checks.dtype_in(call, "dst", out, ("int32",))
    if out.free_size != source.free_size + 1:
        fail(call, f"dst has {out.free_size} elements per partition", f"{source.free_size + 1}", f"{_ISA}, {call}")
    values, result = source.read(), out.read().copy()
    for row in range(0, source.partitions, 16):
        found = np.nonzero(values[row])[0] + int(index_offset)
        result[row, : found.size] = found
        result[row, found.size : -1] = int(padding_val)
        result[row, -1] = found.size
    out.write(result)
    _finish(call, out, [source, out], name)


def sequence_bounds(dst: Any, segment_ids: Any, name: str | None = None) -> None:
    """Start and end index of the segment of each element; elements of segment 0 get (n, -1).

    Args:
        dst: SBUF float32 or int32 ``[1, 2, n]``: starts, then ends (one past the last element).
        segment_ids: SBUF float32 or int32 ``[1, n]``.
    """
    call = "sequence_bounds"
    source = checks.tile(call, "segment_ids", segment_ids, checks.SBUF_ONLY)
    out = checks.tile(call, "dst", dst, checks.SBUF_ONLY)
    for operand, t in (("segment_ids", source), ("dst", out)):
        checks.dtype_in(call, operand, t, ("float32", "int32"))
        if t.partitions != 1:
            fail(call, f"{operand} has {t.partitions} partitions", "it has 1", f"{_ISA}, {call}")
    ids = source.read().reshape(-1)
    n = ids.size
    if out.free_size != 2 * n:
        fail(call, f"dst has {out.free_size} elements", f"it has {2 * n}", f"{_ISA}, {call}")
    starts, ends = np.full(n, n, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    for segment in np.unique(ids[ids != 0]):
        members = np.nonzero(ids == segment)[0]
        starts[members], ends[members] = members[0], members[-1] + 1
    out.write(np.stack([starts, ends]))
    _finish(call, out, [source], name)
