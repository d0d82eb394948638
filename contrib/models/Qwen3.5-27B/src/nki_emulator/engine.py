# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The modelled timeline of one core: when each instruction starts and ends.

An instruction starts when its operands are ready (read after write), when nothing still uses what it overwrites (write
after read, write after write), when the tensor that had its destination's memory before is no longer in use, and when
its engine is free. Compute engines execute in program order; DMA transfers are only ordered by their data. The Tensor
engine works at half speed until it has been busy for a while, and again after idling.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
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
        core: core that executes it.
        index: position in program order of that core.
        call: API function, e.g. ``nc_matmul``.
        engine: engine that executes it.
        label: the ``name=`` of the call, or a summary of the operands.
        start_ns, end_ns: issue and result visible.
        occupied_ns: how long it keeps the part of the engine that it uses.
        busy_ns: the same as a share of the whole engine; a tiled matmul or a small DMA uses a part.
        cost_ns: what it would take alone.
        chain_ns: when it would end if engines and memories were always free and the Tensor engine warm: what is left
            are the times of the instructions whose data it needs, one after the other.
        cause: core and index of the instruction that it waited for last, None if there is none.
        cause_kind: ``data``, ``engine``, ``memory``, ``barrier`` or ``none``.
        bytes_hbm_read, bytes_hbm_written: DMA payload on the HBM side.
    """

    core: int
    index: int
    call: str
    engine: engine
    label: str
    start_ns: float
    occupied_ns: float
    busy_ns: float
    end_ns: float
    cost_ns: float
    chain_ns: float
    cause: tuple[int, int] | None
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


class WarmUp:
    """The limit on the Tensor engine: half speed unless it did at least half of what it could in the last 3 us.

    The hardware smooths the current that way (tools/neuron-explorer/overview-summary-page.rst, Understanding
    throttling, SDK 2.32).
    """

    def __init__(self) -> None:
        # Start, end and work of what ran in the window. Work is time at full speed, and counts sub-arrays that work
        # side by side once.
        self._recent: deque[tuple[float, float, float]] = deque()
        self._work = 0.0
        self._until = 0.0

    def occupied_ns(self, start: float, busy: float) -> float:
        """How long an instruction takes that would take ``busy`` ns at full speed; starts do not decrease."""
        window_start = start - costs.TENSOR_WARM_WINDOW_NS
        recent = self._recent
        while recent and recent[0][1] <= window_start:
            self._work -= recent.popleft()[2]
        outside = 0.0
        for first, last, work in recent:
            if first >= window_start:
                break
            outside += work * (window_start - first) / (last - first)
        warm = self._work - outside >= costs.TENSOR_WARM_WINDOW_NS / costs.TENSOR_COLD_FACTOR - 1e-6
        occupied = busy if warm else busy * float(costs.TENSOR_COLD_FACTOR)
        first, last = max(start, self._until), start + occupied
        if last > first:
            work = busy * (last - first) / occupied
            recent.append((first, last, work))
            self._work += work
            self._until = last
        return occupied


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
        self._warm_up = WarmUp()
        self._dma = Resource(int(costs.DMA_ENGINES))
        self._dge = Resource(int(costs.HWDGE_INSTANCES))

    @property
    def makespan_ns(self) -> float:
        """End of the last instruction."""
        return max((i.end_ns for i in self.instructions), default=0.0)

    def engine_free_at(self, on: engine) -> float:
        """When ``on`` can take the next instruction."""
        return self._free.get(on, (0.0, -1))[0]

    def ready(self, on: engine, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> Wait:
        """When the operands of an instruction and its engine allow it to start; DMA takes any number at a time."""
        wait = self._data_wait(on, reads, writes)
        if on is not engine.dma:
            wait.until(*self._free.get(on, (0.0, -1)), "engine")
        return wait

    def compute(
        self,
        call: str,
        on: engine,
        cost: costs.Cost,
        reads: Sequence[NkiTensor],
        writes: Sequence[NkiTensor],
        label: str,
        cells: tuple[slice, slice] | None = None,
        arrivals: Iterable[Wait] = (),
    ) -> Instruction:
        """Schedule an instruction of a compute engine, in program order on that engine.

        Args:
            cells: sub-arrays of the Tensor engine that a tiled matmul occupies, rows and columns in units of 32.
            arrivals: what each core waited for when it came to this meeting of the cores.
        """
        wait = self._data_wait(on, reads, writes)
        self._meet(wait, arrivals)
        free, user = self._free.get(on, (0.0, -1))
        share, occupied = 1.0, cost.busy_ns
        if on is engine.tensor:
            where = cells if cells is not None else (slice(0, 4), slice(0, 4))
            at = self._cells[where]
            share = at.size / self._cells.size
            latest = int(at.argmax())
            wait.until(float(at.flat[latest]), int(self._cell_users[where].flat[latest]), "engine")
            wait.until(self._tensor_issue[0], self._tensor_issue[1], "engine")
            occupied = self._warm_up.occupied_ns(wait.time, occupied)
        else:
            wait.until(free, user, "engine")
        mark = self._mark_of(on, len(self.instructions))
        busy_until = wait.time + occupied
        end = busy_until + cost.latency_ns
        chain = wait.chain_ns + cost.busy_ns + cost.latency_ns
        item = self._append(call, on, label, wait, occupied, share, end, occupied + cost.latency_ns, chain)
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
        arrivals: Iterable[Wait] = (),
        descriptors: Instruction | None = None,
    ) -> Instruction:
        """Schedule a DMA transfer; its fixed latencies overlap with other transfers, its payload does not.

        Args:
            arrivals: as in :meth:`compute`.
            descriptors: the instruction that writes the descriptors of the transfer.
        """
        wait = self._data_wait(engine.dma, reads, writes)
        self._meet(wait, arrivals)
        if descriptors is not None:
            wait.until(descriptors.end_ns, self._mark_of(descriptors.engine, descriptors.index), "data")
        trigger = wait.time
        cost = float(costs.DMA_START_NS + per_engine_ns + costs.DMA_COMPLETE_NS)
        if hwdge:
            start, trigger = self._dge.place(trigger, float(costs.HWDGE_NS), 1)
            wait.until(start, -1, "engine")
            cost += costs.HWDGE_NS
        _, last = self._dma.place(trigger + costs.DMA_START_NS, per_engine_ns, engines)
        share = engines / costs.DMA_ENGINES
        end = float(last + costs.DMA_COMPLETE_NS)
        item = self._append(call, engine.dma, label, wait, per_engine_ns, share, end, cost, wait.chain_ns + cost)
        item.bytes_hbm_read, item.bytes_hbm_written = hbm_read, hbm_written
        self._mark(item, reads, writes)
        return item

    @staticmethod
    def _meet(wait: Wait, arrivals: Iterable[Wait]) -> None:
        for arrival in arrivals:
            wait.until(arrival.time, arrival.cause, "barrier")
            wait.chain_ns = max(wait.chain_ns, arrival.chain_ns)

    def _append(
        self,
        call: str,
        on: engine,
        label: str,
        wait: Wait,
        occupied: float,
        share: float,
        end: float,
        cost: float,
        chain: float,
    ) -> Instruction:
        item = Instruction(
            core=self.core,
            index=len(self.instructions),
            call=call,
            engine=on,
            label=label,
            start_ns=wait.time,
            occupied_ns=occupied,
            busy_ns=occupied * share,
            end_ns=end,
            cost_ns=cost,
            chain_ns=chain,
            cause=divmod(wait.cause // ENGINE_CODES, _INDEX_LIMIT) if wait.cause >= 0 else None,
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
                wait.until(tensor.storage.allocation.available_ns, tensor.storage.allocation.available_by, "memory")
            _times(tensor.storage).wait_to_write(tensor, wait, on)
        return wait

    def _mark(self, item: Instruction, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> None:
        by = self._mark_of(item.engine, item.index)
        for tensor in (*reads, *writes):
            allocation = tensor.storage.allocation
            if allocation is not None and item.end_ns > allocation.accessed_ns:
                allocation.accessed_ns, allocation.accessed_by = item.end_ns, by
        for tensor in reads:
            _times(tensor.storage).mark_read(tensor, item.end_ns, by)
        for tensor in writes:
            _times(tensor.storage).mark_write(tensor, item.end_ns, by, item.chain_ns)


def _times(storage: Storage) -> AccessTimes:
    if storage.times is None:
        rows, row_bytes = storage.raw.shape
        storage.times = AccessTimes(rows, row_bytes, storage.granule, in_hbm=storage.region in HBM)
    return storage.times
