# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""`qwen35 kernels`: accuracy and modelled cost of a DeltaNet kernel, run in `nki_emulator` on synthetic inputs.

No time in here was measured on a device: all of them are modelled by the emulator.

Letters: B batch, T tokens, H value heads, Hk key heads, D = 128 the dimension of keys and values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..configuration_qwen35 import DTYPES, dtype_name
from ..kernel_selection import DeltaNetInverse
from ..ops import commit_conv, commit_delta_rule, recurrent_gated_delta_rule
from ..selftest.deltanet_cases import (
    CONV_WIDTH,
    DEFAULT_TOKENS,
    HEAD_DIM,
    LAYER,
    Gates,
    KernelCase,
    KernelName,
    layer_step,
    make_inputs,
    relative_error,
)

if TYPE_CHECKING:
    from nki_emulator.report import EngineUse, Report

HBM_BYTES_PER_US = 0.36e6
"""Of one physical core: Trainium2 has 2.9 TB/s for eight (about-neuron/arch/neuron-hardware/trainium2.rst)."""


@dataclass(frozen=True)
class KernelFigures:
    """What a launch gave. Errors are computed from real arithmetic; every time is modelled.

    Attributes:
        output_error, state_error: largest absolute error over the largest magnitude, against float64.
        modelled_us: time of the kernel.
        launch_us: what launching it by itself adds; nothing inside a compiled program.
        hbm_bound_us: `hbm_bound_us` of the case.
        latency_bound_us: what its loads, its stores and its longest chain of dependent instructions take at least.
        engines: modelled use by engine name, of the core that finishes last.
        hbm_bytes_read, hbm_bytes_written: DMA payload of all cores.
        peak_sbuf_bytes: largest live allocation per partition on any core.
        peak_psum_banks: most live PSUM banks on any core.
    """

    output_error: float
    state_error: float
    modelled_us: float
    launch_us: float
    hbm_bound_us: float
    latency_bound_us: float
    engines: dict[str, EngineUse]
    hbm_bytes_read: int
    hbm_bytes_written: int
    peak_sbuf_bytes: int
    peak_psum_banks: int

    @property
    def bound_ratio(self) -> float:
        """Modelled time over the larger of the two bounds."""
        return self.modelled_us / max(self.hbm_bound_us, self.latency_bound_us)

    @property
    def max_error(self) -> float:
        """The larger of the two errors."""
        return max(self.output_error, self.state_error)


def measure(case: KernelCase) -> tuple[KernelFigures, Report]:
    """Run the kernel in the emulator on seeded inputs and compare it with float64.

    Returns:
        The figures, and the emulator's report behind them (tables, trace, critical path).

    Raises:
        ValueError: the kernel refuses the case, or an installed Neuron SDK has taken the emulator's place.
    """
    import nki_emulator

    from ..nki_kernels.chunked import deltanet_chunk_step
    from ..nki_kernels.commit_layer import deltanet_commit_layer
    from ..nki_kernels.decode_layer import deltanet_decode_layer
    from ..nki_kernels.fused_chunked import deltanet_fused_chunked_layer
    from ..nki_kernels.looped_chunked import deltanet_looped_chunked_layer_state
    from ..nki_kernels.nki_seam import EMULATED
    from ..nki_kernels.verify_layer import deltanet_verify_layer

    if not EMULATED:
        raise ValueError("the Neuron SDK's nki is installed here: kernel reports need an environment without it")
    kernel = {
        KernelName.DECODE: deltanet_decode_layer,
        KernelName.VERIFY: deltanet_verify_layer,
        KernelName.COMMIT: deltanet_commit_layer,
        KernelName.CHUNKED: deltanet_chunk_step,
        KernelName.FUSED: deltanet_fused_chunked_layer,
        KernelName.LOOPED: deltanet_looped_chunked_layer_state,
    }[case.kernel]
    inputs = make_inputs(case)
    inverts = case.kernel in (KernelName.CHUNKED, KernelName.FUSED, KernelName.LOOPED)
    options: dict[str, Any] = {"inverse": case.inverse.value} if inverts else {}
    try:
        result = nki_emulator.emulate(kernel, *inputs, grid=case.cores, **options)
    except (AssertionError, nki_emulator.NkiValidationError) as error:
        raise ValueError(f"the kernel refuses {case}: {error}") from error
    output_error, state_error = _errors(case, inputs, result.outputs)
    report = result.report
    return (
        KernelFigures(
            output_error=output_error,
            state_error=state_error,
            modelled_us=report.makespan_ns / 1e3,
            launch_us=report.launch_ns / 1e3,
            hbm_bound_us=hbm_bound_us(case),
            latency_bound_us=report.latency_bound_ns / 1e3,
            engines=max(report.cores, key=lambda core: core.makespan_ns).engines,
            hbm_bytes_read=sum(core.hbm_bytes_read for core in report.cores),
            hbm_bytes_written=sum(core.hbm_bytes_written for core in report.cores),
            peak_sbuf_bytes=max(core.peak_sbuf_bytes for core in report.cores),
            peak_psum_banks=max(core.peak_psum_banks for core in report.cores),
        ),
        report,
    )


