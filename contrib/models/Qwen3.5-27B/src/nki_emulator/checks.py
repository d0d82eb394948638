# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Constraints that many instructions share. Each check names the call, the operand, the value and the rule."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Any, TypeVar

from . import dtypes
from .costs import PARTITIONS
from .enums import MemoryRegion, engine
from .errors import fail
from .memory import HBM, ON_CHIP, NkiTensor
from .registers import VirtualRegister
from .strictness import is_strict as strict

_E = TypeVar("_E", bound=Enum)
ISA = "nki/api/nki/isa/__init__.py"
_PARTITION_DOC = "nki/guides/architecture/trainium_inferentia2_arch.rst, Data Movement"
_PATTERN_DOC = "nki/deep-dives/nki-aps.rst, Hardware Capability"

#: Free dimensions of an access pattern that the memories deliver, and that most instructions have room for.
FREE_DIMENSIONS = 4
MOST_FREE_DIMENSIONS = 3

SBUF_ONLY = (MemoryRegion.sbuf,)
PSUM_ONLY = (MemoryRegion.psum,)
SBUF_OR_PSUM = ON_CHIP
DMA_SPACES = (MemoryRegion.sbuf, *HBM)

#: Memories that each compute engine reaches (nki/guides/architecture/trainium_inferentia2_arch.rst).
REACH: dict[engine, tuple[MemoryRegion, ...]] = {
    engine.vector: SBUF_OR_PSUM,
    engine.scalar: SBUF_OR_PSUM,
    engine.gpsimd: SBUF_ONLY,
}


def tensor(call: str, operand: str, value: Any) -> NkiTensor:
    """``value`` as a tensor.

    Raises:
        NkiValidationError: it is something else, such as a NumPy array.
    """
    if not isinstance(value, NkiTensor):
        fail(call, f"{operand} is a {type(value).__name__}", "it must be an NKI tensor", f"{ISA}, {call}")
    return value


def tile(
    call: str,
    operand: str,
    value: Any,
    spaces: Collection[MemoryRegion] = SBUF_OR_PSUM,
    free_dimensions: int = MOST_FREE_DIMENSIONS,
) -> NkiTensor:
    """``value`` as an on-chip operand of a compute engine, with its memory, partitions and access pattern checked.

    Args:
        spaces: memories that the instruction reaches.
        free_dimensions: how many it takes in a partition, counting those that follow each other as one.
    """
    t = tensor(call, operand, value)
    if not strict():
        return t
    if t.buffer not in spaces:
        allowed = " or ".join(s.name for s in spaces)
        fail(call, f"{operand} {t!r}", f"it must be in {allowed}", f"{ISA}, {call}, Memory types")
    if t.is_indirect:
        fail(call, f"{operand} {t!r}", "only DMA takes a gather or scatter pattern", f"{ISA}, dma_copy")
    partitions(call, operand, t)
    if t.ndim > free_dimensions + 1 and t.free_dimensions > free_dimensions:
        limit = "an access pattern has up to four"
        if t.free_dimensions <= FREE_DIMENSIONS:
            limit += f", of which most instructions take {free_dimensions}"
        fail(
            call,
            f"{operand} has {t.free_dimensions} free dimensions that are not contiguous",
            limit,
            _PATTERN_DOC,
        )
    return t


def partitions(call: str, operand: str, t: NkiTensor) -> None:
    """Partition count and legal start partition."""
    count = t.partitions
    if count > PARTITIONS:
        fail(call, f"{operand} has {count} partitions", f"at most {PARTITIONS}", f"{ISA}, {call}, Tile size")
    start = t.start_partition
    legal = (0,) if count > 64 else (0, 64) if count > 32 else (0, 32, 64, 96)
    if start not in legal:
        fail(
            call,
            f"{operand} occupies {count} partitions from {start}",
            f"{count} partitions start at {' or '.join(map(str, legal))}",
            _PARTITION_DOC,
        )


def same_partitions(call: str, **tensors: NkiTensor) -> None:
    """All operands occupy equally many partitions."""
    counts = {name: t.partitions for name, t in tensors.items()}
    if strict() and len(set(counts.values())) > 1:
        fail(call, f"partitions {counts}", "operands occupy equally many partitions", f"{ISA}, {call}, Tile size")


