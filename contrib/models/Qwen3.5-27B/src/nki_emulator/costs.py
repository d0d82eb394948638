# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Every constant of the timing model, each with its kind and source, and the formulas that use them.

All times are *modelled*. Pages are of ``github:aws-neuron/aws-neuron-sdk``, SDK 2.29 (commit 539a73c5) unless another
release is named. A figure read from a published profile (an image of a page) is *measured*; one that was adjusted until
modelled times agree with published device times is *fitted*. Units: nanoseconds, cycles, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .dtypes import HALVES, itemsize
from .enums import engine

_TRN2 = "nki/guides/architecture/trainium2_arch.rst"
_TRN1 = "nki/guides/architecture/trainium_inferentia2_arch.rst"
_DMA = "nki/deep-dives/nki-dma-bandwidth-guide.rst"
_DMA_TOUR = "nki/get-started/about/nki-dma-overview.rst"
_DGE = "nki/deep-dives/nki-dge.rst"
_SHARED = "nki/api/nki.api.shared.rst"
_PERFORMANCE = "nki/deep-dives/nki_perf_guide.rst"
_RMS_PROFILE = "nki/library/specs/design-rmsnorm-quant.rst, Performance Analysis, trn2 profile with LNC=2"
_THROTTLING = "tools/neuron-explorer/overview-summary-page.rst, Understanding throttling (SDK 2.32)"


class Kind(Enum):
    """How a constant is known."""

    DOCUMENTED = "documented"  # the page states the number
    MEASURED = "measured"  # read from a published profile, or from kernels that run on devices
    FITTED = "fitted"  # adjusted until modelled times agree with published device times
    INFERRED = "inferred"  # no page gives it; the source says what it was chosen to agree with


class Constant(float):
    """A number that knows its unit, how it is known, and from where.

    Attributes:
        unit: of the value, e.g. ``ns``.
        source: the page, or for an inferred one what it agrees with.
        kind: how it is known.
    """

    unit: str
    source: str
    kind: Kind

    def __new__(cls, value: float, unit: str, source: str, kind: Kind = Kind.INFERRED) -> Constant:
        self = super().__new__(cls, value)
        self.unit, self.source, self.kind = unit, source, kind
        return self


_DOCUMENTED, _MEASURED, _FITTED = Kind.DOCUMENTED, Kind.MEASURED, Kind.FITTED

# --- Capacities ------------------------------------------------------------------------------------------------------
PARTITIONS = 128
SBUF_PARTITION_BYTES = Constant(
    224 * 1024 - 16384 - 8,
    "B",
    f"224 KiB ({_TRN2}) less 16,384 B of dynamic DMA scratch and 8 B that the runtime keeps: nki-library 2.29, "
    "core/mlp/mlp_cte/mlp_cte_constants.py, whose kernels place tensors up to there on devices",
    _MEASURED,
)
PSUM_BANKS = Constant(8, "banks", f"{_TRN1} (near-memory accumulation in PSUM)", _DOCUMENTED)
PSUM_BANK_BYTES = Constant(2048, "B", f"{_TRN1} (near-memory accumulation in PSUM)", _DOCUMENTED)

# --- Launch ----------------------------------------------------------------------------------------------------------
# Loading, the first instruction fetches and the final synchronisation of a kernel that is launched by itself.
LAUNCH_LNC1_NS = Constant(
    20_000,
    "ns",
    "benchmarks/bench_library_kernels.py, rows with LNC=1; the profile of nki/guides/tutorials/fused_mamba.rst has "
    "13 us before the first DMA and 4 us after the last",
    _FITTED,
)
LAUNCH_LNC2_NS = Constant(
    29_000,
    "ns",
    f"{_RMS_PROFILE}: 27 us before the first DMA and 2 us after the last; the rows with LNC=2 of "
    "benchmarks/bench_library_kernels.py fit the same",
    _MEASURED,
)

