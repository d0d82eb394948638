# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""DMA transfers between HBM and SBUF, exchange between two cores, and the barrier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import checks, costs, dtypes, ops
from ..access_times import Wait
from ..context import current, describe
from ..enums import MemoryRegion, dge_mode, oob_mode
from ..enums import dge_mode as DgeMode
from ..enums import dma_engine as DmaEngine
from ..enums import engine as Engine
from ..enums import oob_mode as OobMode
from ..errors import fail
from ..memory import HBM, NkiTensor, addresses_of

_ISA = checks.ISA
_UPDATE = "nki/deep-dives/nki-0-3-0-update-guide.rst"
_DGE = "nki/deep-dives/nki-dge.rst"


def dma_copy(
    dst: Any,
    src: Any,
    oob_mode: OobMode = oob_mode.error,
    dge_mode: DgeMode = dge_mode.unknown,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """Copy ``src`` to ``dst`` in row-major order of both; different types convert through float32.

    Args:
        dst, src: HBM or SBUF, equally many elements; either may gather or scatter through ``.ap(vector_offset=...)``.
        oob_mode: what a dynamic address out of bounds does: raise, or skip the element.
        dge_mode: who writes the descriptors; ``hwdge`` neither converts types nor gathers.
        engine: ``sync`` or ``scalar``, the trigger of ``hwdge``.
    """
    call = "dma_copy"
    source, out = _dma_operand(call, "src", src), _dma_operand(call, "dst", dst)
    oob_mode, dge_mode = _modes(call, oob_mode, dge_mode)
    engine = checks.enum_member(call, "engine", engine, Engine)
    if checks.strict():
        hardware = dge_mode is DgeMode.hwdge
        if engine is not Engine.unknown and (not hardware or engine not in (Engine.sync, Engine.scalar)):
            fail(
                call,
                f"engine={engine.name} with dge_mode={dge_mode.name}",
                "only with hwdge, and sync or scalar",
                f"{_ISA}, {call}",
            )
        if hardware and source.dtype != out.dtype:
            fail(call, f"src {source.dtype} and dst {out.dtype} with hwdge", "types must match", f"{_UPDATE}, dge_mode")
        if hardware and (source.is_indirect or out.is_indirect):
            fail(call, "indirect access with hwdge", "it needs swdge", f"{_DGE}, hwdge")
    if source.size != out.size:
        fail(call, f"src {source!r} and dst {out!r}", "equally many elements", f"{_ISA}, {call}, Tile size")
    if source.dtype != out.dtype and dge_mode is DgeMode.unknown:
        current().shared.warn(
            call,
            f"{source.dtype} becomes {out.dtype} with dge_mode=unknown",
            "the compiler may choose hwdge, which takes equal types: say swdge or none, or convert on an engine",
            f"{_UPDATE}, dge_mode",
        )
    values = source.array if source.dtype == out.dtype else dtypes.to_float32(source.array)
    _bounds(call, source, out, oob_mode)
    if source.out_of_bounds:  # Skipped elements leave dst as it is.
        assert source.valid is not None
        values = np.where(source.valid, values, out.array.reshape(values.shape))
    out.write(values)
    _record(call, [source], out, dge_mode, name, keeps=bool(source.out_of_bounds))


def dma_transpose(
    dst: Any,
    src: Any,
    axes: Sequence[int] | None = None,
    dge_mode: DgeMode = dge_mode.unknown,
    oob_mode: OobMode = oob_mode.error,
    name: str | None = None,
) -> None:
    """Transpose by DMA: axes (1, 0), (2, 1, 0) or (3, 1, 2, 0) for two, three or four dimensions.

    Args:
        dst: SBUF, type of ``src``.
        src: HBM or SBUF, 2 or 4 bytes per element.
        axes: the permutation of the rank, if given.
        dge_mode: ``hwdge`` needs ``src.shape[0] == 16``, a last axis of multiples of 128, and 2 bytes.
        oob_mode: as in :func:`dma_copy`, for a gathered ``src``.
    """
    call = "dma_transpose"
    source, out = _dma_operand(call, "src", src), _dma_operand(call, "dst", dst)
    oob_mode, dge_mode = _modes(call, oob_mode, dge_mode)
    order = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}.get(source.ndim)
    if order is None:
        fail(call, f"src has {source.ndim} dimensions", "2, 3 or 4", f"{_ISA}, {call}")
        return
    if axes is not None and tuple(axes) != order:
        fail(call, f"axes={tuple(axes)}", f"rank {source.ndim} transposes by {order}", f"{_ISA}, {call}")
    checks.same_dtype(call, dst=out, src=source)
    if checks.strict():
        _check_transpose(call, source, out, dge_mode)
    _bounds(call, source, out, oob_mode)
    values = source.array.transpose(order)
    if values.size != out.size:
        fail(call, f"dst {out!r}", f"src gives {list(values.shape)}", f"{_ISA}, {call}")
    out.write(np.ascontiguousarray(values))
    in_hbm = source.buffer in HBM
    efficiency = costs.DMA_TRANSPOSE_HBM_EFFICIENCY if in_hbm else costs.DMA_TRANSPOSE_SBUF_EFFICIENCY
    # The engines cooperate on [128, 16] blocks; ragged blocks lose throughput (modelled as half).
    ragged = out.partitions % 128 != 0 or out.shape[-1] % 16 != 0
    _record(call, [source], out, dge_mode, name, efficiency * (0.5 if ragged else 1.0))


