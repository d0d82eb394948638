# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The modelled timeline of one core: when each instruction starts and ends.

An instruction starts when its operands are ready (read after write), when nobody still uses what it overwrites (write
after read, write after write), when memory that it is the first to write has been given up by its previous tenant, and
when its engine is free. Compute engines execute in program order; DMA transfers are only ordered by their data.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import costs
from .enums import engine
from .memory import HBM, NkiTensor, Storage

#: Largest tracker of one tensor, in entries; larger tensors are tracked more coarsely.
_ENTRIES = 1 << 20
_QUADRANT = 32
_INDEX_LIMIT = 1 << 26
_ENGINE_CODES = 8


@dataclass(slots=True)
class Instruction:
    """One executed instruction. Times are modelled nanoseconds from the start of the kernel.

    Attributes:
        index: position in program order.
        call: API function, e.g. ``nc_matmul``.
        engine: engine that executes it.
        label: the ``name=`` of the call, or a summary of the operands.
        start_ns, end_ns: issue and result visible.
        occupied_ns: how long it keeps the part of the engine that it uses.
        busy_ns: the same as a share of the whole engine; a tiled matmul or a small DMA uses a part.
        cost_ns: what it would take alone.
        cause: index of the instruction that it waited for last, -1 if none or on the other core.
        cause_kind: ``data``, ``engine``, ``memory``, ``barrier`` or ``none``.
        bytes_hbm_read, bytes_hbm_written: DMA payload on the HBM side.
    """

    index: int
    call: str
    engine: engine
    label: str
    start_ns: float
    occupied_ns: float
    busy_ns: float
    end_ns: float
    cost_ns: float
    cause: int
    cause_kind: str
    bytes_hbm_read: int = 0
    bytes_hbm_written: int = 0


@dataclass(slots=True)
class _Wait:
    """The latest of several times, with what it came from."""

    time: float = 0.0
    cause: int = -1
    kind: str = "none"

    def until(self, time: float, cause: int, kind: str) -> None:
        if time > self.time:
            self.time, self.cause, self.kind = time, cause, kind


