# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""The core that the running kernel program executes on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from . import costs
from .allocation import OnChipPool
from .engine import Timeline
from .enums import MemoryRegion, engine
from .memory import ON_CHIP, NkiTensor, Storage, addresses_of, physical_storage
from .races import RaceDetector
from .strictness import set_strict

_T = TypeVar("_T")


@dataclass(frozen=True)
class EmulatorOptions:
    """How to execute.

    Attributes:
        strict: check the documented constraints of every call.
        capacity: raise when SBUF or PSUM overflows (peaks are reported in any case).
        timed: build the modelled timeline.
        lint: reject Python that the NKI compiler does not take, before executing.
        lnc: cores that a launch is configured for; None asks the environment.
    """

    strict: bool = True
    capacity: bool = True
    timed: bool = True
    lint: bool = False
    lnc: int | None = None


class Exchange:
    """Rendezvous of the programs of one launch.

    Programs run one at a time and hand over only here, so a launch is deterministic.

    Attributes:
        meetings: how often each program has met the others.
    """

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.turn = 0
        self.finished = [False] * programs
        self.failed = False
        self.meetings = [0] * programs
        self._condition = threading.Condition()
        self._boards: dict[tuple[str, int], dict[int, Any]] = {}
        self._rounds: dict[tuple[int, str], int] = {}
        self._waiting: dict[int, tuple[str, int]] = {}

    def start(self, program: int) -> None:
        """Wait for the first turn."""
        with self._condition:
            self._condition.wait_for(lambda: self.turn == program or self.failed)

    def finish(self, program: int, *, failed: bool = False) -> None:
        """Leave; the next program that is not finished takes over."""
        with self._condition:
            self.finished[program] = True
            self.failed = self.failed or failed
            self._pass_on(program)

    def meet(self, program: int, key: str, post: _T) -> dict[int, _T]:
        """Post a value under ``key`` and wait until every program has posted; returns all posts by program.

        Raises:
            RuntimeError: another program ended without reaching this point.
        """
        with self._condition:
            count = self._rounds.get((program, key), 0)
            self._rounds[(program, key)] = count + 1
            board = self._boards.setdefault((key, count), {})
            board[program] = post
            self._waiting[program] = (key, count)
            while len(board) < self.programs:
                gone = any(done and p not in board for p, done in enumerate(self.finished))
                if self.failed or gone or self._stuck():
                    raise RuntimeError(f"program {program} waits at {key}, which another program never reaches")
                self._pass_on(program)
                self._condition.wait_for(lambda: self.turn == program or self.failed)
            del self._waiting[program]
            self.meetings[program] += 1
            return board

    def _stuck(self) -> bool:
        """Whether every program that still runs waits at a place that not all reach."""
        running = [p for p, done in enumerate(self.finished) if not done]
        return all(p in self._waiting and len(self._boards[self._waiting[p]]) < self.programs for p in running)

    def _pass_on(self, program: int) -> None:
        for step in range(1, self.programs + 1):
            candidate = (program + step) % self.programs
            if not self.finished[candidate]:
                self.turn = candidate
                break
        self._condition.notify_all()


@dataclass
class Shared:
    """What the programs of one launch have in common.

    Attributes:
        grid: launch grid.
        exchange: where programs meet.
        hbm: shared_hbm tensors in order of allocation.
        warnings: what the programs rely on and nothing promises, each once.
        races: who accessed which bytes of the shared memory.
    """

    grid: tuple[int, ...]
    exchange: Exchange
    hbm: list[NkiTensor] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)
    races: RaceDetector = field(default_factory=RaceDetector)

    def warn(self, call: str, what: str, rule: str, source: str) -> None:
        """Note something that nothing promises, in the form of :func:`errors.fail`."""
        self.warnings[f"{call}: {what}; {rule} ({source})"] = None