# --- Clocks ----------------------------------------------------------------------------------------------------------
TENSOR_GHZ = Constant(2.4, "GHz", f"{_TRN2} (compute engine specifications)", _DOCUMENTED)
VECTOR_GHZ = Constant(0.96, "GHz", f"{_TRN2} (compute engine specifications)", _DOCUMENTED)
SCALAR_GHZ = Constant(1.2, "GHz", f"{_TRN2} (compute engine specifications)", _DOCUMENTED)
GPSIMD_GHZ = Constant(1.2, "GHz", f"{_TRN2} (compute engine specifications)", _DOCUMENTED)
SYNC_GHZ = Constant(1.2, "GHz", "as the Scalar and GpSimd sequencers")

# --- Tensor engine ---------------------------------------------------------------------------------------------------
MATMUL_MIN_CYCLES = Constant(64, "cycles", f"{_TRN1} (Tensor engine cost model, given for v2)", _DOCUMENTED)
MATMUL_FP32_FACTOR = Constant(4, "x", f"{_TRN1} (Tensor engine cost model)", _DOCUMENTED)
MATMUL_FP32_ONEZERO_FACTOR = Constant(
    2, "x", "nki/api/nki/isa/__init__.py (nc_matmul, is_*_onezero: 2x better)", _DOCUMENTED
)
TRANSPOSE_FP32_FACTOR = Constant(2, "x", f"{_TRN2} (built-in transpose: 2x faster than fp32 matmul)", _DOCUMENTED)
LOAD_STATIONARY_SPEEDUP = Constant(4, "x", f"{_TRN1} (background and fast LoadStationary)", _DOCUMENTED)
TENSOR_LATENCY_CYCLES = Constant(128, "cycles", "one pass through 128 rows before the first result lands")
TENSOR_COLD_FACTOR = Constant(
    2, "x", f"{_THROTTLING}: half of full utilisation at first; 512 columns in 420 ns in {_RMS_PROFILE}", _DOCUMENTED
)
TENSOR_WARM_WINDOW_NS = Constant(3000, "ns", f"{_THROTTLING}: less than half in 3 us slows it down again", _DOCUMENTED)

# --- Vector, Scalar, GpSimd engines ----------------------------------------------------------------------------------
MIN_ISSUE_CYCLES = Constant(64, "cycles", f"{_SHARED} (MIN_II)", _DOCUMENTED)
ACCESS_LATENCY_CYCLES = Constant(60, "cycles", f"{_TRN1} (tensor access overhead, given for v2)", _DOCUMENTED)
VECTOR_OVERHEAD_CYCLES = Constant(
    122,
    "cycles",
    f"{_RMS_PROFILE}: a scalar_tensor_tensor of 512 elements every 660 ns; {_TRN1} (Vector cost model) says about 100",
    _MEASURED,
)
SCALAR_LATENCY_CYCLES = Constant(
    200, "cycles", f"{_PERFORMANCE}, Opt #5a: 264 cycles between dependent instructions, less MIN_II", _MEASURED
)
STRIDE_LIMIT_BYTES = Constant(16, "B", f"{_TRN1} (access pattern)", _DOCUMENTED)
STRIDE_FACTOR = Constant(2, "x", f"{_TRN1} (access pattern: half of the peak bandwidth)", _DOCUMENTED)
VECTOR_WIDE_SPEEDUP = Constant(
    2,
    "x",
    f"{_TRN2} (256 elements a cycle for types other than bf16/fp16); tensor_scalar from bf16 to fp8 takes 8.8 us for "
    f"16,384 elements in {_RMS_PROFILE}",
    _DOCUMENTED,
)
VECTOR_FAST_SPEEDUP = Constant(4, "x", f"{_TRN2} (Vector performance mode, 1)", _DOCUMENTED)
VECTOR_HALF_FAST_SPEEDUP = Constant(2, "x", f"{_TRN2} (Vector performance mode, 2x)", _DOCUMENTED)
VECTOR_TWO_INPUTS = Constant(
    1, "x", f"{_RMS_PROFILE}: N cycles and the overhead; v2 took 2N ({_TRN1}), or N for bf16 by {_TRN2}", _MEASURED
)
VECTOR_RECIPROCAL_FACTOR = Constant(8, "x", f"{_SHARED} (engine selection for reciprocal)", _DOCUMENTED)
SCALAR_READ_REDUCE_CYCLES = Constant(64, "cycles", f"{_TRN1} (ActReadAccumulator)", _DOCUMENTED)
VECTOR_READ_REDUCE_CYCLES = Constant(64, "cycles", "as on the Scalar engine")
GPSIMD_CYCLES_PER_ELEMENT = Constant(1, "cycles", "simple element-wise work at best")
GPSIMD_TWO_INPUTS = Constant(2, "x", "reads one operand at a time")
GPSIMD_RSQRT_FACTOR = Constant(4, "x", f"{_SHARED} (engine selection for reverse square root)", _DOCUMENTED)
GPSIMD_START_CYCLES = Constant(100, "cycles", "a program starts on eight processors")
PARTITION_REDUCE_FACTOR = Constant(16, "x", "16 partitions share one GpSimd processor")

