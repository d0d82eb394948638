# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Every constant of the timing model, each with its source, and the formulas that use them.

All times are *modelled*. A source is a page of ``github:aws-neuron/aws-neuron-sdk`` (SDK 2.29), or ``inferred`` where
no page gives the number; an inferred one says what it was chosen to agree with. Units: nanoseconds, cycles, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from .dtypes import HALVES, itemsize
from .enums import engine

_TRN2 = "nki/guides/architecture/trainium2_arch.rst"
_TRN1 = "nki/guides/architecture/trainium_inferentia2_arch.rst"
_DMA = "nki/deep-dives/nki-dma-bandwidth-guide.rst"
_DGE = "nki/deep-dives/nki-dge.rst"
_SHARED = "nki/api/nki.api.shared.rst"


class Constant(float):
    """A number that knows its unit and where it comes from."""

    unit: str
    source: str

    def __new__(cls, value: float, unit: str, source: str) -> Constant:
        self = super().__new__(cls, value)
        self.unit, self.source = unit, source
        return self


# --- Capacities ------------------------------------------------------------------------------------------------------
PARTITIONS = 128
SBUF_PARTITION_BYTES = Constant(
    192 * 1024, "B", f"inferred: usable part of the 224 KiB of {_TRN2}; the figure of {_TRN1}"
)
PSUM_BANKS = Constant(8, "banks", f"{_TRN1} (near-memory accumulation in PSUM)")
PSUM_BANK_BYTES = Constant(2048, "B", f"{_TRN1} (near-memory accumulation in PSUM)")

# --- Clocks ----------------------------------------------------------------------------------------------------------
TENSOR_GHZ = Constant(2.4, "GHz", f"{_TRN2} (compute engine specifications)")
VECTOR_GHZ = Constant(0.96, "GHz", f"{_TRN2} (compute engine specifications)")
SCALAR_GHZ = Constant(1.2, "GHz", f"{_TRN2} (compute engine specifications)")
GPSIMD_GHZ = Constant(1.2, "GHz", f"{_TRN2} (compute engine specifications)")
SYNC_GHZ = Constant(1.2, "GHz", "inferred: as the Scalar and GpSimd sequencers")

# --- Tensor engine ---------------------------------------------------------------------------------------------------
MATMUL_MIN_CYCLES = Constant(64, "cycles", f"{_TRN1} (Tensor engine cost model, given for v2)")
MATMUL_FP32_FACTOR = Constant(4, "x", f"{_TRN1} (Tensor engine cost model)")
MATMUL_FP32_ONEZERO_FACTOR = Constant(2, "x", "nki/api/nki/isa/__init__.py (nc_matmul, is_*_onezero: 2x better)")
TRANSPOSE_FP32_FACTOR = Constant(2, "x", f"{_TRN2} (built-in transpose: 2x faster than fp32 matmul)")
LOAD_STATIONARY_SPEEDUP = Constant(4, "x", f"{_TRN1} (background and fast LoadStationary)")
TENSOR_LATENCY_CYCLES = Constant(128, "cycles", "inferred: one pass through 128 rows before the first result lands")

