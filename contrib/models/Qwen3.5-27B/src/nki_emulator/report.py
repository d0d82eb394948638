# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Reports on a launch: tables for people, JSON for tools, and a Chrome/Perfetto trace. All times are modelled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import costs
from .context import Core
from .engine import Instruction
from .enums import engine

ENGINES = (engine.tensor, engine.vector, engine.scalar, engine.gpsimd, engine.sync, engine.dma)


@dataclass(frozen=True)
class EngineUse:
    """Use of one engine, modelled.

    Attributes:
        instructions: how many ran.
        busy_ns: time that the engine was busy.
        busy_cycles: the same in cycles of its clock; 0 for DMA, which has none.
        utilisation: busy time over the makespan.
    """

    instructions: int
    busy_ns: float
    busy_cycles: float
    utilisation: float


@dataclass(frozen=True)
class CoreReport:
    """One physical core.

    Attributes:
        program: program of the launch that ran on it.
        makespan_ns: end of the last instruction, modelled.
        engines: use by engine name.
        calls: instructions by API function.
        hbm_bytes_read, hbm_bytes_written: DMA payload.
        dma_count: DMA transfers.
        peak_sbuf_bytes: largest live allocation per partition.
        peak_psum_banks: largest live number of banks.
    """

    program: int
    makespan_ns: float
    engines: dict[str, EngineUse]
    calls: dict[str, int]
    hbm_bytes_read: int
    hbm_bytes_written: int
    dma_count: int
    peak_sbuf_bytes: int
    peak_psum_banks: int