def _check_transpose(call: str, source: NkiTensor, out: NkiTensor, mode: DgeMode) -> None:
    if out.buffer is not MemoryRegion.sbuf:
        fail(call, f"dst {out!r}", "it must be in sbuf", f"{_ISA}, {call}")
    if source.itemsize not in (2, 4):
        fail(
            call,
            f"src has dtype {source.dtype}",
            "2 or 4 bytes per element",
            "nki/guides/architecture/trainium2_arch.rst",
        )
    if source.is_indirect:
        if mode is DgeMode.hwdge:
            fail(call, "a gathered src with hwdge", "dge_mode is unknown or swdge", f"{_ISA}, {call}, Indirect")
        if source.itemsize != 2 or source.shape[-1] > 128 or source.shape[0] % 16:
            fail(
                call,
                f"a gathered src {source!r}",
                "2 bytes, a last axis of at most 128, and rows in multiples of 16",
                f"{_ISA}, {call}, Indirect",
            )
    elif mode is DgeMode.swdge or mode is DgeMode.none:
        fail(call, f"dge_mode={mode.name}", "a direct transpose takes unknown or hwdge", f"{_ISA}, {call}, Direct")
    elif mode is DgeMode.hwdge and (source.shape[0] != 16 or source.shape[-1] % 128 or source.itemsize != 2):
        fail(
            call,
            f"src {source!r} with hwdge",
            "src.shape[0] == 16, src.shape[-1] % 128 == 0 and 2 bytes",
            f"{_ISA}, {call}, Direct",
        )


def dma_compute(
    dst: Any,
    srcs: Sequence[Any],
    reduce_op: Any,
    scales: Sequence[float] | None = None,
    unique_indices: bool = True,
    name: str | None = None,
) -> None:
    """``dst = srcs[0] + srcs[1] + ...`` inside the DMA engines, in float32.

    Args:
        dst: HBM or SBUF; may scatter.
        srcs: up to 16 tensors of as many elements.
        reduce_op: ``nl.add``.
        scales: None or all 1.0.
        unique_indices: must be True.
    """
    call = "dma_compute"
    out = _dma_operand(call, "dst", dst)
    sources = [_dma_operand(call, f"srcs[{i}]", s) for i, s in enumerate(srcs)]
    if ops.op_name(call, "reduce_op", reduce_op) != "add":
        fail(call, f"reduce_op=nl.{reduce_op.nki_operator}", "it must be nl.add", f"{_ISA}, {call}")
    if scales is not None and any(s != 1.0 for s in scales):
        fail(call, f"scales={list(scales)}", "all are 1.0", f"{_ISA}, {call}")
    if not 1 <= len(sources) <= 16:
        fail(call, f"{len(sources)} srcs", "1 to 16", f"{_ISA}, {call}")
    if not unique_indices:
        fail(call, "unique_indices=False", "it must be True", f"{_ISA}, {call}")
    if any(s.size != out.size for s in sources):
        fail(call, f"srcs of {[s.size for s in sources]} elements", f"dst has {out.size}", f"{_ISA}, {call}")
    total = np.zeros(out.shape, dtype=np.float32)
    for source in sources:
        _bounds(call, source, out, OobMode.error)
        total = total + dtypes.to_float32(source.array).reshape(out.shape)
    out.write(total)
    _record(call, sources, out, DgeMode.unknown, name)


