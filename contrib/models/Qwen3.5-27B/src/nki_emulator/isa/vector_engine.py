# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Vector engine: element-wise work on tiles, reductions, scans, shuffles, searches.

Shapes: P partitions, F elements per partition (all free axes flattened). Arithmetic is float32 and rounds once, on
write. Some run on the Scalar or GpSimd engine too; the ``engine=`` argument selects, ``unknown`` lets the model choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks, costs, dtypes, ops
from ..context import current
from ..enums import MemoryRegion
from ..enums import engine as Engine
from ..enums import reduce_cmd as ReduceCmd
from ..errors import fail
from ..memory import NkiTensor
from .common import check_reduce_cmd, finish, reduce_registers, value_of

_ISA = checks.ISA
_UPDATE = "nki/deep-dives/nki-0-3-0-update-guide.rst"
FP32_MIN = float(np.finfo(np.float32).min)


# --- Copies and fills ------------------------------------------------------------------------------------------------
def tensor_copy(dst: Any, src: Any, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """``dst = src`` between SBUF and PSUM; bit-exact for equal types, through float32 otherwise.

    Args:
        dst, src: SBUF or PSUM ``[P, F]``.
        engine: ``vector``, ``scalar`` or ``gpsimd`` (SBUF only); ``unknown`` takes the one that ends first.
    """
    call = "tensor_copy"
    source, out = checks.tile(call, "src", src), checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, src=source)
    on = checks.choose_engine(call, engine, (Engine.vector, Engine.scalar, Engine.gpsimd))
    out.write(source.read() if source.dtype == out.dtype else source.read_float())
    candidates = (Engine.vector, Engine.scalar) if on is Engine.unknown else (on,)
    prices = {e: _copy_cost(e, out, source) for e in candidates}
    timeline = current().timeline
    on = min(candidates, key=lambda e: timeline.engine_free_at(e) + prices[e].busy_ns)
    checks.reachable(call, on, dst=out, src=source)
    finish(call, on, prices[on], [source], [out], name)


def _copy_cost(on: Engine, out: NkiTensor, source: NkiTensor) -> costs.Cost:
    if on is Engine.vector:
        return costs.elementwise(on, costs.vector_single_input(out.tile(), source.tile(), fast_capable=True))
    factor = costs.GPSIMD_CYCLES_PER_ELEMENT if on is Engine.gpsimd else 1.0
    return costs.elementwise(on, costs.strided(out.free_size, out.tile(), source.tile()) * factor)


def tensor_copy_predicated(
    dst: Any, src: Any, predicate: Any, reverse_pred: bool = False, name: str | None = None
) -> None:
    """Copy the elements of ``src`` where ``predicate`` is not zero; others of ``dst`` stay.

    Args:
        dst: SBUF or PSUM ``[P, F]``.
        src: tile of the same type, or a constant.
        predicate: uint8, uint16 or uint32 ``[P, F]``; not in PSUM together with ``src``.
        reverse_pred: copy where it is zero instead.
    """
    call = "tensor_copy_predicated"
    mask, out = checks.tile(call, "predicate", predicate), checks.tile(call, "dst", dst)
    checks.dtype_in(call, "predicate", mask, ("uint8", "uint16", "uint32"))
    checks.elementwise(call, dst=out, predicate=mask)
    chosen = (mask.read() != 0) != bool(reverse_pred)
    if isinstance(src, NkiTensor):
        source = checks.tile(call, "src", src)
        checks.elementwise(call, dst=out, src=source)
        checks.same_dtype(call, dst=out, src=source)
        checks.not_both_psum(call, src=source, predicate=mask)
        values = source.read()
    else:
        values = np.full(mask.read().shape, src, dtype=np.float32)
    out.write(np.where(chosen, values, out.read()))
    cost = costs.elementwise(Engine.vector, costs.vector_two_inputs(out.tile(), mask.tile(), out.tile()))
    finish(call, Engine.vector, cost, [src, mask, out], [out], name)