def hbm_bytes(case: KernelCase) -> int:
    """Bytes of all inputs and outputs of the launch, each counted once."""
    B, T, H, Hk = case.batch, case.tokens, case.heads, case.key_heads
    size, channels = case.dtype.itemsize, (2 * Hk + H) * HEAD_DIM
    state, conv_state = 4 * B * H * HEAD_DIM**2, B * channels * (CONV_WIDTH - 1) * size
    qkv, z = B * T * channels * size, B * T * H * HEAD_DIM * size
    committed = 4 * B * T * (Hk * HEAD_DIM + H * HEAD_DIM + H)  # keys, u and g
    if case.kernel is KernelName.COMMIT:
        return committed + 2 * state + qkv + 2 * conv_state + 4 * B
    if case.kernel in LAYER:
        parameters = channels * CONV_WIDTH * size + 4 * (2 * H + HEAD_DIM)  # the convolution, A_log, dt_bias, the norm
        taken = qkv + z + 2 * B * T * H * size + conv_state + parameters + state
        return taken + z + (state + conv_state if case.kernel is KernelName.DECODE else committed)
    # q, k, v and the output; g and beta; a sequence of the fused kernel starts from zero.
    return qkv + z + 2 * 4 * B * T * H + state * (1 if case.kernel is KernelName.FUSED else 2)


def hbm_bound_us(case: KernelCase) -> float:
    """Least time of the launch in microseconds: its `hbm_bytes` at 0.36 TB/s for each core."""
    return hbm_bytes(case) / (case.cores * HBM_BYTES_PER_US)


def write_timeline_png(report: Report, path: str | Path) -> None:
    """Draw the modelled timeline: a row for each engine of each core, a bar for each instruction.

    Bars of DMA are whole transfers, with the 2 us of latency that `EngineUse.busy_ns` leaves out; they overlap, and are
    darker where more are under way.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a timeline needs matplotlib: pip install 'qwen35-neuron[plot]'") from error

    engines = list(report.cores[0].engines)
    rows = [(core, engine) for core in range(len(report.cores)) for engine in engines]
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {row: [] for row in rows}
    names: dict[tuple[int, int], str] = {}
    for event in report.trace_events():  # the name of a thread comes before its bars
        thread = (event["pid"], event.get("tid", -1))
        if event["name"] == "thread_name":
            names[thread] = event["args"]["name"].split()[0]  # without the lane: 'dma 3' is the row of 'dma'
        elif event["ph"] == "X":
            bars[event["pid"], names[thread]].append((event["ts"], event["dur"]))

    figure = Figure(figsize=(12, 1.2 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, (core, engine) in enumerate(rows):
        axes.broken_barh(bars[core, engine], (y - 0.4, 0.8), facecolors=f"C{engines.index(engine)}", alpha=0.7)
    axes.set_yticks(range(len(rows)), [f"core {core} {engine}" for core, engine in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, report.makespan_ns / 1e3)
    axes.set_xlabel("modelled time, us")
    axes.set_title(f"{report.kernel}: {report.makespan_ns / 1e3:.2f} us (modelled, not measured on a device)")
    figure.savefig(path, format="png", dpi=120)


def _errors(case: KernelCase, inputs: list[Tensor], outputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Errors of the output and of the state, see `KernelFigures`.

    Of verification, the state is that after all tokens by what the kernel returned; of a commit, which has no output,
    the conv state takes its place.
    """
    exact = [x.double() for x in inputs]
    if case.kernel is KernelName.COMMIT:
        keys, u, g, state, qkv, conv_state, accepted = exact
        conv_error = relative_error(outputs[1], commit_conv(qkv, conv_state, accepted.long()))
        return conv_error, relative_error(outputs[0], commit_delta_rule(keys, u, g, state, accepted.long()))
    if case.kernel not in LAYER:
        expected = recurrent_gated_delta_rule(*exact)
        return relative_error(outputs[0], expected[0]), relative_error(outputs[1], expected[1])
    output, state = layer_step(*exact)
    found = outputs[1]
    if case.kernel is KernelName.VERIFY:
        keys, u, g = (x.double() for x in outputs[1:])
        found = commit_delta_rule(keys, u, g, exact[-1], torch.full((case.batch,), case.tokens))
    return relative_error(outputs[0], output), relative_error(found, state)