# --- DMA -------------------------------------------------------------------------------------------------------------
DMA_ENGINES = Constant(16, "engines", _DMA, _DOCUMENTED)
DMA_PARTITIONS_PER_ENGINE = Constant(8, "partitions", f"{_DMA_TOUR} (128 partitions over 16 engines)", _DOCUMENTED)
DMA_ENGINE_BYTES_PER_NS = Constant(
    27.2,
    "B/ns",
    f"{_DMA_TOUR}; 27.1 in the store of its example 1, 26.7 in {_RMS_PROFILE}; {_DMA} gives 23 with all in use",
    _DOCUMENTED,
)
DMA_START_NS = Constant(1300, "ns", f"{_DMA} (semaphore to start)", _DOCUMENTED)
DMA_COMPLETE_NS = Constant(
    300, "ns", f"{_DMA_TOUR}, profiles of examples 1 and 2: last byte to the start of the instruction on it", _MEASURED
)
DMA_RUN_NS = Constant(
    16, "ns", f"per contiguous run, so that 256 B reach 37%, 2 KiB 82% and 4 KiB 90% as {_DMA} describes"
)
DMA_ELEMENT_NS = Constant(
    2.6,
    "ns",
    "per element of a run too short for a descriptor of its own: what brings the pairformer layer of "
    "github:aws-neuron/neuronx-distributed-inference pull 64, with its 2-byte elements, to its 65.9 ms",
    _FITTED,
)
DMA_TRANSPOSE_HBM_EFFICIENCY = Constant(0.9, "x", f"{_TRN2} (DMA transpose, HBM to SBUF)", _DOCUMENTED)
DMA_TRANSPOSE_SBUF_EFFICIENCY = Constant(0.5, "x", f"{_TRN2} (DMA transpose, SBUF to SBUF)", _DOCUMENTED)
HWDGE_NS = Constant(600, "ns", f"{_DGE} (hwdge)", _DOCUMENTED)
HWDGE_INSTANCES = Constant(2, "instances", f"{_DGE} (hwdge)", _DOCUMENTED)
SWDGE_CYCLES = Constant(
    1000, "cycles", f"GpSimd writes the descriptors; 0.9 us in the profile of example 2 of {_DMA_TOUR}"
)
HBM_BYTES_PER_NS = Constant(
    362.5,
    "B/ns",
    "of a core whose neighbour reads as much: about-neuron/arch/neuron-hardware/trainium2.rst (2.9 TB/s over 8 cores), "
    "neuron-runtime/explore/device-memory.rst (two cores share an HBM)",
    _DOCUMENTED,
)

# --- Exchange between the two cores of LNC=2 -------------------------------------------------------------------------
BARRIER_NS = Constant(1300, "ns", f"one cross-engine semaphore, the {_DMA} figure")

CLOCK_GHZ: dict[engine, Constant] = {
    engine.tensor: TENSOR_GHZ,
    engine.vector: VECTOR_GHZ,
    engine.scalar: SCALAR_GHZ,
    engine.gpsimd: GPSIMD_GHZ,
    engine.sync: SYNC_GHZ,
}

