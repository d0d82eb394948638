# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""How much of SBUF and PSUM a kernel holds at a time, and from when reused memory may be written.

A tensor is live from its first to its last access in program order, as for a compiler that allocates statically. The
last access is not known while the kernel runs; so each access extends the life of its tensor, and overflow is certain,
and reported, at the access that makes more live at one instruction than fits. When memory is full, modelled time takes
that of tensors that nothing refers to any more, then that of the tensor whose last access is the oldest.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from .errors import fail


class Allocation:
    """One tensor's share of a memory.

    Attributes:
        size: bytes per partition, or banks.
        label: what it is, for messages.
        first, last: positions of its first and last access in program order, -1 before.
        available_ns: from when it may be written.
        accessed_ns: end of its last access.
    """

    __slots__ = ("accessed_ns", "available_ns", "first", "label", "last", "pool", "size")

    def __init__(self, pool: OnChipPool, size: int, label: str) -> None:
        self.pool, self.size, self.label = pool, size, label
        self.first = self.last = -1
        self.available_ns = self.accessed_ns = 0.0


class OnChipPool:
    """SBUF (bytes per partition) or PSUM (banks) of one core.

    Sizes are tracked and addresses are not, so fragmentation is not modelled.
    """

    def __init__(self, memory: str, capacity: int, unit: str, source: str, *, enforce: bool) -> None:
        self.memory, self.capacity, self.unit, self.source, self.enforce = memory, capacity, unit, source, enforce
        self.placed = 0  # highest end of the tensors with an explicit address
        self._usage = np.zeros(1024, dtype=np.int64)  # live units at each position
        self._records: list[Allocation] = []
        self._fresh = capacity
        self._freed: deque[tuple[int, float]] = deque()
        self._held: dict[Allocation, None] = {}

    @property
    def peak(self) -> int:
        """Most units live at one instruction."""
        return self.placed + int(self._usage.max())

    def allocate(self, size: int, label: str) -> Allocation:
        """A new tensor; it takes unused memory, then what was freed longest ago, then what was accessed longest ago.

        The last case is a guess that the tensor accessed longest ago is dead. It affects modelled time only.
        """
        allocation = Allocation(self, size, label)
        missing = size - min(size, self._fresh)
        self._fresh -= size - missing
        available = 0.0
        while missing > 0:
            if not self._freed:
                idle = [a for a in self._held if a.first >= 0]
                if not idle:
                    break
                oldest = min(idle, key=lambda a: a.accessed_ns)
                del self._held[oldest]
                self._freed.append((oldest.size, oldest.accessed_ns))
            amount, when = self._freed.popleft()
            available = max(available, when)
            if amount > missing:
                self._freed.appendleft((amount - missing, when))
            missing -= amount
        allocation.available_ns = allocation.accessed_ns = available
        self._held[allocation] = None
        return allocation

    def release(self, allocation: Allocation) -> None:
        """The last reference to the tensor is gone."""
        if allocation in self._held:
            del self._held[allocation]
            self._freed.append((allocation.size, allocation.accessed_ns))

    def touch(self, call: str, allocation: Allocation, position: int) -> None:
        """The instruction at ``position`` accesses the tensor, which is live since its first access.

        Raises:
            NkiValidationError: at some instruction in between more is live than fits.
        """
        if allocation.last == position:
            return
        while position >= self._usage.size:
            self._usage = np.concatenate([self._usage, np.zeros_like(self._usage)])
        start = position if allocation.first < 0 else allocation.last + 1
        if allocation.first < 0:
            allocation.first = position
            self._records.append(allocation)
        allocation.last = position
        span = self._usage[start : position + 1]
        span += allocation.size
        if self.enforce and int(span.max()) + self.placed > self.capacity:
            self._overflow(call, allocation, start + int(span.argmax()))

    def _overflow(self, call: str, allocation: Allocation, position: int) -> None:
        live = [a for a in self._records if a.first <= position <= a.last]
        largest = sorted(live, key=lambda a: -a.size)[:10]
        names = "; ".join(f"{a.label} ({a.size})" for a in largest)
        total = self.placed + int(self._usage[position])
        fail(
            call,
            f"{allocation.label} is used here, so that at instruction {position} of this core {len(live)} tensors with "
            f"{total} {self.unit} are live in {self.memory}, the largest: {names}",
            f"{self.memory} has {self.capacity} {self.unit} per partition",
            self.source,
        )