# --- Presentation ----------------------------------------------------------------------------------------------------
def as_table(case: KernelCase, figures: KernelFigures) -> str:
    """Text for people."""
    return "\n".join(
        (
            str(case),
            f"  {'error of output, of largest':28} {figures.output_error:.1e} (against float64)",
            f"  {'error of state, of largest':28} {figures.state_error:.1e} (against float64)",
            f"  {'modelled time':28} {figures.modelled_us:.2f} us of the kernel; launched by itself, modelled "
            f"{figures.modelled_us + figures.launch_us:.2f} us",
            f"  {'HBM bound':28} {figures.hbm_bound_us:.2f} us ({hbm_bytes(case):,} B needed)",
            f"  {'latency bound':28} {figures.latency_bound_us:.2f} us (loads, dependent instructions, stores)",
            f"  {'modelled over larger bound':28} {figures.bound_ratio:.2f}",
            f"  {'HBM read, written':28} {figures.hbm_bytes_read:,} B, {figures.hbm_bytes_written:,} B",
            f"  {'peak SBUF, PSUM':28} {figures.peak_sbuf_bytes:,} B per partition, {figures.peak_psum_banks} banks",
            f"  {'engine':8} {'instructions':>12} {'modelled us':>12} {'modelled cycles':>16} {'utilisation':>12}",
            *(
                f"  {name:8} {use.instructions:12,d} {use.busy_ns / 1e3:12.2f} "
                f"{f'{use.busy_cycles:,.0f}' if use.busy_cycles else '-':>16} {use.utilisation:12.1%}"
                for name, use in figures.engines.items()
            ),
        )
    )


def as_json(case: KernelCase, figures: KernelFigures) -> dict[str, Any]:
    """One JSON object; its times are modelled, as it says."""
    described = {
        **asdict(case),
        "kernel": case.kernel.value,
        "gates": case.gates.value,
        "dtype": dtype_name(case.dtype),
        "inverse": case.inverse.value,
    }
    return {"modelled": True, "case": described, "figures": asdict(figures)}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `kernels` to the commands of `qwen35`."""
    parser = commands.add_parser(
        "kernels",
        help="accuracy and modelled time of a DeltaNet kernel",
        description="Run a DeltaNet kernel in the emulator: its error against float64, and its modelled cost.",
    )
    default = KernelCase()
    parser.set_defaults(run=_run)
    parser.add_argument("--kernel", choices=_values(KernelName), default=default.kernel.value)
    parser.add_argument("--batch", type=int, default=default.batch, metavar="B")
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="T",
        help="default: " + ", ".join(f"{tokens} ({kernel.value})" for kernel, tokens in DEFAULT_TOKENS.items()),
    )
    parser.add_argument("--heads", type=int, default=default.heads, metavar="H", help="value heads per rank")
    parser.add_argument("--key-heads", type=int, default=default.key_heads, metavar="Hk", help="key heads per rank")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype_name(default.dtype))
    parser.add_argument("--cores", type=int, choices=(1, 2), default=default.cores, help="physical cores (LNC)")
    parser.add_argument("--gates", choices=_values(Gates), default=default.gates.value)
    parser.add_argument("--inverse", choices=_values(DeltaNetInverse), default=default.inverse.value)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev (JSON)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the modelled timeline (PNG)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _values(choices: Iterable[Enum]) -> list[str]:
    return [choice.value for choice in choices]


def _run(args: argparse.Namespace) -> None:
    kernel = KernelName(args.kernel)
    case = KernelCase(
        kernel,
        args.batch,
        DEFAULT_TOKENS[kernel] if args.tokens is None else args.tokens,
        args.heads,
        args.key_heads,
        DTYPES[args.dtype],
        args.cores,
        Gates(args.gates),
        DeltaNetInverse(args.inverse),
    )
    figures, report = measure(case)
    if args.trace:
        report.write_trace(args.trace)
    if args.png:
        write_timeline_png(report, args.png)
    print(json.dumps(as_json(case, figures)) if args.json else as_table(case, figures))
