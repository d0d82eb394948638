# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Enumerations of the NKI 0.3.0 interface, with the members and values of the documented stubs.

Importable as ``nki.isa.constants`` after :func:`nki_emulator.install`, which is where library kernels look for them.
"""

from enum import Enum


class MemoryRegion(Enum):
    """Where a tensor lives (nki/api/nki/language/__init__.py)."""

    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"


class engine(Enum):
    """Engines of one physical NeuronCore; ``unknown`` lets the compiler (here: the model) choose."""

    tensor = 1
    vector = 5
    scalar = 2
    gpsimd = 3
    dma = 4
    sync = 6
    unknown = 0


class dge_mode(Enum):
    """Who writes the descriptors of a DMA (nki/deep-dives/nki-dge.rst)."""

    unknown = 0
    swdge = 1
    hwdge = 2
    none = 3


class dma_engine(Enum):
    """Which DMA carries a core-to-core exchange."""

    dma = 1
    gpsimd_dma = 2


class matmul_perf_mode(Enum):
    """Performance mode of the Tensor engine."""

    none = "none"
    double_row = "double_row"


class nc_version(Enum):
    """Generation of the NeuronCore; this emulator models gen3 (Trainium2)."""

    gen2 = 2
    gen3 = 3
    gen4 = 4

    # Kernels gate features with comparisons such as ``nisa.get_nc_version() >= nisa.nc_version.gen3``.
    def __ge__(self, other: "nc_version") -> bool:
        return self.value >= other.value

    def __gt__(self, other: "nc_version") -> bool:
        return self.value > other.value

    def __le__(self, other: "nc_version") -> bool:
        return self.value <= other.value

    def __lt__(self, other: "nc_version") -> bool:
        return self.value < other.value


class oob_mode(Enum):
    """What an indirect access out of bounds does."""

    error = 0
    skip = 1


class reduce_cmd(Enum):
    """What an instruction does with the reduction registers of its engine."""

    idle = 0
    reset = 1
    reduce = 2
    reset_reduce = 3
    load_reduce = 4