def memset(dst: Any, value: Any, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """Fill ``dst`` with a compile-time constant of its type.

    Args:
        dst: SBUF or PSUM ``[P, F]``.
        value: an int for integer tiles; an int or float for float tiles; 0 for packed types.
        engine: ``vector`` or ``gpsimd``; ``unknown`` takes the one that is free first.
    """
    call = "memset"
    out = checks.tile(call, "dst", dst)
    on = checks.choose_engine(call, engine, (Engine.vector, Engine.gpsimd))
    if isinstance(value, NkiTensor):
        fail(call, f"value is {value!r}", "it must be a compile-time constant", f"{_ISA}, memset")
    if checks.strict():
        if out.dtype in dtypes.INTEGERS and (isinstance(value, float) or isinstance(value, np.floating)):
            fail(
                call,
                f"value={value!r} for a dst of dtype {out.dtype}",
                "integer tiles take an int",
                f"{_UPDATE}, memset",
            )
        if out.dtype in dtypes.PACKED_X4 and value != 0:
            fail(call, f"value={value!r} for a dst of dtype {out.dtype}", "packed types take 0 only", f"{_ISA}, memset")
    if out.dtype in dtypes.INTEGERS or out.dtype in dtypes.PACKED_X4:
        out.write(np.full(out.shape, int(value), dtype=np.int64).astype(dtypes.STORAGE[out.dtype]))
    else:
        out.write(np.full(out.shape, value, dtype=np.float32))
    if on is Engine.unknown:
        timeline = current().timeline
        in_psum = out.buffer is MemoryRegion.psum
        gpsimd_first = timeline.engine_free_at(Engine.gpsimd) < timeline.engine_free_at(Engine.vector)
        on = Engine.gpsimd if gpsimd_first and not in_psum else Engine.vector
    checks.reachable(call, on, dst=out)
    if on is Engine.vector:
        cycles = costs.vector_single_input(out.tile(), out.tile(), fast_capable=True)
    else:
        cycles = out.free_size * costs.GPSIMD_CYCLES_PER_ELEMENT
    finish(call, on, costs.elementwise(on, cycles), [], [out], name)


def reciprocal(dst: Any, data: Any, name: str | None = None) -> None:
    """``dst = 1 / data`` in float32; ``dst`` and ``data`` in SBUF or PSUM ``[P, F]``."""
    call = "reciprocal"
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, data=src)
    with np.errstate(all="ignore"):
        out.write(np.float32(1) / src.read_float())
    cycles = max(float(costs.MIN_ISSUE_CYCLES), src.free_size * costs.VECTOR_RECIPROCAL_FACTOR)
    finish(call, Engine.vector, costs.elementwise(Engine.vector, cycles), [src], [out], name)


# --- Element-wise operators ------------------------------------------------------------------------------------------
def tensor_scalar(
    dst: Any,
    data: Any,
    op0: Any,
    operand0: Any,
    reverse0: bool = False,
    op1: Any = None,
    operand1: Any = None,
    reverse1: bool = False,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """``dst = (data op0 operand0) op1 operand1``, the operands broadcast along the free axis.

    Args:
        dst, data: SBUF or PSUM ``[P, F]``; integers for bitvec operators.
        op0, op1: both arithmetic or both bitvec; ``op1`` is optional.
        operand0, operand1: constant or ``[P, 1]`` float32 (integer for bitvec).
        reverse0, reverse1: swap the sides of an operator.
        engine: ``vector``; ``scalar`` for multiply+add, multiply or add; ``gpsimd`` for rsqrt.
    """
    call = "tensor_scalar"
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, data=src)
    on = checks.choose_engine(call, engine, (Engine.vector, Engine.scalar, Engine.gpsimd))
    if (op1 is None) != (operand1 is None):
        fail(call, f"op1={op1!r}, operand1={operand1!r}", "give both or neither", f"{_ISA}, {call}")
    stages: list[tuple[Any, Any, bool, str]] = [(op0, operand0, reverse0, "0")]
    if op1 is not None:
        stages.append((op1, operand1, reverse1, "1"))
    names = [ops.op_name(call, f"op{i}", op) for op, _, _, i in stages]
    bitvec = [n in ops.BITVEC for n in names]
    if any(bitvec) and not all(bitvec):
        fail(call, f"op0=nl.{names[0]}, op1=nl.{names[-1]}", "both are bitvec or both arithmetic", f"{_ISA}, {call}")
    operands = [checks.scalar_or_column(call, f"operand{i}", operand, src) for _, operand, _, i in stages]
    if bitvec[0]:
        checks.integers(call, names[0], data=src, dst=out)
        values = _bitvec_stages(call, src, names, operands, [s[2] for s in stages])
    else:
        for at, operand in enumerate(operands):
            if isinstance(operand, NkiTensor):
                checks.dtype_in(call, f"operand{at}", operand, ("float32",))
        values = src.read_float()
        with np.errstate(all="ignore"):
            for (op, _, reverse, i), operand in zip(stages, operands, strict=True):
                _, function = ops.arithmetic(call, f"op{i}", op)
                other = value_of(operand)
                values = np.asarray(function(other, values) if reverse else function(values, other), dtype=np.float32)
    on = _tensor_scalar_engine(call, on, names, bitvec[0])
    checks.reachable(call, on, dst=out, data=src)
    out.write(values)
    if on is Engine.vector:
        cycles = costs.vector_single_input(out.tile(), src.tile(), fast_capable=True)
    else:
        factor = costs.GPSIMD_RSQRT_FACTOR if on is Engine.gpsimd else 1.0
        cycles = costs.strided(src.free_size, src.tile(), out.tile()) * factor
    finish(call, on, costs.elementwise(on, cycles), [src, *operands], [out], name)


