# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Tensor engine: matrix multiplication into PSUM, and transposes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks, costs, dtypes
from ..context import current
from ..enums import MemoryRegion, matmul_perf_mode
from ..enums import engine as Engine
from ..enums import matmul_perf_mode as PerfMode
from ..errors import fail
from ..memory import BankGroups, NkiTensor
from .common import note_psum_write

_DOC = "nki/api/nki/isa/__init__.py, nc_matmul"
_PSUM_DOC = "nki/guides/architecture/trainium_inferentia2_arch.rst, Near-memory accumulation in PSUM"
#: OpenBLAS starts threads above this number of multiplications (interface/gemm.c: 65536 * GEMM_MULTITHREAD_THRESHOLD).
_BLAS_ONE_THREAD = 1 << 18
_BLAS_COLUMNS = 128
MATMUL_DTYPES = (*dtypes.FP8, "bfloat16", "float16", "tfloat32", "float32")


def nc_matmul(
    dst: Any,
    stationary: Any,
    moving: Any,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple[int, ...] = (),
    tile_size: tuple[int, ...] = (),
    perf_mode: PerfMode = matmul_perf_mode.none,
    name: str | None = None,
) -> None:
    """``dst[M, N] (+)= stationary[K, M].T @ moving[K, N]`` in float32.

    Args:
        dst: PSUM ``[M, N]`` float32 (the input type with ``is_transpose``), within one 2 KiB bank.
        stationary: SBUF ``[K <= 128, M <= 128]``; ``[K, 2, M]`` with ``double_row``.
        moving: SBUF ``[K, N <= 512]``; ``[K, 2, N]`` with ``double_row``.
        is_stationary_onezero, is_moving_onezero: a float32 operand of ones and zeros multiplies faster.
        is_transpose: move data exactly; ``moving`` selects (an identity transposes).
        accumulate: True adds to ``dst``, False overwrites, None overwrites what was never written and adds elsewhere.
        tile_position, tile_size: (row, column) of the sub-array and its size, multiples of 32.
        perf_mode: ``double_row`` doubles the contraction of fp8 operands.

    Raises:
        NkiValidationError: a constraint of the call is violated, or ``accumulate=None`` would add to a value that was
            already read, which is nearly always a tile that was meant to start anew.
    """
    call = "nc_matmul"
    w = checks.tile(call, "stationary", stationary, checks.SBUF_ONLY)
    x = checks.tile(call, "moving", moving, checks.SBUF_ONLY)
    out = checks.tile(call, "dst", dst, checks.PSUM_ONLY)
    perf_mode = checks.enum_member(call, "perf_mode", perf_mode, PerfMode)
    double = perf_mode is PerfMode.double_row
    rows, columns, cells = _tiling(call, tile_position, tile_size)
    if checks.strict():
        _check_matmul(call, out, w, x, rows, columns, is_transpose, double, tile_size)
        for operand, t, hint in (("stationary", w, is_stationary_onezero), ("moving", x, is_moving_onezero)):
            if hint:
                _check_onezero(call, operand, t)
    k = w.partitions
    factor = 2 if double else 1
    m, n = w.free_size // factor, x.free_size // factor
    if out.partitions != m or out.free_size != n:
        fail(
            call,
            f"dst is [{out.partitions}, {out.free_size}]",
            f"stationary [{k}, {m}] and moving [{k}, {n}] give [{m}, {n}]",
            f"{_DOC}, Layout",
        )
    if is_transpose:
        result = _select_rows(call, w, x)
    else:
        left, right = _operand(w), _operand(x)
        if double:
            left = left.reshape(k, 2, m).transpose(1, 0, 2).reshape(2 * k, m)
            right = right.reshape(k, 2, n).transpose(1, 0, 2).reshape(2 * k, n)
        with np.errstate(over="ignore", invalid="ignore"):
            result = _product(left, right)
    adds = _accumulate(call, out, result, accumulate, is_transpose)
    _note_group(call, out, adds)
    if is_transpose:
        cost = costs.tensor_transpose(n, w.dtype)
    else:
        cost = costs.matmul(n, m, (w.dtype, x.dtype), (is_stationary_onezero, is_moving_onezero))
    # An accumulating matmul reads dst too, but the order of writes already covers that dependence.
    current().record(call, Engine.tensor, cost, [w, x], [out], name, cells=cells, keeps=[out] if adds else [])


