# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""How much of SBUF and PSUM a kernel holds at a time, and from when reused memory may be written.

A tensor is live from its first to its last access in program order, as for a compiler that allocates statically, except
between the last read of its content and the writes that replace all of it: scratch that every round of a loop fills
anew is dead in between. What comes later is not known while the kernel runs; so each access extends the life of its
tensor, a gap before a partial write counts once something old is read again, and overflow is certain, and reported, at
the access that makes more live at one instruction than fits. When memory is full, modelled time takes that of tensors
that nothing refers to any more, then that of the tensor whose last access is the oldest.

In SBUF a tensor of few partitions leaves the other quadrants of 32 partitions to others: nki-library 2.29 runs rotary
embeddings on devices that fit only so.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import numpy as np

from .errors import fail

QUADRANTS = 4
"""Parts of a memory that are used independently: engines start at partition 0, 32, 64 or 96."""


class OnChipView(Protocol):
    """What is asked of a tensor that an instruction accesses: a strided view of an allocated tensor."""

    @property
    def array(self) -> np.ndarray: ...

    @property
    def byte_offset(self) -> int: ...


class Allocation:
    """One tensor's share of a memory.

    Attributes:
        size: bytes per partition, or banks.
        quadrants: of the memory, which it occupies.
        label: what it is, for messages.
        total_bytes, granule: bytes of the tensor, over all partitions, and of one of its elements.
        first, last: positions of its first and last access in program order, -1 before.
        intervals: positions at which it is live, as [first, last] pairs.
        available_ns, available_by: from when it may be written, and the instruction that used its memory before.
        accessed_ns, accessed_by: end of its last access, and the instruction.
        replaced: elements that were overwritten since `gap`, while that is open.
        gap: positions, first and last, at which it is live only if an element that is not in `replaced` is read.
    """

    __slots__ = (
        "accessed_by",
        "accessed_ns",
        "available_by",
        "available_ns",
        "first",
        "gap",
        "granule",
        "intervals",
        "label",
        "last",
        "pool",
        "quadrants",
        "replaced",
        "replaced_count",
        "size",
        "total_bytes",
    )

    def __init__(self, pool: OnChipPool, size: int, label: str, total_bytes: int, granule: int, quadrants: int) -> None:
        self.pool, self.size, self.label, self.quadrants = pool, size, label, quadrants
        self.total_bytes, self.granule = total_bytes, granule
        self.first = self.last = -1
        self.intervals: list[list[int]] = []
        self.available_ns = self.accessed_ns = 0.0
        self.available_by = self.accessed_by = -1
        self.replaced: np.ndarray | None = None
        self.replaced_count = 0
        self.gap = (0, -1)

    @property
    def area(self) -> int:
        """What it takes of a memory whose capacity counts `QUADRANTS` times."""
        return self.size * self.quadrants

    def covers(self, view: OnChipView) -> bool:
        """Whether ``view`` is the whole tensor."""
        array = view.array
        whole = array.size * array.itemsize == self.total_bytes
        return whole and all(stride or count == 1 for stride, count in zip(array.strides, array.shape, strict=True))

    def open_gap(self, first: int, last: int) -> None:
        """Content may have been dead from position ``first`` to ``last``: nothing is replaced yet."""
        self.gap = (first, last)
        self.replaced = np.zeros(self.total_bytes // self.granule, dtype=np.bool_)
        self.replaced_count = 0

    def replace(self, view: OnChipView) -> bool:
        """Note a write; whether all of the tensor is replaced now."""
        where = self._replaced_part(view)
        if where is not None:
            self.replaced_count += where.size - int(np.count_nonzero(where))
            where[...] = True
        return self.replaced_count == self.total_bytes // self.granule

    def is_replaced(self, view: OnChipView) -> bool:
        """Whether ``view`` shows nothing from before the gap."""
        where = self._replaced_part(view)
        return where is not None and bool(where.all())

    def _replaced_part(self, view: OnChipView) -> np.ndarray | None:
        """The part of `replaced` that ``view`` shows; None if its elements are smaller than those of the tensor."""
        assert self.replaced is not None
        array, granule = view.array, self.granule
        if array.itemsize % granule or any(stride % granule for stride in array.strides):
            return None
        shape, strides = (*array.shape, array.itemsize // granule), (*(s // granule for s in array.strides), 1)
        return np.ndarray(shape, np.bool_, buffer=self.replaced, offset=view.byte_offset // granule, strides=strides)


class OnChipPool:
    """SBUF (bytes per partition) or PSUM (banks) of one core.

    Sizes are tracked and addresses are not, so fragmentation is not modelled.
    """

    def __init__(self, memory: str, capacity: int, unit: str, source: str, *, enforce: bool) -> None:
        self.memory, self.capacity, self.unit, self.source, self.enforce = memory, capacity, unit, source, enforce
        self.placed = 0  # highest end of the tensors with an explicit address
        self._usage = np.zeros(1024, dtype=np.int64)  # live area at each position
        self._records: list[Allocation] = []
        self._fresh = capacity * QUADRANTS
        self._freed: deque[tuple[int, float, int]] = deque()
        self._held: dict[Allocation, None] = {}

    @property
    def peak(self) -> int:
        """Most units live at one instruction; in SBUF the mean of the quadrants."""
        return self._units(int(self._usage.max()))

    def _units(self, area: int) -> int:
        return self.placed - (-area // QUADRANTS)

    def allocate(self, size: int, label: str, total_bytes: int, granule: int, quadrants: int = QUADRANTS) -> Allocation:
        """A new tensor; it takes unused memory, then what was freed longest ago, then what was accessed longest ago.

        The last case is a guess that the tensor accessed longest ago is dead. It affects modelled time only.
        """
        allocation = Allocation(self, size, label, total_bytes, granule, quadrants)
        missing = allocation.area - min(allocation.area, self._fresh)
        self._fresh -= allocation.area - missing
        available, by = 0.0, -1
        while missing > 0:
            if not self._freed:
                idle = [a for a in self._held if a.first >= 0]
                if not idle:
                    break
                oldest = min(idle, key=lambda a: a.accessed_ns)
                del self._held[oldest]
                self._freed.append((oldest.area, oldest.accessed_ns, oldest.accessed_by))
            amount, when, user = self._freed.popleft()
            if when > available:
                available, by = when, user
            if amount > missing:
                self._freed.appendleft((amount - missing, when, user))
            missing -= amount
        allocation.available_ns = allocation.accessed_ns = available
        allocation.available_by = allocation.accessed_by = by
        self._held[allocation] = None
        return allocation

    def release(self, allocation: Allocation) -> None:
        """The last reference to the tensor is gone."""
        if allocation in self._held:
            del self._held[allocation]
            self._freed.append((allocation.area, allocation.accessed_ns, allocation.accessed_by))

    def read(self, call: str, allocation: Allocation, view: OnChipView, position: int) -> None:
        """The instruction at ``position`` reads ``view`` of the tensor, which is live since its last access.

        Raises:
            NkiValidationError: at some instruction in between more is live than fits.
        """
        if allocation.replaced is not None and not allocation.is_replaced(view):
            allocation.replaced = None
            self._charge(call, allocation, *allocation.gap)
        self._extend(call, allocation, position)

    def write(self, call: str, allocation: Allocation, view: OnChipView, position: int) -> None:
        """The instruction at ``position`` writes ``view`` of the tensor.

        Raises:
            NkiValidationError: as :meth:`read`.
        """
        if allocation.first >= 0 and allocation.covers(view):
            allocation.replaced = None
            allocation.last = max(allocation.last, position - 1)  # dead since then
        elif allocation.replaced is not None:
            if allocation.replace(view):
                allocation.replaced = None
        elif 0 <= allocation.last < position - 1:
            allocation.open_gap(allocation.last + 1, position - 1)
            allocation.replace(view)
            allocation.last = position - 1
        self._extend(call, allocation, position)

    def _extend(self, call: str, allocation: Allocation, position: int) -> None:
        """The tensor is live from its last access to ``position``."""
        if allocation.last == position:
            return
        start = position if allocation.first < 0 else allocation.last + 1
        if allocation.first < 0:
            allocation.first = position
            self._records.append(allocation)
        allocation.last = position
        self._charge(call, allocation, start, position)

    def _charge(self, call: str, allocation: Allocation, first: int, last: int) -> None:
        """Count the tensor as live from position ``first`` to ``last``."""
        while last >= self._usage.size:
            self._usage = np.concatenate([self._usage, np.zeros_like(self._usage)])
        intervals = allocation.intervals
        if intervals and intervals[-1][1] == first - 1:
            intervals[-1][1] = last
        else:
            intervals.append([first, last])
        span = self._usage[first : last + 1]
        span += allocation.area
        if self.enforce and self._units(int(span.max())) > self.capacity:
            self._overflow(call, allocation, first + int(span.argmax()))

    def _overflow(self, call: str, allocation: Allocation, position: int) -> None:
        live = [a for a in self._records if any(first <= position <= last for first, last in a.intervals)]
        largest = sorted(live, key=lambda a: -a.area)[:10]
        names = "; ".join(f"{a.label} ({a.size})" for a in largest)
        total = self._units(int(self._usage[position]))
        fail(
            call,
            f"{allocation.label} is used here, so that at instruction {position} of this core {len(live)} tensors with "
            f"{total} {self.unit} are live in {self.memory}, the largest: {names}",
            f"{self.memory} has {self.capacity} {self.unit} per partition",
            self.source,
        )