def _tensor_scalar_engine(call: str, on: Engine, names: list[str], bitvec: bool) -> Engine:
    if on is Engine.unknown:
        return Engine.gpsimd if "rsqrt" in names else Engine.vector
    if not checks.strict():
        return on
    combination = "+".join(names)
    if bitvec and on is not Engine.vector:
        fail(
            call,
            f"nl.{combination} on engine {on.name}",
            "bitvec operators run on the Vector engine",
            f"{_ISA}, {call}",
        )
    if on is Engine.scalar and names not in (["multiply", "add"], ["multiply"], ["add"]):
        fail(
            call, f"nl.{combination} on the Scalar engine", "it takes multiply+add, multiply or add", f"{_ISA}, {call}"
        )
    if "rsqrt" in names and on is not Engine.gpsimd:
        source = "nki/api/nki.api.shared.rst, Engine Selection"
        fail(call, f"nl.rsqrt on engine {on.name}", "it runs on GpSimd here, and on Scalar by nisa.activation", source)
    if on is Engine.gpsimd and "rsqrt" not in names:
        fail(call, f"nl.{combination} on the GpSimd engine", "it takes rsqrt only", f"{_ISA}, {call}")
    return on


def _bitvec_stages(
    call: str, src: NkiTensor, names: list[str], operands: list[Any], reverses: list[bool]
) -> np.ndarray:
    values = src.read()
    for name, operand, reverse in zip(names, operands, reverses, strict=True):
        if isinstance(operand, NkiTensor):
            checks.integers(call, name, operand=operand)
            other: Any = operand.read()
        else:
            other = np.array(int(operand), dtype=np.int64).astype(values.dtype)
        function = ops.BITVEC[name]
        values = np.asarray(function(other, values) if reverse else function(values, other)).astype(values.dtype)
    return values


def tensor_tensor(
    dst: Any, data1: Any, data2: Any, op: Any, engine: Engine = Engine.unknown, name: str | None = None
) -> None:
    """``dst = data1 op data2`` element by element.

    Args:
        dst: SBUF or PSUM ``[P, F]``.
        data1, data2: ``[P, F]``, not both in PSUM.
        op: arithmetic or bitvec operator; ``nl.power`` runs on the GpSimd engine.
        engine: ``vector`` or ``gpsimd``; ``unknown`` is GpSimd, with exact integers, for 32-bit integer tiles in SBUF.
    """
    _tensor_tensor("tensor_tensor", dst, data1, data2, op, engine, name)


def _tensor_tensor(call: str, dst: Any, data1: Any, data2: Any, op: Any, engine: Engine, name: str | None) -> None:
    left, right = checks.tile(call, "data1", data1), checks.tile(call, "data2", data2)
    out = checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, data1=left, data2=right)
    checks.not_both_psum(call, data1=left, data2=right)
    on = checks.choose_engine(call, engine, (Engine.vector, Engine.gpsimd))
    op_name = ops.op_name(call, "op", op)
    tiles = (left, right, out)
    in_psum = any(t.buffer is MemoryRegion.psum for t in tiles)
    words = all(t.dtype in ("int32", "uint32") for t in tiles)
    if on is Engine.unknown:
        on = Engine.gpsimd if op_name == "power" or (words and not in_psum) else Engine.vector
    if op_name == "power" and on is Engine.vector:
        fail(call, "op=nl.power on engine vector", "it runs on the GpSimd engine", f"{_ISA}, {call}")
    checks.reachable(call, on, dst=out, data1=left, data2=right)
    with np.errstate(all="ignore"):
        if op_name in ops.BITVEC:
            checks.integers(call, op_name, data1=left, data2=right, dst=out)
            values = ops.BITVEC[op_name](left.read(), right.read().astype(left.read().dtype))
        else:
            _, function = ops.arithmetic(call, "op", op)
            if words and on is Engine.gpsimd:
                exact = np.asarray(function(left.read().astype(np.int64), right.read().astype(np.int64)))
                values = exact.astype(np.int64).astype(dtypes.STORAGE[out.dtype])  # wraps, as 32-bit integers do
            else:
                values = np.asarray(function(left.read_float(), right.read_float()), dtype=np.float32)
    out.write(values)
    if on is Engine.vector:
        cycles = costs.vector_two_inputs(out.tile(), left.tile(), right.tile())
    else:
        cycles = out.free_size * costs.GPSIMD_CYCLES_PER_ELEMENT * costs.GPSIMD_TWO_INPUTS
    finish(call, on, costs.elementwise(on, cycles), [left, right], [out], name)