#: Of every instruction, before it streams.
OVERHEAD_CYCLES: dict[engine, Constant] = {
    engine.vector: VECTOR_OVERHEAD_CYCLES,
    engine.gpsimd: GPSIMD_START_CYCLES,
}

#: From the end of the stream until the next instruction may read what it wrote.
LATENCY_CYCLES: dict[engine, Constant] = {
    engine.vector: ACCESS_LATENCY_CYCLES,
    engine.scalar: SCALAR_LATENCY_CYCLES,
    engine.gpsimd: ACCESS_LATENCY_CYCLES,
}


@dataclass(frozen=True)
class Cost:
    """What one instruction takes: the engine is busy for ``busy_ns``; the result is there ``latency_ns`` later."""

    busy_ns: float
    latency_ns: float = 0.0


def constants() -> dict[str, Constant]:
    """All constants by name, in the order of this file."""
    return {name: value for name, value in globals().items() if isinstance(value, Constant)}


def launch_ns(cores: int) -> float:
    """What a launch by itself adds to the time of its kernel, on one core or with LNC=2.

    Inside a compiled program it is assumed to be zero: the program is launched once, and its kernels follow each other.
    """
    return float(LAUNCH_LNC1_NS if cores == 1 else LAUNCH_LNC2_NS)


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
    cycles = max(cycles + OVERHEAD_CYCLES.get(on, 0.0), MIN_ISSUE_CYCLES)
    return Cost((cycles + extra_cycles) / clock, LATENCY_CYCLES[on] / clock)


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
    contiguous = dst.contiguous and src.contiguous
    in_psum = dst.in_psum + src.in_psum
    if fast_capable and dst.dtype in HALVES and src.dtype in HALVES:
        if contiguous and in_psum == 0:
            return elements / VECTOR_FAST_SPEEDUP
        if in_psum == 0 or (contiguous and in_psum == 1):
            return elements / VECTOR_HALF_FAST_SPEEDUP
    elif fast_capable and contiguous and in_psum == 0:
        return elements / VECTOR_WIDE_SPEEDUP
    return strided(elements, dst, src)


def vector_two_inputs(dst: Tile, left: Tile, right: Tile) -> float:
    """Cycles of tensor_tensor and its relatives."""
    elements = max(dst.elements, left.elements, right.elements)
    return strided(elements, dst, left, right) * VECTOR_TWO_INPUTS


def strided(cycles: float, *tiles: Tile) -> float:
    """Half the bandwidth when the innermost stride of any operand exceeds 16 bytes."""
    return cycles * STRIDE_FACTOR if any(tile.stride_bytes > STRIDE_LIMIT_BYTES for tile in tiles) else cycles


def dma_bytes_per_ns(engines: int, cores: int, *, hbm: bool) -> float:
    """Peak rate of each of ``engines`` DMA engines of a core; with two cores it has half of the HBM they share."""
    rate = float(DMA_ENGINE_BYTES_PER_NS)
    return min(rate, HBM_BYTES_PER_NS / engines) if hbm and cores > 1 else rate


def dma_engine_ns(
    total_bytes: int,
    run_bytes: int,
    engines: int,
    bytes_per_ns: float = DMA_ENGINE_BYTES_PER_NS,
    element_bytes: int | None = None,
) -> float:
    """Time that each of ``engines`` DMA engines spends on its share of a transfer.

    Args:
        total_bytes: payload of the whole transfer.
        run_bytes: contiguous bytes at a time, the smaller of both sides.
        engines: engines that share the transfer.
        bytes_per_ns: rate that an engine reaches in this kind of transfer.
        element_bytes: of one element; a run of few elements costs what they cost one by one, if that is less.
    """
    run_bytes = max(run_bytes, 1)
    elements = run_bytes / element_bytes if element_bytes else float("inf")
    overhead = min(float(DMA_RUN_NS), elements * DMA_ELEMENT_NS)
    return (total_bytes / bytes_per_ns + total_bytes / run_bytes * overhead) / engines