class Issued(NamedTuple):
    """An instruction of the body of a device loop: the call, and storage, place and shape of its operands on chip.

    In HBM the place may follow the loop index, and counts for nothing.
    """

    call: str
    operands: tuple[tuple[Storage, int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, call: str, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> Issued:
        on_chip = (t for t in (*writes, *reads) if t.buffer in ON_CHIP)
        return cls(call, tuple((t.storage, 0 if t.is_indirect else t.byte_offset, t.shape) for t in on_chip))


def canonical_body(body: Sequence[Issued], started: int) -> list[tuple[str, list[tuple[int, int, tuple[int, ...]]]]]:
    """What an iteration issued, comparable with others: storages made since ``started`` are numbered from -1 down."""
    made: dict[int, int] = {}

    def number(storage: Storage) -> int:
        return storage.serial if storage.serial < started else made.setdefault(storage.serial, -1 - len(made))

    return [(item.call, [(number(storage), at, shape) for storage, at, shape in item.operands]) for item in body]


class Core:
    """State of one program: position in the grid, memories, engine registers, timeline.

    Attributes:
        loop_bodies: what the current iteration of each device loop has issued, outermost first.
    """

    def __init__(self, options: EmulatorOptions, shared: Shared, program: int) -> None:
        self.options = options
        self.shared = shared
        self.program = program
        self.coordinates = tuple(int(i) for i in np.unravel_index(program, shared.grid)) if shared.grid else ()
        self.sbuf = OnChipPool(
            "sbuf",
            int(costs.SBUF_PARTITION_BYTES),
            "bytes",
            costs.SBUF_PARTITION_BYTES.source,
            enforce=options.capacity,
        )
        self.psum = OnChipPool(
            "psum", int(costs.PSUM_BANKS), "banks", costs.PSUM_BANKS.source, enforce=options.capacity
        )
        self.position = 0
        self.timeline = Timeline(program)
        self.hbm_allocations = 0
        self.scalar_registers = np.full(costs.PARTITIONS, np.nan, dtype=np.float32)
        self.vector_registers = np.full(costs.PARTITIONS, np.nan, dtype=np.float32)
        self.identities: dict[tuple[int, str], NkiTensor] = {}
        self.loop_bodies: list[list[Issued]] = []
        self._physical: dict[MemoryRegion, Storage] = {}

    def physical(self, region: MemoryRegion) -> Storage:
        """The whole of SBUF or PSUM, for tensors with an address."""
        if region not in self._physical:
            row = (
                costs.SBUF_PARTITION_BYTES if region is MemoryRegion.sbuf else costs.PSUM_BANKS * costs.PSUM_BANK_BYTES
            )
            self._physical[region] = physical_storage(region, int(row))
        return self._physical[region]

    def touch(
        self, call: str, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor], keeps: Sequence[NkiTensor] = ()
    ) -> None:
        """The next instruction in program order accesses tensors: extends their lives on chip, looks for races in HBM.

        Args:
            keeps: destinations that keep something of what they held, such as those of an accumulating matmul.
        """
        for body in self.loop_bodies:
            body.append(Issued.of(call, reads, writes))
        for tensor in (*reads, *keeps):
            allocation = tensor.storage.allocation
            if allocation is not None:
                allocation.pool.read(call, allocation, tensor, self.position)
        for tensor in writes:
            allocation = tensor.storage.allocation
            if allocation is not None:
                allocation.pool.write(call, allocation, tensor, self.position)
        if self.shared.exchange.programs > 1:
            self._look_for_races(call, reads, writes)
        self.position += 1

    def _look_for_races(self, call: str, reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> None:
        meeting = self.shared.exchange.meetings[self.program]
        for tensors, writing in ((reads, False), (writes, True)):
            for tensor in tensors:
                if tensor.buffer is not MemoryRegion.shared_hbm:
                    continue
                conflict = self.shared.races.access(tensor, self.program, meeting, writing=writing)
                if conflict is not None:
                    self.shared.warn(
                        call,
                        f"core {self.program} {'writes' if writing else 'reads'} bytes of {tensor.storage.label} that "
                        f"core {conflict.core} {'writes' if conflict.writing else 'reads'}, and they do not meet in "
                        "between",
                        "the order is undefined on a device: give each core bytes of its own or meet at "
                        "nisa.core_barrier",
                        "nki/api/nki/isa/__init__.py, core_barrier",
                    )

    def record(
        self,
        call: str,
        on: engine,
        cost: costs.Cost,
        reads: Sequence[NkiTensor | object],
        writes: Sequence[NkiTensor],
        name: str | None,
        *,
        cells: tuple[slice, slice] | None = None,
        keeps: Sequence[NkiTensor] = (),
    ) -> None:
        """Account for an instruction of a compute engine; operands that are no tensors are ignored.

        Args:
            cells: as in :meth:`Timeline.compute`.
            keeps: as in :meth:`touch`.
        """
        tensors = [t for t in reads if isinstance(t, NkiTensor)]
        tensors += addresses_of([*tensors, *writes])
        self.touch(call, tensors, writes, keeps)
        if not self.options.timed:
            return
        label = name or describe(tensors, writes)
        self.timeline.compute(call, on, cost, tensors, writes, label, cells)


def describe(reads: Sequence[NkiTensor], writes: Sequence[NkiTensor]) -> str:
    """Operands in a few words, for reports."""
    return f"{' '.join(map(_brief, writes))} <- {' '.join(map(_brief, reads))}"


def _brief(tensor: NkiTensor) -> str:
    return f"{tensor.buffer.name}{list(tensor.shape)}{tensor.dtype}"


_local = threading.local()


def activate(core: Core | None) -> None:
    """Make ``core`` the one that instructions of this thread run on."""
    _local.core = core
    set_strict(core is None or core.options.strict)


def active() -> Core | None:
    """The core of this thread, None outside a kernel."""
    return getattr(_local, "core", None)


def current() -> Core:
    """The core of this thread.

    Raises:
        RuntimeError: no kernel is running.
    """
    core = active()
    if core is None:
        raise RuntimeError(
            "no kernel is running: call the kernel through nki.jit, nki.simulate or nki_emulator.emulate"
        )
    return core