def sendrecv(
    src: Any,
    dst: Any,
    send_to_rank: int,
    recv_from_rank: int,
    pipe_id: int,
    dma_engine: DmaEngine = DmaEngine.dma,
    name: str | None = None,
) -> None:
    """Swap tiles between the two cores of a logical core: ``src`` goes to the other core's ``dst``.

    Args:
        src, dst: SBUF, same shape and type.
        send_to_rank, recv_from_rank: 0 or 1.
        pipe_id: exchanges of one pipe wait for each other.
        dma_engine: ``gpsimd_dma`` needs partitions in multiples of 16 and at most 1024 / 512 / 256 bytes per partition
            for 4- / 2- / 1-byte types.
    """
    call = "sendrecv"
    source = checks.tile(call, "src", src, checks.SBUF_ONLY)
    out = checks.tile(call, "dst", dst, checks.SBUF_ONLY)
    checks.elementwise(call, dst=out, src=source)
    checks.same_dtype(call, dst=out, src=source)
    dma_engine = checks.enum_member(call, "dma_engine", dma_engine, DmaEngine)
    core = current()
    programs = core.shared.exchange.programs
    for operand, rank in (("send_to_rank", send_to_rank), ("recv_from_rank", recv_from_rank)):
        if int(rank) not in (0, 1) or int(rank) >= programs:
            fail(call, f"{operand}={rank} in a launch of {programs}", "0 or 1, with LNC=2", f"{_ISA}, {call}")
    if dma_engine is DmaEngine.gpsimd_dma and checks.strict():
        limit = 256 * source.itemsize
        if source.partitions % 16 or source.free_size * source.itemsize > limit:
            fail(call, f"src {source!r} by gpsimd_dma", f"partitions in 16s, {limit} bytes each", f"{_ISA}, {call}")
    ready = core.timeline.ready(Engine.dma, [source], [out]) if core.options.timed else Wait()
    post: tuple[int, np.ndarray, Wait] = (int(send_to_rank), source.read().copy(), ready)
    board = core.shared.exchange.meet(core.program, f"sendrecv {pipe_id}", post)
    target, values, _ = board[int(recv_from_rank)]
    if target != core.program:
        fail(
            call,
            f"core {core.program} receives from {recv_from_rank}, which sends to {target}",
            "ranks must match",
            f"{_ISA}, {call}",
        )
    out.write(values)
    core.touch(call, [source], [out])
    if core.options.timed:
        size = source.size * source.itemsize
        share = costs.dma_engine_ns(size, source.free_size * source.itemsize, _engines(source))
        core.timeline.dma(
            call,
            [source],
            [out],
            name or describe([source], [out]),
            share,
            _engines(source),
            arrivals=[arrival for _, _, arrival in board.values()],
        )


def core_barrier(data: Any, cores: Any, engine: Engine = Engine.gpsimd, name: str | None = None) -> None:
    """Wait until both cores arrive; orders their accesses to a shared HBM tensor.

    Args:
        data: tensor in shared HBM.
        cores: ``(0, 1)``.
        engine: engine that waits.
    """
    call = "core_barrier"
    shared = checks.tensor(call, "data", data)
    engine = checks.enum_member(call, "engine", engine, Engine)
    core = current()
    programs = core.shared.exchange.programs
    if checks.strict():
        if shared.buffer is not MemoryRegion.shared_hbm:
            fail(call, f"data {shared!r}", "it must be in shared_hbm", f"{_ISA}, {call}")
        if tuple(cores) != (0, 1) or programs != 2:
            fail(call, f"cores={tuple(cores)} in a launch of {programs}", "(0, 1) with LNC=2", f"{_ISA}, {call}")
    on = Engine.gpsimd if engine is Engine.unknown else engine
    ready = core.timeline.ready(on, [shared], [shared]) if core.options.timed else Wait()
    board = core.shared.exchange.meet(core.program, "core_barrier", ready)
    core.touch(call, [], [])  # the meeting itself accesses nothing; later instructions on ``data`` wait for it
    if core.options.timed:
        cost, label = costs.Cost(float(costs.BARRIER_NS)), name or describe([], [shared])
        core.timeline.compute(call, on, cost, [], [shared], label, arrivals=board.values())


