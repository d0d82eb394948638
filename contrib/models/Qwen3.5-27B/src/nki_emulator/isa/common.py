# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What instructions of several engines share: recording, reduction registers, PSUM bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import costs
from ..context import current
from ..enums import engine as Engine
from ..enums import reduce_cmd as ReduceCmd
from ..errors import fail
from ..memory import NkiTensor
from ..ops import REDUCTIONS, reduce_free


def note_psum_write(out: NkiTensor, *, product: bool = False) -> None:
    """Remember that these PSUM elements hold a value; a matmul with ``accumulate=None`` will add to it.

    Args:
        product: the Tensor engine wrote it, so that a matmul with ``accumulate=True`` may add to it.
    """
    state = out.accumulation
    if state is not None:
        state.of(state.written, out)[...] = True
        if product:
            state.of(state.product, out)[...] = True
        state.of(state.stale, out)[...] = False


def note_psum_read(source: NkiTensor) -> None:
    """Remember that these PSUM elements were read."""
    state = source.accumulation
    if state is not None:
        state.of(state.stale, source)[...] = True


def finish(
    call: str,
    on: Engine,
    cost: costs.Cost,
    reads: Sequence[Any],
    writes: Sequence[NkiTensor],
    name: str | None,
) -> None:
    """PSUM bookkeeping and timeline entry of an instruction of the Vector, Scalar or GpSimd engine."""
    for source in reads:
        if isinstance(source, NkiTensor):
            note_psum_read(source)
    for out in writes:
        note_psum_write(out)
    current().record(call, on, cost, reads, writes, name)


def value_of(operand: Any) -> Any:
    """A constant as float32, a ``[P, 1]`` tensor as float32 array."""
    return operand.read_float() if isinstance(operand, NkiTensor) else np.float32(operand)


def reduce_registers(
    call: str,
    registers: np.ndarray,
    lanes: NkiTensor,
    values: np.ndarray,
    command: ReduceCmd,
    op: str,
    load: Any = 0.0,
) -> np.ndarray:
    """Apply a reduce command to one engine's accumulators; returns their content as ``[P, 1]``.

    Args:
        registers: 128 accumulators, changed in place.
        lanes: operand whose partitions select the accumulators.
        values: ``[P, F]`` float32 results of the instruction.
        command: what to do with the accumulators.
        op: reduction operator.
        load: initial value of ``load_reduce``.
    """
    where = slice(lanes.start_partition, lanes.start_partition + lanes.partitions)
    if command is ReduceCmd.idle:
        return registers[where, None]
    if command in (ReduceCmd.reset, ReduceCmd.reset_reduce):
        registers[where] = REDUCTIONS[op]
    elif command is ReduceCmd.load_reduce:
        registers[where] = np.broadcast_to(np.asarray(load, dtype=np.float32).reshape(-1), (lanes.partitions,))
    if command is not ReduceCmd.reset:
        both = np.concatenate([registers[where, None], reduce_free(op, values)], axis=1)
        registers[where] = reduce_free("add" if op == "subtract" else op, both)[:, 0]
    return registers[where, None]


def check_reduce_cmd(call: str, command: Any, allowed: tuple[ReduceCmd, ...]) -> None:
    """``command`` is one that this instruction supports."""
    if command not in allowed:
        fail(
            call,
            f"reduce_cmd={command}",
            f"it must be {' or '.join(c.name for c in allowed)}",
            f"nki/api/nki/isa/__init__.py, {call}",
        )