# --- Vector, Scalar, GpSimd engines ----------------------------------------------------------------------------------
MIN_ISSUE_CYCLES = Constant(64, "cycles", f"{_SHARED} (MIN_II)")
ACCESS_LATENCY_CYCLES = Constant(60, "cycles", f"{_TRN1} (tensor access overhead, given for v2)")
STRIDE_LIMIT_BYTES = Constant(16, "B", f"{_TRN1} (access pattern)")
STRIDE_FACTOR = Constant(2, "x", f"{_TRN1} (access pattern: half of the peak bandwidth)")
VECTOR_FP32_SPEEDUP = Constant(
    1, "x", f"inferred: 1 keeps N cycles of {_TRN1}; {_TRN2} lists 256 elements a cycle, which would be 2"
)
VECTOR_FAST_SPEEDUP = Constant(4, "x", f"{_TRN2} (Vector performance mode, 1)")
VECTOR_HALF_FAST_SPEEDUP = Constant(2, "x", f"{_TRN2} (Vector performance mode, 2x)")
VECTOR_TWO_INPUTS = Constant(2, "x", f"{_TRN1} (Vector engine cost model: 2N cycles)")
VECTOR_RECIPROCAL_FACTOR = Constant(8, "x", f"{_SHARED} (engine selection for reciprocal)")
SCALAR_READ_REDUCE_CYCLES = Constant(64, "cycles", f"{_TRN1} (ActReadAccumulator)")
VECTOR_READ_REDUCE_CYCLES = Constant(64, "cycles", "inferred: as on the Scalar engine")
GPSIMD_CYCLES_PER_ELEMENT = Constant(1, "cycles", "inferred: simple element-wise work at best")
GPSIMD_RSQRT_FACTOR = Constant(4, "x", f"{_SHARED} (engine selection for reverse square root)")
GPSIMD_START_CYCLES = Constant(100, "cycles", "inferred: a program starts on eight processors")
PARTITION_REDUCE_FACTOR = Constant(16, "x", "inferred: 16 partitions share one GpSimd processor")

# --- DMA -------------------------------------------------------------------------------------------------------------
DMA_ENGINES = Constant(16, "engines", _DMA)
DMA_ENGINE_BYTES_PER_NS = Constant(23, "B/ns", _DMA)
DMA_START_NS = Constant(1300, "ns", f"{_DMA} (semaphore to start)")
DMA_COMPLETE_NS = Constant(700, "ns", "inferred: a small transfer takes about 2 us end to end")
DMA_CHUNK_NS = Constant(
    16, "ns", f"inferred: per contiguous chunk, so that 256 B reach 41%, 2 KiB 85% and 4 KiB 92% as {_DMA} describes"
)
DMA_CAST_FACTOR = Constant(1, "x", "inferred: the conversion is pipelined")
DMA_TRANSPOSE_HBM_EFFICIENCY = Constant(0.9, "x", f"{_TRN2} (DMA transpose, HBM to SBUF)")
DMA_TRANSPOSE_SBUF_EFFICIENCY = Constant(0.5, "x", f"{_TRN2} (DMA transpose, SBUF to SBUF)")
HWDGE_NS = Constant(600, "ns", f"{_DGE} (hwdge)")
HWDGE_INSTANCES = Constant(2, "instances", f"{_DGE} (hwdge)")
SWDGE_CYCLES = Constant(1000, "cycles", "inferred: GpSimd writes the descriptors")
HBM_BYTES_PER_NS = Constant(362.5, "B/ns", "about-neuron/arch/neuron-hardware/trainium2.rst (2.9 TB/s over 8 cores)")

# --- Exchange between the two cores of LNC=2 -------------------------------------------------------------------------
BARRIER_NS = Constant(1300, "ns", f"inferred: one cross-engine semaphore, the {_DMA} figure")

CLOCK_GHZ: dict[engine, Constant] = {
    engine.tensor: TENSOR_GHZ,
    engine.vector: VECTOR_GHZ,
    engine.scalar: SCALAR_GHZ,
    engine.gpsimd: GPSIMD_GHZ,
    engine.sync: SYNC_GHZ,
}


@dataclass(frozen=True)
class Cost:
    """What one instruction takes: the engine is busy for ``busy_ns``; the result is there ``latency_ns`` later."""

    busy_ns: float
    latency_ns: float = 0.0


def constants() -> list[tuple[str, float, str, str]]:
    """All constants as (name, value, unit, source), in the order of this file."""
    return [(k, float(v), v.unit, v.source) for k, v in globals().items() if isinstance(v, Constant)]


