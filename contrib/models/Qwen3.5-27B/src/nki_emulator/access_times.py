# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""When each part of a tensor was last written and last read: what the next access to it must wait for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .enums import engine

#: Largest tracker of one tensor, in entries; larger tensors are tracked more coarsely.
_MAX_ENTRIES = 1 << 20
_QUADRANT = 32
#: An access is recorded as one number, whose remainder by this is the value of its engine.
ENGINE_CODES = 8

Entries = tuple[slice, slice | np.ndarray]


class View(Protocol):
    """What the tracker asks of a tensor, a strided view of a storage.

    Attributes:
        has_partition_axis: whether the first axis runs over partitions.
        entries: the last answer of :meth:`AccessTimes.select` for this view, with the group that it holds for.
    """

    has_partition_axis: bool
    entries: tuple[int, Entries] | None

    @property
    def array(self) -> np.ndarray: ...

    @property
    def size(self) -> int: ...

    @property
    def byte_offset(self) -> int: ...

    @property
    def is_indirect(self) -> bool: ...


@dataclass(slots=True)
class Wait:
    """The latest of several times, with what it came from.

    Attributes:
        time: modelled nanoseconds from the start of the kernel.
        cause: the instruction that it came from, as `Timeline` numbers them; -1 if none.
        kind: ``data``, ``engine``, ``memory``, ``barrier`` or ``none``.
        chain_ns: when the data would be there if engines and memories were always free.
    """

    time: float = 0.0
    cause: int = -1
    kind: str = "none"
    chain_ns: float = 0.0

    def until(self, time: float, cause: int, kind: str) -> None:
        """Wait until ``time`` at least."""
        if time > self.time:
            self.time, self.cause, self.kind = time, cause, kind