def nc_transpose(dst: Any, data: Any, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """``dst[F, P] = data[P, F].T``, bit-exact.

    Args:
        dst: same type as ``data``; PSUM on the Tensor engine, SBUF or PSUM on the Vector engine.
        data: Tensor engine: SBUF up to [128, 128]; Vector engine: SBUF or PSUM up to [32, 32].
        engine: ``tensor``, ``vector`` or ``unknown`` (Vector where the shape and the memory of ``dst`` allow it).
    """
    call = "nc_transpose"
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    on = checks.choose_engine(call, engine, (Engine.tensor, Engine.vector))
    p, f = src.partitions, src.free_size
    if (out.partitions, out.free_size) != (f, p):
        fail(
            call,
            f"dst is [{out.partitions}, {out.free_size}]",
            f"data [{p}, {f}] gives [{f}, {p}]",
            f"{checks.ISA}, {call}",
        )
    checks.same_dtype(call, dst=out, data=src)
    if on is Engine.unknown:
        small = p <= 32 and f <= 32 and out.buffer is MemoryRegion.sbuf
        on = Engine.vector if small else Engine.tensor
    limit = 32 if on is Engine.vector else 128
    if checks.strict():
        if p > limit or f > limit:
            fail(
                call,
                f"data is [{p}, {f}]",
                f"engine {on.name} transposes up to [{limit}, {limit}]",
                f"{checks.ISA}, {call}",
            )
        if on is Engine.tensor:
            if src.buffer is not MemoryRegion.sbuf:
                fail(call, f"data {src!r} on the Tensor engine", "it must be in sbuf", f"{checks.ISA}, {call}")
            if out.buffer is not MemoryRegion.psum:
                fail(call, f"dst {out!r} on the Tensor engine", "it must be in psum", f"{checks.ISA}, {call}")
    out.write(np.ascontiguousarray(src.read().T))
    note_psum_write(out, product=on is Engine.tensor)
    if on is Engine.tensor:
        cost = costs.tensor_transpose(p, src.dtype)
    else:
        cost = costs.elementwise(Engine.vector, max(p, f))
    current().record(call, on, cost, [src], [out], name)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``left.T @ right`` in blocks so small that OpenBLAS keeps them on one thread.

    Its threads wait actively for each other, which makes a 128-wide product hundreds of times slower on a busy machine.
    """
    (k, m), n = left.shape, right.shape[1]
    columns = min(n, _BLAS_COLUMNS)
    rows = max(1, _BLAS_ONE_THREAD // (k * columns))
    if rows >= m and columns == n:
        return left.T @ right
    result, transposed = np.empty((m, n), dtype=np.float32), left.T
    for j in range(0, n, columns):
        part = right[:, j : j + columns]
        for i in range(0, m, rows):
            result[i : i + rows, j : j + columns] = transposed[i : i + rows] @ part
    return result


def _operand(t: NkiTensor) -> np.ndarray:
    values = t.read_float()
    return dtypes.round_tf32(values) if t.dtype == "tfloat32" else values


def _tiling(call: str, position: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int, tuple[slice, slice] | None]:
    """Rows and columns of the sub-array, and which 32x32 cells of the array it takes."""
    position, size = tuple(position or ()), tuple(size or ())
    if not position and not size:
        return 128, 128, None
    if len(position) != 2 or len(size) != 2:
        fail(
            call,
            f"tile_position={position}, tile_size={size}",
            "give both, as (row, column), or neither",
            f"{_DOC}, Tiling mode",
        )
    (row, column), (rows, columns) = (int(v) for v in position), (int(v) for v in size)
    for axis, start, extent in (("row", row, rows), ("column", column, columns)):
        if extent not in (32, 64, 128):
            fail(call, f"tile_size {axis} size {extent}", "sub-arrays have 32, 64 or 128", f"{_DOC}, Tiling mode")
        if start % extent or start + extent > 128:
            fail(
                call,
                f"tile_position {axis} {start}",
                f"it is a multiple of {extent} within 128",
                f"{_DOC}, Tiling mode",
            )
    return (
        rows,
        columns,
        (
            slice(row // 32, (row + rows) // 32),
            slice(column // 32, (column + columns) // 32),
        ),
    )


def _check_matmul(
    call: str,
    out: NkiTensor,
    w: NkiTensor,
    x: NkiTensor,
    rows: int,
    columns: int,
    is_transpose: bool,
    double: bool,
    tile_size: tuple[int, ...],
) -> None:
    allowed = MATMUL_DTYPES if not is_transpose else tuple(dtypes.STORAGE)
    for operand, t in (("stationary", w), ("moving", x)):
        if t.dtype not in allowed:
            fail(call, f"{operand} has dtype {t.dtype}", f"it must be {' or '.join(allowed)}", f"{_DOC}, Data types")
    if (w.dtype in dtypes.FP32S) != (x.dtype in dtypes.FP32S):
        fail(
            call,
            f"stationary is {w.dtype} and moving is {x.dtype}",
            "if one is float32 or tfloat32 the other must be too",
            f"{_DOC}, Data types",
        )
    expected = {"float32", w.dtype} if is_transpose else {"float32"}
    if out.dtype not in expected:
        fail(
            call,
            f"dst has dtype {out.dtype}",
            f"it must be {' or '.join(sorted(expected))} on NeuronCore-v3",
            f"{_DOC}, Data types",
        )
    if w.partitions != x.partitions:
        fail(
            call,
            f"stationary has {w.partitions} partitions and moving {x.partitions}",
            "the contraction dimension is the partition dimension of both",
            f"{_DOC}, Layout",
        )
    if w.partitions > rows:
        fail(call, f"contraction size {w.partitions}", f"at most {rows} rows", f"{_DOC}, Tile size")
    factor = 2 if double else 1
    if double:
        _check_double_row(call, w, x, columns, is_transpose, tile_size)
    if w.free_size > columns * factor:
        fail(call, f"stationary has {w.free_size} columns", f"at most {columns * factor}", f"{_DOC}, Tile size")
    if x.free_size > 512 * factor:
        fail(call, f"moving has {x.free_size} columns", f"at most {512 * factor}", f"{_DOC}, Tile size")
    one_bank(call, out)


def _check_onezero(call: str, operand: str, t: NkiTensor) -> None:
    """The hint that an operand holds ones and zeros only: the hardware multiplies it by less than its full mantissa."""
    values = t.read_float()
    other = (values != 0) & (values != 1)
    if other.any():
        where = tuple(int(i) for i in np.argwhere(other)[0])
        fail(
            call,
            f"is_{operand}_onezero=True, and {operand} holds {values[where]:g} at {where}",
            "such a tile holds ones and zeros only",
            f"{_DOC}, is_{operand}_onezero",
        )


def _check_double_row(
    call: str, w: NkiTensor, x: NkiTensor, columns: int, is_transpose: bool, tile_size: tuple[int, ...]
) -> None:
    for operand, t in (("stationary", w), ("moving", x)):
        if t.dtype not in ("float8_e4m3", "float8_e5m2"):
            fail(
                call,
                f"{operand} has dtype {t.dtype} with double_row",
                "it must be float8_e4m3 or float8_e5m2",
                _DOC,
            )
        if t.ndim < 3 or t.shape[1] != 2:
            fail(call, f"{operand} has shape {list(t.shape)} with double_row", "its first free dimension is 2", _DOC)
    if is_transpose or (tile_size and columns != 128):
        fail(
            call,
            "double_row with transpose or column tiling",
            "they cannot be combined",
            f"{_DOC}, Performance mode",
        )


def one_bank(call: str, out: NkiTensor) -> None:
    """The output of a Tensor engine instruction lies in one PSUM bank."""
    bank = int(costs.PSUM_BANK_BYTES)
    pattern = out._array
    first = out.byte_offset % out.storage.raw.strides[0]
    axes = range(1 if out.has_partition_axis else 0, pattern.ndim)
    last = first + sum(pattern.strides[a] * (pattern.shape[a] - 1) for a in axes) + pattern.itemsize - 1
    if first // bank != last // bank:
        fail(
            call,
            f"dst spans bytes {first} to {last} of a partition",
            f"it must lie in one PSUM bank of {bank} bytes",
            _PSUM_DOC,
        )


def _select_rows(call: str, w: NkiTensor, x: NkiTensor) -> np.ndarray:
    """Transpose mode: column n of the result is the row of ``w`` that column n of ``x`` selects, NaN or not."""
    selector = x.read_float()
    if (checks.strict() and not ((selector == 0) | (selector == 1)).all()) or not (selector.sum(axis=0) == 1).all():
        fail(
            call,
            "moving with is_transpose=True",
            "each column selects one row: a single 1, the rest 0",
            f"{_DOC}, Transpose mode",
        )
    return w.read()[selector.argmax(axis=0)].T


def _accumulate(call: str, out: NkiTensor, result: np.ndarray, accumulate: bool | None, is_transpose: bool) -> bool:
    """Write or add into PSUM by the rules of the ``accumulate`` argument, per element; whether something was kept."""
    state = out.accumulation
    if state is None:  # Not in PSUM: only reachable without strict checks.
        out.write(result)
        return False
    written, stale, product = (state.of(m, out) for m in (state.written, state.stale, state.product))
    if accumulate is True and checks.strict() and not product.all():
        fail(
            call,
            f"accumulate=True on dst {out!r}, of which no matmul wrote {product.size - int(product.sum())} elements",
            "start the group with accumulate=False or None",
            f"{_DOC}, Accumulation mode",
        )
    adds = accumulate is True or (accumulate is None and not is_transpose and bool(written.any()))
    if not adds:
        out.write(result)
    else:
        if accumulate is None and checks.strict() and bool((stale & written).any()):
            fail(
                call,
                f"accumulate=None on dst {out!r}, which holds an earlier result that was already read",
                "say accumulate=True to keep adding or accumulate=False to start anew",
                f"{_DOC}, Accumulation mode",
            )
        old = dtypes.to_float32(out.array)
        total = old + result.reshape(old.shape)
        if accumulate is None and not written.all():
            total = np.where(written.reshape(old.shape), total, result.reshape(old.shape))
        out.write(total)
    written[...] = True
    product[...] = True
    stale[...] = False
    return adds


def _note_group(call: str, out: NkiTensor, adds: bool) -> None:
    """Warn when a matmul adds to an accumulation group after another group of the same bank had its turn."""
    storage = out.storage
    bank = out.byte_offset % storage.raw.strides[0] // int(costs.PSUM_BANK_BYTES)
    groups = storage.banks.setdefault(bank, BankGroups())
    if groups.matmul(out._array, adds=adds):
        current().shared.warn(
            call,
            f"dst {out!r} adds to a group while another group of PSUM bank {bank} of {storage.label} is open",
            "a bank holds one open accumulation group: finish it before the next one starts, or use another bank",
            f"{_PSUM_DOC}: up to eight outstanding groups with eight banks",
        )