@dataclass(frozen=True)
class Report:
    """A launch: one :class:`CoreReport` per program, and the instructions behind them.

    Attributes:
        kernel: its name.
        cores: one per program.
        warnings: what the kernel relies on and nothing promises.
        instructions: of every core, in program order.
    """

    kernel: str
    cores: tuple[CoreReport, ...]
    warnings: tuple[str, ...]
    instructions: tuple[tuple[Instruction, ...], ...] = field(repr=False)

    @classmethod
    def of(cls, kernel: str, cores: Sequence[Core]) -> Report:
        """Summarise the cores of a finished launch."""
        return cls(
            kernel,
            tuple(_summarise(core) for core in cores),
            tuple(cores[0].shared.warnings),
            tuple(tuple(core.timeline.instructions) for core in cores),
        )

    @property
    def makespan_ns(self) -> float:
        """Time of the kernel: end of the last instruction on any core, modelled."""
        return max((core.makespan_ns for core in self.cores), default=0.0)

    @property
    def launch_ns(self) -> float:
        """What launching the kernel by itself adds, modelled; nothing inside a compiled program."""
        return costs.launch_ns(len(self.cores))

    @property
    def device_ns(self) -> float:
        """Time on the device of the kernel launched by itself, modelled."""
        return self.launch_ns + self.makespan_ns

    @property
    def latency_bound_ns(self) -> float:
        """What loads, stores and the longest chain of instructions that need each other's data take at least, modelled.

        No order of the same instructions on any number of engines takes less.
        """
        return max((i.chain_ns for items in self.instructions for i in items), default=0.0)

    def critical_path(self, core: int = 0) -> list[Instruction]:
        """The chain of instructions, first to last, each of which waited for the one before it.

        It ends with the last instruction of ``core``, and may cross to the other core at a meeting of the two.
        """
        items = self.instructions[core]
        if not items:
            return []
        chain = [max(items, key=lambda i: i.end_ns)]
        while (cause := chain[-1].cause) is not None:
            chain.append(self.instructions[cause[0]][cause[1]])
        return chain[::-1]

    def table(self, path_length: int = 12) -> str:
        """Text for people: engines, memory and the heaviest calls of the critical path, per core."""
        lines = [
            f"{self.kernel}: {self.makespan_ns / 1000:.2f} us (modelled, {len(self.cores)} core(s)); "
            f"launched by itself {self.device_ns / 1000:.2f} us, of which the launch {self.launch_ns / 1000:.2f} us"
        ]
        lines += [f"warning: {warning}" for warning in self.warnings]
        for core in self.cores:
            lines.append(f"core {core.program}: {core.makespan_ns / 1000:.2f} us modelled")
            lines.append(f"  {'engine':8} {'instr.':>8} {'busy us':>10} {'cycles':>12} {'used':>7}")
            for name, use in core.engines.items():
                lines.append(
                    f"  {name:8} {use.instructions:8d} {use.busy_ns / 1000:10.2f} {use.busy_cycles:12.0f} "
                    f"{use.utilisation:7.1%}"
                )
            lines.append(
                f"  HBM read {core.hbm_bytes_read:,} B, written {core.hbm_bytes_written:,} B, "
                f"{core.dma_count} DMA transfers"
            )
            lines.append(
                f"  peak SBUF {core.peak_sbuf_bytes:,} of {int(costs.SBUF_PARTITION_BYTES):,} B per partition, "
                f"peak PSUM {core.peak_psum_banks} of {int(costs.PSUM_BANKS)} banks"
            )
            path = self.critical_path(core.program)
            share: Counter[str] = Counter()
            for before, item in zip([None, *path[:-1]], path, strict=True):
                where = "" if item.core == core.program else f" of core {item.core}"
                share[f"{item.engine.name} {item.call}{where}"] += int(item.end_ns - (before.end_ns if before else 0.0))
            lines.append(f"  critical path: {len(path)} instructions; time on it by call (ns):")
            lines += [f"    {ns:10,d}  {call}" for call, ns in share.most_common(path_length)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The summary of every core as JSON."""
        return json.dumps(
            {
                "kernel": self.kernel,
                "modelled": True,
                "makespan_ns": self.makespan_ns,
                "launch_ns": self.launch_ns,
                "device_ns": self.device_ns,
                "latency_bound_ns": self.latency_bound_ns,
                "warnings": self.warnings,
                "cores": [asdict(core) for core in self.cores],
                "critical_path": [
                    [
                        {"core": i.core, "index": i.index, "call": i.call, "engine": i.engine.name}
                        for i in self.critical_path(c)
                    ]
                    for c in range(len(self.cores))
                ],
            },
            indent=1,
        )

    def trace_events(self) -> list[dict[str, Any]]:
        """Events of the Chrome trace format: one process per core, one thread per engine (several for DMA)."""
        events: list[dict[str, Any]] = []
        for pid, items in enumerate(self.instructions):
            events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"core {pid} (modelled)"}})
            lanes: dict[engine, list[float]] = {}
            named: set[int] = set()
            for item in sorted(items, key=lambda i: i.start_ns):
                # DMA transfers and tiled matmuls overlap, and a trace thread cannot hold overlapping events.
                length = item.end_ns - item.start_ns if item.engine is engine.dma else item.occupied_ns
                ends = lanes.setdefault(item.engine, [])
                lane = next((k for k, end in enumerate(ends) if end <= item.start_ns + 1e-6), len(ends))
                ends[lane : lane + 1] = [item.start_ns + length]
                tid = ENGINES.index(item.engine) * 100 + lane
                if tid not in named:
                    named.add(tid)
                    name = item.engine.name if lane == 0 else f"{item.engine.name} {lane}"
                    events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
                events.append(
                    {
                        "ph": "X",
                        "pid": pid,
                        "tid": tid,
                        "name": item.call,
                        "ts": item.start_ns / 1000,
                        "dur": length / 1000,
                        "args": {
                            "operands": item.label,
                            "index": item.index,
                            "result_at_us": item.end_ns / 1000,
                            "waited_for": item.cause,
                            "waited_because": item.cause_kind,
                        },
                    }
                )
        return events

    def write_trace(self, path: str | Path) -> None:
        """Write a trace that chrome://tracing and ui.perfetto.dev open."""
        data = {"traceEvents": self.trace_events(), "displayTimeUnit": "ns", "otherData": {"times": "modelled"}}
        Path(path).write_text(json.dumps(data))


def _summarise(core: Core) -> CoreReport:
    items = core.timeline.instructions
    makespan = core.timeline.makespan_ns
    engines = {}
    for on in ENGINES:
        mine = [i for i in items if i.engine is on]
        busy = sum(i.busy_ns for i in mine)
        clock = float(costs.CLOCK_GHZ.get(on, 0.0))
        engines[on.name] = EngineUse(len(mine), busy, busy * clock, busy / makespan if makespan else 0.0)
    return CoreReport(
        program=core.program,
        makespan_ns=makespan,
        engines=engines,
        calls=dict(Counter(i.call for i in items)),
        hbm_bytes_read=sum(i.bytes_hbm_read for i in items),
        hbm_bytes_written=sum(i.bytes_hbm_written for i in items),
        dma_count=engines[engine.dma.name].instructions,
        peak_sbuf_bytes=core.sbuf.peak,
        peak_psum_banks=core.psum.peak,
    )
