# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The modelled timeline of one core: when each instruction starts and ends.

An instruction starts when its operands are ready (read after write), when nothing still uses what it overwrites (write
after read, write after write), when the tensor that had its destination's memory before is no longer in use, and when
its engine is free. Compute engines execute in program order; DMA transfers are only ordered by their data.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import costs
from .access_times import ENGINE_CODES, AccessTimes, Wait
from .enums import engine
from .memory import HBM, NkiTensor, Storage

_INDEX_LIMIT = 1 << 26


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
        self, call: str, on: engine, label: str, wait: Wait, occupied: float, share: float, end: float, cost: float
    ) -> Instruction:
        cause = wait.cause
        if cause >= 0:
            core, cause = divmod(cause // ENGINE_CODES, _INDEX_LIMIT)
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
        return (self.core * _INDEX_LIMIT + index) * ENGINE_CODES + on.value

    def _data_wait(self, on: engine, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> Wait:
        wait = Wait()
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


def _times(storage: Storage) -> AccessTimes:
    if storage.times is None:
        rows, row_bytes = storage.raw.shape
        storage.times = AccessTimes(rows, row_bytes, storage.granule, in_hbm=storage.region in HBM)
    return storage.times