def same_free_size(call: str, **tensors: NkiTensor) -> None:
    """All operands have equally many elements per partition."""
    sizes = {name: t.free_size for name, t in tensors.items()}
    if len(set(sizes.values())) > 1:
        fail(
            call,
            f"elements per partition {sizes}",
            "operands have equally many elements per partition",
            f"{ISA}, {call}, Tile size",
        )


def elementwise(call: str, **tensors: NkiTensor) -> None:
    """Same partitions and same elements per partition."""
    same_partitions(call, **tensors)
    same_free_size(call, **tensors)


def not_both_psum(call: str, **tensors: NkiTensor) -> None:
    """Two inputs may not both come from PSUM."""
    if strict() and all(t.buffer is MemoryRegion.psum for t in tensors.values()):
        fail(call, f"{' and '.join(tensors)} are both in psum", "one of them must be in sbuf", f"{ISA}, {call}")


def column(call: str, operand: str, value: Any, like: NkiTensor) -> NkiTensor:
    """``value`` as a ``[P, 1]`` vector beside ``like``."""
    t = tile(call, operand, value)
    if t.partitions != like.partitions or t.free_size != 1:
        fail(
            call,
            f"{operand} has shape {list(t.shape)}",
            f"a vector operand has shape [{like.partitions}, 1]",
            f"{ISA}, {call}",
        )
    return t


def scalar_or_column(call: str, operand: str, value: Any, like: NkiTensor) -> Any:
    """A constant as float, or a ``[P, 1]`` vector as its tensor."""
    if isinstance(value, NkiTensor):
        return column(call, operand, value, like)
    if isinstance(value, VirtualRegister):
        return float(value.value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            return float(value)
        except (TypeError, ValueError):
            fail(call, f"{operand}={value!r}", "it must be a constant or a [P, 1] tensor", f"{ISA}, {call}")
    return value


def dtype_in(call: str, operand: str, t: NkiTensor, allowed: Collection[str], why: str = "Data types") -> None:
    """Element type is one of ``allowed``."""
    if strict() and t.dtype not in allowed:
        fail(
            call,
            f"{operand} has dtype {t.dtype}",
            f"it must be {' or '.join(sorted(allowed))}",
            f"{ISA}, {call}, {why}",
        )


def same_dtype(call: str, **tensors: NkiTensor) -> None:
    """All operands have one element type."""
    found = {name: t.dtype for name, t in tensors.items()}
    if strict() and len(set(found.values())) > 1:
        fail(call, f"dtypes {found}", "they must be equal", f"{ISA}, {call}, Data types")


def integers(call: str, op: str, **tensors: NkiTensor) -> None:
    """Bitvec operators work on integers only."""
    for name, t in tensors.items():
        if t.dtype not in dtypes.INTEGERS:
            fail(
                call,
                f"{name} has dtype {t.dtype} with nl.{op}",
                "bitvec operators take integer types",
                f"{ISA}, {call}",
            )


def enum_member(call: str, operand: str, value: Any, kind: type[_E]) -> _E:
    """``value`` as a member of ``kind``; without strict checks its integer value will do.

    Raises:
        NkiValidationError: it is not a member.
    """
    if isinstance(value, kind):
        return value
    if not strict() and value in {member.value for member in kind}:
        return kind(value)
    fail(
        call,
        f"{operand}={value!r}",
        f"it must be a member of nisa.{kind.__name__}",
        "nki/deep-dives/nki-0-3-0-update-guide.rst, Integer Enum Constants",
    )


def choose_engine(call: str, value: Any, allowed: tuple[engine, ...]) -> engine:
    """The engine that the caller asked for, or ``unknown``.

    Raises:
        NkiValidationError: this call does not run there.
    """
    value = enum_member(call, "engine", value, engine)
    if value is not engine.unknown and value not in allowed:
        fail(call, f"engine={value.name}", f"it runs on {' or '.join(e.name for e in allowed)}", f"{ISA}, {call}")
    return value


def reachable(call: str, on: engine, **tensors: NkiTensor) -> None:
    """The engine can access the memory of every operand."""
    if not strict():
        return
    for name, t in tensors.items():
        if t.buffer not in REACH[on]:
            fail(
                call,
                f"{name} {t!r} on engine {on.name}",
                f"{on.name} accesses {' and '.join(s.name for s in REACH[on])} only",
                "nki/guides/architecture/trainium_inferentia2_arch.rst",
            )