# --- Shared ----------------------------------------------------------------------------------------------------------
def _dma_operand(call: str, operand: str, value: Any) -> NkiTensor:
    t = checks.tensor(call, operand, value)
    if checks.strict() and t.buffer not in checks.DMA_SPACES:
        fail(
            call,
            f"{operand} {t!r}",
            "DMA reaches HBM and SBUF; move PSUM to SBUF with tensor_copy first",
            f"{_UPDATE}, Reading from PSUM",
        )
    if checks.strict() and t.buffer is MemoryRegion.sbuf and t.partitions > costs.PARTITIONS:
        fail(call, f"{operand} has {t.partitions} partitions", f"at most {costs.PARTITIONS}", f"{_ISA}, {call}")
    return t


def _modes(call: str, oob: Any, dge: Any) -> tuple[OobMode, DgeMode]:
    return checks.enum_member(call, "oob_mode", oob, OobMode), checks.enum_member(call, "dge_mode", dge, DgeMode)


def _bounds(call: str, source: NkiTensor, out: NkiTensor, mode: OobMode) -> None:
    for operand, t in (("src", source), ("dst", out)):
        if t.out_of_bounds and mode is OobMode.error:
            fail(
                call,
                f"{operand} has {t.out_of_bounds} elements out of bounds",
                "dynamic addresses stay inside the tensor, or oob_mode=nisa.oob_mode.skip",
                f"{_ISA}, {call}",
            )


def _run_bytes(t: NkiTensor) -> int:
    """Contiguous bytes at the innermost level of an operand."""
    if t.is_indirect:
        return t.shape[-1] * t.itemsize
    run = t.itemsize
    array = t._array
    first_free = 1 if t.buffer is MemoryRegion.sbuf and t.has_partition_axis else 0
    for axis in range(array.ndim - 1, first_free - 1, -1):
        if array.shape[axis] == 1:
            continue
        if array.strides[axis] != run:
            break
        run *= array.shape[axis]
    return run


def _engines(t: NkiTensor) -> int:
    """DMA engines that share a transfer: each serves its share of the partitions."""
    engines = int(costs.DMA_ENGINES)
    if t.buffer is not MemoryRegion.sbuf:
        return engines
    return max(1, min(engines, -(-t.partitions // int(costs.DMA_PARTITIONS_PER_ENGINE))))


def _record(
    call: str,
    sources: list[NkiTensor],
    out: NkiTensor,
    mode: DgeMode,
    name: str | None,
    efficiency: float = 1.0,
    *,
    keeps: bool = False,
) -> None:
    """Account for a transfer.

    Args:
        efficiency: fraction of the peak bandwidth that this kind of transfer reaches.
        keeps: ``out`` keeps something of what it held.
    """
    core, operands = current(), [*sources, out]
    reads = [*sources, *addresses_of(operands)]
    core.touch(call, reads, [out], [out] if keeps else [])
    if not core.options.timed:
        return
    size = sum(s.size * s.itemsize for s in sources)
    written = out.size * out.itemsize
    if call == "dma_transpose":  # all engines work on one block after the other
        run, engines = 1 << 30, int(costs.DMA_ENGINES)
    else:
        run, engines = min(_run_bytes(t) for t in operands), min(_engines(t) for t in operands)
    if all(t.buffer in HBM for t in operands):
        engines = max(1, min(engines, out.size * out.itemsize // max(run, 1)))
    element = min(t.itemsize for t in operands)
    in_hbm = any(t.buffer in HBM for t in operands)
    rate = efficiency * costs.dma_bytes_per_ns(engines, core.shared.exchange.programs, hbm=in_hbm)
    share = costs.dma_engine_ns(max(size, written), run, engines, rate, element)
    label = name or describe(sources, [out])
    descriptors = None
    if mode is DgeMode.swdge or any(t.is_indirect for t in operands):
        busy = costs.Cost(float(costs.SWDGE_CYCLES / costs.GPSIMD_GHZ))
        descriptors = core.timeline.compute(f"{call} descriptors", Engine.gpsimd, busy, [], [], label)
    core.timeline.dma(
        call,
        reads,
        [out],
        label,
        share,
        engines,
        hwdge=mode is DgeMode.hwdge,
        hbm_read=sum(s.size * s.itemsize for s in sources if s.buffer in HBM),
        hbm_written=written if out.buffer in HBM else 0,
        descriptors=descriptors,
    )