class RegionTimes:
    """Last write and last read of every part of one storage.

    On chip, an entry is one element of 32 partitions: compute engines start at multiples of 32, so this is exact, until
    an access covers a part of such a group, which DMA may; then the storage is tracked by partition. In HBM an entry is
    one element, or more for tensors beyond a million elements. Look-ups are vectorised over the region, hence linear in
    its size and independent of how many instructions ran before.
    """

    __slots__ = (
        "granule",
        "group",
        "hbm",
        "hbm_read_at",
        "hbm_read_by",
        "partitions",
        "read_at",
        "read_by",
        "row",
        "write_at",
        "write_by",
    )

    def __init__(self, storage: Storage) -> None:
        rows, row_bytes = storage.raw.shape
        self.hbm = storage.region in HBM
        self.partitions, self.group = rows, _QUADRANT
        self.granule = storage.granule
        while self.hbm and row_bytes // self.granule > _ENTRIES:
            self.granule *= 2
        self.row = max(-(-row_bytes // self.granule), 1)
        # In HBM only the latest read of the tensor is kept, and writes from the first one on: inputs cost nothing.
        self.hbm_read_at, self.hbm_read_by = 0.0, -1
        shape = (0, self.row) if self.hbm else (-(-rows // _QUADRANT), self.row)
        self.write_at, self.write_by = np.zeros(shape), np.full(shape, -1, dtype=np.int64)
        self.read_at, self.read_by = np.zeros(shape), np.full(shape, -1, dtype=np.int64)

    def wait_to_read(self, tensor: NkiTensor, wait: _Wait) -> None:
        """Wait for the last write of what ``tensor`` covers."""
        if self.write_at.size and tensor.size:
            where = self.select(tensor)
            _latest(wait, self.write_at[where], self.write_by[where], None)

    def wait_to_write(self, tensor: NkiTensor, wait: _Wait, on: engine) -> None:
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

    def mark_read(self, tensor: NkiTensor, end: float, by: int) -> None:
        """Record a read that ends at ``end``."""
        if self.hbm:
            if end > self.hbm_read_at:
                self.hbm_read_at, self.hbm_read_by = end, by
        elif tensor.size:
            where = self.select(tensor)
            at = self.read_at[where]
            later = at < end
            self.read_by[where] = np.where(later, by, self.read_by[where])
            self.read_at[where] = np.where(later, end, at)

    def mark_write(self, tensor: NkiTensor, end: float, by: int) -> None:
        """Record a write that ends at ``end``."""
        if not self.write_at.size:
            self.write_at, self.write_by = np.zeros((1, self.row)), np.full((1, self.row), -1, dtype=np.int64)
        if tensor.size:
            where = self.select(tensor)
            self.write_at[where] = end
            self.write_by[where] = by

    def select(self, tensor: NkiTensor) -> tuple[slice, slice | np.ndarray]:
        """Entries that ``tensor`` touches, as an index into the arrays."""
        if tensor._entries is None or tensor._entries[0] != self.group:
            entries = self._select(tensor)
            tensor._entries = (self.group, entries)
        return tensor._entries[1]

    def _track_by_partition(self) -> None:
        """Give every partition entries of its own."""
        count = self.partitions
        self.write_at, self.write_by, self.read_at, self.read_by = (
            np.repeat(a, self.group, axis=0)[:count] for a in (self.write_at, self.write_by, self.read_at, self.read_by)
        )
        self.group = 1

    def _select(self, tensor: NkiTensor) -> tuple[slice, slice | np.ndarray]:
        if tensor.is_indirect:
            return slice(None), slice(None)
        array = tensor._array
        pitch = tensor.storage.raw.strides[0]
        start = tensor.byte_offset
        groups, shape, strides = slice(0, 1), array.shape, array.strides
        if not self.hbm:
            first = start // pitch
            count = array.shape[0] if tensor.has_partition_axis else 1
            last = first + max(count, 1)
            partial = first % self.group or (last % self.group and last != self.partitions)
            if partial and self.partitions * self.row <= _ENTRIES:
                self._track_by_partition()
            groups = slice(first // self.group, (last - 1) // self.group + 1)
            start -= first * pitch
            if tensor.has_partition_axis:
                shape, strides = shape[1:], strides[1:]
        dims = [(n, s) for n, s in zip(shape, strides, strict=True) if n > 1 and s != 0]
        dims.sort(key=lambda dim: -dim[1])
        run = array.itemsize
        while dims and dims[-1][1] == run:
            run *= dims.pop()[0]
        g = self.granule
        if not dims:
            return groups, slice(start // g, -(-(start + run) // g))
        offsets = np.zeros(1, dtype=np.int64)
        for count, stride in dims:
            offsets = (offsets[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
        first_entry = (offsets + start) // g
        length = int((-(-(offsets + start + run) // g) - first_entry).max())
        entries = (first_entry[:, None] + np.arange(length)).reshape(-1)
        return groups, np.minimum(entries, self.row - 1)


class Resource:
    """Engines of one kind that accept work in any order: each keeps its busy intervals and fills gaps."""

    def __init__(self, count: int) -> None:
        self._starts: list[list[float]] = [[] for _ in range(count)]
        self._ends: list[list[float]] = [[] for _ in range(count)]

    def place(self, ready: float, duration: float, copies: int) -> tuple[float, float]:
        """Reserve ``duration`` on ``copies`` engines, not before ``ready``; returns (first start, last end)."""
        options = sorted((self._earliest(k, ready, duration), k) for k in range(len(self._starts)))[:copies]
        for start, k in options:
            self._insert(k, start, start + duration)
        return options[0][0], options[-1][0] + duration

    def _earliest(self, k: int, ready: float, duration: float) -> float:
        starts, ends = self._starts[k], self._ends[k]
        at = bisect_right(ends, ready)
        time = ready
        while at < len(starts):
            if starts[at] - time >= duration:
                return time
            time = max(time, ends[at])
            at += 1
        return time

    def _insert(self, k: int, start: float, end: float) -> None:
        starts, ends = self._starts[k], self._ends[k]
        at = bisect_right(starts, start)
        # Adjacent intervals merge, so that a saturated engine keeps a short list.
        if at > 0 and ends[at - 1] >= start - 1e-9:
            at -= 1
            ends[at] = end
        else:
            starts.insert(at, start)
            ends.insert(at, end)
        if at + 1 < len(starts) and starts[at + 1] <= end + 1e-9:
            ends[at] = ends.pop(at + 1)
            starts.pop(at + 1)


class Timeline:
    """Instructions of one core with their modelled times."""

    def __init__(self, core: int = 0) -> None:
        self.core = core
        self.instructions: list[Instruction] = []
        self._free: dict[engine, tuple[float, int]] = {}
        # The Tensor engine is a 4x4 grid of 32x32 sub-arrays, which tiled matmuls use side by side.
        self._cells = np.zeros((4, 4))
        self._cell_users = np.full((4, 4), -1, dtype=np.int64)
        self._tensor_issue = (0.0, -1)
        self._dma = Resource(int(costs.DMA_ENGINES))
        self._dge = Resource(int(costs.HWDGE_INSTANCES))

    @property
    def makespan_ns(self) -> float:
        """End of the last instruction."""
        return max((i.end_ns for i in self.instructions), default=0.0)

    def engine_free_at(self, on: engine) -> float:
        """When ``on`` can take the next instruction."""
        return self._free.get(on, (0.0, -1))[0]

    def ready(self, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> float:
        """When the operands of an instruction allow it to start."""
        return self._data_wait(engine.dma, reads, writes).time

    def compute(
        self,
        call: str,
        on: engine,
        cost: costs.Cost,
        reads: Sequence[NkiTensor],
        writes: Sequence[NkiTensor],
        label: str,
        cells: tuple[slice, slice] | None = None,
        not_before: float = 0.0,
    ) -> Instruction:
        """Schedule an instruction of a compute engine, in program order on that engine.

        Args:
            cells: sub-arrays of the Tensor engine that a tiled matmul occupies, rows and columns in units of 32.
            not_before: a time given from outside, such as the arrival of the other core at a barrier.
        """
        wait = self._data_wait(on, reads, writes)
        wait.until(not_before, -1, "barrier")
        free, user = self._free.get(on, (0.0, -1))
        share = 1.0
        if on is engine.tensor:
            where = cells if cells is not None else (slice(0, 4), slice(0, 4))
            at = self._cells[where]
            share = at.size / self._cells.size
            latest = int(at.argmax())
            wait.until(float(at.flat[latest]), int(self._cell_users[where].flat[latest]), "engine")
            wait.until(self._tensor_issue[0], self._tensor_issue[1], "engine")
        else:
            wait.until(free, user, "engine")
        mark = self._mark_of(on, len(self.instructions))
        busy_until = wait.time + cost.busy_ns
        end = busy_until + cost.latency_ns
        item = self._append(call, on, label, wait, cost.busy_ns, share, end, cost.busy_ns + cost.latency_ns)
        self._free[on] = (busy_until, mark)
        if on is engine.tensor:
            self._cells[where] = busy_until
            self._cell_users[where] = mark
            # Issue stays in order even when instructions use different sub-arrays.
            self._tensor_issue = (wait.time, mark)
        self._mark(item, reads, writes)
        return item

    def dma(
        self,
        call: str,
        reads: Sequence[NkiTensor],
        writes: Sequence[NkiTensor],
        label: str,
        per_engine_ns: float,
        engines: int,
        *,
        hwdge: bool = False,
        hbm_read: int = 0,
        hbm_written: int = 0,
        not_before: float = 0.0,
    ) -> Instruction:
        """Schedule a DMA transfer; its fixed latencies overlap with other transfers, its payload does not."""
        wait = self._data_wait(engine.dma, reads, writes)
        wait.until(not_before, -1, "barrier")
        trigger = wait.time
        cost = float(costs.DMA_START_NS + per_engine_ns + costs.DMA_COMPLETE_NS)
        if hwdge:
            start, trigger = self._dge.place(trigger, float(costs.HWDGE_NS), 1)
            wait.until(start, -1, "engine")
            cost += costs.HWDGE_NS
        _, last = self._dma.place(trigger + costs.DMA_START_NS, per_engine_ns, engines)
        share = engines / costs.DMA_ENGINES
        end = float(last + costs.DMA_COMPLETE_NS)
        item = self._append(call, engine.dma, label, wait, per_engine_ns, share, end, cost)
        item.bytes_hbm_read, item.bytes_hbm_written = hbm_read, hbm_written
        self._mark(item, reads, writes)
        return item

    def _append(
        self, call: str, on: engine, label: str, wait: _Wait, occupied: float, share: float, end: float, cost: float
    ) -> Instruction:
        cause = wait.cause
        if cause >= 0:
            core, cause = divmod(cause // _ENGINE_CODES, _INDEX_LIMIT)
            if core != self.core:
                cause = -1
        item = Instruction(
            index=len(self.instructions),
            call=call,
            engine=on,
            label=label,
            start_ns=wait.time,
            occupied_ns=occupied,
            busy_ns=occupied * share,
            end_ns=end,
            cost_ns=cost,
            cause=cause,
            cause_kind=wait.kind,
        )
        self.instructions.append(item)
        return item

    def _mark_of(self, on: engine, index: int) -> int:
        """Core, instruction and engine in one number: storages shared by two cores carry marks of both."""
        return (self.core * _INDEX_LIMIT + index) * _ENGINE_CODES + on.value

    def _data_wait(self, on: engine, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> _Wait:
        wait = _Wait()
        for tensor in reads:
            _times(tensor.storage).wait_to_read(tensor, wait)
        for tensor in writes:
            if tensor.storage.allocation is not None:
                wait.until(tensor.storage.allocation.available_ns, -1, "memory")
            _times(tensor.storage).wait_to_write(tensor, wait, on)
        return wait

    def _mark(self, item: Instruction, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> None:
        by = self._mark_of(item.engine, item.index)
        for tensor in (*reads, *writes):
            allocation = tensor.storage.allocation
            if allocation is not None:
                allocation.accessed_ns = max(allocation.accessed_ns, item.end_ns)
        for tensor in reads:
            _times(tensor.storage).mark_read(tensor, item.end_ns, by)
        for tensor in writes:
            _times(tensor.storage).mark_write(tensor, item.end_ns, by)


def _times(storage: Storage) -> RegionTimes:
    if storage.times is None:
        storage.times = RegionTimes(storage)
    return storage.times


def _latest(wait: _Wait, at: np.ndarray, by: np.ndarray, ignore: int | None) -> None:
    """Wait for the latest of the accesses ``at``, leaving out those of the engine with code ``ignore``."""
    if at.size:
        if ignore is not None:
            at = np.where(by % _ENGINE_CODES == ignore, 0.0, at)
        k = int(at.argmax())
        wait.until(float(at.flat[k]), int(by.flat[k]), "data")