class AccessTimes:
    """Last write and last read of every part of one storage.

    Args:
        partitions, row_bytes: of the storage; one partition in HBM.
        granule: bytes of one entry.
        in_hbm: whether the storage is in HBM.

    On chip, an entry is one element of 32 partitions: compute engines start at multiples of 32, so this is exact, until
    an access covers a part of such a group, which DMA may; then the storage is tracked by partition. In HBM an entry is
    one element, or more for tensors beyond a million elements. Look-ups are vectorised over the region, hence linear in
    its size and independent of how many instructions ran before.
    """

    __slots__ = (
        "granule",
        "group",
        "hbm_read_at",
        "hbm_read_by",
        "in_hbm",
        "partitions",
        "read_at",
        "read_by",
        "row",
        "row_bytes",
        "write_at",
        "write_by",
        "write_chain",
    )

    def __init__(self, partitions: int, row_bytes: int, granule: int, *, in_hbm: bool) -> None:
        self.in_hbm = in_hbm
        self.partitions, self.row_bytes, self.group = partitions, row_bytes, _QUADRANT
        self.granule = granule
        while self.in_hbm and row_bytes // self.granule > _MAX_ENTRIES:
            self.granule *= 2
        self.row = max(-(-row_bytes // self.granule), 1)
        # In HBM only the latest read of the tensor is kept, and writes from the first one on: inputs cost nothing.
        self.hbm_read_at, self.hbm_read_by = 0.0, -1
        shape = (0, self.row) if self.in_hbm else (-(-partitions // _QUADRANT), self.row)
        self.write_at: np.ndarray = np.zeros(shape)
        self.write_by: np.ndarray = np.full(shape, -1, dtype=np.int64)
        self.write_chain: np.ndarray = np.zeros(shape)
        self.read_at: np.ndarray = np.zeros(shape)
        self.read_by: np.ndarray = np.full(shape, -1, dtype=np.int64)

    def wait_to_read(self, tensor: View, wait: Wait) -> None:
        """Wait for the last write of what ``tensor`` covers."""
        if self.write_at.size and tensor.size:
            where = self.select(tensor)
            _latest(wait, self.write_at[where], self.write_by[where], None)
            wait.chain_ns = max(wait.chain_ns, float(self.write_chain[where].max()))

    def wait_to_write(self, tensor: View, wait: Wait, on: engine) -> None:
        """Wait for the last write and the last read of what ``tensor`` covers.

        A compute engine works in order, so it need not wait for its own earlier accesses: accumulating matmuls follow
        each other without a gap.
        """
        wait.until(self.hbm_read_at, self.hbm_read_by, "data")
        if not tensor.size:
            return
        own = None if on is engine.dma else on.value
        where = self.select(tensor)
        if self.write_at.size:
            _latest(wait, self.write_at[where], self.write_by[where], own)
        if self.read_at.size:
            _latest(wait, self.read_at[where], self.read_by[where], own)

    def mark_read(self, tensor: View, end: float, by: int) -> None:
        """Record a read that ends at ``end``."""
        if self.in_hbm:
            if end > self.hbm_read_at:
                self.hbm_read_at, self.hbm_read_by = end, by
        elif tensor.size:
            where = self.select(tensor)
            at = self.read_at[where]
            later = at < end
            self.read_by[where] = np.where(later, by, self.read_by[where])
            self.read_at[where] = np.where(later, end, at)

    def mark_write(self, tensor: View, end: float, by: int, chain_ns: float) -> None:
        """Record a write that ends at ``end``, and at ``chain_ns`` if engines and memories were always free."""
        if not self.write_at.size:
            self.write_at, self.write_by = np.zeros((1, self.row)), np.full((1, self.row), -1, dtype=np.int64)
            self.write_chain = np.zeros((1, self.row))
        if tensor.size:
            where = self.select(tensor)
            self.write_at[where] = end
            self.write_by[where] = by
            self.write_chain[where] = chain_ns

    def select(self, tensor: View) -> Entries:
        """Entries that ``tensor`` touches, as an index into the arrays."""
        if tensor.entries is None or tensor.entries[0] != self.group:
            # Before the group is read, for this may change it.
            selected = self._select(tensor)
            tensor.entries = (self.group, selected)
        return tensor.entries[1]

    def _track_by_partition(self) -> None:
        """Give every partition entries of its own."""
        count = self.partitions
        self.write_at, self.write_by, self.write_chain, self.read_at, self.read_by = (
            np.repeat(a, self.group, axis=0)[:count]
            for a in (self.write_at, self.write_by, self.write_chain, self.read_at, self.read_by)
        )
        self.group = 1

    def _select(self, tensor: View) -> Entries:
        if tensor.is_indirect:
            return slice(None), slice(None)
        array, pitch, start = tensor.array, self.row_bytes, tensor.byte_offset
        groups, shape, strides = slice(0, 1), array.shape, array.strides
        if not self.in_hbm:
            first = start // pitch
            count = array.shape[0] if tensor.has_partition_axis else 1
            last = first + max(count, 1)
            partial = first % self.group or (last % self.group and last != self.partitions)
            if partial and self.partitions * self.row <= _MAX_ENTRIES:
                self._track_by_partition()
            groups = slice(first // self.group, (last - 1) // self.group + 1)
            start -= first * pitch
            if tensor.has_partition_axis:
                shape, strides = shape[1:], strides[1:]
        offsets, run = contiguous_runs(shape, strides, array.itemsize)
        g = self.granule
        if offsets.size == 1:
            return groups, slice(start // g, -(-(start + run) // g))
        first_entry = (offsets + start) // g
        length = int((-(-(offsets + start + run) // g) - first_entry).max())
        entries = (first_entry[:, None] + np.arange(length)).reshape(-1)
        return groups, np.minimum(entries, self.row - 1)


def contiguous_runs(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[np.ndarray, int]:
    """Contiguous runs of bytes of a strided array: offset of each from the first element, and the length of each."""
    dims = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and s != 0]
    dims.sort(key=lambda dim: -dim[1])
    run = itemsize
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    offsets = np.zeros(1, dtype=np.int64)
    for count, stride in dims:
        offsets = (offsets[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return offsets, run


def _latest(wait: Wait, at: np.ndarray, by: np.ndarray, ignore: int | None) -> None:
    """Wait for the latest of the accesses ``at``, leaving out those of the engine with code ``ignore``."""
    if at.size:
        if ignore is not None:
            at = np.where(by % ENGINE_CODES == ignore, 0.0, at)
        k = int(at.argmax())
        wait.until(float(at.flat[k]), int(by.flat[k]), "data")