def matmul(moving_columns: int, stationary_columns: int, dtypes: tuple[str, str], onezero: tuple[bool, bool]) -> Cost:
    """One nc_matmul: initiation interval ``max(N, 64)``, times four for fp32; LoadStationary runs in its shadow."""
    factor = 1.0
    if dtypes[0] == "float32" or dtypes[1] == "float32":
        factor = float(MATMUL_FP32_FACTOR)
        # A tile of ones and zeros needs no mantissa splitting.
        if any(hint and dtype == "float32" for hint, dtype in zip(onezero, dtypes, strict=True)):
            factor = float(MATMUL_FP32_ONEZERO_FACTOR)
    load = stationary_columns * factor / LOAD_STATIONARY_SPEEDUP
    cycles = max(max(moving_columns, MATMUL_MIN_CYCLES) * factor, load)
    return Cost(cycles / TENSOR_GHZ, TENSOR_LATENCY_CYCLES / TENSOR_GHZ)


def tensor_transpose(rows: int, dtype: str) -> Cost:
    """A transpose on the Tensor engine: the tile is stationary and an identity of ``rows`` columns moves."""
    factor = MATMUL_FP32_FACTOR / TRANSPOSE_FP32_FACTOR if itemsize(dtype) == 4 else 1.0
    return Cost(max(rows, MATMUL_MIN_CYCLES) * factor / TENSOR_GHZ, TENSOR_LATENCY_CYCLES / TENSOR_GHZ)


def elementwise(on: engine, cycles: float, extra_cycles: float = 0.0) -> Cost:
    """An instruction of the Vector, Scalar or GpSimd engine that streams for ``cycles``."""
    clock = CLOCK_GHZ[on]
    start = GPSIMD_START_CYCLES if on is engine.gpsimd else 0.0
    return Cost((max(cycles, MIN_ISSUE_CYCLES) + start + extra_cycles) / clock, ACCESS_LATENCY_CYCLES / clock)


@dataclass(frozen=True)
class Tile:
    """What the cost of a Vector instruction depends on, for one operand."""

    elements: int
    dtype: str
    in_psum: bool
    contiguous: bool
    stride_bytes: int


def vector_single_input(dst: Tile, src: Tile, *, fast_capable: bool) -> float:
    """Cycles of a one-input Vector instruction.

    Args:
        dst, src: destination and source.
        fast_capable: tensor_copy and tensor_scalar have a performance mode; other instructions have not.
    """
    elements = max(dst.elements, src.elements)
    halves = dst.dtype in HALVES and src.dtype in HALVES
    if fast_capable and halves:
        contiguous = dst.contiguous and src.contiguous
        in_psum = dst.in_psum + src.in_psum
        if contiguous and in_psum == 0:
            return elements / VECTOR_FAST_SPEEDUP
        if in_psum == 0 or (contiguous and in_psum == 1):
            return elements / VECTOR_HALF_FAST_SPEEDUP
    return strided(elements, dst, src) / VECTOR_FP32_SPEEDUP


def vector_two_inputs(dst: Tile, left: Tile, right: Tile) -> float:
    """Cycles of tensor_tensor and its relatives: 2N, or N when all is bf16/fp16 and both inputs are in SBUF."""
    elements = max(dst.elements, left.elements, right.elements)
    cycles = strided(elements, dst, left, right) * VECTOR_TWO_INPUTS
    if all(tile.dtype in HALVES for tile in (dst, left, right)) and not (left.in_psum or right.in_psum):
        return cycles / VECTOR_HALF_FAST_SPEEDUP
    return cycles


def strided(cycles: float, *tiles: Tile) -> float:
    """Half the bandwidth when the innermost stride of any operand exceeds 16 bytes."""
    return cycles * STRIDE_FACTOR if any(tile.stride_bytes > STRIDE_LIMIT_BYTES for tile in tiles) else cycles


def dma_engine_ns(total_bytes: int, chunk_bytes: int, engines: int, efficiency: float = 1.0) -> float:
    """Time that each of ``engines`` DMA engines spends on its share of a transfer.

    Args:
        total_bytes: payload of the whole transfer.
        chunk_bytes: contiguous bytes per descriptor element, the smaller of both sides.
        engines: engines that share the transfer.
        efficiency: fraction of the peak that this kind of transfer reaches.
    """
    chunks = total_bytes / max(chunk_bytes, 1)
    return (total_bytes / (DMA_ENGINE_BYTES_PER_NS * efficiency) + chunks * DMA_CHUNK_NS) / engines