def scalar_tensor_tensor(
    dst: Any,
    data: Any,
    op0: Any,
    operand0: Any,
    op1: Any,
    operand1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """``dst = (data op0 operand0) op1 operand1`` for the price of one tensor_tensor.

    Args:
        dst, data: SBUF or PSUM ``[P, F]``.
        operand0: constant or ``[P, 1]``.
        operand1: ``[P, F]``, not in PSUM together with ``data``.
        op0, op1: arithmetic operators.
        reverse0, reverse1: swap the sides of an operator.
    """
    call = "scalar_tensor_tensor"
    src, other, out = (checks.tile(call, n, t) for n, t in (("data", data), ("operand1", operand1), ("dst", dst)))
    checks.elementwise(call, dst=out, data=src, operand1=other)
    checks.not_both_psum(call, data=src, operand1=other)
    first = checks.scalar_or_column(call, "operand0", operand0, src)
    _, function0 = ops.arithmetic(call, "op0", op0)
    _, function1 = ops.arithmetic(call, "op1", op1)
    with np.errstate(all="ignore"):
        a, b = src.read_float(), value_of(first)
        middle = np.asarray(function0(b, a) if reverse0 else function0(a, b), dtype=np.float32)
        c = other.read_float()
        out.write(np.asarray(function1(c, middle) if reverse1 else function1(middle, c), dtype=np.float32))
    cost = costs.elementwise(Engine.vector, costs.vector_two_inputs(out.tile(), src.tile(), other.tile()))
    finish(call, Engine.vector, cost, [src, first, other], [out], name)


# --- Reductions and scans --------------------------------------------------------------------------------------------
def tensor_reduce(
    dst: Any,
    op: Any,
    data: Any,
    axis: int | tuple[int, ...] | list[int],
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """Reduce the last free axes of ``data``.

    Args:
        dst: SBUF or PSUM, ``[P, ...]`` with the reduced axes removed or of size one.
        op: an operator that may reduce; bitvec operators need integers.
        data: SBUF or PSUM.
        axis: the last axes, contiguous, never the partition axis 0.
        negate: multiply the result by -1.
        keepdims: the reduced axes stay with size one.
    """
    call = "tensor_reduce"
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    checks.same_partitions(call, dst=out, data=src)
    rank = src.ndim
    axes = sorted((int(a) + rank) % rank for a in ((axis,) if isinstance(axis, int) else axis))
    if 0 in axes or not axes or axes != list(range(axes[0], rank)):
        fail(
            call,
            f"axis={axis} of a tile of rank {rank}",
            "the reduced axes are the last free axes, ending at the final one",
            f"{_ISA}, {call}",
        )
    kept = int(np.prod(src.shape[1 : axes[0]], dtype=np.int64))
    if out.free_size != kept:
        fail(call, f"dst has {out.free_size} elements per partition", f"axis={axis} leaves {kept}", f"{_ISA}, {call}")
    op_name = ops.op_name(call, "op", op)
    values = src.array.reshape(src.partitions * kept, -1)
    if op_name in ops.BITVEC:
        if op_name not in ("bitwise_and", "bitwise_or", "bitwise_xor"):
            fail(call, f"op=nl.{op_name}", "it is no reduction operator", "nki/api/nki.api.shared.rst")
        checks.integers(call, op_name, data=src, dst=out)
        if negate:
            fail(call, f"negate=True with nl.{op_name}", "only arithmetic operators are negated", f"{_ISA}, {call}")
        result = ops.BITVEC[op_name].reduce(values, axis=1)  # type: ignore[attr-defined]
    else:
        if op_name not in ops.REDUCTIONS:
            fail(call, f"op=nl.{op_name}", f"reductions are {', '.join(ops.REDUCTIONS)}", "nki/api/nki.api.shared.rst")
        with np.errstate(all="ignore"):
            result = ops.reduce_free(op_name, dtypes.to_float32(values))
            result = -result if negate else result
    out.write(result)
    cycles = costs.vector_single_input(src.tile(), src.tile(), fast_capable=False)
    finish(call, Engine.vector, costs.elementwise(Engine.vector, cycles), [src], [out], name)


def tensor_scalar_reduce(
    dst: Any,
    data: Any,
    op0: Any,
    operand0: Any,
    reduce_op: Any,
    reduce_res: Any,
    reverse0: bool = False,
    name: str | None = None,
) -> None:
    """``dst = data op0 operand0`` and ``reduce_res = reduce_op(dst)`` along the free axis.

    Args:
        dst, data: SBUF or PSUM ``[P, F]``.
        operand0: constant or ``[P, 1]`` float32.
        reduce_op: add, subtract, multiply, maximum or minimum.
        reduce_res: ``[P, 1]``.
        reverse0: documented as not supported yet; must be False.
    """
    call = "tensor_scalar_reduce"
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, data=src)
    if reverse0:
        fail(call, "reverse0=True", "it is not supported yet", f"{_ISA}, {call}")
    operand = checks.scalar_or_column(call, "operand0", operand0, src)
    _, function = ops.arithmetic(call, "op0", op0)
    reduction = ops.op_name(call, "reduce_op", reduce_op)
    if reduction not in ("add", "subtract", "multiply", "max", "min", "maximum", "minimum"):
        fail(call, f"reduce_op=nl.{reduction}", "it must be add, subtract, multiply, max or min", f"{_ISA}, {call}")
    total = checks.column(call, "reduce_res", reduce_res, src)
    with np.errstate(all="ignore"):
        values = np.asarray(function(src.read_float(), value_of(operand)), dtype=np.float32)
        out.write(values)
        total.write(ops.reduce_free(reduction, values))
    cycles = costs.vector_single_input(out.tile(), src.tile(), fast_capable=False)
    cost = costs.elementwise(Engine.vector, cycles, float(costs.VECTOR_READ_REDUCE_CYCLES))
    finish(call, Engine.vector, cost, [src, operand], [out, total], name)


def tensor_tensor_scan(
    dst: Any,
    data0: Any,
    data1: Any,
    initial: Any,
    op0: Any,
    op1: Any,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """``r[i] = op1(op0(data0[i], r[i-1]), data1[i])`` along the free axis, ``r[-1] = initial``.

    Args:
        dst: SBUF or PSUM ``[P, F]``.
        data0, data1: ``[P, F]``, not both in PSUM.
        initial: constant or ``[P, 1]``.
        op0, op1: arithmetic operators.
        reverse0: ``data0[i]`` is the right side of ``op0``.
        reverse1: ``data1[i]`` is the left side of ``op1``.
    """
    call = "tensor_tensor_scan"
    a, b, out = (checks.tile(call, n, t) for n, t in (("data0", data0), ("data1", data1), ("dst", dst)))
    checks.elementwise(call, dst=out, data0=a, data1=b)
    checks.not_both_psum(call, data0=a, data1=b)
    start = checks.scalar_or_column(call, "initial", initial, a)
    _, function0 = ops.arithmetic(call, "op0", op0)
    _, function1 = ops.arithmetic(call, "op1", op1)
    # The running value stays in float32 inside the engine; only what is written is rounded.
    left, right = np.ascontiguousarray(a.read_float().T), np.ascontiguousarray(b.read_float().T)
    result = np.empty_like(left)
    running = np.broadcast_to(np.asarray(value_of(start), dtype=np.float32).reshape(-1), (a.partitions,))
    with np.errstate(all="ignore"):
        for i in range(left.shape[0]):
            middle = function0(running, left[i]) if reverse0 else function0(left[i], running)
            running = function1(right[i], middle) if reverse1 else function1(middle, right[i])
            result[i] = running
    out.write(np.ascontiguousarray(result.T))
    cost = costs.elementwise(Engine.vector, costs.vector_two_inputs(out.tile(), a.tile(), b.tile()))
    finish(call, Engine.vector, cost, [a, b, start], [out], name)


def tensor_scalar_cumulative(
    dst: Any,
    src: Any,
    op0: Any,
    op1: Any,
    imm0: Any,
    imm1: Any = None,
    reduce_cmd: ReduceCmd = ReduceCmd.reset_reduce,
    name: str | None = None,
) -> None:
    """``dst[i] = op1(op0(src[i], imm0), dst[i-1])`` along the free axis, carried in the Vector engine's registers.

    Args:
        dst, src: SBUF or PSUM ``[P, F]``, no 32-bit integers.
        op0: arithmetic operator.
        op1: add, subtract, multiply, maximum or minimum.
        imm0: constant or ``[P, 1]`` float32.
        imm1: initial value for ``load_reduce``.
        reduce_cmd: ``reset_reduce``, ``reduce`` or ``load_reduce``.
    """
    call = "tensor_scalar_cumulative"
    source, out = checks.tile(call, "src", src), checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, src=source)
    allowed = frozenset(dtypes.STORAGE) - {"int32", "uint32"}
    checks.dtype_in(call, "src", source, allowed)
    checks.dtype_in(call, "dst", out, allowed)
    first = checks.scalar_or_column(call, "imm0", imm0, source)
    _, function0 = ops.arithmetic(call, "op0", op0)
    reduction, function1 = ops.arithmetic(call, "op1", op1)
    if reduction not in ("add", "subtract", "multiply", "max", "min", "maximum", "minimum"):
        fail(call, f"op1=nl.{reduction}", "it must be add, subtract, multiply, max or min", f"{_ISA}, {call}")
    check_reduce_cmd(call, reduce_cmd, (ReduceCmd.reset_reduce, ReduceCmd.reduce, ReduceCmd.load_reduce))
    registers = current().vector_registers
    where = slice(source.start_partition, source.start_partition + source.partitions)
    if reduce_cmd is ReduceCmd.reset_reduce:
        registers[where] = ops.REDUCTIONS[reduction]
    elif reduce_cmd is ReduceCmd.load_reduce:
        registers[where] = np.asarray(value_of(checks.scalar_or_column(call, "imm1", imm1, source))).reshape(-1)
    running = registers[where].copy()
    values = source.read_float()
    result = np.empty_like(values)
    with np.errstate(all="ignore"):
        terms = np.asarray(function0(values, value_of(first)), dtype=np.float32)
        for i in range(values.shape[1]):
            running = np.asarray(function1(terms[:, i], running), dtype=np.float32)
            result[:, i] = running
    registers[where] = running
    out.write(result)
    cost = costs.elementwise(Engine.vector, costs.vector_single_input(out.tile(), source.tile(), fast_capable=False))
    finish(call, Engine.vector, cost, [source, first, imm1], [out], name)


def bn_stats(dst: Any, data: Any, name: str | None = None) -> None:
    """Count, mean and variance*count of the even and of the odd elements of each partition.

    Args:
        dst: ``[P, 6]``.
        data: SBUF or PSUM ``[P, F <= 512]``.
    """
    call = "bn_stats"
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    checks.same_partitions(call, dst=out, data=src)
    if src.free_size > 512:
        fail(call, f"data has {src.free_size} elements per partition", "at most 512", f"{_ISA}, {call}")
    if out.free_size != 6:
        fail(call, f"dst has {out.free_size} elements per partition", "it has 6", f"{_ISA}, {call}")
    values = src.read_float()
    parts = []
    for half in (values[:, 0::2], values[:, 1::2]):
        count = half.shape[1]
        mean = half.mean(axis=1, dtype=np.float32) if count else np.zeros(src.partitions, np.float32)
        squares = np.square(half - mean[:, None]).sum(axis=1, dtype=np.float32)
        parts += [np.full(src.partitions, count, np.float32), mean, squares]
    out.write(np.stack(parts, axis=1))
    cost = costs.elementwise(Engine.vector, costs.vector_single_input(src.tile(), src.tile(), fast_capable=False))
    finish(call, Engine.vector, cost, [src], [out], name)


def bn_aggr(dst: Any, data: Any, name: str | None = None) -> None:
    """Mean and variance per partition from (count, mean, variance*count) triples.

    Args:
        dst: ``[P, 2]``.
        data: ``[P, 3 n]``, results of :func:`bn_stats`.
    """
    call = "bn_aggr"
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    checks.same_partitions(call, dst=out, data=src)
    if src.free_size % 3 or out.free_size != 2:
        fail(call, f"data has {src.free_size} and dst {out.free_size} elements", "3 n and 2", f"{_ISA}, {call}")
    triples = src.read_float().reshape(src.partitions, -1, 3)
    count, mean, squares = triples[..., 0], triples[..., 1], triples[..., 2]
    total = count.sum(axis=1, keepdims=True)
    overall = (count * mean).sum(axis=1, keepdims=True) / total
    spread = (squares + count * np.square(mean - overall)).sum(axis=1, keepdims=True) / total
    out.write(np.concatenate([overall, spread], axis=1))
    cost = costs.elementwise(Engine.vector, float(src.free_size))
    finish(call, Engine.vector, cost, [src], [out], name)


# --- Selection -------------------------------------------------------------------------------------------------------
def select_reduce(
    dst: Any,
    predicate: Any,
    on_true: Any,
    on_false: Any,
    reduce_res: Any = None,
    reduce_cmd: ReduceCmd = ReduceCmd.idle,
    reduce_op: Any = ops.MAXIMUM,
    reverse_pred: bool = False,
    name: str | None = None,
) -> None:
    """``dst = where(predicate, on_true, on_false)``, optionally with the maximum per partition.

    Args:
        dst: SBUF or PSUM ``[P, F]``.
        predicate: int8, uint8, int16 or uint16 ``[P, F]``; not in PSUM together with ``on_true``.
        on_true: ``[P, F]``, no 32-bit integer or tfloat32.
        on_false: constant or ``[P, 1]``.
        reduce_res: float ``[P, 1]``.
        reduce_cmd: ``idle``, ``reset_reduce`` or ``reduce``.
        reduce_op: ``nl.maximum``.
        reverse_pred: select ``on_true`` where the predicate is zero.
    """
    call = "select_reduce"
    mask, yes, out = (
        checks.tile(call, n, t) for n, t in (("predicate", predicate), ("on_true", on_true), ("dst", dst))
    )
    checks.elementwise(call, dst=out, predicate=mask, on_true=yes)
    checks.not_both_psum(call, predicate=mask, on_true=yes)
    checks.dtype_in(call, "predicate", mask, ("int8", "uint8", "int16", "uint16"))
    checks.dtype_in(call, "on_true", yes, frozenset(dtypes.STORAGE) - {"tfloat32", "int32", "uint32"})
    no = checks.scalar_or_column(call, "on_false", on_false, yes)
    if ops.op_name(call, "reduce_op", reduce_op) not in ("maximum", "max"):
        fail(call, f"reduce_op=nl.{reduce_op.nki_operator}", "it must be nl.maximum", f"{_ISA}, {call}")
    check_reduce_cmd(call, reduce_cmd, (ReduceCmd.idle, ReduceCmd.reset_reduce, ReduceCmd.reduce))
    chosen = (mask.read() != 0) != bool(reverse_pred)
    values = np.where(chosen, yes.read_float(), value_of(no)).astype(np.float32)
    _select_finish(call, out, values, [mask, yes, no], yes, reduce_res, reduce_cmd, name)


def range_select(
    dst: Any,
    on_true_tile: Any,
    comp_op0: Any,
    comp_op1: Any,
    bound0: Any,
    bound1: Any,
    reduce_cmd: ReduceCmd = ReduceCmd.reset_reduce,
    reduce_res: Any = None,
    reduce_op: Any = ops.MAXIMUM,
    range_start: int = 0,
    on_false_value: float = -3.4028235e38,
    name: str | None = None,
) -> None:
    """Keep elements whose index satisfies two comparisons, optionally with the maximum per partition.

    Args:
        dst: SBUF or PSUM ``[P, F]``.
        on_true_tile: float ``[P, F]``.
        comp_op0, comp_op1: comparisons of ``range_start + index`` with the bounds.
        bound0, bound1: float32 ``[P, 1]``.
        reduce_cmd, reduce_res, reduce_op: reduction by ``nl.maximum``.
        range_start: index of the first element.
        on_false_value: must be the smallest float32.
    """
    call = "range_select"
    src, out = checks.tile(call, "on_true_tile", on_true_tile), checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, on_true_tile=src)
    checks.dtype_in(call, "on_true_tile", src, dtypes.FLOATS)
    low, high = checks.column(call, "bound0", bound0, src), checks.column(call, "bound1", bound1, src)
    checks.dtype_in(call, "bound0", low, ("float32",))
    checks.dtype_in(call, "bound1", high, ("float32",))
    comparisons = []
    for operand, op in (("comp_op0", comp_op0), ("comp_op1", comp_op1)):
        op_name = ops.op_name(call, operand, op)
        if op_name not in ops.COMPARISONS - {"not_equal"}:
            fail(call, f"{operand}=nl.{op_name}", "it must be a comparison other than not_equal", f"{_ISA}, {call}")
        comparisons.append(ops.ARITHMETIC[op_name])
    if ops.op_name(call, "reduce_op", reduce_op) not in ("maximum", "max"):
        fail(call, f"reduce_op=nl.{reduce_op.nki_operator}", "it must be nl.maximum", f"{_ISA}, {call}")
    if np.float32(on_false_value) != np.float32(FP32_MIN):
        fail(call, f"on_false_value={on_false_value}", f"it must be {FP32_MIN}", f"{_ISA}, {call}")
    if range_start + src.free_size > 2**24:
        fail(call, f"range_start={range_start}", "indices stay below 2**24", f"{_ISA}, {call}")
    index = (range_start + np.arange(src.free_size)).astype(np.float32)
    chosen = comparisons[0](index, low.read_float()) & comparisons[1](index, high.read_float())
    values = np.where(chosen, src.read_float(), np.float32(FP32_MIN))
    _select_finish(call, out, values, [src, low, high], src, reduce_res, reduce_cmd, name)


