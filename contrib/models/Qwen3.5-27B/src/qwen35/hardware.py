# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""Figures of Trainium 2 and its instances, with their sources, and which instance this machine is.

Sources are documents of github.com/aws-neuron/aws-neuron-sdk, release 2.29, unless they say otherwise.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


PRODUCT_NAME = Path("/sys/devices/virtual/dmi/id/product_name")
"""Where Linux has the machine's product name, which on EC2 is the type of the instance: NxD reads it there, too
(test/integration/modules/moe/test_module_performance.py of neuronx-distributed)."""

NEURON_LS = ("neuron-ls", "--json-output")
"""Lists the Neuron devices, chips each: tools/neuron-sys-tools/neuron-ls.rst."""

_NEURON_LS_SECONDS = 20
"""More than it takes to list devices; a driver that hangs is none."""


def detected_instance(product_name: Path = PRODUCT_NAME) -> Instance | None:
    """The instance that this machine is: by its product name, else by as many chips as neuron-ls lists.

    Other sizes have the same chips: 16 of them in a trn2u.48xlarge are those of trn2.48xlarge.

    Returns:
        None on any other machine, and where neither can be asked.
    """
    try:
        name = product_name.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        name = ""
    if name in INSTANCES:
        return INSTANCES[name]
    chips = sum(map(_is_chip, _neuron_devices()))
    return next((instance for instance in INSTANCES.values() if instance.chips.value == chips), None)


def _neuron_devices() -> list[Any]:
    """What neuron-ls lists; nothing where it is not installed, finds no driver, or says something else."""
    try:
        listed = subprocess.run(NEURON_LS, capture_output=True, check=True, timeout=_NEURON_LS_SECONDS).stdout
        devices = json.loads(listed)
    except (OSError, subprocess.SubprocessError, ValueError, RecursionError):
        return []
    return devices if isinstance(devices, list) else []


def _is_chip(device: Any) -> bool:
    """Whether an entry of neuron-ls is a chip of Trainium 2: those of other generations have another memory."""
    return isinstance(device, Mapping) and device.get("memory_size") == CHIP_HBM.value


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
