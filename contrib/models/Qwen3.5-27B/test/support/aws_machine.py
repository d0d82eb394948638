# Copyright 2026 The qwen35-neuron authors
# SPDX-License-Identifier: Apache-2.0
"""A machine on which AWS's vLLM plugin is the platform, with the CPU in the place of Neuron devices.

vLLM, the plugin and NxDI are the real ones, unchanged. What needs a compiler or a device is not: closed packages are
empty (`neuron_shells`), NxDI's `compile` writes the configuration alone, and its `load` is its own `to_cpu`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import neuron_shells

PLATFORM = "vllm_neuron.platform.NeuronPlatform"
"""What the plugin's own entry point returns where the driver has made files below /dev."""

WORKER = "support.aws_machine.CpuWorker"
"""For vLLM's --worker-cls."""

NO_PLUGIN = "AWS's vLLM plugin or NxDI is not importable: see docs/testing.md"
PLUGIN_AVAILABLE = find_spec("vllm_neuron") is not None and find_spec("neuronx_distributed_inference") is not None


def install(directory: Path) -> None:
    """Let this process, and those that it starts, find the platform by an entry point of its own.

    Before vLLM is imported.
    """
    metadata = directory / "aws_on_cpu-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: aws-on-cpu\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[vllm.platform_plugins]\naws_on_cpu = {__name__}:platform\n")
    sys.path.insert(0, str(directory))
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VLLM_PLUGINS": "qwen35,aws_on_cpu",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def platform() -> str:
    neuron_shells.install()
    return PLATFORM


def __getattr__(name: str) -> Any:
    # When vLLM asks for the worker: its base class needs the platform, whose entry point is in this module.
    if name != "CpuWorker":
        raise AttributeError(name)
    from neuronx_distributed_inference.models.application_base import NeuronApplicationBase
    from vllm_neuron.worker.neuron_worker import NeuronWorker

    def save_configuration(application: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        application.config.save(str(path))

    def load_on_cpu(application: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        application.to_cpu()

    NeuronApplicationBase.compile, NeuronApplicationBase.load = save_configuration, load_on_cpu
    return NeuronWorker
