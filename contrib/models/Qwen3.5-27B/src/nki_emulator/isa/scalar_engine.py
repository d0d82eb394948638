# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Instructions of the Scalar engine: activation functions with a free scale, bias and row sum."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks, costs, ops
from ..context import current
from ..enums import engine as Engine
from ..enums import reduce_cmd as ReduceCmd
from ..errors import fail
from .common import check_reduce_cmd, finish, reduce_registers, value_of


def activation(
    dst: Any,
    op: Any,
    data: Any,
    bias: Any = None,
    scale: Any = 1.0,
    reduce_op: Any = None,
    reduce_res: Any = None,
    reduce_cmd: ReduceCmd = ReduceCmd.idle,
    name: str | None = None,
) -> None:
    """``dst = op(data * scale + bias)`` in float32, optionally summed along the free axis.

    Args:
        dst, data: SBUF or PSUM ``[P <= 128, F]``, any type.
        op: an activation function such as ``nl.exp``.
        bias: constant or ``[P, 1]`` of any type but tfloat32; None is 0.
        scale: constant or ``[P, 1]`` float32.
        reduce_op: ``nl.add`` or None.
        reduce_res: ``[P, 1]`` receives the reduction registers.
        reduce_cmd: what to do with the reduction registers.
    """
    _activation("activation", dst, op, data, bias, scale, reduce_op, reduce_res, reduce_cmd, name)


def activation_reduce(
    dst: Any,
    op: Any,
    data: Any,
    reduce_op: Any,
    reduce_res: Any,
    bias: Any = None,
    scale: Any = 1.0,
    name: str | None = None,
) -> None:
    """:func:`activation` that resets the registers, sums this tile into them and writes them to ``reduce_res``."""
    _activation("activation_reduce", dst, op, data, bias, scale, reduce_op, reduce_res, ReduceCmd.reset_reduce, name)


def _activation(
    call: str,
    dst: Any,
    op: Any,
    data: Any,
    bias: Any,
    scale: Any,
    reduce_op: Any,
    reduce_res: Any,
    reduce_cmd: ReduceCmd,
    name: str | None,
) -> None:
    src, out = checks.tile(call, "data", data), checks.tile(call, "dst", dst)
    checks.elementwise(call, dst=out, data=src)
    function_name, function = ops.activation(call, op)
    scale = checks.scalar_or_column(call, "scale", scale, src)
    bias = checks.scalar_or_column(call, "bias", 0.0 if bias is None else bias, src)
    if isinstance(scale, checks.NkiTensor):
        checks.dtype_in(call, "scale", scale, ("float32",))
    if isinstance(bias, checks.NkiTensor) and bias.dtype == "tfloat32" and checks.strict():
        fail(call, "bias has dtype tfloat32", "any supported type but tfloat32", f"{checks.ISA}, {call}, Data types")
    if reduce_op is not None and ops.op_name(call, "reduce_op", reduce_op) != "add":
        fail(call, f"reduce_op=nl.{reduce_op.nki_operator}", "it must be nl.add", f"{checks.ISA}, {call}")
    check_reduce_cmd(call, reduce_cmd, (ReduceCmd.idle, ReduceCmd.reset, ReduceCmd.reduce, ReduceCmd.reset_reduce))
    if reduce_cmd in (ReduceCmd.reduce, ReduceCmd.reset_reduce) and reduce_op is None:
        fail(call, f"reduce_cmd={reduce_cmd.name} without reduce_op", "give reduce_op=nl.add", f"{checks.ISA}, {call}")
    with np.errstate(all="ignore"):
        argument = src.read_float() * value_of(scale) + value_of(bias)
        if checks.strict():
            ops.check_range(call, function_name, argument)
        result = np.asarray(function(argument), dtype=np.float32)
    out.write(result)
    registers = reduce_registers(call, current().scalar_registers, src, result, reduce_cmd, "add")
    writes, extra = [out], 0.0
    if reduce_res is not None:
        total = checks.column(call, "reduce_res", reduce_res, src)
        total.write(registers)
        writes.append(total)
        extra = float(costs.SCALAR_READ_REDUCE_CYCLES)
    cycles = costs.strided(max(src.free_size, out.free_size), src.tile(), out.tile())
    cost = costs.elementwise(Engine.scalar, cycles, extra)
    finish(call, Engine.scalar, cost, [src, scale, bias], writes, name)