def _select_finish(
    call: str,
    out: NkiTensor,
    values: np.ndarray,
    reads: list[Any],
    lanes: NkiTensor,
    reduce_res: Any,
    reduce_cmd: ReduceCmd,
    name: str | None,
) -> None:
    out.write(values)
    registers = reduce_registers(call, current().vector_registers, lanes, values, reduce_cmd, "maximum")
    writes, extra = [out], 0.0
    if reduce_res is not None:
        total = checks.column(call, "reduce_res", reduce_res, lanes)
        checks.dtype_in(call, "reduce_res", total, dtypes.FLOATS)
        total.write(registers)
        writes.append(total)
        extra = float(costs.VECTOR_READ_REDUCE_CYCLES)
    cycles = costs.vector_two_inputs(out.tile(), lanes.tile(), lanes.tile())
    finish(call, Engine.vector, costs.elementwise(Engine.vector, cycles, extra), reads, writes, name)


# --- Movement across partitions --------------------------------------------------------------------------------------
def nc_stream_shuffle(dst: Any, src: Any, shuffle_mask: Any, name: str | None = None) -> None:
    """Within each group of 32 partitions, partition ``i`` of ``dst`` receives partition ``shuffle_mask[i]`` of ``src``.

    Args:
        dst, src: SBUF or PSUM, same type and elements per partition; may be the same tile.
        shuffle_mask: 32 integers; 255 leaves the partition of ``dst`` as it is.
    """
    call = "nc_stream_shuffle"
    source, out = checks.tile(call, "src", src), checks.tile(call, "dst", dst)
    mask = [int(m) for m in shuffle_mask]
    if len(mask) != 32 or any(not (0 <= m < 32 or m == 255) for m in mask):
        fail(call, f"shuffle_mask={mask}", "32 entries, each 0 to 31 or 255", f"{_ISA}, {call}")
    checks.same_dtype(call, dst=out, src=source)
    checks.same_free_size(call, dst=out, src=source)
    active_partitions = -(-max(out.partitions, source.partitions) // 32) * 32
    legal = (0,) if active_partitions > 64 else (0, 64) if active_partitions > 32 else (0, 32, 64, 96)
    for operand, t in (("src", source), ("dst", out)):
        if checks.strict() and t.start_partition not in legal:
            fail(
                call,
                f"{operand} starts at partition {t.start_partition} with {active_partitions} active partitions",
                f"it must start at {' or '.join(map(str, legal))}",
                f"{_ISA}, {call}",
            )
    values, result = source.read().copy(), out.read().copy()
    for i in range(out.partitions):
        m = mask[i % 32]
        if m == 255:
            continue
        origin = i // 32 * 32 + m
        if origin >= source.partitions:
            fail(call, f"shuffle_mask[{i % 32}]={m}", f"src has {source.partitions} partitions", f"{_ISA}, {call}")
        result[i] = values[origin]
    out.write(result)
    reads = [source, out] if 255 in mask else [source]
    cost = costs.elementwise(Engine.vector, costs.strided(out.free_size, out.tile(), source.tile()))
    finish(call, Engine.vector, cost, reads, [out], name)


# --- Searches --------------------------------------------------------------------------------------------------------
def max8(dst: Any, src: Any, name: str | None = None) -> None:
    """The eight largest values of each partition, descending.

    Args:
        dst: ``[P, 8]``.
        src: ``[P, 8 <= F <= 16384]``.
    """
    call = "max8"
    source, out = checks.tile(call, "src", src), checks.tile(call, "dst", dst)
    checks.same_partitions(call, dst=out, src=source)
    _search_size(call, "src", source)
    _eight(call, "dst", out)
    out.write(-np.sort(-source.read_float(), axis=1)[:, :8])
    _search_finish(call, source, [source], [out], name)


def nc_find_index8(dst: Any, data: Any, vals: Any, name: str | None = None) -> None:
    """Index of the first element equal to each of eight values, per partition.

    Args:
        dst: uint16 or uint32 ``[P, 8]``.
        data: ``[P, 8 <= F <= 16384]``.
        vals: ``[P, 8]``, values that occur in ``data``; repeated values find successive occurrences.
    """
    call = "nc_find_index8"
    source, wanted, out = (checks.tile(call, n, t) for n, t in (("data", data), ("vals", vals), ("dst", dst)))
    checks.same_partitions(call, dst=out, data=source, vals=wanted)
    checks.dtype_in(call, "dst", out, ("uint16", "uint32"))
    _search_size(call, "data", source)
    _eight(call, "vals", wanted)
    _eight(call, "dst", out)
    out.write(_first_matches(source.read_float(), wanted.read_float()).astype(np.int64))
    _search_finish(call, source, [source, wanted], [out], name)


def nc_match_replace8(dst: Any, data: Any, vals: Any, imm: float, dst_idx: Any = None, name: str | None = None) -> None:
    """Copy ``data`` with the first occurrence of each of eight values replaced by ``imm``.

    Args:
        dst: like ``data``.
        data: ``[P, 8 <= F <= 16384]``.
        vals: ``[P, 8]``.
        imm: replacement.
        dst_idx: uint16 or uint32 ``[P, 8]``, receives the positions.
    """
    call = "nc_match_replace8"
    source, wanted, out = (checks.tile(call, n, t) for n, t in (("data", data), ("vals", vals), ("dst", dst)))
    checks.elementwise(call, dst=out, data=source)
    checks.same_partitions(call, data=source, vals=wanted)
    _search_size(call, "data", source)
    _eight(call, "vals", wanted)
    values = source.read_float().copy()
    found = _first_matches(values, wanted.read_float())
    rows, columns = np.nonzero(found >= 0)
    values[rows, found[rows, columns]] = imm
    out.write(values)
    writes = [out]
    if dst_idx is not None:
        positions = checks.tile(call, "dst_idx", dst_idx)
        checks.dtype_in(call, "dst_idx", positions, ("uint16", "uint32"))
        _eight(call, "dst_idx", positions)
        positions.write(found.astype(np.int64))
        writes.append(positions)
    _search_finish(call, source, [source, wanted], writes, name)


def _first_matches(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Per row and wanted value, the first position not taken by an equal earlier value; -1 if there is none."""
    found = np.full(wanted.shape, -1, dtype=np.int64)
    for row in range(values.shape[0]):
        taken: set[int] = set()
        for k, value in enumerate(wanted[row]):
            for position in np.nonzero(values[row] == value)[0]:
                if int(position) not in taken:
                    found[row, k] = position
                    taken.add(int(position))
                    break
    return found


def _search_size(call: str, operand: str, t: NkiTensor) -> None:
    if not 8 <= t.free_size <= 16384:
        fail(call, f"{operand} has {t.free_size} elements per partition", "8 to 16384", f"{_ISA}, {call}")


def _eight(call: str, operand: str, t: NkiTensor) -> None:
    if t.free_size != 8:
        fail(call, f"{operand} has {t.free_size} elements per partition", "it has 8", f"{_ISA}, {call}")


def _search_finish(call: str, source: NkiTensor, reads: list[Any], writes: list[NkiTensor], name: str | None) -> None:
    cycles = costs.vector_single_input(source.tile(), source.tile(), fast_capable=False)
    finish(call, Engine.vector, costs.elementwise(Engine.vector, cycles), reads, writes, name)
