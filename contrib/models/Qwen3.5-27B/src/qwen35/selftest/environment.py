# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""What machine this is: devices, driver, packages, memory; the first check.

Commands and files are those of Neuron's documents: tools/neuron-sys-tools/neuron-ls.rst for devices,
tools/neuron-sys-tools/neuron-sysfs-user-guide.rst for memory in use. Neither has been asked on a device yet.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..hardware import DEFAULT_LNC, NEURON_LS, detected_instance
from ..kernel_selection import KERNEL_ENVIRONMENT
from ..nki_kernels.nki_seam import EMULATED
from ..nxdi import NXDI_AVAILABLE
from .outcome import CheckFailed, Values

PACKAGES = (
    "torch", "transformers", "safetensors", "torch-neuronx", "torch-xla", "libneuronxla", "neuronx-cc", "nki",
    "neuronx-distributed", "neuronx-distributed-inference", "vllm",
)  # fmt: skip
"""Distributions of Python whose versions matter."""

DRIVER_VERSION = Path("/sys/module/neuron/version")
DEVICES = Path("/sys/devices/virtual/neuron_device")
LNC_VARIABLE = "NEURON_LOGICAL_NC_CONFIG"
"""The runtime's, for the physical cores of a logical one."""

COMPILER_PLACES = ("NEURON_COMPILE_CACHE_URL",)
"""Variables that the self-test sets itself."""

COMMAND_SECONDS = 30
SHOWN_VARIABLES = ("NEURON_", "NKI_", "XLA_", *KERNEL_ENVIRONMENT)
"""How the names of variables begin that change what is compiled or run."""


def run_environment_check(workdir: Path) -> Values:
    """What there is, as values for the report.

    Raises:
        CheckFailed: NxDI is installed, and there is no device for it, or one set up for other logical cores.
    """
    devices, problem = neuron_devices()
    instance = detected_instance()
    values: Values = {
        "instance": None if instance is None else instance.name,
        "devices": [_described(device) for device in devices],
        "neuron_ls": problem,
        "driver": _text_of(DRIVER_VERSION),
        "system_packages": _system_packages(),
        "packages": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "nki": "nki_emulator" if EMULATED else "nki",
        "nxdi": "NxDI" if NXDI_AVAILABLE else "nxdi_cpu, the CPU stand-ins",
        "host_memory_gb": _host_memory_gb(),
        "free_disk_gb": round(shutil.disk_usage(workdir).free / 1e9, 1),
        "cores": os.cpu_count(),
        "variables": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if name.startswith(SHOWN_VARIABLES) and name not in COMPILER_PLACES
        },
    }
    if NXDI_AVAILABLE and not devices:
        raise CheckFailed(
            f"no Neuron device: {problem}; NxDI is installed, but there is nothing to run on: use a Trn2 instance, and "
            "see that 'neuron-ls' lists its devices",
            values,
        )
    set_to = os.environ.get(LNC_VARIABLE)
    if NXDI_AVAILABLE and set_to not in (None, str(DEFAULT_LNC.value)):
        raise CheckFailed(
            f"{LNC_VARIABLE}={set_to}: what is checked is compiled for logical cores of {DEFAULT_LNC.value} physical "
            "ones; unset it",
            values,
        )
    return values


def neuron_devices() -> tuple[list[dict[str, Any]], str | None]:
    """What neuron-ls lists, and why it lists nothing."""
    try:
        listed = subprocess.run(
            NEURON_LS, capture_output=True, encoding="utf-8", errors="replace", timeout=COMMAND_SECONDS
        )
    except FileNotFoundError:
        return [], "neuron-ls is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"neuron-ls: {error}"
    if listed.returncode != 0:
        said = (listed.stderr.strip() or listed.stdout.strip() or "nothing").splitlines()[-1]
        return [], f"neuron-ls ended with {listed.returncode} and said: {said[:200]}"
    try:
        devices = json.loads(listed.stdout)
    except (ValueError, RecursionError):
        return [], f"neuron-ls gave no JSON: {listed.stdout.strip()[:200]}"
    listed_devices = [device for device in devices if isinstance(device, dict)] if isinstance(devices, list) else []
    return listed_devices, None if listed_devices else "neuron-ls lists no devices"


def _described(device: dict[str, Any]) -> dict[str, Any]:
    """A device, with the HBM that nobody has taken, where the driver tells."""
    number, memory = device.get("neuron_device"), device.get("memory_size")
    used = _used_bytes(number)
    free = memory - used if isinstance(memory, int) and used is not None else None
    processes = device.get("neuron_processes")
    return {
        "number": number,
        "cores": device.get("nc_count"),
        "lnc": device.get("logical_neuroncore_config"),
        "hbm_bytes": memory,
        "free_hbm_bytes": free,
        "processes": len(processes) if isinstance(processes, list) else 0,
    }


def _used_bytes(device: Any) -> int | None:
    """HBM in use: of each core stats/memory_usage/device_mem/total, which counts what is in use now."""
    counters = [*(DEVICES / f"neuron{device}").glob("neuron_core*/stats/memory_usage/device_mem/total")]
    texts = [_text_of(counter) for counter in counters]
    numbers = [int(text) for text in texts if text is not None and text.isdigit()]
    return sum(numbers) if numbers and len(numbers) == len(counters) else None


def _system_packages() -> dict[str, str]:
    """Neuron's packages of the system: driver, runtime, collectives, tools."""
    try:
        listed = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${Version}\n", "aws-neuronx-*"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.split() for line in listed.stdout.splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _text_of(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _host_memory_gb() -> float | None:
    """Memory that programs can have now (MemAvailable of /proc/meminfo)."""
    for line in (_text_of(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return round(int(line.split()[1]) * 1024 / 1e9, 1)
    return None
