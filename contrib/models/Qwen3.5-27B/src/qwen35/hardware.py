# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Figures of Trainium 2 and its instances, with their sources.

Sources are documents of github.com/aws-neuron/aws-neuron-sdk, release 2.29, unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Figure:
    """A constant with its unit and where it is from."""

    value: int
    unit: str
    source: str


_CHIP = "about-neuron/arch/neuron-hardware/trainium2.rst"
CHIP_CORES = Figure(8, "physical NeuronCores per chip", _CHIP)
CHIP_HBM = Figure(96 * 2**30, "bytes of HBM per chip, a quarter to each pair of cores", _CHIP)
CHIP_HBM_BANDWIDTH = Figure(2_900 * 10**9, "bytes of HBM per second and chip", _CHIP)
CHIP_BF16_FLOPS = Figure(667 * 10**12, "dense bfloat16 FLOP per second and chip", _CHIP)
CHIP_FP32_FLOPS = Figure(181 * 10**12, "float32 FLOP per second and chip", _CHIP)
DEFAULT_LNC = Figure(
    2,
    "physical cores per logical core (LNC), one logical core per rank",
    "about-neuron/arch/neuron-features/logical-neuroncore-config.rst",
)


@dataclass(frozen=True)
class Instance:
    """An EC2 instance of Trainium 2 chips. A rank has one logical core of `lnc` physical cores."""

    name: str
    chips: Figure

    def ranks(self, lnc: int) -> int:
        """Logical cores of the instance: one for each rank at most."""
        return self.chips.value * CHIP_CORES.value // lnc


TRN2_3XLARGE = Instance(
    # The SDK's trn2-arch.rst lists the larger sizes only; deploy/files/manifests/daemonset.yaml names this one.
    "trn2.3xlarge", Figure(1, "chips of trn2.3xlarge", "aws.amazon.com/ec2/instance-types/trn2"),
)  # fmt: skip
TRN2_48XLARGE = Instance(
    "trn2.48xlarge", Figure(16, "chips of trn2.48xlarge", "about-neuron/arch/neuron-hardware/trn2-arch.rst")
)
INSTANCES = {instance.name: instance for instance in (TRN2_3XLARGE, TRN2_48XLARGE)}


def rank_hbm_bytes(lnc: int) -> int:
    """Bytes of HBM per rank: its cores' share of the chip's. At LNC=1 two ranks share a bank of 24 GiB."""
    return CHIP_HBM.value * lnc // CHIP_CORES.value


def rank_bandwidth(lnc: int) -> float:
    """Bytes of HBM per second and rank, while all cores of the chip read or write."""
    return CHIP_HBM_BANDWIDTH.value * lnc / CHIP_CORES.value


def rank_flops(lnc: int, dtype: torch.dtype) -> float:
    """Peak FLOP per second and rank, in bfloat16 or float32."""
    peak = CHIP_BF16_FLOPS if dtype == torch.bfloat16 else CHIP_FP32_FLOPS
    return peak.value * lnc / CHIP_CORES.value
